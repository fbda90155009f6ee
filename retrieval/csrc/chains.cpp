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
      if (chain(k).is_left() || chain(k).has_task(true)) return true;
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
  Place place;
  if (!chain.has_task(is_own) || !chain.take(is_own, place)) return false;
  guard([&] {
    if (place.stage > 0) work_(at, place.stage - 1, place.task);
    const bool is_last = chain.num_left.fetch_sub(1, std::memory_order_acq_rel) == 1;
    if (is_last && (is_own || !chain.leave())) advance_from(at, place.stage);
  });
  return true;
}

// The owner takes tasks from the front; others from the back, so that it is the same ones from call to call.
bool Chains::Chain::take(bool is_own, Place& place) {
  std::uint64_t at = next.load(std::memory_order_acquire);
  do {
    if (!is_task(at, is_own)) return false;
  } while (!next.compare_exchange_weak(at, at + (is_own ? 1 : kOneHelped), std::memory_order_acq_rel));
  place.stage = stage_of(at);
  place.task = is_own ? front_of(at) : counts[place.stage] - 1 - helped_of(at);
  return true;
}

// What another thread has left to the chain's own.
void Chains::proceed(std::size_t at) {
  guard([&] { advance_from(at, Chain::stage_of(chains_[at].next.load(std::memory_order_acquire))); });
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
  const std::int64_t num_helped = Chain::helped_of(chain.next.load(std::memory_order_relaxed));
  Stage next{0};
  while (next.count == 0 && stage < kMaxStages) next = advance_(at, stage++, num_helped);
  if (next.count <= 0) {
    chain.next.store(Chain::place_of(kMaxStages + 1), std::memory_order_release);
    return;
  }
  chain.counts[stage] = next.count;
  chain.most_helped[stage] = next.most_helped;
  chain.num_left.store(next.count, std::memory_order_relaxed);
  chain.next.store(Chain::place_of(stage), std::memory_order_release);
}

}  // namespace retrieval
