// Chooses the kernel table from what the processor reports.
#include "distance.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace retrieval {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("gfni");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Levels usable on this machine, best first; the last is always the scalar one.
int usable_levels(const Kernels* out[8]) {
  int count = 0;
  const auto add = [&](const Kernels* table) {
    if (table != nullptr) out[count++] = table;
  };
#if defined(__x86_64__)
  if (has_avx512_bf16()) add(avx512_bf16_kernels());
  if (has_avx512()) add(avx512_kernels());
  if (has_avx2()) add(avx2_kernels());
#elif defined(__aarch64__)
  add(neon_kernels());
#endif
  add(scalar_kernels());
  return count;
}

const Kernels* find(const char* name) {
  const Kernels* levels[8];
  const int count = usable_levels(levels);
  for (int i = 0; i < count; ++i) {
    if (name == nullptr || std::strcmp(levels[i]->name, name) == 0) return levels[i];
  }
  return nullptr;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> table = [] {
    const Kernels* named = find(std::getenv("RETRIEVAL_SIMD"));
    return named != nullptr ? named : find(nullptr);
  }();
  return table;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

bool select_kernels(const char* name) {
  const Kernels* table = find(name);
  if (table != nullptr) selected().store(table);
  return table != nullptr;
}

}  // namespace retrieval
