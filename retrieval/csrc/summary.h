// What the 32 keys of a run have in common: neighbours in a text are alike, so the mean of a run tells what its keys
// can score at most, and what they weigh, before any of them is looked at. Means are kept as codes, like keys.
//
// All of it comes from the codes, so it is the same however the keys were appended. Rotated and centred, a key lies
// within `radius` of its run's mean; how far it lies in the direction of one query follows from the scatter of all
// keys round the means of their runs.
#pragma once

#include <cstdint>

#include "codes.h"

namespace retrieval {

// Fills the mean and the radius of a run, counted from the first key, which must be full, and adds to the scatter.
// Runs are to be summarized in order.
void summarize(HeadCodes& head, std::int64_t run, int head_dim, int bits);

// Root mean square distance of keys from the means of their runs; 0 if there is none.
float own_radius(const HeadCodes& head, int head_dim);

// Deviations of <k - mean of its run, q'> over the keys, for num queries mapped as the codes are; 0 if unknown.
void own_deviations(const HeadCodes& head, const float* mapped, int num, int head_dim, float* deviations);

}  // namespace retrieval
