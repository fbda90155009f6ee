#include "choose.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace retrieval {
namespace {

constexpr int kRunsPerGroup = kGroupKeys / kRunKeys;
static_assert(kRunsPerGroup == 2);
constexpr std::size_t kFirstChunks = 8;     // chunks whose best groups a search begins with, per head
constexpr std::int64_t kMeansAhead = 3;     // chunks
constexpr float kNear = 5.0f;               // nats below the best that a key within half the reach may not be missed
constexpr float kOddRadius = 1.75f;         // of the root mean square
constexpr float kKeysPerGroup = 3.0f;       // drawn from a drawn group, about
constexpr float kLargestVariance = 4.0f;    // nats squared; keys that differ more are not told by a mean

// Codes that will be scanned soon, on their way from memory.
void fetch(const CodeGroups& groups, int g, int head_dim, int bits) {
  const int size = bits * plane_bytes(head_dim);
  for (int at = 0; at < size; at += 64) __builtin_prefetch(groups.planes + g * size + at, 0, 2);
  __builtin_prefetch(groups.factors + g * kGroupKeys, 0, 2);
  __builtin_prefetch(groups.factors + g * kGroupKeys + kGroupKeys / 2, 0, 2);
}

// Runs with a key that is unlike all others: how far such keys lie off the mean tells nothing about it.
std::uint64_t odd_runs(const CodeChunk& chunk, float radius) {
  const auto limit = static_cast<std::int16_t>(std::min(32767.0f, kOddRadius * radius / std::max(chunk.radius_unit, 1e-30f)));
  std::uint64_t odd;
  kernels().select(chunk.radii, 1, limit, &odd);
  return odd;
}

}  // namespace

void score_means(Unit& unit, const Task& task) {
  Scan& scan = unit.scans[task.run];
  const int head_dim = unit.queries.head_dim;
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    const CodeGroups& means = scan.chunk(c).means;
    if (c + kMeansAhead < scan.num_chunks) fetch(scan.chunk(c + kMeansAhead).means, 0, head_dim, scan.part->codes->bits());
    std::int16_t tops[kMaxGroup * kBlocksPerChunk];
    kernels().scan(scan.query.tables.data(), scan.query.offsets, unit.queries.num, head_dim, scan.query.shift,
                   reinterpret_cast<const std::uint8_t*>(means.planes), scan.part->codes->bits(), 1u, means.factors,
                   scan.levels + c * kChunkRuns, scan.num_chunks * kChunkRuns, tops, kBlocksPerChunk);
    for (int h = 0; h < unit.queries.num; ++h) scan.crests[h * scan.num_chunks + c] = tops[h * kBlocksPerChunk];
  }
}

void choose_first(Unit& unit) {
  struct Crest {
    float level;
    const Scan* scan;
    std::int64_t chunk;
  };
  for (Scan& scan : unit.scans) {
    std::fill_n(scan.chosen, scan.num_chunks, 0u);
    std::fill_n(scan.stands_for, scan.num_chunks * kChunkGroups, 1.0f);
  }
  const auto choose = [&](const Scan& scan, std::int64_t c, int g) {
    scan.chosen[c] |= 1u << g;
    fetch(scan.chunk(c).keys, g, unit.queries.head_dim, scan.part->codes->bits());
  };
  for_sample_groups(unit, choose);
  std::vector<Crest> crests;
  for (int h = 0; h < unit.queries.num; ++h) {
    crests.clear();
    for (const Scan& scan : unit.scans) {
      for (std::int64_t c = 0; c < scan.num_chunks; ++c) {
        crests.push_back({scan.query.base[h] + scan.level_unit(c, h) * scan.crests[h * scan.num_chunks + c], &scan, c});
      }
    }
    const std::size_t num = std::min(kFirstChunks, crests.size());
    std::partial_sort(crests.begin(), crests.begin() + static_cast<std::ptrdiff_t>(num), crests.end(),
                      [](const Crest& a, const Crest& b) { return a.level > b.level; });
    for (std::size_t i = 0; i < num; ++i) {
      const auto [level, scan, c] = crests[i];
      const std::int16_t* levels = scan->levels + (h * scan->num_chunks + c) * kChunkRuns;
      for (int r = 0; r < kChunkRuns; ++r) {
        const float each = scan->query.base[h] + scan->level_unit(c, h) * levels[r];
        if (each >= crests[num - 1].level) choose(*scan, c, r / kRunsPerGroup);
      }
    }
  }
}

