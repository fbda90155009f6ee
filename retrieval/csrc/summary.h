// What the 32 keys of a run have in common: neighbours in a text are alike, so the mean of a run tells what its keys
// can score at most, and what they weigh, before any of them is looked at. Means are kept as codes, like keys.
//
// Rotated and centred, a key lies within `radius` of its run's mean; how far it lies in the direction of one query
// follows from the scatter of all keys round the means of their runs. Both come from the keys themselves: the errors
// of their codes would widen every run.
#pragma once

#include <cstdint>
#include <vector>

#include "codes.h"

namespace retrieval {

// Full runs on their way into the codes of a head.
class RunSummaries {
 public:
  RunSummaries(std::int64_t num_runs, int head_dim, CodeShape shape);
  // Summarizes run `at` from its keys [kRunKeys][head_dim], as encoded; number: its place among all runs of the head.
  // Runs may be filled in any order, and at the same time.
  void fill(std::int64_t at, std::int64_t number, const float* keys);
  // Puts them behind the first `num_runs` of a head, whose chunks are there.
  void add_to(HeadCodes& head, std::int64_t num_runs) const;

 private:
  int head_dim_;
  CodeShape shape_;
  std::vector<std::uint8_t> codes_;        // [num_runs][shape.dims], of the means
  std::vector<float> factors_, radii_;     // [num_runs]
  std::vector<float> offsets_;             // [num_runs][head_dim]: a key of the run less the mean
  std::vector<float> means_;               // [num_runs][head_dim - shape.dims]: what the mean's code leaves out
  std::vector<float> key_factors_;         // [num_runs] of the key whose offset is kept
};

// Root mean square distance of keys from the means of their runs; 0 if there is none.
float own_radius(const HeadCodes& head, int head_dim);

// Deviations of <k - mean of its run, q'> over the keys, for num queries mapped as the codes are; 0 if unknown.
void own_deviations(const HeadCodes& head, const float* mapped, int num, int head_dim, float* deviations);

// Deviation of what the coordinates without a code, `mapped` those of a query, add to a product, over the vector's factor.
float uncoded_deviation(const Uncoded& uncoded, const float* mapped, int num_uncoded);

}  // namespace retrieval
