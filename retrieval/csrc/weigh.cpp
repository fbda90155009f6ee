#include "weigh.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace retrieval {
namespace {

// Candidates of a task, as the weighing goes on.
struct Tile {
  int count = 0;
  std::int32_t positions[kTileKeys];
  float inverses[kTileKeys];
  float weights[kMaxGroup * kTileKeys];  // [num][kTileKeys]
};

// Their scores, which are known, for weights.
void read_joined(const Scan& scan, const Task& task, int num, Tile& tile) {
  tile.count = static_cast<int>(task.end - task.begin);
  std::copy_n(scan.positions.data() + task.begin, tile.count, tile.positions);
  std::copy_n(scan.inverses.data() + task.begin, tile.count, tile.inverses);
  for (int h = 0; h < num; ++h) {
    const float* known = scan.scores + static_cast<std::size_t>(h) * scan.positions.size() + task.begin;
    std::copy_n(known, tile.count, tile.weights + h * kTileKeys);
  }
}

// From where they were found: num weights of each.
void read_lists(const Scan& scan, const Task& task, int num, Tile& tile) {
  const auto after = std::upper_bound(scan.firsts.begin(), scan.firsts.end(), task.begin);
  auto list = static_cast<std::size_t>(after - scan.firsts.begin()) - 1;
  for (std::int64_t at = task.begin; at < task.end; ++list) {
    const Found& found = scan.found[list];
    const std::int64_t from = at - scan.firsts[list], count = std::min(task.end, scan.firsts[list + 1]) - at;
    std::copy_n(found.positions.data() + from, count, tile.positions + tile.count);
    std::copy_n(found.inverses.data() + from, count, tile.inverses + tile.count);
    for (int h = 0; h < num; ++h) {
      std::copy_n(found.weights[h].data() + from, count, tile.weights + h * kTileKeys + tile.count);
    }
    tile.count += static_cast<int>(count);
    at += count;
  }
}

// Keys that have more than nothing for any head, one after the other. Returns for how many heads they do, in all.
std::int64_t move_together(int num, float nothing, Tile& tile) {
  int num_mine[kTileKeys] = {}, from[kTileKeys + 1], num_kept = 0, count = 0;
  for (int h = 0; h < num; ++h) {
    const float* row = tile.weights + h * kTileKeys;
    for (int i = 0; i < tile.count; ++i) num_mine[i] += row[i] > nothing ? 1 : 0;
  }
  for (int i = 0; i < tile.count; ++i) {
    from[count] = i;
    count += num_mine[i] > 0 ? 1 : 0;
    num_kept += num_mine[i];
  }
  for (int h = 0; h < num; ++h) {
    float* row = tile.weights + h * kTileKeys;
    for (int n = 0; n < count; ++n) row[n] = row[from[n]];
  }
  for (int n = 0; n < count; ++n) {
    tile.positions[n] = tile.positions[from[n]];
    tile.inverses[n] = tile.inverses[from[n]];
  }
  tile.count = count;
  return num_kept;
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

Weighed weigh_candidates(Unit& unit, const Task& task, float scale, bool has_ranks) {
  const Scan& scan = unit.scans[task.run];
  Partial& partial = unit.partials[task.slot];
  const Kernels& kernel = kernels();
  const int num = unit.queries.num;
  Tile tile;
  Weighed weighed;
  if (has_ranks) {
    read_joined(scan, task, num, tile);
  } else {
    read_lists(scan, task, 0, tile);
    kernel.score(unit.queries, scan.part->key_rows(unit.kv_head), tile.positions, 0, tile.count, tile.weights, kTileKeys);
    weighed.num_scored = tile.count;
  }
  float* weights = tile.weights;
  int count = tile.count;
  float floors[kMaxGroup];
  for (int h = 0; h < num; ++h) floors[h] = unit.draws[h] > 0.0f ? -kInfinity : unit.floor[h];
  weighed.num_retrieved = std::int64_t{num} * count;
  if (std::any_of(floors, floors + num, [](float floor) { return floor > -kInfinity; })) {
    for (int h = 0; h < num; ++h) {
      float* row = weights + h * kTileKeys;
      for (int i = 0; i < count; ++i) row[i] = row[i] >= floors[h] ? row[i] : -kInfinity;
    }
    weighed.num_retrieved = move_together(num, -kInfinity, tile);
    count = tile.count;
  }
  if (count == 0) return weighed;
  for (int h = 0; h < num; ++h) {
    float* row = weights + h * kTileKeys;
    partial.top[h] = std::max(unit.best[h], kernel.maximum(row, count));
    partial.sum[h] = kernel.exponentiate(row, count, scale, partial.top[h], std::numeric_limits<float>::lowest());
    if (unit.draws[h] == 0.0f) continue;
    // What was drawn stands for others too.
    for (int i = 0; i < count; ++i) row[i] *= tile.inverses[i];
    kernel.below(row, count, kInfinity, &partial.sum[h]);
  }
  kernel.accumulate(weights, kTileKeys, num, scan.part->value_rows(unit.kv_head), tile.positions, 0, count, partial.acc);
  weighed.num_read = count;
  return weighed;
}

Weighed weigh_by_estimate(Unit& unit, const Task& task, float scale) {
  const Scan& scan = unit.scans[task.run];
  Partial& partial = unit.partials[task.slot];
  const Kernels& kernel = kernels();
  const int num = unit.queries.num;
  Tile tile;
  read_lists(scan, task, num, tile);
  float scores[kMaxGroup * kTileKeys];
  std::int32_t scored[kTileKeys + 1], which[kTileKeys + 1];
  int num_scored = 0;
  for (int i = 0; i < tile.count; ++i) {
    which[num_scored] = i;
    scored[num_scored] = tile.positions[i];
    num_scored += tile.inverses[i] > 0.0f ? 1 : 0;
  }
  kernel.score(unit.queries, scan.part->key_rows(unit.kv_head), scored, 0, num_scored, scores, kTileKeys);
  bool has_floors = false;
  for (int h = 0; h < num; ++h) {
    const bool draws = unit.draws[h] > 0.0f;
    float *row = tile.weights + h * kTileKeys, *known = scores + h * kTileKeys, &top = partial.top[h];
    top = num_scored > 0 ? std::max(unit.best[h], kernel.maximum(known, num_scored)) : unit.best[h];
    // A head may have ceased to draw.
    const float factor = draws ? std::exp(scale * (unit.reference[h] - top)) : 0.0f;
    for (int i = 0; factor != 1.0f && i < tile.count; ++i) row[i] *= factor;
    kernel.exponentiate(known, num_scored, scale, top, draws ? std::numeric_limits<float>::lowest() : unit.floor[h]);
    for (int n = 0; n < num_scored; ++n) row[which[n]] = known[n] * tile.inverses[which[n]];
    kernel.below(row, tile.count, kInfinity, &partial.sum[h]);
    has_floors |= !draws;
  }
  std::int64_t num_retrieved = std::int64_t{num} * tile.count;
  if (has_floors) num_retrieved = move_together(num, 0.0f, tile);
  kernel.accumulate(tile.weights, kTileKeys, num, scan.part->value_rows(unit.kv_head), tile.positions, 0, tile.count,
                    partial.acc);
  return {num_scored, tile.count, num_retrieved};
}

}  // namespace retrieval
