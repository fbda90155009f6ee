// Memory that is kept from call to call: pages once touched stay mapped, lists keep their room.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "arena.h"
#include "unit.h"

namespace retrieval {

// Of one calling thread.
class Scratch {
 public:
  Scratch() { spare_.reserve(kMostSpare); }
  Arena arena;

  Found take() {
    if (spare_.empty()) return {};
    Found found = std::move(spare_.back());
    spare_.pop_back();
    return found;
  }
  // Lists that have grown far beyond the usual are not kept.
  void give_back(Found&& found) {
    if (found.positions.capacity() > 8 * kUsualCandidates || spare_.size() >= kMostSpare) return;
    found.positions.clear();
    found.inverses.clear();
    found.bounds.clear();
    found.counts.clear();
    spare_.push_back(std::move(found));
  }

 private:
  static constexpr std::size_t kMostSpare = 256;
  std::vector<Found> spare_;
};

}  // namespace retrieval
