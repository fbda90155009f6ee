#include "weigh.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace retrieval {
namespace {

// Keys that reach the floor of any head, one after the other, with their scores [num][kTileKeys]: -infinity where they do
// not reach the head's. Returns how many scores do, and how many keys.
std::pair<std::int64_t, int> move_together(const std::int32_t* candidates, const float* inverses, int num_candidates,
                                           const float* floors, int num, float* scores, std::int32_t* kept,
                                           float* kept_inverses) {
  int num_mine[kTileKeys] = {}, from[kTileKeys], num_reached = 0, count = 0;
  for (int h = 0; h < num; ++h) {
    float* row = scores + h * kTileKeys;
    for (int i = 0; i < num_candidates; ++i) {
      const bool is_mine = row[i] >= floors[h];
      row[i] = is_mine ? row[i] : -kInfinity;
      num_mine[i] += is_mine ? 1 : 0;
    }
  }
  for (int i = 0; i < num_candidates; ++i) {
    from[count] = i;
    count += num_mine[i] > 0 ? 1 : 0;
    num_reached += num_mine[i];
  }
  for (int h = 0; h < num; ++h) {
    float* row = scores + h * kTileKeys;
    for (int n = 0; n < count; ++n) row[n] = row[from[n]];
  }
  for (int n = 0; n < count; ++n) {
    kept[n] = candidates[from[n]];
    kept_inverses[n] = inverses[from[n]];
  }
  return {num_reached, count};
}

// Keys that weigh anything to any head, one after the other, with their weights [num][stride]. Returns how many weights
// there are, and how many keys.
std::pair<std::int64_t, int> keep_weighty(const std::int32_t* positions, int num_positions, int num, std::int64_t stride,
                                          float* weights, std::int32_t* kept) {
  int num_weights[kTileKeys] = {}, from[kTileKeys + 1], num_kept = 0, count = 0;
  for (int h = 0; h < num; ++h) {
    for (int i = 0; i < num_positions; ++i) num_weights[i] += weights[h * stride + i] > 0.0f ? 1 : 0;
  }
  for (int i = 0; i < num_positions; ++i) {
    from[count] = i;
    count += num_weights[i] > 0 ? 1 : 0;
    num_kept += num_weights[i];
  }
  for (int h = 0; h < num; ++h) {
    for (int n = 0; n < count; ++n) weights[h * stride + n] = weights[h * stride + from[n]];
  }
  for (int n = 0; n < count; ++n) kept[n] = positions[from[n]];
  return {num_kept, count};
}

}  // namespace

void attend_exactly(Unit& unit, const Task& task, float scale) {
  const Part& part = *unit.exact[task.run];
  Partial& partial = unit.partials[task.slot];
  const Rows keys = part.key_rows(unit.kv_head), values = part.value_rows(unit.kv_head);
  const Kernels& kernel = kernels();
  float scores[kMaxGroup * kTileKeys];
  for (std::int64_t first = task.begin; first < task.end; first += kTileKeys) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTileKeys, task.end - first));
    kernel.score(unit.queries, keys, nullptr, first, count, scores, kTileKeys);
    for (int h = 0; h < unit.queries.num; ++h) {
      float* row = scores + h * kTileKeys;
      const float top = std::max(partial.top[h], kernel.maximum(row, count));
      if (top > partial.top[h]) {
        const float factor = std::exp(scale * (partial.top[h] - top));
        float* acc = partial.acc + h * unit.queries.head_dim;
        for (int j = 0; j < unit.queries.head_dim; ++j) acc[j] *= factor;
        partial.sum[h] *= factor;
        partial.top[h] = top;
      }
      partial.sum[h] += kernel.exponentiate(row, count, scale, top, -kInfinity);
    }
    kernel.accumulate(scores, kTileKeys, unit.queries.num, values, nullptr, first, count, partial.acc);
  }
}

