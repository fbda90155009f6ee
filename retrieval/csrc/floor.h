// The floor of a search: the score below which a key does not matter to a head.
#pragma once

#include <vector>

#include "attend.h"
#include "unit.h"

namespace retrieval {

// Fills best, floor and draws of head h of a unit whose searched parts have been scanned. may_draw: a head that looks
// widely draws its keys.
void find_floor(Unit& unit, int h, int k, const Budget& budget, float scale, bool may_draw);

// The score that a key must reach, given the best one and some scores; the order of scores is lost.
float floor_of(float best, std::vector<float>& scores, int k, const Budget& budget, float scale);

}  // namespace retrieval
