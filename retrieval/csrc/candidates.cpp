#include "candidates.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "luck.h"

namespace retrieval {
namespace {

// Bounds [num][stride] of the keys that were found in chunk c of a scan, of which the first is found.positions[first].
struct FoundBounds {
  const Unit& unit;
  const Scan& scan;
  const std::int32_t* positions;
  const std::int16_t* kept;  // [num][count]
  std::int64_t c;
  int count;

  std::int16_t of(int h, int n) const {
    return unit.is_long ? kept[h * count + n] : scan.bounds[h * scan.stride() + positions[n] - scan.first_key(0)];
  }
};

// visit(found, first, bounds) for every chunk of every list.
template <typename Visit>
void for_each_chunk(Unit& unit, Visit visit) {
  for (Scan& scan : unit.scans) {
    for (const Found& found : scan.found) {
      const std::int16_t* bounds = found.bounds.data();
      std::size_t first = 0;
      for (const int count : found.counts) {
        if (count == 0) continue;
        const std::int32_t* positions = found.positions.data() + first;
        const std::int64_t c = *positions / kChunkKeys - scan.first_chunk;
        visit(found, first, FoundBounds{unit, scan, positions, bounds, c, count});
        first += static_cast<std::size_t>(count);
        bounds += unit.queries.num * count;
      }
    }
  }
}

// Largest distances of the bounds of keys above what makes their head take them.
void find_slacks(const FoundBounds& bounds, float* slacks) {
  const Unit& unit = bounds.unit;
  const Scan& scan = bounds.scan;
  std::fill_n(slacks, bounds.count, -kInfinity);
  for (int h = 0; h < unit.queries.num; ++h) {
    const float least = unit.draws[h] > 0.0f ? std::min(unit.floor[h], unit.heavy[h]) : unit.listed[h];
    // As threshold rounds down, so a bound in the last step counts as reaching it.
    const float step = scan.bound_unit(bounds.c, h), base = scan.query.base[h] - least + 2.0f * step;
    for (int n = 0; n < bounds.count; ++n) {
      slacks[n] = std::max(slacks[n], base + step * static_cast<float>(bounds.of(h, n)));
    }
  }
}

// Room for so many more.
template <typename T>
T* extend(List<T>& list, int count) {
  list.resize(list.size() + static_cast<std::size_t>(count));
  return list.data() + list.size() - count;
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

void Refiner::refine(std::int64_t c, const ChunkBounds& in) {
  Caught& caught = caught_[turn_];
  set_takings(c);
  caught.chunk = c;
  caught.count = take(c, in, {caught.slots, caught.factors, caught.bounds});
  for (int h = 0; h < unit_.queries.num; ++h) {
    const Lot& lot = takings_[h].lot;
    caught.odds[h] = {lot.draw, takings_[h].draws ? lot.step : 0.0f, unit_.drawn_weight[h]};
  }
  turn_ = 1 - turn_;
  list(caught_[turn_]);
}

void Refiner::list(Caught& caught) {
  const int num = unit_.queries.num, count = caught.count;
  if (count < 0) return;
  caught.count = -1;
  found_.counts.push_back(count);
  if (count == 0) return;
  std::int32_t* positions = extend(found_.positions, count);
  float *inverses = extend(found_.inverses, count), *weights[kMaxGroup];
  const auto first = static_cast<std::int32_t>(scan_.first_key(caught.chunk));
  for (int n = 0; n < count; ++n) positions[n] = first + caught.slots[n];
  if (unit_.is_long) {
    std::int16_t* bounds = extend(found_.bounds, num * count);
    for (int h = 0; h < num; ++h) std::copy_n(caught.bounds + h * kTakenStride, count, bounds + h * count);
  }
  if (!unit_.draws_any()) {
    std::fill_n(inverses, count, 1.0f);  // no group stands for others either
    return;
  }
  for (int h = 0; unit_.is_clear && h < num; ++h) weights[h] = extend(found_.weights[h], count);
  // Groups may have been drawn, and so whatever is found in them.
  const float* log_times = unit_.chooses ? scan_.log_times + caught.chunk * kChunkGroups : nullptr;
  kernels().chances({caught.slots, caught.factors, caught.bounds}, num, count, caught.odds, log_times, inverses,
                    unit_.is_clear ? weights : nullptr);
  found_.num_drawn += count - std::count(inverses, inverses + count, 1.0f);
}

void drop(const Unit& unit, const Scan& scan, Found& found) {
  float slacks[kChunkKeys];
  const bool draws = unit.draws_any();
  const std::int16_t* bounds = found.bounds.data();
  std::int16_t* kept_bounds = found.bounds.data();
  std::size_t first = 0, kept = 0;
  for (int& count : found.counts) {
    if (count == 0) continue;
    const std::int32_t* positions = found.positions.data() + first;
    find_slacks({unit, scan, positions, bounds, *positions / kChunkKeys - scan.first_chunk, count}, slacks);
    int staying[kChunkKeys], num_staying = 0;
    for (int n = 0; n < count; ++n) {
      staying[num_staying] = n;
      const float inverse = found.inverses[first + static_cast<std::size_t>(n)];
      num_staying += (draws && inverse != 1.0f) || (slacks[n] >= 0.0f && inverse != 0.0f) ? 1 : 0;
    }
    for (int n = 0; n < num_staying; ++n) {
      const std::size_t from = first + static_cast<std::size_t>(staying[n]), to = kept + static_cast<std::size_t>(n);
      found.positions[to] = found.positions[from];
      found.inverses[to] = found.inverses[from];
      for (int h = 0; unit.is_clear && h < unit.queries.num; ++h) found.weights[h][to] = found.weights[h][from];
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
  for (const Scan& scan : unit.scans) {
    for (const Found& found : scan.found) num_found += found.positions.size();
  }
  if (num_found <= limit) return;
  std::vector<float> slacks(num_found), reached;
  std::size_t at = 0, num_drawn = 0;
  for_each_chunk(unit, [&](const Found& found, std::size_t first, const FoundBounds& bounds) {
    find_slacks(bounds, &slacks[at]);
    for (int n = 0; n < bounds.count; ++n, ++at) {
      if (found.inverses[first + static_cast<std::size_t>(n)] != 1.0f) {
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
    for (Found& found : scan.found) {
      const std::size_t here = found.positions.size();
      std::size_t kept = 0;
      for (std::size_t i = 0; i < here; ++i, ++at) {
        const bool is_drawn = found.inverses[i] != 1.0f;
        if (is_drawn ? turn++ % every != 0 : slacks[at] < least) continue;
        const float times = is_drawn ? static_cast<float>(every) : 1.0f;
        found.positions[kept] = found.positions[i];
        found.inverses[kept] = times * found.inverses[i];
        for (int h = 0; unit.is_clear && h < unit.queries.num; ++h) {
          found.weights[h][kept] = times * found.weights[h][i];
        }
        ++kept;
      }
      found.positions.resize(kept);
      found.inverses.resize(kept);
    }
  }
}

}  // namespace retrieval