std::pair<std::int64_t, std::int64_t> weigh_candidates(Unit& unit, const Task& task, float scale, bool has_ranks) {
  Scan& scan = unit.scans[task.run];
  Partial& partial = unit.partials[task.slot];
  const Rows keys = scan.part->key_rows(unit.kv_head), values = scan.part->value_rows(unit.kv_head);
  const std::int32_t* candidates = scan.positions.data() + task.begin;
  const float* inverses = scan.inverses.data() + task.begin;
  const auto num_candidates = static_cast<int>(task.end - task.begin);
  float weights[kMaxGroup * kTileKeys];
  if (!has_ranks) {
    kernels().score(unit.queries, keys, candidates, 0, num_candidates, weights, kTileKeys);
  } else {
    for (int h = 0; h < unit.queries.num; ++h) {
      const float* known = scan.scores + static_cast<std::size_t>(h) * scan.positions.size() + task.begin;
      std::copy_n(known, num_candidates, weights + h * kTileKeys);
    }
  }
  float floors[kMaxGroup], kept_inverses[kTileKeys];
  std::int32_t kept[kTileKeys];
  for (int h = 0; h < unit.queries.num; ++h) floors[h] = unit.draws[h] > 0.0f ? -kInfinity : unit.floor[h];
  int count = num_candidates;
  std::int64_t num_retrieved = std::int64_t{unit.queries.num} * count;
  if (std::any_of(floors, floors + unit.queries.num, [](float floor) { return floor > -kInfinity; })) {
    std::tie(num_retrieved, count) = move_together(candidates, inverses, num_candidates, floors, unit.queries.num, weights,
                                                   kept, kept_inverses);
    candidates = kept;
    inverses = kept_inverses;
  }
  if (count == 0) return {0, 0};
  for (int h = 0; h < unit.queries.num; ++h) {
    partial.top[h] = std::max(unit.best[h], kernels().maximum(weights + h * kTileKeys, count));
    partial.sum[h] = kernels().exponentiate(weights + h * kTileKeys, count, scale, partial.top[h],
                                             std::numeric_limits<float>::lowest());
    if (unit.draws[h] == 0.0f) continue;
    // What was drawn stands for others too.
    for (int i = 0; i < count; ++i) weights[h * kTileKeys + i] *= inverses[i];
    kernels().below(weights + h * kTileKeys, count, kInfinity, &partial.sum[h]);
  }
  kernels().accumulate(weights, kTileKeys, unit.queries.num, values, candidates, 0, count, partial.acc);
  return {num_retrieved, count};
}

std::pair<std::int64_t, std::int64_t> weigh_by_estimate(Unit& unit, const Task& task, float scale) {
  Scan& scan = unit.scans[task.run];
  Partial& partial = unit.partials[task.slot];
  const Kernels& kernel = kernels();
  const std::int32_t* positions = scan.positions.data() + task.begin;
  const float* inverses = scan.inverses.data() + task.begin;
  const int num = unit.queries.num, stride = static_cast<int>(scan.weights_stride);
  int count = static_cast<int>(task.end - task.begin), num_scored = 0;
  float scores[kMaxGroup * kTileKeys];
  std::int32_t scored[kTileKeys + 1], which[kTileKeys + 1], kept[kTileKeys];
  for (int i = 0; i < count; ++i) {
    which[num_scored] = i;
    scored[num_scored] = positions[i];
    num_scored += inverses[i] > 0.0f ? 1 : 0;
  }
  kernel.score(unit.queries, scan.part->key_rows(unit.kv_head), scored, 0, num_scored, scores, kTileKeys);
  float* weights = scan.weights.data() + task.begin;
  bool has_floors = false;
  for (int h = 0; h < num; ++h) {
    const bool draws = unit.draws[h] > 0.0f;
    float *row = weights + std::int64_t{h} * stride, *known = scores + h * kTileKeys, &top = partial.top[h];
    top = num_scored > 0 ? std::max(unit.best[h], kernel.maximum(known, num_scored)) : unit.best[h];
    const float factor = draws ? std::exp(scale * (unit.reference[h] - top)) : 0.0f;
    for (int i = 0; factor != 1.0f && i < count; ++i) row[i] *= factor;
    kernel.exponentiate(known, num_scored, scale, top, draws ? std::numeric_limits<float>::lowest() : unit.floor[h]);
    for (int n = 0; n < num_scored; ++n) row[which[n]] = known[n] * inverses[which[n]];
    kernel.below(row, count, kInfinity, &partial.sum[h]);
    has_floors |= !draws;
  }
  std::int64_t num_retrieved = std::int64_t{num} * count;
  if (has_floors) {
    std::tie(num_retrieved, count) = keep_weighty(positions, count, num, stride, weights, kept);
    positions = kept;
  }
  kernel.accumulate(weights, stride, num, scan.part->value_rows(unit.kv_head), positions, 0, count, partial.acc);
  return {num_retrieved, count};
}

}  // namespace retrieval
