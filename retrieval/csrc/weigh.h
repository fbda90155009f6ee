// From keys to weighted values: exact scores, softmax and sums of one task.
#pragma once

#include <cstdint>
#include <utility>

#include "unit.h"

namespace retrieval {

// All keys of a task of an exact part. Softmax as it goes: one tile of scores at a time, rescaled when the maximum rises.
void attend_exactly(Unit& unit, const Task& task, float scale);

// The candidates of a task that matter to some head; has_ranks: their scores are known. Returns how many keys of how
// many heads entered the output, and of how many keys the values were read.
std::pair<std::int64_t, std::int64_t> weigh_candidates(Unit& unit, const Task& task, float scale, bool has_ranks);

// The same for a unit that is clear: only keys that were not drawn are scored.
std::pair<std::int64_t, std::int64_t> weigh_by_estimate(Unit& unit, const Task& task, float scale);

}  // namespace retrieval
