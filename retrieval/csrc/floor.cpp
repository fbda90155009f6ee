#include "floor.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "sample.h"

namespace retrieval {
namespace {

constexpr int kProbes = 16;                // keys rescored to find the threshold

Queries one_query(const Unit& unit, int h) {
  const int at = h * unit.queries.head_dim;
  return {unit.queries.values + at, unit.queries.bf16 != nullptr ? unit.queries.bf16 + at : nullptr, 1,
          unit.queries.head_dim};
}

// Blocks that were scanned, counted through all scans, and the best bound of each, as a score.
struct Tops {
  List<float> bounds;
  List<std::int32_t> blocks;
};

struct Place {
  std::uint32_t scan;
  std::int32_t position;
};

// Keys by their bounds.
struct Probes {
  List<float> bounds;
  List<Place> places;

  void resize(std::size_t count) {
    bounds.resize(count);
    places.resize(count);
  }
};

// What a thread's calls look at, so that lists keep their room.
struct Lists {
  Tops tops;
  Probes probes;
  List<std::int32_t> positions;
  List<float> scores;
};

void read_tops(const Unit& unit, int h, Tops& tops) {
  std::int64_t num_blocks = 0;
  for (const Scan& scan : unit.scans) num_blocks += scan.num_chunks * kBlocksPerChunk;
  tops.bounds.resize(static_cast<std::size_t>(num_blocks));
  tops.blocks.resize(static_cast<std::size_t>(num_blocks));
  std::size_t count = 0;
  std::int32_t block = 0;
  for (const Scan& scan : unit.scans) {
    const std::int16_t* found = scan.tops + h * scan.tops_stride();
    for (std::int64_t c = 0; c < scan.num_chunks; ++c, found += kBlocksPerChunk, block += kBlocksPerChunk) {
      const std::uint32_t chosen = scan.chosen[c];
      if (chosen == 0) continue;
      const float factor = scan.bound_unit(c, h);
      for (int b = 0; b < kBlocksPerChunk; ++b) {
        tops.bounds[count] = scan.query.base[h] + factor * static_cast<float>(found[b]);
        tops.blocks[count] = block + b;
        count += (chosen >> (b * kBlockGroups) & ((1u << kBlockGroups) - 1)) != 0 ? 1 : 0;
      }
    }
  }
  tops.bounds.resize(count);
  tops.blocks.resize(count);
}

// A value that at least `wanted` of the values reach, of which there are more, and hardly more than that. By halves: to
// count takes a few vector instructions, to sort mispredicted branches.
float reached_by(const List<float>& values, std::size_t wanted) {
  const auto num = static_cast<int>(values.size());
  float low = *std::min_element(values.begin(), values.end()), high = kernels().maximum(values.data(), num);
  for (int turn = 0; turn < 16 && low < high; ++turn) {
    const float middle = low + 0.5f * (high - low);
    float sum;
    const auto reaching = static_cast<std::size_t>(num - kernels().below(values.data(), num, middle, &sum));
    (reaching >= wanted ? low : high) = middle;
    if (reaching >= wanted && reaching <= wanted + wanted / 8) break;
  }
  return low;
}

// A bound that about `wanted` keys or more reach: each block's best passes the least of the wanted tops.
float probe_bound(const Unit& unit, int h, const Tops& tops, std::size_t wanted) {
  if (tops.bounds.size() > wanted) return reached_by(tops.bounds, wanted);
  if (tops.bounds.empty()) return -kInfinity;
  // Few blocks: go down from the least top in growing steps until enough keys pass.
  const auto [least, most] = std::minmax_element(tops.bounds.begin(), tops.bounds.end());
  float bound = *least, step = std::max(*most - *least, 1e-3f * std::fabs(*most));
  for (int turn = 0; turn < 8 && step > 0.0f; ++turn) {
    std::size_t count = 0;
    for (const Scan& scan : unit.scans) {
      for (std::int64_t c = 0; c < scan.num_chunks; ++c) {
        const int threshold = scan.threshold(c, h, bound);
        if (scan.chosen[c] == 0 || threshold > 32767) continue;
        std::uint64_t masks[kChunkGroups];
        kernels().select(scan.bounds + h * scan.stride() + c * kChunkKeys, kChunkGroups,
                         static_cast<std::int16_t>(threshold), masks);
        for_each_bit(scan.chosen[c], [&](int g) {
          if (masks[g] != 0) count += static_cast<std::size_t>(__builtin_popcountll(masks[g] & scan.visible(c, g)));
        });
      }
    }
    if (count >= wanted) return bound;
    bound -= step;
    step *= 2.0f;
  }
  return -kInfinity;
}

// Keeps the best probes, `wanted` or somewhat more; rest: raised to what all others have at most.
void cut(Probes& probes, std::size_t wanted, float& rest) {
  const std::size_t count = probes.bounds.size();
  if (count <= wanted) return;
  float *bounds = probes.bounds.data(), least = reached_by(probes.bounds, wanted);
  Place* places = probes.places.data();
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const float bound = bounds[i];
    bounds[kept] = bound;
    places[kept] = places[i];
    kept += bound >= least ? 1 : 0;
  }
  if (kept > 2 * wanted) {  // too many are equal
    kept = 2 * wanted;
    least = kernels().maximum(bounds, static_cast<int>(kept));
  }
  rest = std::max(rest, least);
  probes.resize(kept);
}

// Keys of a block whose bounds reach `rest`.
void read_block(const Unit& unit, int h, std::size_t s, std::int64_t block, float rest, Probes& probes) {
  const Scan& scan = unit.scans[s];
  const std::int64_t c = block / kBlocksPerChunk, first_key = scan.first_key(0) + block * kBlockKeys;
  const int threshold = scan.threshold(c, h, rest);
  if (threshold > 32767) return;
  const std::int16_t* bounds = scan.bounds + h * scan.stride() + block * kBlockKeys;
  const float factor = scan.bound_unit(c, h);
  const auto first_group = static_cast<int>(block % kBlocksPerChunk * kBlockGroups);
  constexpr std::uint32_t kWhole = (1u << kBlockGroups) - 1;
  const std::uint32_t scanned = scan.chosen[c] >> first_group & kWhole;
  std::uint64_t masks[kBlockGroups] = {};
  if (scanned == kWhole) {
    kernels().select(bounds, kBlockGroups, static_cast<std::int16_t>(threshold), masks);
  } else {
    for_each_bit(scanned, [&](int g) {
      kernels().select(bounds + g * kGroupKeys, 1, static_cast<std::int16_t>(threshold), &masks[g]);
    });
  }
  std::size_t count = probes.bounds.size();
  probes.resize(count + kBlockKeys);
  for (int g = 0; g < kBlockGroups; ++g) {
    if (masks[g] == 0) continue;
    for_each_bit(masks[g] & scan.visible(c, first_group + g), [&](int i) {
      const std::int64_t at = std::int64_t{g} * kGroupKeys + i;
      probes.bounds[count] = scan.query.base[h] + factor * static_cast<float>(bounds[at]);
      probes.places[count++] = {static_cast<std::uint32_t>(s), static_cast<std::int32_t>(first_key + at)};
    });
  }
  probes.resize(count);
}

void score_probes(const Unit& unit, int h, Lists& lists) {
  const Queries query = one_query(unit, h);
  lists.scores.resize(lists.probes.places.size());
  std::size_t done = 0;
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    lists.positions.clear();
    for (const Place& place : lists.probes.places) {
      if (place.scan == s) lists.positions.push_back(place.position);
    }
    const auto count = static_cast<int>(lists.positions.size());
    kernels().score(query, unit.scans[s].part->key_rows(unit.kv_head), lists.positions.data(), 0, count,
                    lists.scores.data() + done, count);
    done += lists.positions.size();
  }
}

