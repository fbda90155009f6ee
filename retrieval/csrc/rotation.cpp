#include "rotation.h"

#include <cmath>
#include <map>
#include <mutex>
#include <utility>

#include "distance.h"

namespace retrieval {
namespace {

constexpr int kRounds = 4;

// splitmix64: small, and the same everywhere.
std::uint64_t next_random(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// In-place Walsh-Hadamard transform of n (a power of two) values, scaled to be orthogonal.
void hadamard(float* x, int n) {
  for (int width = 1; width < n; width *= 2) {
    for (int block = 0; block < n; block += 2 * width) {
      for (int i = block; i < block + width; ++i) {
        const float a = x[i], b = x[i + width];
        x[i] = a + b;
        x[i + width] = a - b;
      }
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (int i = 0; i < n; ++i) x[i] *= scale;
}

}  // namespace

Rotation::Rotation(int dims, std::uint64_t seed) : dims_(dims), span_(1) {
  while (span_ * 2 <= dims) span_ *= 2;
  std::uint64_t state = seed;
  signs_.resize(static_cast<std::size_t>(kRounds * dims));
  for (float& sign : signs_) sign = next_random(state) >> 63 ? 1.0f : -1.0f;
}

void Rotation::apply(float* vector) const {
  for (int round = 0; round < kRounds; ++round) {
    const float* signs = signs_.data() + round * dims_;
    for (int j = 0; j < dims_; ++j) vector[j] *= signs[j];
    hadamard(vector + (round % 2 == 0 ? 0 : dims_ - span_), span_);
  }
}

void Rotation::multiply(const float* matrix, int width, float* out) const {
  const auto d = static_cast<std::size_t>(width);
  std::vector<float> column(d);
  for (std::size_t j = 0; j < d; ++j) {
    for (std::size_t i = 0; i < d; ++i) column[i] = matrix != nullptr ? matrix[i * d + j] : (i == j ? 1.0f : 0.0f);
    apply(column.data());
    for (std::size_t i = 0; i < d; ++i) out[i * d + j] = column[i];
  }
}

std::shared_ptr<const std::vector<float>> shared_rotation(int head_dim, std::uint64_t seed) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::uint64_t>, std::weak_ptr<const std::vector<float>>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<const std::vector<float>>& held = known[{head_dim, seed}];
  std::shared_ptr<const std::vector<float>> matrix = held.lock();
  if (!matrix) {
    std::vector<float> made(static_cast<std::size_t>(head_dim) * static_cast<std::size_t>(head_dim));
    Rotation(head_dim, seed).multiply(nullptr, head_dim, made.data());
    held = matrix = std::make_shared<const std::vector<float>>(std::move(made));
  }
  return matrix;
}

void apply_map(const float* map, const float* vectors, int num, int head_dim, float* out) {
  kernels().score({vectors, nullptr, num, head_dim}, {map, nullptr, DType::kFloat32, head_dim}, nullptr, 0, head_dim,
                  out, head_dim);
}

bool are_dual(const float* a, const float* b, int d) {
  for (int i = 0; i < d; ++i) {
    for (int j = 0; j < d; ++j) {
      float sum = i == j ? -1.0f : 0.0f;
      for (int t = 0; t < d; ++t) sum += a[t * d + i] * b[t * d + j];
      if (!(std::fabs(sum) < 1e-3f)) return false;
    }
  }
  return true;
}

}  // namespace retrieval
