#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "luck.h"

namespace retrieval {
namespace {

// How one head takes keys of one chunk.
struct Taking {
  Lot lot;                    // its draw goes by the bound alone where the head does not draw
  float never = -kInfinity;   // 0 where it draws
  int least_top = 0;          // below it a block holds nothing
  int sure = 0;               // bounds that are not left to chance

  bool draws() const { return lot.step > 0.0f; }
  // Logarithm of the chance; 0 and more: taken for certain.
  float log_chance(std::int16_t bound, std::int16_t factor) const {
    const float drawn = lot.log_chance(bound, factor) + never;
    return bound >= sure ? 0.0f : drawn;
  }
};

Taking how_to_take(const Unit& unit, const Scan& scan, std::int64_t c, int h, float listed, float scale) {
  Taking taking;
  if (unit.draws[h] == 0.0f) {
    taking.sure = taking.least_top = scan.threshold(c, h, listed);
    taking.lot.draw.floor = to_word(static_cast<float>(taking.sure));
    return taking;
  }
  taking.lot = lot_above(unit.floor[h], scan.query.base[h], scan.bound_unit(c, h), scan.query.keys, h, scale);
  taking.never = 0.0f;
  taking.least_top = -32768;
  taking.sure = scan.threshold(c, h, unit.heavy[h]);
  return taking;
}

// What a bound of a head must reach for its key to stay.
float least_bound(const Unit& unit, int h) {
  return unit.draws[h] > 0.0f ? std::min(unit.floor[h], unit.heavy[h]) : unit.listed[h];
}

// Largest distance of a key's bounds above what they must reach.
float slack_of(const Unit& unit, const Scan& scan, std::int64_t c, const std::int16_t* bounds) {
  float slack = -kInfinity;
  for (int h = 0; h < unit.queries.num; ++h) {
    const float bound = scan.query.base[h] + scan.bound_unit(c, h) * static_cast<float>(bounds[h]);
    slack = std::max(slack, bound - least_bound(unit, h));
  }
  return slack;
}

// Slots of the keys of a chunk that any head takes, to be looked at one by one.
int take(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& in, const Taking* takings,
         const std::int16_t* luck, std::int16_t* slots) {
  const int num = unit.queries.num;
  const std::int16_t* factors = scan.chunk(c).keys.factors;
  Draw usual[kMaxGroup], draws[kMaxGroup];
  for (int h = 0; h < num; ++h) usual[h] = takings[h].lot.draw;
  int count = 0;
  for (int b = 0; b < kBlocksPerChunk; ++b) {
    const std::uint32_t chosen = scan.chosen[c] & (((1u << kBlockGroups) - 1) << b * kBlockGroups);
    bool is_needed = false, is_heavy = false;
    for (int h = 0; h < num; ++h) {
      const int top = in.tops[h * in.tops_stride + b];
      is_needed |= top >= takings[h].least_top;
      is_heavy |= takings[h].draws() && top >= takings[h].sure;
    }
    if (!is_needed) continue;
    for_each_bit(chosen, [&](int g) {
      const int slot = g * kGroupKeys;
      const float stands_for = scan.weight_of(c, g);
      if (stands_for > 1.0f) {
        const float log_times = std::log(stands_for);
        for (int h = 0; h < num; ++h) {
          draws[h] = usual[h];
          if (takings[h].draws()) draws[h].floor = takings[h].lot.floor_raised(log_times);
        }
      }
      std::uint64_t masks[kMaxGroup], any = 0;
      kernels().draw(in.bounds + slot, in.stride, num, factors + slot, luck + slot, stands_for > 1.0f ? draws : usual,
                     masks);
      for (int h = 0; h < num; ++h) any |= masks[h];
      for (int h = 0; is_heavy && h < num; ++h) {
        if (!takings[h].draws() || takings[h].sure > 32767) continue;
        kernels().select(in.bounds + h * in.stride + slot, 1, static_cast<std::int16_t>(takings[h].sure), masks);
        any |= masks[0];
      }
      for_each_bit(any & scan.visible(c, g), [&](int i) { slots[count++] = static_cast<std::int16_t>(slot + i); });
    });
  }
  return count;
}

}  // namespace

std::int64_t refine(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& in, const float* listed,
                    float scale, Found& found) {
  if (scan.chosen[c] == 0) return 0;
  const std::int16_t* factors = scan.chunk(c).keys.factors;
  const bool draws_any = unit.draws_any(), draws_groups = unit.chooses && draws_any;
  Taking takings[kMaxGroup];
  for (int h = 0; h < unit.queries.num; ++h) takings[h] = how_to_take(unit, scan, c, h, listed[h], scale);
  std::int16_t slots[kChunkKeys];
  float chances[kChunkKeys];
  const std::int64_t first = scan.first_key(c);
  const int count = take(unit, scan, c, in, takings, lucks_of_keys(unit.start + first), slots);
  int group = -1;
  float log_times = 0.0f;
  for (int n = 0; draws_any && n < count; ++n) {
    float chance = -kInfinity;
    for (int h = 0; h < unit.queries.num; ++h) {
      chance = std::max(chance, takings[h].log_chance(in.bounds[h * in.stride + slots[n]], factors[slots[n]]));
    }
    if (draws_groups && slots[n] / kGroupKeys != group) {
      group = slots[n] / kGroupKeys;
      log_times = std::log(scan.weight_of(c, group));
    }
    chances[n] = std::min(0.0f, chance + log_times);
  }
  if (draws_any) kernels().exponentiate(chances, count, 1.0f, 0.0f, -kInfinity);
  std::int64_t num_drawn = 0;
  for (int n = 0; n < count; ++n) {
    // The group may have been drawn, and so whatever is found in it.
    float inverse = scan.weight_of(c, slots[n] / kGroupKeys);
    if (draws_any) inverse /= std::max(chances[n], kLeastChance);
    num_drawn += inverse > 1.0f ? 1 : 0;
    found.keys.push_back({static_cast<std::int32_t>(first + slots[n]), inverse});
    for (int h = 0; h < unit.queries.num; ++h) found.bounds.push_back(in.bounds[h * in.stride + slots[n]]);
  }
  return num_drawn;
}

void keep(Unit& unit, std::size_t limit) {
  const auto num = static_cast<std::size_t>(unit.queries.num);
  std::size_t num_found = 0, num_drawn = 0;
  std::vector<float> slacks;
  for (Scan& scan : unit.scans) {
    for (Found& found : scan.found) {
      std::size_t kept = 0;
      std::int64_t chunk = -1;
      int least[kMaxGroup];
      for (std::size_t i = 0; i < found.keys.size(); ++i) {
        const std::int16_t* bounds = &found.bounds[i * num];
        const std::int64_t c = found.keys[i].position / kChunkKeys - scan.first_chunk;
        for (int h = 0; c != chunk && h < unit.queries.num; ++h) least[h] = scan.threshold(c, h, least_bound(unit, h));
        chunk = c;
        bool stays = found.keys[i].inverse > 1.0f;
        num_drawn += stays ? 1 : 0;
        for (std::size_t h = 0; h < num; ++h) stays |= bounds[h] >= least[h];
        found.keys[kept] = found.keys[i];
        std::copy_n(bounds, num, &found.bounds[kept * num]);
        kept += stays ? 1 : 0;
      }
      found.keys.resize(kept);
      num_found += kept;
    }
    scan.positions.reserve(num_found);
    scan.inverses.reserve(num_found);
  }
  const auto for_each = [&](auto visit) {
    for (Scan& scan : unit.scans) {
      for (const Found& found : scan.found) {
        for (std::size_t i = 0; i < found.keys.size(); ++i) visit(scan, found.keys[i], &found.bounds[i * num]);
      }
    }
  };
  const auto slack = [&](const Scan& scan, const Candidate& key, const std::int16_t* bounds) {
    return slack_of(unit, scan, key.position / kChunkKeys - scan.first_chunk, bounds);
  };
  float least = -kInfinity;
  std::size_t every = 1;
  if (num_found > limit) {
    for_each([&](const Scan& scan, const Candidate& key, const std::int16_t* bounds) {
      if (!(key.inverse > 1.0f)) slacks.push_back(slack(scan, key, bounds));
    });
    const std::size_t share = (limit + 1) / 2;
    every = std::max<std::size_t>(1, (num_drawn + share - 1) / share);
    const std::size_t most = limit - num_drawn / every;
    if (slacks.size() > most) {
      const auto nth = slacks.begin() + static_cast<std::ptrdiff_t>(most - 1);
      std::nth_element(slacks.begin(), nth, slacks.end(), std::greater<float>());
      least = *nth;
    }
  }
  std::size_t turn = every / 2;
  for_each([&](Scan& scan, const Candidate& key, const std::int16_t* bounds) {
    const bool is_drawn = key.inverse > 1.0f;
    if (num_found > limit && (is_drawn ? turn++ % every != 0 : slack(scan, key, bounds) < least)) return;
    scan.positions.push_back(key.position);
    scan.inverses.push_back(is_drawn ? key.inverse * static_cast<float>(every) : 1.0f);
  });
}

}  // namespace retrieval
