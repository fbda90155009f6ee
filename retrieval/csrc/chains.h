// Chains of stages: what the next stage of a chain has to do is known when its last one is done.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "thread_pool.h"

namespace retrieval {

// All threads of a pool work on all chains at once: each begins with chains of its own, whose data it then has in its
// cache, and helps with others where its own have nothing to give. Nobody waits for the end of a stage but who has nothing
// else to do; and where a chain's own thread does, it is the one to go on.
class Chains {
 public:
  static constexpr std::int64_t kEnd = -1;
  static constexpr int kMaxStages = 16;
  // How many tasks a stage has, fewer than 2^24, or kEnd; and how many of them, the last ones, threads other than the
  // chain's own may do.
  struct Stage {
    std::int64_t count;
    std::int64_t most_helped = std::int64_t{1} << 24;
  };
  // Called when all earlier stages of the chain are done, of which others have done num_helped tasks of the last one that
  // had any. One thread at a time per chain.
  using Advance = std::function<Stage(std::size_t chain, int stage, std::int64_t num_helped)>;
  using Work = std::function<void(std::size_t chain, int stage, std::int64_t task)>;

  Chains(std::size_t num_chains, Advance advance, Work work);
  // Returns when all chains have ended. The first exception is rethrown; what has not begun is then left out.
  void run(ThreadPool& pool);
  void run_alone() { help(0, 1); }

 private:
  struct Place {
    int stage = 0;
    std::int64_t task = 0;
  };
  struct alignas(64) Chain {
    // The stage, how many of its tasks others have taken, and how many its own thread. Stage 0 is ours: its one task is to
    // begin.
    std::atomic<std::uint64_t> next{0};
    std::atomic<std::int64_t> num_left{1};
    std::int64_t counts[kMaxStages + 1] = {1};       // tasks by stage; written before `next` shows the stage
    std::int64_t most_helped[kMaxStages + 1] = {1};  // of them
    static constexpr int kHelpedBit = 24, kStageBit = 48;
    static constexpr std::uint64_t kOneHelped = std::uint64_t{1} << kHelpedBit;
    static int stage_of(std::uint64_t at) { return static_cast<int>(at >> kStageBit); }
    static std::int64_t front_of(std::uint64_t at) { return static_cast<std::int64_t>(at & (kOneHelped - 1)); }
    static std::int64_t helped_of(std::uint64_t at) { return front_of(at >> kHelpedBit); }
    static std::uint64_t place_of(int stage) { return static_cast<std::uint64_t>(stage) << kStageBit; }

    bool has_ended() const { return stage_of(next.load(std::memory_order_acquire)) > kMaxStages; }
    // Whether there is a task at a value of `next`.
    bool is_task(std::uint64_t at, bool is_own) const {
      const int stage = stage_of(at);
      return stage <= kMaxStages && front_of(at) + helped_of(at) < counts[stage] &&
             (is_own || helped_of(at) < most_helped[stage]);
    }
    bool has_task(bool is_own) const { return is_task(next.load(std::memory_order_acquire), is_own); }
    bool take(bool is_own, Place& place);

    // Who does a stage's last task goes on to the next stage, unless the thread whose chain it is waits for just that.
    enum Owner : int { kBusy, kWaits, kIsCalled };
    std::atomic<int> owner{kBusy};

    // By the owner. False: it has been called.
    void await() { owner.store(kWaits); }
    bool is_left() const { return owner.load(std::memory_order_relaxed) == kIsCalled; }
    bool stop_awaiting() { return owner.exchange(kBusy) == kWaits; }
    // By another thread that has done the last task: whether the owner goes on.
    bool leave() {
      int waits = kWaits;
      return owner.compare_exchange_strong(waits, kIsCalled);
    }
  };
  static constexpr int kIdleTurns = 16;  // between looks at the chains of others

  void help(std::size_t self, std::size_t num_threads);
  bool do_one(std::size_t at, bool is_own);
  void proceed(std::size_t at);
  template <typename Do>
  void guard(Do act);
  void advance_from(std::size_t at, int stage);

  const Advance advance_;
  const Work work_;
  std::vector<Chain> chains_;
  std::atomic<bool> has_failed_{false};
};

}  // namespace retrieval
