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

  // Call task(i) for every i in [0, count), in no order, and return when all are done. The first
  // exception is rethrown here; tasks not yet begun are then skipped. Calls from several threads take
  // turns. Must not be called from a task.
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task);

  // A run comes within some hundred microseconds: workers that sleep get up and look out for it.
  void wake();

 private:
  void work();
  void drain(const std::function<void(std::int64_t)>& task, std::int64_t count);

  std::mutex run_mutex_;  // one run at a time
  std::mutex mutex_;      // guards parking and error_
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};  // a run begins when it becomes odd, ends when even
  std::atomic<std::uint64_t> calls_{0};       // of wake
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> inside_{0};  // workers between entering and leaving the current run
  std::int64_t count_ = 0;
  const std::function<void(std::int64_t)>* task_ = nullptr;
  std::exception_ptr error_;
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

// Physical cores that this process may run on.
int default_num_threads();

}  // namespace retrieval
