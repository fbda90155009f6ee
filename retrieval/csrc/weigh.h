// From keys to weighted values: exact scores, softmax and sums of one task.
#pragma once

#include "unit.h"

namespace retrieval {

// All keys of a task of an exact part. Softmax as it goes: one tile of scores at a time, rescaled when the maximum rises.
void attend_exactly(Unit& unit, const Task& task, float scale);

// The candidates of a task that matter to some head; has_ranks: their scores are known.
Weighed weigh_candidates(Unit& unit, const Task& task, float scale, bool has_ranks);

// The same for a unit that is clear: only keys that were not drawn are scored.
Weighed weigh_by_estimate(Unit& unit, const Task& task, float scale);

}  // namespace retrieval
