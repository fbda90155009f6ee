#include "sample.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace retrieval {
namespace {

constexpr float kDrawnError = 0.0055f;     // of the whole weight, that the drawn part may be off by where that is cheap,
                                          // of up to 2^17 keys
constexpr float kLargestSpacing = 0.001f;  // of the whole weight, that a drawn key may stand for where that is cheap
constexpr float kLeastGain = 4.0f;         // spacing over the weight of what is listed
constexpr float kClearVariance = 0.25f;    // nats squared of estimates; many weights by them are as good as exact ones
constexpr float kLargestVariance = 4.0f;   // nats squared
constexpr float kHeavy = 0.02f;            // share of all weight, from which on no key should be left to chance
constexpr float kDoubt = 2.5f;             // deviations that its estimate may be too low; then its chance is still good

// Weights of one head, relative to its best key.
struct Sample {
  std::vector<float> weights;      // [groups * kGroupKeys], by estimate; 0 where a key is not searched or not counted
  float per_key = 0.0f;            // keys that each of them stands for

  // Of all keys: those of at least that weight, and what the others weigh together.
  std::pair<float, float> divide(float weight) const {
    const auto num = static_cast<int>(weights.size());
    float sum;
    const int num_below = kernels().below(weights.data(), num, weight, &sum);
    return {per_key * static_cast<float>(num - num_below), per_key * sum};
  }
};

// Of an estimated logit of head h, in nats squared.
float estimate_variance(const Unit& unit, int h, float scale) {
  float variance = 0.0f;
  int num_groups = 0;
  for_sample_groups(unit, [&](const Scan& scan, std::int64_t c, int g) {
    const CodeGroups& keys = scan.chunk(c).keys;
    const std::int16_t* factors = keys.factors + g * kGroupKeys;
    std::int32_t squares = 0;  // of factors without their last bits, or they would not fit
    for (int i = 0; i < kGroupKeys; ++i) squares += (factors[i] >> 4) * (factors[i] >> 4);
    const float deviation = scale * scan.query.keys.deviation[h] * keys.unit / 2048.0f;
    variance += deviation * deviation * static_cast<float>(squares) / kGroupKeys;
    ++num_groups;
  });
  return num_groups > 0 ? variance / static_cast<float>(num_groups) : 0.0f;
}

// Keys with bounds above `rest` have been scored exactly, and do not count.
Sample take_sample(const Unit& unit, int h, float rest, float scale) {
  Sample sample;
  sample.weights.reserve(2 * kSampleGroups * kGroupKeys);
  std::int64_t num_visible = 0, num_sampled = 0;
  for (const Scan& scan : unit.scans) num_visible += scan.end - scan.begin;
  for_sample_groups(unit, [&](const Scan& scan, std::int64_t c, int g) {
    const CodeGroups& keys = scan.chunk(c).keys;
    const std::int64_t slot = std::int64_t{g} * kGroupKeys;
    const std::int16_t *bounds = scan.bounds + h * scan.stride() + c * kChunkKeys + slot, *factors = keys.factors + slot;
    const int seen_from = scan.threshold(c, h, rest) + 2;  // above the floor of what the threshold rounds down
    std::uint64_t seen = 0;
    if (seen_from <= 32767) kernels().select(bounds, 1, static_cast<std::int16_t>(std::max(seen_from, -32768)), &seen);
    const std::uint64_t visible = scan.visible(c, g);
    sample.weights.resize(sample.weights.size() + kGroupKeys);
    kernels().weigh(bounds, factors, scan.weigher(c, h, scale, unit.best[h]), visible & ~seen,
                    &sample.weights[sample.weights.size() - kGroupKeys]);
    num_sampled += __builtin_popcountll(visible);
  });
  if (num_sampled == 0) return sample;
  sample.per_key = static_cast<float>(num_visible) / static_cast<float>(num_sampled);
  return sample;
}

// Neighbours are alike: a group that outweighs all other groups is the one that was looked for, not one of many.
// Its weight, if there is one, and it no longer counts.
float put_aside(std::vector<float>& weights) {
  float total = 0.0f, largest = 0.0f;
  auto outlier = weights.begin();
  for (auto group = weights.begin(); group != weights.end(); group += kGroupKeys) {
    float sum;
    kernels().below(&*group, kGroupKeys, kInfinity, &sum);
    total += sum;
    if (sum > largest) {
      largest = sum;
      outlier = group;
    }
  }
  if (largest <= total - largest) return 0.0f;
  std::fill(outlier, outlier + kGroupKeys, 0.0f);
  return largest;
}

// Whether a head that does not look widely may draw all the same.
bool can_draw(const Unit& unit, int h, float variance, float scale) {
  return unit.is_long && variance <= kClearVariance && scale * unit.own(h) <= kLargestOwn;
}

}  // namespace