void set_group_floors(Unit& unit, float scale) {
  for (int h = 0; h < unit.queries.num; ++h) {
    // A run is left out when none of its keys can become the best, or of a head that draws, weigh as much as the rest.
    unit.group_floor[h] = unit.floor[h] == -kInfinity ? -kInfinity : unit.best[h];
    unit.group_draws[h] = 0.0f;
    if (unit.draws[h] == 0.0f) continue;
    float variance = 0.0f;
    for (const Scan& scan : unit.scans) variance = std::max(variance, scale * scale * scan.query.own[h] * scan.query.own[h]);
    if (!(variance > 0.0f && variance <= kLargestVariance)) {
      unit.group_floor[h] = -kInfinity;
      continue;
    }
    unit.group_floor[h] = unit.best[h] + std::log(std::max(1.0f, unit.total[h])) / scale;
    unit.group_draws[h] = unit.draws[h] / kKeysPerGroup * kRunKeys * std::exp(0.5f * variance);
  }
}

void choose_groups(Unit& unit, const Task& task, const Budget& budget, float scale) {
  Scan& scan = unit.scans[task.run];
  const std::int64_t stride = scan.num_chunks * kChunkRuns;
  float at = phase(unit, ~scan.first_key(task.begin));
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    const CodeChunk& chunk = scan.chunk(c);
    float chances[kChunkRuns] = {}, unused[kChunkRuns] = {};
    std::uint64_t passed = ~chunk.full_runs | odd_runs(chunk, scan.query.radius);
    for (int h = 0; h < unit.queries.num; ++h) {
      const std::int16_t* levels = scan.levels + h * stride + c * kChunkRuns;
      const float crest = scan.crests[h * scan.num_chunks + c];
      const auto pass = [&](float deviations, float floor) {
        // However far it lies from the mean, a key scores no more above it than this times the radius.
        float reach = scan.query.norm[h];
        if (scan.query.radius > 0.0f) reach = std::min(reach, deviations * scan.query.own[h] / scan.query.radius);
        const Weigher bound{scan.query.base[h], scan.level_unit(c, h), -reach * chunk.radius_unit};
        if (bound.base + bound.slope * crest - bound.lift * kRadiusSteps < floor) return;
        passed |= kernels().split(levels, chunk.radii, bound, floor, chunk.full_runs, 0.0f, unused);
      };
      pass(budget.reach, unit.group_floor[h]);
      pass(0.5f * budget.reach, unit.group_floor[h] - kNear / scale);
      if (unit.group_draws[h] == 0.0f) continue;
      float mine[kChunkRuns] = {};
      kernels().split(levels, chunk.means.factors, scan.weigher(chunk.means, h, scale, unit.best[h]), kInfinity,
                      chunk.full_runs, unit.group_draws[h], mine);
      // What is drawn for one head serves the others as well.
      for (int r = 0; r < kChunkRuns; ++r) chances[r] = std::max(chances[r], mine[r]);
    }
    std::uint32_t chosen = scan.chosen[c];
    for (int g = 0; g < kChunkGroups; ++g) {
      if ((chosen >> g & 1u) != 0) continue;
      if ((passed >> kRunsPerGroup * g & 3u) == 0) {
        const float chance = chances[kRunsPerGroup * g] + chances[kRunsPerGroup * g + 1];
        if (chance < 1.0f) {
          at += chance;
          if (at < 1.0f) continue;
          at -= 1.0f;
          scan.stands_for[c * kChunkGroups + g] = 1.0f / chance;
        }
      }
      chosen |= 1u << g;
    }
    scan.chosen[c] = chosen;
    if (__builtin_popcount(chosen) > kChunkGroups / 2) continue;
    for_each_bit(chosen, [&](int g) { fetch(chunk.keys, g, unit.queries.head_dim, scan.part->codes->bits()); });
  }
}

}  // namespace retrieval
