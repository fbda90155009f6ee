#include "candidates.h"

#include <algorithm>
#include <functional>
#include <vector>

namespace retrieval {
namespace {

constexpr std::size_t kUsualCandidates = 256;  // of a task

// What one chunk holds for the heads of a unit.
struct Marks {
  std::uint64_t masks[kMaxGroup][kChunkGroups];  // keys that pass the floor of a head, of chosen groups
  std::uint64_t any[kChunkGroups] = {};          // of any head
  float measure[kChunkKeys];                     // chances of being drawn, of chosen groups where some head draws
};

void mark_by_bound(const Unit& unit, const Scan& scan, std::int64_t c, int h, Marks& marks) {
  const std::int16_t* bounds = scan.bounds + h * scan.stride() + c * kChunkKeys;
  const std::int16_t* tops = scan.tops + h * scan.tops_stride() + c * kBlocksPerChunk;
  const int threshold = scan.threshold(c, h, unit.floor[h]);
  for_each_bit(scan.chosen[c], [&](int g) {
    std::uint64_t& mask = marks.masks[h][g];
    mask = 0;
    if (tops[g / kBlockGroups] < threshold) return;
    kernels().select(bounds + g * kGroupKeys, 1, static_cast<std::int16_t>(threshold), &mask);
    marks.any[g] |= mask;
  });
}

void mark_by_weight(const Unit& unit, const Scan& scan, std::int64_t c, int h, float scale, Marks& marks) {
  const std::int16_t* bounds = scan.bounds + h * scan.stride() + c * kChunkKeys;
  const CodeGroups& keys = scan.chunk(c).keys;
  const std::int16_t* tops = scan.tops + h * scan.tops_stride() + c * kBlocksPerChunk;
  const int heavy = scan.threshold(c, h, unit.heavy[h]);
  const float floor = scale * kLog2E * (unit.floor[h] - unit.best[h]);
  const Weigher weigher = scan.weigher(keys, h, scale, unit.best[h]);
  for_each_bit(scan.chosen[c], [&](int g) {
    const int slot = g * kGroupKeys;
    marks.masks[h][g] = kernels().split(bounds + slot, keys.factors + slot, weigher, floor, scan.visible(c, g),
                                        unit.draws[h] * scan.weight_of(c, g), marks.measure + slot);
    if (tops[g / kBlockGroups] >= heavy) {
      std::uint64_t mask;
      kernels().select(bounds + slot, 1, static_cast<std::int16_t>(heavy), &mask);
      marks.masks[h][g] |= mask;
    }
    marks.any[g] |= marks.masks[h][g];
  });
}

// Largest distance above the floor of a head, of key i of group g.
float slack_of(const Unit& unit, const Scan& scan, std::int64_t c, int g, int i, const Marks& marks) {
  float slack = -kInfinity;
  for (int h = 0; h < unit.queries.num; ++h) {
    if ((marks.masks[h][g] >> i & 1u) == 0) continue;
    const auto bound = static_cast<float>(scan.bounds[h * scan.stride() + c * kChunkKeys + g * kGroupKeys + i]);
    slack = std::max(slack, scan.query.base[h] + scan.bound_unit(c, h) * bound - unit.floor[h]);
  }
  return slack;
}

}  // namespace

std::int64_t refine(Unit& unit, const Task& task, float scale) {
  Scan& scan = unit.scans[task.run];
  std::vector<Candidate>& found = scan.found[task.slot];
  found.reserve(kUsualCandidates);
  float at = phase(unit, scan.first_key(task.begin));
  std::int64_t num_drawn = 0;
  const bool draws_any = unit.draws_any();
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    Marks marks;
    for_each_bit(draws_any ? scan.chosen[c] : 0, [&](int g) { std::fill_n(marks.measure + g * kGroupKeys, kGroupKeys, 0.0f); });
    for (int h = 0; h < unit.queries.num; ++h) {
      if (unit.draws[h] > 0.0f) {
        mark_by_weight(unit, scan, c, h, scale, marks);
      } else {
        mark_by_bound(unit, scan, c, h, marks);
      }
    }
    for_each_bit(scan.chosen[c], [&](int g) {
      const std::int64_t first = scan.first_key(c) + g * kGroupKeys;
      const std::uint64_t visible = scan.visible(c, g);
      const float* measure = marks.measure + g * kGroupKeys;
      std::uint64_t sure = marks.any[g] & visible, drawn = 0;
      if (draws_any) drawn = kernels().draw(measure, sure | ~visible, &at, &sure);
      const float stands_for = scan.weight_of(c, g);
      const bool is_drawn = stands_for > 1.0f;  // the group, and so whatever is found in it
      for_each_bit(sure, [&](int i) {
        const float slack = is_drawn ? kInfinity : slack_of(unit, scan, c, g, i, marks);
        found.push_back({static_cast<std::int32_t>(first + i), slack, stands_for});
      });
      for_each_bit(drawn, [&](int i) {
        found.push_back({static_cast<std::int32_t>(first + i), kInfinity, stands_for / measure[i]});
      });
      num_drawn += __builtin_popcountll(drawn) + (is_drawn ? __builtin_popcountll(sure) : 0);
    });
  }
  return num_drawn;
}

void keep(Unit& unit, std::size_t limit) {
  std::vector<float> slacks;
  std::size_t num_drawn = 0;
  for (Scan& scan : unit.scans) {
    std::size_t num_found = 0;
    for (const auto& found : scan.found) num_found += found.size();
    slacks.reserve(slacks.size() + num_found);
    scan.positions.reserve(std::min(num_found, limit));
    scan.inverses.reserve(std::min(num_found, limit));
    for (const auto& found : scan.found) {
      for (const Candidate& candidate : found) {
        if (candidate.is_drawn()) {
          ++num_drawn;
        } else {
          slacks.push_back(candidate.slack);
        }
      }
    }
  }
  const std::size_t share = (limit + 1) / 2, every = std::max<std::size_t>(1, (num_drawn + share - 1) / share);
  const std::size_t most = limit - num_drawn / every;
  float least = -kInfinity;
  if (slacks.size() > most) {
    const auto nth = slacks.begin() + static_cast<std::ptrdiff_t>(most - 1);
    std::nth_element(slacks.begin(), nth, slacks.end(), std::greater<float>());
    least = *nth;
  }
  std::size_t turn = every / 2;
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    Scan& scan = unit.scans[s];
    for (const auto& found : scan.found) {
      for (const Candidate& candidate : found) {
        if (candidate.slack < least || (candidate.is_drawn() && turn++ % every != 0)) continue;
        scan.positions.push_back(candidate.position);
        scan.inverses.push_back(candidate.is_drawn() ? candidate.inverse * static_cast<float>(every) : 1.0f);
      }
    }
  }
}

}  // namespace retrieval