// Exact scores of the keys with the highest bounds, at least `wanted` if there are so many; all others have bounds of at
// most `rest`. Until the thread's next call.
List<float>& probe(const Unit& unit, int h, std::size_t wanted, float& rest) {
  thread_local Lists lists;
  auto& [tops, probes, positions, scores] = lists;
  probes.resize(0);
  read_tops(unit, h, tops);
  rest = probe_bound(unit, h, tops, wanted);
  std::size_t num_best = 0;
  for (std::size_t i = 0; i < tops.bounds.size(); ++i) {
    if (tops.bounds[i] < rest) continue;
    tops.bounds[num_best] = tops.bounds[i];
    tops.blocks[num_best++] = tops.blocks[i];
  }
  tops.bounds.resize(num_best);
  // The best block first: where neighbours are alike, it soon tells what the others must reach.
  const auto best = std::max_element(tops.bounds.begin(), tops.bounds.end());
  if (num_best > 0) std::swap(tops.blocks[0], tops.blocks[static_cast<std::size_t>(best - tops.bounds.begin())]);
  for (std::size_t i = 0; i < num_best; ++i) {
    std::int64_t block = tops.blocks[i];
    std::size_t s = 0;
    for (; block >= unit.scans[s].num_chunks * kBlocksPerChunk; ++s) block -= unit.scans[s].num_chunks * kBlocksPerChunk;
    read_block(unit, h, s, block, rest, probes);
    if (probes.bounds.size() > 6 * wanted) cut(probes, 2 * wanted, rest);
  }
  cut(probes, 2 * wanted, rest);
  score_probes(unit, h, lists);
  return scores;
}

}  // namespace

