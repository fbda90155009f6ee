// Memory that is kept from call to call: pages once touched stay mapped, lists keep their room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "arena.h"
#include "unit.h"

namespace retrieval {

// What a unit works with. Units of the same number are mostly some thread's own, whose cache then holds it: what another
// thread has written takes it as long to read as memory does, and longer where the two share no cache.
struct Desk {
  Unit unit;
  Arena arena;
  std::int64_t num_helped = 0;  // scan tasks, the last ones, that other threads than its own did
};
// A place for the sums over some keys, which begin at none.
std::size_t add_partial(Desk& desk);

// Of one calling thread.
class Scratch {
 public:
  // The first `count`, as the calls before have left them.
  void provide(std::size_t count) {
    while (desks_.size() < count) desks_.push_back(std::make_unique<Desk>());
    num_provided_ = count;
  }
  Desk& desk(std::size_t at) { return *desks_[at]; }
  const Desk& desk(std::size_t at) const { return *desks_[at]; }

  // Of a call that ends. Where it is long since a call has needed nearly as much as is held, desks are cleared.
  void tidy() {
    std::size_t used = 0, held = 0;
    for (std::size_t i = 0; i < desks_.size(); ++i) {
      used += i < num_provided_ ? desks_[i]->arena.used_bytes() : 0;
      held += desks_[i]->arena.held_bytes();
    }
    num_wasteful_ = held > kMostHeld * used + kSpareBytes ? num_wasteful_ + 1 : 0;
    if (num_wasteful_ < kPatience) return;
    num_wasteful_ = 0;
    for (std::size_t i = 0; i < desks_.size(); ++i) {
      const std::size_t needed = i < num_provided_ ? desks_[i]->arena.used_bytes() : 0;
      if (desks_[i]->arena.held_bytes() > kMostHeld * needed) *desks_[i] = {};
    }
  }

 private:
  static constexpr std::size_t kSpareBytes = std::size_t{8} << 20;
  static constexpr std::size_t kMostHeld = 3;   // times what is used
  static constexpr int kPatience = 256;         // calls
  std::vector<std::unique_ptr<Desk>> desks_;
  std::size_t num_provided_ = 0;
  int num_wasteful_ = 0;  // calls in a row
};

}  // namespace retrieval
