// The floor of a search: the score below which a key does not matter to a head.
#pragma once

#include "attend.h"
#include "unit.h"

namespace retrieval {

// Fills best, floor, listed and draws of head h of a unit of whose searched parts some groups or all have been scanned.
// may_draw: a head that looks widely draws its keys.
void find_floor(Unit& unit, int h, int k, const Budget& budget, float scale, bool may_draw);

// What bounds must reach to be listed, given the best score known.
float listed_from(const Unit& unit, int h, float best, const Budget& budget, float scale);

// Scores the key with the highest bound of each block of chunk c where it may be better than the best one known. A better
// one raises what the task lists, and may leave nothing to draw.
void look_for_best(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& in, const Budget& budget,
                   float scale, Found& found);

// Sets best, floor, listed and draws of head h by what its tasks have found.
void settle_best(Unit& unit, int h, const Budget& budget, float scale);

// The score that a key must reach, given the best one and some scores; the order of scores is lost.
float floor_of(float best, List<float>& scores, int k, const Budget& budget, float scale);

}  // namespace retrieval
