// A fixed set of workers for loops of independent tasks; the caller works too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace retrieval {

class ThreadPool {
 public:
  // num_threads counts the caller: one means no workers.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Call task(i) for every i in [0, count), in no order, and return when all are done. Each thread begins with its own
  // stretch of them and then helps the others, so that runs over the same data find it in the caches. The first
  // exception is rethrown here; tasks not yet begun are then skipped. Calls from several threads take
  // turns. Must not be called from a task.
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task);

  // A run comes within some hundred microseconds: workers that sleep get up and look out for it.
  void wake();

 private:
  // A thread's own tasks: those of [next, end).
  struct alignas(64) Stretch {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
  };

  void work(std::size_t self);
  void drain(const std::function<void(std::int64_t)>& task, std::size_t self);

  std::mutex run_mutex_;  // one run at a time
  std::mutex mutex_;      // guards parking and error_
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};  // a run begins when it becomes odd, ends when even
  std::atomic<std::uint64_t> calls_{0};       // of wake
  std::atomic<int> inside_{0};  // workers between entering and leaving the current run
  std::vector<Stretch> stretches_;  // the caller's first
  const std::function<void(std::int64_t)>* task_ = nullptr;
  std::exception_ptr error_;
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

// Between two looks at what another thread is about to do.
void relax();

// Physical cores that this process may run on.
int default_num_threads();

}  // namespace retrieval
