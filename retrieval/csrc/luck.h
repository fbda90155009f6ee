// Drawing by luck: a key has luck, even numbers u in (0, 1) by a table, and is drawn where its chance is at least u. In
// logarithms that is a sum of its integer estimate and -log u against a limit: a few 16-bit operations, and only what
// is drawn needs its chance as a number. All heads of a unit see the same luck, so a key's chance is the largest of
// theirs. Such numbers spread evenly over neighbours, which keeps the size of a sample near what is expected of it
// (Poisson sampling with permanent random numbers; Ohlsson 1995).
#pragma once

#include <cstdint>

#include "unit.h"

namespace retrieval {

inline constexpr std::int64_t kNumLucks = 8192;

// Luck of kChunkKeys keys in order, of which the first has number `start`.
const std::int16_t* lucks_of_keys(std::int64_t start);
// Luck of kChunkRuns runs, two by two, of which the first are of group number `start`; and the greatest of it.
const std::int16_t* lucks_of_groups(std::int64_t start);
std::int16_t most_luck_of_groups(std::int64_t start);

// Rounded, and cut to 16 bits.
std::int16_t to_word(float value);

// Where the luck of a unit begins: the same for the same step.
void set_start(Unit& unit);

// How a head draws keys by their integer bounds.
struct Lot {
  Draw draw;
  float step = 0.0f;         // of an integer bound, in nats

  // Logarithm of the chance; 0 and more: taken for certain.
  float log_chance(std::int16_t bound, std::int16_t factor) const {
    return step * (static_cast<float>(bound - times(factor, draw.lift) - draw.floor) + 0.5f);
  }
  // Whether it could be drawn by that bound, at any factor, with that luck.
  bool may_draw(std::int16_t bound, std::int16_t luck) const {
    const std::int32_t lucky = times(luck, draw.spread) << draw.doublings;
    return draw.lift < 0 || bound + lucky >= draw.floor;
  }
  // The limit where all chances are larger, by a logarithm.
  std::int16_t floor_raised(float log_times) const { return to_word(static_cast<float>(draw.floor) - log_times / step); }
};

// Keys at `floor` and above are taken for certain, those below with a chance in proportion to their weight.
// A bound b is a score of base + unit * b by the bound, and less by the reading's lift by estimate.
Lot lot_above(float floor, float base, float unit, const CodeReading& reading, int h, float scale);

}  // namespace retrieval
