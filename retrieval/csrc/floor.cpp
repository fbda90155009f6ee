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

// The best bound of a block that was scanned, as a score.
struct Top {
  float bound;
  std::uint32_t scan;
  std::int32_t block;
};

std::vector<Top> read_tops(const Unit& unit, int h) {
  std::vector<Top> tops;
  std::int64_t num_blocks = 0;
  for (const Scan& scan : unit.scans) num_blocks += scan.num_chunks * kBlocksPerChunk;
  tops.reserve(static_cast<std::size_t>(num_blocks));
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    const Scan& scan = unit.scans[s];
    for (std::int64_t c = 0; c < scan.num_chunks; ++c) {
      if (scan.chosen[c] == 0) continue;
      const float factor = scan.bound_unit(c, h);
      const std::int64_t first = c * kBlocksPerChunk;
      for (int b = 0; b < kBlocksPerChunk; ++b) {
        if ((scan.chosen[c] >> (b * kBlockGroups) & ((1u << kBlockGroups) - 1)) == 0) continue;
        const std::int16_t found = scan.tops[h * scan.tops_stride() + first + b];
        tops.push_back({scan.query.base[h] + factor * static_cast<float>(found), static_cast<std::uint32_t>(s),
                        static_cast<std::int32_t>(first + b)});
      }
    }
  }
  return tops;
}

// A value that at least `wanted` of the values reach, of which there are more, and hardly more than that. By halves: to
// count takes a few vector instructions, to sort mispredicted branches.
float reached_by(const std::vector<float>& values, std::size_t wanted) {
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
float probe_bound(const Unit& unit, int h, const std::vector<Top>& blocks, std::size_t wanted) {
  std::vector<float> tops;
  tops.reserve(blocks.size());
  for (const Top& top : blocks) tops.push_back(top.bound);
  if (tops.size() > wanted) return reached_by(tops, wanted);
  if (tops.empty()) return -kInfinity;
  // Few blocks: go down from the least top in growing steps until enough keys pass.
  const auto [least, most] = std::minmax_element(tops.begin(), tops.end());
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

struct Place {
  std::uint32_t scan;
  std::int32_t position;
};

// Keys by their bounds.
struct Probes {
  std::vector<float> bounds;
  std::vector<Place> places;

  explicit Probes(std::size_t room) {
    bounds.reserve(room);
    places.reserve(room);
  }
  // Keeps the best, `wanted` or somewhat more; rest: raised to the bounds of all others.
  void cut(std::size_t wanted, float& rest) {
    if (bounds.size() <= wanted) return;
    const float least = reached_by(bounds, wanted);
    std::size_t kept = 0;
    for (std::size_t i = 0; i < bounds.size(); ++i) {
      const bool stays = bounds[i] >= least && kept < 2 * wanted;
      rest = stays ? rest : std::max(rest, bounds[i]);
      bounds[kept] = bounds[i];
      places[kept] = places[i];
      kept += stays ? 1 : 0;
    }
    bounds.resize(kept);
    places.resize(kept);
  }
};

std::vector<float> score_places(const Unit& unit, int h, const std::vector<Place>& places) {
  const Queries query = one_query(unit, h);
  std::vector<float> scores(places.size());
  std::vector<std::int32_t> positions;
  std::size_t done = 0;
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    positions.clear();
    for (const Place& place : places) {
      if (place.scan == s) positions.push_back(place.position);
    }
    const auto count = static_cast<int>(positions.size());
    kernels().score(query, unit.scans[s].part->key_rows(unit.kv_head), positions.data(), 0, count, scores.data() + done,
                    count);
    done += positions.size();
  }
  return scores;
}

// Exact scores of the keys with the highest bounds, at least `wanted` if there are so many; all others have bounds of at
// most `rest`.
std::vector<float> probe(const Unit& unit, int h, std::size_t wanted, float& rest) {
  Probes probes(16 * wanted);
  std::vector<Top> tops = read_tops(unit, h);
  rest = probe_bound(unit, h, tops, wanted);
  // Best blocks first: they soon tell what the others must reach.
  tops.erase(std::remove_if(tops.begin(), tops.end(), [&](const Top& top) { return top.bound < rest; }), tops.end());
  std::sort(tops.begin(), tops.end(), [](const Top& a, const Top& b) { return a.bound > b.bound; });
  for (const Top& top : tops) {
    if (top.bound < rest) break;
    const Scan& scan = unit.scans[top.scan];
    const std::int64_t c = top.block / kBlocksPerChunk;
    const int threshold = scan.threshold(c, h, rest);
    if (threshold > 32767) continue;
    const std::int16_t* block = scan.bounds + h * scan.stride() + std::int64_t{top.block} * kBlockKeys;
    const float factor = scan.bound_unit(c, h);
    const auto first_group = static_cast<int>(top.block % kBlocksPerChunk * kBlockGroups);
    const std::int64_t first_key = scan.first_key(0) + std::int64_t{top.block} * kBlockKeys;
    for_each_bit(scan.chosen[c] >> first_group & ((1u << kBlockGroups) - 1), [&](int g) {
      const std::int64_t start = std::int64_t{g} * kGroupKeys;
      std::uint64_t mask;
      kernels().select(block + start, 1, static_cast<std::int16_t>(threshold), &mask);
      if (mask == 0) return;
      for_each_bit(mask & scan.visible(c, first_group + g), [&](int i) {
        probes.bounds.push_back(scan.query.base[h] + factor * static_cast<float>(block[start + i]));
        probes.places.push_back({top.scan, static_cast<std::int32_t>(first_key + start + i)});
      });
    });
    if (probes.bounds.size() > 8 * wanted) probes.cut(2 * wanted, rest);  // from then on better ones are looked for
  }
  probes.cut(2 * wanted, rest);
  return score_places(unit, h, probes.places);
}

}  // namespace

float floor_of(float best, std::vector<float>& scores, int k, const Budget& budget, float scale) {
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
  std::vector<float> scores = probe(unit, h, wanted, rest);
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
