// The groups of keys that a search of a long context scans.
//
// The mean of a run tells how high its keys may score: a group of two runs where even a key some deviations off the mean
// would not matter to any head is ruled out unseen, unless a key in it is unlike all others. Heads that look widely draw
// from all keys; of the groups in which no single key could weigh much they draw some, in proportion to the weight that
// the means foretell, and each stands for the others like it. What is drawn of its keys then keeps exactly the chance
// that it would have had.
#pragma once

#include <cstdint>

#include "attend.h"
#include "unit.h"

namespace retrieval {

// Bounds of the means of the runs of a chunk task.
void score_means(Unit& unit, const Task& task);

// Whether the means of runs tell keys apart, so that it may pay to choose.
bool means_tell(const Unit& unit, const Budget& budget, float scale);

// Chooses the groups to begin with: those with the best means, and some at even distances. Their bounds give a first
// floor, and tell which heads look widely.
void choose_first(Unit& unit);

// By what the first groups have shown, sets what groups must reach and whether it pays to choose.
void choose_whether(Unit& unit, const Budget& budget, float scale);

}  // namespace retrieval
