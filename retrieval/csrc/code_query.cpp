#include "code_query.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "rotation.h"
#include "summary.h"

namespace retrieval {

namespace {

constexpr int kMostWeights = (kMaxHeadDim * kMaxBits + kTableBits - 1) / kTableBits * kTableBits;

// What the bits of a code add to a sum, and how the sum becomes <u, q'>.
struct BitWeights {
  std::int16_t weights[kMostWeights] = {};
  float step = 0.0f;      // of a weight
  float least = 0.0f;     // <u, q'> = 2 step * sum + least, on average
  float rounding = 0.0f;  // and a deviation from that
};

// Of a mapped query. u is twice the code less the code of all ones, and bit p of a coordinate of the code is worth 2^p.
BitWeights weigh_bits(const float* query, CodeShape shape) {
  BitWeights out;
  float exact[kMostWeights] = {};
  const int num_tables_needed = num_tables(shape.num_pieces());
  for (int j = 0, i = 0; j < shape.dims; ++j) {
    for (int p = 0; p < shape.bits; ++p) exact[i++] = query[j] * static_cast<float>(1 << p);
  }
  float largest = 0.0f;
  for (int t = 0; t < num_tables_needed; ++t) {
    float sum = 0.0f;
    for (int i = t * kTableBits; i < (t + 1) * kTableBits; ++i) sum += std::fabs(exact[i]);
    largest = std::max(largest, sum);
  }
  // Rounding may add half a level for each bit.
  const float step = out.step = std::max(largest / static_cast<float>(kTableLevels - kTableBits / 2), 1e-30f);
  const float inverse = 1.0f / step;
  float squares = 0.0f, too_much = 0.0f;
  int lowest = 0;
  for (int i = 0; i < num_tables_needed * kTableBits; ++i) {
    const float level = exact[i] * inverse;
    const int weight = static_cast<int>(level + (level < 0.0f ? -0.5f : 0.5f));
    const float error = static_cast<float>(weight) - level;
    out.weights[i] = static_cast<std::int16_t>(weight);
    lowest += std::min(0, weight);
    squares += error * error;
    too_much += error;
  }
  const auto top_code = static_cast<float>((1 << shape.bits) - 1);
  // Half of all bits are set.
  out.least = step * (2.0f * static_cast<float>(lowest) - too_much) - top_code * std::accumulate(query, query + shape.dims, 0.0f);
  out.rounding = step * std::sqrt(squares);
  return out;
}

}  // namespace

CodeQuery prepare_query(const LayerCodes& codes, int head, const Queries& queries, float deviations) {
  const int dims = codes.head_dim();
  const HeadCodes& held = codes.head(head);
  const int num_coded = held.shape.dims;
  CodeQuery out;
  float coded_norm[kMaxGroup], mapped[kMaxGroup * kMaxHeadDim];
  apply_map(codes.query_map(head), queries.values, queries.num, dims, mapped);
  out.radius = own_radius(held, dims);
  own_deviations(held, mapped, queries.num, dims, out.own);
  for (int h = 0; h < queries.num; ++h) {
    const float *rotated = mapped + h * dims, *query = queries.values + h * dims;
    out.base[h] = std::inner_product(query, query + dims, held.centroid.data(), 0.0f);
    out.norm[h] = std::sqrt(std::inner_product(rotated, rotated + dims, rotated, 0.0f));
    coded_norm[h] = std::sqrt(std::inner_product(rotated, rotated + num_coded, rotated, 0.0f));
  }
  for (CodeReading* reading : {&out.keys, &out.means}) {
    const bool is_of_keys = reading == &out.keys;
    const CodeShape shape = is_of_keys ? held.shape : held.shape.of_means();
    const int tables = num_tables(shape.num_pieces());
    reading->tables = allocate_aligned(static_cast<std::size_t>(queries.num * tables * kTableBytes));
    const auto most = static_cast<float>(tables * kTableLevels);
    float offsets[kMaxGroup], largest = 1.0f;
    for (int h = 0; h < queries.num; ++h) {
      const float* rotated = mapped + h * dims;
      const BitWeights bits = weigh_bits(rotated, shape);
      kernels().tabulate(bits.weights, tables, reading->tables_of(h * tables));
      // |u| sqrt((1 - a^2) / (d - 1)) is 0.60 to 0.65 on average for 1 to 4 bits, give or take 0.05.
      constexpr float kMeanError = 0.63f, kLargeError = 0.7f;
      const float left_out = uncoded_deviation(is_of_keys ? held.keys : held.means, rotated + num_coded, dims - num_coded);
      const float beside = std::hypot(bits.rounding, left_out);
      const float reach = (is_of_keys ? deviations : 0.0f) * std::hypot(kLargeError * coded_norm[h], beside);
      reading->deviation[h] = std::hypot(kMeanError * coded_norm[h], beside);
      reading->slope[h] = 2.0f * bits.step;
      // A bound beyond 16 bits is cut; only deviations of hundreds lead there.
      offsets[h] = std::clamp(std::ceil((bits.least + reach) / reading->slope[h]), -32767.0f, 32767.0f - most);
      reading->lift[h] = offsets[h] * reading->slope[h] - bits.least;
      largest = std::max({largest, std::fabs(offsets[h]), std::fabs(offsets[h] + most)});
    }
    while (reading->shift < 14 && largest * static_cast<float>(2 << reading->shift) <= 32767.0f) ++reading->shift;
    for (int h = 0; h < queries.num; ++h) {
      reading->offsets[h] = static_cast<std::int16_t>(offsets[h]);
      reading->slope[h] /= static_cast<float>(1 << reading->shift);
    }
  }
  return out;
}

}  // namespace retrieval
