#include "thread_pool.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <set>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace retrieval {
namespace {

// Long enough to bridge the phases of one layer call, short enough to leave the core to others between calls.
constexpr auto kSpin = std::chrono::microseconds(30);
// The same for a run that was announced, if it does not come.
constexpr auto kLookOut = std::chrono::microseconds(400);

}  // namespace

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

ThreadPool::ThreadPool(int num_threads) : stretches_(static_cast<std::size_t>(std::max(1, num_threads))) {
  for (std::size_t i = 1; i < stretches_.size(); ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(std::int64_t count, const std::function<void(std::int64_t)>& task) {
  if (count <= 0) return;
  if (workers_.empty() || count == 1) {
    for (std::int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  const std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
  // No worker is inside: the previous run waited for the last to leave.
  task_ = &task;
  error_ = nullptr;
  const auto num_threads = static_cast<std::int64_t>(stretches_.size());
  for (std::int64_t t = 0; t < num_threads; ++t) {
    Stretch& stretch = stretches_[static_cast<std::size_t>(t)];
    stretch.next.store(t * count / num_threads);
    stretch.end = (t + 1) * count / num_threads;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    generation_.fetch_add(1);  // now odd
  }
  wake_.notify_all();
  drain(task, 0);
  generation_.fetch_add(1);  // even: nobody enters any more
  while (inside_.load() != 0) relax();
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::drain(const std::function<void(std::int64_t)>& task, std::size_t self) {
  try {
    for (std::size_t turn = 0; turn < stretches_.size(); ++turn) {
      Stretch& stretch = stretches_[(self + turn) % stretches_.size()];
      for (std::int64_t i = stretch.next.fetch_add(1); i < stretch.end; i = stretch.next.fetch_add(1)) task(i);
    }
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    for (Stretch& stretch : stretches_) stretch.next.store(stretch.end);
  }
}

void ThreadPool::wake() {
  if (workers_.empty()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.fetch_add(1);
  }
  wake_.notify_all();
}

void ThreadPool::work(std::size_t self) {
  std::uint64_t seen = 0, heard = 0;
  auto patience = kSpin;
  while (true) {
    const auto is_news = [&] {
      const std::uint64_t now = generation_.load();
      return stop_.load() || (now % 2 == 1 && now != seen);
    };
    const auto deadline = std::chrono::steady_clock::now() + patience;
    patience = kSpin;
    int turns = 0;
    while (!is_news() && (++turns % 64 != 0 || std::chrono::steady_clock::now() < deadline)) relax();
    if (!is_news()) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return is_news() || calls_.load() != heard; });
      if (!is_news()) {
        heard = calls_.load();
        patience = kLookOut;
        continue;
      }
    }
    if (stop_.load()) return;
    // Enter, then look again: the run may have ended meanwhile, and its task with it.
    inside_.fetch_add(1);
    const std::uint64_t now = generation_.load();
    if (now % 2 == 1) {
      drain(*task_, self);
      seen = now;
    }
    inside_.fetch_sub(1);
  }
}

int default_num_threads() {
  std::set<std::string> cores;
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
      std::string package, core;
      std::ifstream(topology + "physical_package_id") >> package;
      std::ifstream(topology + "core_id") >> core;
      // Unknown topology: count every processor.
      cores.insert(core.empty() ? std::to_string(cpu) : package + ":" + core);
    }
  }
#endif
  if (!cores.empty()) return static_cast<int>(cores.size());
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace retrieval