float floor_of(float best, List<float>& scores, int k, const Budget& budget, float scale) {
  const float floor = k > 0 ? kInfinity : best - budget.beta / scale;
  const auto least = static_cast<std::size_t>(k > 0 ? k : budget.min_keys);
  if (k == 0 && least <= 1) return floor;  // the best key passes anyway
  if (least > scores.size()) return -kInfinity;  // fewer than asked for: all of them
  const auto nth = scores.begin() + static_cast<std::ptrdiff_t>(least - 1);
  std::nth_element(scores.begin(), nth, scores.end(), std::greater<float>());
  return std::min(floor, *nth);
}

// The keys with the highest bounds are scored exactly. What they reach is a floor that the rest must
// pass: the k-th best score, or beta nats below the best.
void find_floor(Unit& unit, int h, int k, const Budget& budget, float scale, bool may_draw) {
  const auto wanted = static_cast<std::size_t>(std::max({k, budget.min_keys, kProbes}));
  unit.best[h] = unit.floor[h] = unit.listed[h] = -kInfinity;
  unit.draws[h] = 0.0f;
  for (const Partial& partial : unit.partials) unit.best[h] = std::max(unit.best[h], partial.top[h]);
  std::int64_t num_visible = 0;
  for (const Scan& scan : unit.scans) num_visible += scan.end - scan.begin;
  if (num_visible <= 4 * static_cast<std::int64_t>(wanted)) return;  // score them all
  float rest = kInfinity;
  List<float>& scores = probe(unit, h, wanted, rest);
  unit.num_probed[h] += static_cast<std::int64_t>(scores.size());
  for (const float score : scores) unit.best[h] = std::max(unit.best[h], score);
  unit.floor[h] = unit.listed[h] = floor_of(unit.best[h], scores, k, budget, scale);
  if (k > 0 || budget.rest <= 0.0f || !may_draw) return;
  float known = 0.0f;
  for (const float score : scores) known += std::exp(scale * (score - unit.best[h]));
  for (const Partial& partial : unit.partials) {
    if (partial.sum[h] > 0.0f) known += partial.sum[h] * std::exp(scale * (partial.top[h] - unit.best[h]));
  }
  look_around(unit, h, known, rest, budget, scale);
  unit.listed[h] = listed_from(unit, h, unit.best[h], budget, scale);
}

