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
  const std::size_t num = chains_.size(), home = self * num / num_threads;
  // Of the chains in a circle from home, the first `num_ended` have ended.
  for (std::size_t num_ended = 0; num_ended < num && !has_failed_.load(std::memory_order_relaxed);) {
    if (chains_[(home + num_ended) % num].has_ended()) {
      ++num_ended;
      continue;
    }
    bool has_done = false;
    for (std::size_t k = num_ended; k < num && !has_done; ++k) has_done = do_one((home + k) % num);
    if (!has_done) relax();
  }
}

// A task of the chain, if there is one to be had.
bool Chains::do_one(std::size_t at) {
  Chain& chain = chains_[at];
  const auto is_there = [&](std::uint64_t next) {
    const std::uint64_t stage = next >> 32;
    return stage <= kMaxStages && static_cast<std::int64_t>(next & 0xffffffffu) < chain.counts[stage];
  };
  if (!is_there(chain.next.load(std::memory_order_acquire))) return false;
  const std::uint64_t mine = chain.next.fetch_add(1, std::memory_order_acq_rel);
  if (!is_there(mine)) return false;
  const auto stage = static_cast<int>(mine >> 32);
  try {
    if (stage > 0) work_(at, stage - 1, static_cast<std::int64_t>(mine & 0xffffffffu));
    if (chain.num_left.fetch_sub(1, std::memory_order_acq_rel) == 1) advance_from(at, stage);
  } catch (...) {
    has_failed_.store(true);
    throw;
  }
  return true;
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
