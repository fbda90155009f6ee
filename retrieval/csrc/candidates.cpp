#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "luck.h"

namespace retrieval {
namespace {

// Raises the logarithms of chances to those of one head; 0 and more: taken for certain.
void raise(const Taking& taking, const Taken& taken, int h, int count, float* chances) {
  const std::int16_t* bounds = taken.bounds + h * kTakenStride;
  for (int n = 0; n < count; ++n) {
    const float drawn = taking.draws ? taking.lot.log_chance(bounds[n], taken.factors[n]) : -kInfinity;
    chances[n] = std::max(chances[n], bounds[n] >= taking.lot.draw.sure ? 0.0f : drawn);
  }
}

// visit(scan, found, first, count, c, bounds) for every chunk of every list.
template <typename Visit>
void for_each_chunk(Unit& unit, Visit visit) {
  for (Scan& scan : unit.scans) {
    for (const Found& found : scan.found) {
      const std::int16_t* bounds = found.bounds.data();
      std::size_t first = 0;
      for (const int count : found.counts) {
        if (count == 0) continue;
        visit(scan, found, first, count, found.positions[first] / kChunkKeys - scan.first_chunk, bounds);
        first += static_cast<std::size_t>(count);
        bounds += unit.queries.num * count;
      }
    }
  }
}

// Largest distances of the bounds of keys above what makes their head take them.
void find_slacks(const Unit& unit, const Scan& scan, std::int64_t c, int count, const std::int16_t* bounds, float* slacks) {
  std::fill_n(slacks, count, -kInfinity);
  for (int h = 0; h < unit.queries.num; ++h) {
    const float least = unit.draws[h] > 0.0f ? std::min(unit.floor[h], unit.heavy[h]) : unit.listed[h];
    // As threshold rounds down, so a bound in the last step counts as reaching it.
    const float step = scan.bound_unit(c, h), base = scan.query.base[h] - least + 2.0f * step;
    for (int n = 0; n < count; ++n) slacks[n] = std::max(slacks[n], base + step * static_cast<float>(bounds[h * count + n]));
  }
}

}  // namespace

// Made anew where chunks differ in their unit, or the task has come across a better key.
void Refiner::set_takings(std::int64_t c) {
  const float keys_unit = scan_.chunk(c).keys.unit;
  for (int h = 0; h < unit_.queries.num; ++h) {
    Taking& taking = takings_[h];
    if (keys_unit == keys_unit_ && taking.draws == found_.draws[h] && taking.listed == found_.listed[h]) continue;
    taking = {{}, found_.draws[h], found_.listed[h], -32768};
    const int sure = scan_.threshold(c, h, taking.draws ? unit_.heavy[h] : taking.listed);
    if (taking.draws) {
      taking.lot = lot_above(unit_.floor[h], scan_.query.base[h], scan_.bound_unit(c, h), scan_.query.keys, h, scale_);
    } else {
      taking.least_top = sure;
    }
    taking.lot.draw.sure = static_cast<std::int16_t>(std::min(sure, 32767));
  }
  keys_unit_ = keys_unit;
}

// Keys of chunk c that any head takes.
int Refiner::take(std::int64_t c, const ChunkBounds& in, const Taken& taken) const {
  const int num = unit_.queries.num;
  std::uint32_t wanted = 0;
  for (int b = 0; b < kBlocksPerChunk; ++b) {
    bool is_needed = false;
    for (int h = 0; h < num; ++h) is_needed |= in.tops[h * in.tops_stride + b] >= takings_[h].least_top;
    if (is_needed) wanted |= ((1u << kBlockGroups) - 1) << b * kBlockGroups;
  }
  wanted &= scan_.chosen[c];
  if (wanted == 0) return 0;
  Draw draws[kMaxGroup];
  std::int16_t floors[kMaxGroup * kChunkGroups];
  for (int h = 0; h < num; ++h) {
    draws[h] = takings_[h].lot.draw;
    std::fill_n(floors + h * kChunkGroups, kChunkGroups, draws[h].floor);
  }
  // Keys of a group that stands for others are drawn with greater chances.
  for_each_bit(unit_.chooses ? wanted : 0u, [&](int g) {
    const float log_times = scan_.log_times_of(c, g);
    if (!(log_times > 0.0f)) return;
    for (int h = 0; h < num; ++h) {
      if (takings_[h].draws) floors[h * kChunkGroups + g] = takings_[h].lot.floor_raised(log_times);
    }
  });
  const std::int64_t first = scan_.first_key(c);
  const auto slot_of = [&](std::int64_t position) {
    return static_cast<int>(std::clamp<std::int64_t>(position - first, 0, kChunkKeys));
  };
  return kernels().take(in.bounds, in.stride, num, scan_.chunk(c).keys.factors, lucks_of_keys(unit_.start + first), draws,
                        floors, wanted, slot_of(scan_.begin), slot_of(scan_.end), taken);
}

std::int64_t Refiner::refine(std::int64_t c, const ChunkBounds& in) {
  const int num = unit_.queries.num;
  set_takings(c);
  std::int16_t slots[kTakenStride], factors[kTakenStride], bounds[kMaxGroup * kTakenStride];
  const Taken taken{slots, factors, bounds};
  const int count = take(c, in, taken);
  found_.counts.push_back(count);
  if (count == 0) return 0;
  std::int32_t positions[kChunkKeys];
  float inverses[kChunkKeys];
  const auto first = static_cast<std::int32_t>(scan_.first_key(c));
  for (int n = 0; n < count; ++n) positions[n] = first + slots[n];
  std::int64_t num_drawn = 0;
  if (!unit_.draws_any()) {
    std::fill_n(inverses, count, 1.0f);  // no group stands for others either
  } else {
    float chances[kChunkKeys];  // logarithms
    std::fill_n(chances, count, -kInfinity);
    for (int h = 0; h < num; ++h) raise(takings_[h], taken, h, count, chances);
    for (int n = 0; n < count; ++n) {
      // The group may have been drawn, and so whatever is found in it.
      const float log_times = unit_.chooses ? scan_.log_times_of(c, slots[n] / kGroupKeys) : 0.0f;
      inverses[n] = std::clamp(chances[n] + log_times, kLogLeastChance, 0.0f) - log_times;
    }
    kernels().exponentiate(inverses, count, 1.0f, 0.0f, -kInfinity);
    for (int n = 0; n < count; ++n) {
      inverses[n] = 1.0f / inverses[n];
      num_drawn += inverses[n] > 1.0f ? 1 : 0;
    }
  }
  found_.positions.insert(found_.positions.end(), positions, positions + count);
  found_.inverses.insert(found_.inverses.end(), inverses, inverses + count);
  for (int h = 0; h < num; ++h) {
    found_.bounds.insert(found_.bounds.end(), bounds + h * kTakenStride, bounds + h * kTakenStride + count);
  }
  return num_drawn;
}

void drop(const Unit& unit, const Scan& scan, Found& found) {
  float slacks[kChunkKeys];
  const float most = unit.draws_any() ? 1.0f : kInfinity;
  const std::int16_t* bounds = found.bounds.data();
  std::int16_t* kept_bounds = found.bounds.data();
  std::size_t first = 0, kept = 0;
  for (int& count : found.counts) {
    if (count == 0) continue;
    find_slacks(unit, scan, found.positions[first] / kChunkKeys - scan.first_chunk, count, bounds, slacks);
    int staying[kChunkKeys], num_staying = 0;
    for (int n = 0; n < count; ++n) {
      staying[num_staying] = n;
      num_staying += slacks[n] >= 0.0f || found.inverses[first + static_cast<std::size_t>(n)] > most ? 1 : 0;
    }
    for (int n = 0; n < num_staying; ++n) {
      const std::size_t from = first + static_cast<std::size_t>(staying[n]), to = kept + static_cast<std::size_t>(n);
      found.positions[to] = found.positions[from];
      found.inverses[to] = found.inverses[from];
    }
    for (int h = 0; h < unit.queries.num; ++h) {
      for (int n = 0; n < num_staying; ++n) kept_bounds[h * num_staying + n] = bounds[h * count + staying[n]];
    }
    first += static_cast<std::size_t>(count);
    kept += static_cast<std::size_t>(num_staying);
    bounds += unit.queries.num * count;
    kept_bounds += unit.queries.num * num_staying;
    count = num_staying;
  }
  found.positions.resize(kept);
  found.inverses.resize(kept);
}

void keep(Unit& unit, std::size_t limit) {
  std::size_t num_found = 0;
  for (Scan& scan : unit.scans) {
    std::size_t here = 0;
    for (const Found& found : scan.found) here += found.positions.size();
    scan.positions.reserve(here);
    scan.inverses.reserve(here);
    num_found += here;
  }
  if (num_found <= limit) {
    for (Scan& scan : unit.scans) {
      for (const Found& found : scan.found) {
        scan.positions.insert(scan.positions.end(), found.positions.begin(), found.positions.end());
        scan.inverses.insert(scan.inverses.end(), found.inverses.begin(), found.inverses.end());
      }
    }
    return;
  }
  std::vector<float> slacks(num_found), reached;
  std::size_t at = 0, num_drawn = 0;
  for_each_chunk(unit, [&](const Scan& scan, const Found& found, std::size_t first, int count, std::int64_t c,
                           const std::int16_t* bounds) {
    find_slacks(unit, scan, c, count, bounds, &slacks[at]);
    for (int n = 0; n < count; ++n, ++at) {
      if (found.inverses[first + static_cast<std::size_t>(n)] > 1.0f) {
        ++num_drawn;
      } else {
        reached.push_back(slacks[at]);
      }
    }
  });
  const std::size_t share = (limit + 1) / 2, every = std::max<std::size_t>(1, (num_drawn + share - 1) / share);
  const std::size_t most = limit - num_drawn / every;
  float least = -kInfinity;
  if (reached.size() > most) {
    const auto nth = reached.begin() + static_cast<std::ptrdiff_t>(most - 1);
    std::nth_element(reached.begin(), nth, reached.end(), std::greater<float>());
    least = *nth;
  }
  std::size_t turn = every / 2;
  at = 0;
  for (Scan& scan : unit.scans) {
    for (const Found& found : scan.found) {
      for (std::size_t i = 0; i < found.positions.size(); ++i, ++at) {
        const bool is_drawn = found.inverses[i] > 1.0f;
        if (is_drawn ? turn++ % every != 0 : slacks[at] < least) continue;
        scan.positions.push_back(found.positions[i]);
        scan.inverses.push_back(is_drawn ? found.inverses[i] * static_cast<float>(every) : 1.0f);
      }
    }
  }
}

}  // namespace retrieval
