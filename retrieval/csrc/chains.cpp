#include "chains.h"

#include <utility>

namespace retrieval {

Chains::Chains(std::size_t num_chains, Advance advance, Work work)
    : advance_(std::move(advance)), work_(std::move(work)), chains_(num_chains) {}

void Chains::run(ThreadPool& pool) {
  const auto num_threads = static_cast<std::size_t>(pool.num_threads());
  pool.run(pool.num_threads(), [&](std::int64_t self) { help(static_cast<std::size_t>(self), num_threads); });
}

void Chains::help(std::size_t self, std::size_t num_threads) {
  const std::size_t num = chains_.size(), home = self * num / num_threads, num_own = (self + 1) * num / num_threads - home;
  // Of the chains in a circle from home, of which its own come first, the first `num_ended` have ended.
  std::size_t num_ended = 0;
  const auto chain = [&](std::size_t k) -> Chain& { return chains_[(home + k) % num]; };
  const auto is_needed = [&] {
    for (std::size_t k = num_ended; k < num_own; ++k) {
      if (chain(k).is_left() || chain(k).has_task(chain(k).next.load(std::memory_order_acquire))) return true;
    }
    return false;
  };
  while (num_ended < num && !has_failed_.load(std::memory_order_relaxed)) {
    if (chain(num_ended).has_ended()) {
      ++num_ended;
      continue;
    }
    bool has_done = false;
    for (std::size_t k = num_ended; k < num && !has_done; ++k) has_done = do_one((home + k) % num, k < num_own);
    if (has_done) continue;
    // Others write where it looks at their chains, and would have to fetch that anew each time.
    for (std::size_t k = num_ended; k < num_own; ++k) chain(k).await();
    for (int turn = 0; turn < kIdleTurns && !is_needed(); ++turn) relax();
    for (std::size_t k = num_ended; k < num_own; ++k) {
      if (!chain(k).stop_awaiting()) proceed((home + k) % num);
    }
  }
}

// A task of the chain, if there is one to be had.
bool Chains::do_one(std::size_t at, bool is_own) {
  Chain& chain = chains_[at];
  if (!chain.has_task(chain.next.load(std::memory_order_acquire))) return false;
  const std::uint64_t mine = chain.next.fetch_add(1, std::memory_order_acq_rel);
  if (!chain.has_task(mine)) return false;
  const auto stage = static_cast<int>(mine >> 32);
  guard([&] {
    if (stage > 0) work_(at, stage - 1, static_cast<std::int64_t>(mine & 0xffffffffu));
    const bool is_last = chain.num_left.fetch_sub(1, std::memory_order_acq_rel) == 1;
    if (is_last && (is_own || !chain.leave())) advance_from(at, stage);
  });
  return true;
}

// What another thread has left to the chain's own.
void Chains::proceed(std::size_t at) {
  guard([&] { advance_from(at, static_cast<int>(chains_[at].next.load(std::memory_order_acquire) >> 32)); });
}

template <typename Do>
void Chains::guard(Do act) {
  try {
    act();
  } catch (...) {
    has_failed_.store(true);
    throw;
  }
}

void Chains::advance_from(std::size_t at, int stage) {
  Chain& chain = chains_[at];
  std::int64_t count = 0;
  while (count == 0 && stage < kMaxStages) count = advance_(at, stage++);
  if (count <= 0) {
    chain.next.store(std::uint64_t{kMaxStages + 1} << 32, std::memory_order_release);
    return;
  }
  chain.counts[stage] = count;
  chain.num_left.store(count, std::memory_order_relaxed);
  chain.next.store(static_cast<std::uint64_t>(stage) << 32, std::memory_order_release);
}

}  // namespace retrieval
