#include "weigh.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace retrieval {

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
  std::int64_t num_retrieved = 0;
  Scan& scan = unit.scans[task.run];
  Partial& partial = unit.partials[task.slot];
  const Rows keys = scan.part->key_rows(unit.kv_head), values = scan.part->value_rows(unit.kv_head);
  const std::int32_t* candidates = scan.positions.data() + task.begin;
  float fresh[kMaxGroup * kTileKeys];
  if (!has_ranks) {
    kernels().score(unit.queries, keys, candidates, 0, static_cast<int>(task.end - task.begin), fresh, kTileKeys);
  }
  const float* scores = has_ranks ? scan.scores + task.begin : fresh;
  const std::size_t stride = has_ranks ? scan.positions.size() : static_cast<std::size_t>(kTileKeys);
  float weights[kMaxGroup * kTileKeys];
  float inverses[kTileKeys], floors[kMaxGroup];
  std::int32_t positions[kTileKeys];
  for (int h = 0; h < unit.queries.num; ++h) floors[h] = unit.draws[h] > 0.0f ? -kInfinity : unit.floor[h];
  // Keys that matter to any head, moved together.
  int count = 0;
  for (std::int64_t i = 0; i < task.end - task.begin; ++i) {
    bool is_kept = false;
    for (int h = 0; h < unit.queries.num; ++h) {
      const float score = scores[static_cast<std::size_t>(h) * stride + static_cast<std::size_t>(i)];
      const bool is_mine = score >= floors[h];
      weights[h * kTileKeys + count] = is_mine ? score : -kInfinity;
      is_kept |= is_mine;
      num_retrieved += is_mine ? 1 : 0;
    }
    positions[count] = candidates[i];
    inverses[count] = scan.inverses[static_cast<std::size_t>(task.begin + i)];
    count += is_kept ? 1 : 0;
  }
  if (count == 0) return {0, 0};
  for (int h = 0; h < unit.queries.num; ++h) {
    partial.top[h] = std::max(unit.best[h], kernels().maximum(weights + h * kTileKeys, count));
    partial.sum[h] = kernels().exponentiate(weights + h * kTileKeys, count, scale, partial.top[h],
                                             std::numeric_limits<float>::lowest());
    if (unit.draws[h] == 0.0f) continue;
    // What was drawn stands for others too.
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) {
      weights[h * kTileKeys + i] *= inverses[i];
      sum += weights[h * kTileKeys + i];
    }
    partial.sum[h] = sum;
  }
  kernels().accumulate(weights, kTileKeys, unit.queries.num, values, positions, 0, count, partial.acc);
  return {num_retrieved, count};
}

}  // namespace retrieval
