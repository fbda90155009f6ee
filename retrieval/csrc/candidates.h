// The keys that a search rescores exactly, or draws.
#pragma once

#include <cstddef>
#include <cstdint>

#include "luck.h"
#include "unit.h"

namespace retrieval {

// How one head takes keys of one chunk.
struct Taking {
  Lot lot;                 // what is sure alone where the head does not draw
  bool draws = false;
  float listed = 0.0f;     // what bounds must reach where it does not
  int least_top = -32768;  // below it a block holds nothing
};

// Lists the candidates of a task.
class Refiner {
 public:
  Refiner(const Unit& unit, const Scan& scan, float scale, Found& found)
      : unit_(unit), scan_(scan), scale_(scale), found_(found) {}

  // Those of chunk c, scanned into `in`: keys whose bound reaches `listed` of a head; of a head that looks widely, those
  // whose estimate reaches its floor and some of the others, drawn once for all such heads of the unit. They are listed
  // when the next chunk has been looked at: what has just been written key by key is not yet to be had in vectors.
  void refine(std::int64_t c, const ChunkBounds& in);
  // Lists those of the last chunk.
  void finish() { list(caught_[1 - turn_]); }

 private:
  // Keys taken from a chunk.
  struct Caught {
    std::int64_t chunk;
    int count = -1;  // negative: of none
    Odds odds[kMaxGroup];
    std::int16_t slots[kTakenStride], factors[kTakenStride], bounds[kMaxGroup * kTakenStride];
  };
  void list(Caught& caught);
  void set_takings(std::int64_t c);
  int take(std::int64_t c, const ChunkBounds& in, const Taken& taken) const;

  const Unit& unit_;
  const Scan& scan_;
  const float scale_;
  Found& found_;
  float keys_unit_ = -1.0f;  // of the chunk that takings_ are made for
  Taking takings_[kMaxGroup];
  Caught caught_[2];
  int turn_ = 0;
};

// Drops keys whose bounds no longer reach what is listed, since a better key came later; those that were drawn if no head
// draws any more.
void drop(const Unit& unit, const Scan& scan, Found& found);

// Cuts the lists of a unit's tasks to about limit keys in all. Of those that reach what is listed the ones that reach it
// by least go; of those drawn, every second or third and so on stays and stands for the others.
void keep(Unit& unit, std::size_t limit);

}  // namespace retrieval
