// Which groups of keys a search of a long context scans, chunk by chunk (choose.h tells why).
#pragma once

#include <cstdint>

#include "attend.h"
#include "luck.h"
#include "unit.h"

namespace retrieval {

// Runs where a key so many deviations above the mean would reach `distance` below the floor of any head.
class Reach {
 public:
  Reach(const Unit& unit, const Scan& scan, float deviations, float distance)
      : unit_(unit), scan_(scan), deviations_(deviations), distance_(distance) {}

  // Those of chunk c.
  std::uint64_t runs_of(std::int64_t c);

 private:
  void measure(const CodeChunk& chunk);
  bool may_be_in(std::int64_t c) const;  // by the largest mean of each head

  const Unit& unit_;
  const Scan& scan_;
  const float deviations_, distance_;
  float means_unit_ = -1.0f, radius_unit_ = -1.0f;  // of the chunk that was measured last
  bool reaches_all_ = false;
  Draw draws_[kMaxGroup];
  int limits_[kMaxGroup];  // of a mean in a run of the largest radius
};

// Groups that some head draws.
class GroupLots {
 public:
  GroupLots(const Unit& unit, const Scan& scan, float scale);

  // Of chunk c, those in `left_out` excepted; each then stands for others.
  std::uint32_t draw(std::int64_t c, std::uint32_t left_out);

 private:
  const Unit& unit_;
  const Scan& scan_;
  const float scale_;
  int num_ = 0, heads_[kMaxGroup];
  float means_unit_ = -1.0f;  // of the chunk drawn from last
  Lot lots_[kMaxGroup];
};

class Chooser {
 public:
  Chooser(const Unit& unit, const Scan& scan, const Budget& budget, float scale);

  // Adds to what is chosen of chunk c. Returns how many groups of it then are.
  int choose(std::int64_t c);
  // The same, or all of a unit that does not choose; codes of a few groups are sent for.
  int choose_and_fetch(std::int64_t c);

 private:
  const Unit& unit_;
  const Scan& scan_;
  Reach far_, near_;
  GroupLots lots_;
};

// Sends for the codes of a group, which will be scanned soon.
void fetch(const CodeGroups& groups, int g);

}  // namespace retrieval