// The sample tells how many keys pass the floor and what those below weigh. Too many, or too much: the head looks
// widely. It then takes about rest_keys keys, each with a chance in proportion to its weight, and those for certain
// whose chance would be 1 (sampling in proportion to size; Hajek 1964). Any head takes fewer where these are as good.
void look_around(Unit& unit, int h, float known, float rest, const Budget& budget, float scale) {
  const float variance = estimate_variance(unit, h, scale);
  unit.spread[h] = std::sqrt(variance) / scale;
  // Where estimates are off by more than that, chances by weight would be chances by error; their mean weight is
  // too large by e^(variance / 2).
  if (variance > kLargestVariance) return;
  Sample sample = take_sample(unit, h, rest, scale);
  if (!(sample.per_key > 0.0f)) return;
  known += put_aside(sample.weights);
  const float deflation = std::exp(-0.5f * variance);
  const float floor_weight = std::exp(scale * (unit.floor[h] - unit.best[h]));
  const auto [count, inflated] = sample.divide(floor_weight);
  const float below = inflated * deflation, total = known + sample.divide(kInfinity).second * deflation;
  const auto wanted = static_cast<float>(std::min(budget.rest_keys, budget.max_keys));
  const bool is_wide = count > wanted || below > budget.rest * (known + below);
  if (!is_wide && !can_draw(unit, h, variance, scale)) return;
  float spacing = sample.divide(kInfinity).second / wanted;
  for (int turn = 0; turn < 3; ++turn) {
    const auto [above, under] = sample.divide(spacing);
    spacing = under / std::max(wanted - above, 0.25f * wanted);
  }
  // Each draw stands for `spacing`, so the drawn weight is off by about the root of spacing times itself, and by the
  // errors of estimates, which make of it e^variance times as much. In long searches as much of it is left to chance as
  // that allows.
  const auto error = [&](float each) { return std::sqrt(each * sample.divide(each).second) / (deflation * total); };
  const float allowed = kDrawnError * std::cbrt(unit.length());
  float sparing = std::max(floor_weight, spacing);
  for (int turn = 0; unit.is_long && turn < 4; ++turn) {
    const float ratio = allowed / std::max(error(sparing), 1e-9f);
    sparing = std::min(std::sqrt(kLargestSpacing * total * sparing), sparing * ratio);
  }
  if (unit.is_long) spacing = std::max(spacing, sparing);
  if (!(spacing > (is_wide ? 0.0f : kLeastGain * floor_weight))) return;
  unit.draws[h] = 1.0f / spacing;
  unit.total[h] = total;
  unit.reference[h] = unit.best[h];
  unit.floor[h] = unit.best[h] + std::log(spacing) / scale;
  unit.heavy[h] = unit.best[h] + std::log(kHeavy * unit.total[h]) / scale +
                  std::max(0.0f, budget.deviations - kDoubt) * unit.spread[h];
}

bool are_clear(const Unit& unit, float scale) {
  for (int h = 0; h < unit.queries.num; ++h) {
    if (estimate_variance(unit, h, scale) > kClearVariance) return false;
  }
  return true;
}

// Errors of estimates make weights e^(variance / 2) too large on average. What else they add to the error of a sum is about
// what they save: an exact weight over a chance by estimate spreads it e^variance times as much as one by estimate. But keys
// that are alike err alike; at twice the variance the error of the output was a fifth larger.
void settle_weights(Unit& unit, float scale) {
  unit.is_clear = unit.draws_any();
  for (int h = 0; h < unit.queries.num; ++h) {
    if (unit.draws[h] == 0.0f) continue;
    const float variance = scale * unit.spread[h] * (scale * unit.spread[h]);
    unit.is_clear &= variance <= kClearVariance;
    unit.drawn_weight[h] = std::exp(-0.5f * variance) / unit.draws[h];
  }
}

}  // namespace retrieval