// A bound lies z = `deviations` deviations s of an estimate above it, so that the best key is hardly ever missed. A key t
// nats below it weighs e^-t and may be missed e^(t/2) times as often, which allows for there being more of such keys: the
// tail of a Gaussian goes as e^(-z^2 / 2), so sqrt(z^2 - t) deviations will do for it, and a bound that is t - s (z -
// sqrt(z^2 - t)) nats below the best key. What is listed is the lowest of these, over t up to beta.
float listed_from(const Unit& unit, int h, float best, const Budget& budget, float scale) {
  if (best == -kInfinity) return -kInfinity;
  const float z = budget.deviations, half = 0.5f * scale * unit.spread[h];
  const float root = std::clamp(std::sqrt(std::max(0.0f, z * z - budget.beta)), half, std::max(half, z));
  const float t = std::max(0.0f, z * z - root * root);
  return best - (t - 2.0f * half * (z - std::min(root, z))) / scale;
}

// What a drawing head draws weighs something even beside that best key.
bool still_draws(const Unit& unit, int h, float best, const Budget& budget, float scale) {
  return unit.total[h] * std::exp(scale * (unit.reference[h] - best)) > budget.rest;
}

void look_for_best(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& in, const Budget& budget,
                   float scale, Found& found) {
  constexpr float kLikely = 0.8f;  // of the deviations: the estimate of a key that may be better
  for (int h = 0; h < unit.queries.num; ++h) {
    const int likely = scan.threshold(c, h, found.best[h] + kLikely * budget.deviations * unit.spread[h]);
    std::int32_t positions[kBlocksPerChunk];
    int count = 0;
    for (int b = 0; b < kBlocksPerChunk; ++b) {
      const std::int16_t top = in.tops[h * in.tops_stride + b];
      if ((scan.chosen[c] >> b * kBlockGroups & ((1u << kBlockGroups) - 1)) == 0 || top < likely) continue;
      std::uint64_t masks[kBlockGroups];
      kernels().select(in.bounds + h * in.stride + b * kBlockKeys, kBlockGroups, top, masks);
      for (int g = 0; g < kBlockGroups; ++g) {
        const std::uint64_t mask = masks[g] & scan.visible(c, b * kBlockGroups + g);
        if (mask == 0) continue;
        const std::int64_t first = scan.first_key(c) + b * kBlockKeys + g * kGroupKeys;
        positions[count++] = static_cast<std::int32_t>(first + __builtin_ctzll(mask));
        break;
      }
    }
    if (count == 0) continue;
    float scores[kBlocksPerChunk];
    kernels().score(one_query(unit, h), scan.part->key_rows(unit.kv_head), positions, 0, count, scores, count);
    found.num_probed[h] += count;
    const float best = *std::max_element(scores, scores + count);
    if (best <= found.best[h]) continue;
    found.best[h] = best;
    found.listed[h] = listed_from(unit, h, best, budget, scale);
    found.draws[h] = found.draws[h] && still_draws(unit, h, best, budget, scale);
  }
}

void settle_best(Unit& unit, int h, const Budget& budget, float scale) {
  const float known = unit.best[h];
  for (const Scan& scan : unit.scans) {
    for (const Found& found : scan.found) {
      unit.num_probed[h] += found.num_probed[h];
      unit.best[h] = std::max(unit.best[h], found.best[h]);
    }
  }
  if (unit.best[h] == known) return;
  if (unit.draws[h] > 0.0f) {
    if (still_draws(unit, h, unit.best[h], budget, scale)) return;
    unit.draws[h] = 0.0f;
  }
  unit.is_raised = true;
  unit.floor[h] = unit.best[h] - budget.beta / scale;
  unit.listed[h] = listed_from(unit, h, unit.best[h], budget, scale);
}

}  // namespace retrieval
