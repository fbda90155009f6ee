// The groups of keys that a search of a long context scans.
//
// The mean of a run tells how high its keys may score: a group of two runs where even a key some deviations off the mean
// would not matter to any head is ruled out unseen, unless a key in it is unlike all others. Heads that look widely draw from all keys; of the groups in which no single
// key could weigh much they draw some, in proportion to the weight that the means foretell, and each stands for the
// others like it. What is drawn of its keys then keeps exactly the chance that it would have had.
#pragma once

#include <cstdint>

#include "attend.h"
#include "unit.h"

namespace retrieval {

// Bounds of the means of the runs of a chunk task.
void score_means(Unit& unit, const Task& task);

// Chooses the groups to begin with: those with the best means, and some at even distances. Their bounds give a first
// floor, and tell which heads look widely.
void choose_first(Unit& unit);

// From floor, draws and total of each head: what a group must reach, or how it is drawn.
void set_group_floors(Unit& unit, float scale);

// Sets the best key attended exactly as what a group must reach, and begins with groups at even distances. False where
// that leaves more than half of all groups, by some chunks; then all are to be scanned.
bool pays_by_best(Unit& unit, const Budget& budget, float scale);

// Chooses the groups of a chunk task, those to begin with included.
void choose_groups(Unit& unit, const Task& task, const Budget& budget, float scale);

}  // namespace retrieval
