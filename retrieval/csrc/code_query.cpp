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
  constexpr int kLanes = 8;
  static_assert(kTableBits % 2 == 0 && kTableBits % 3 == 0 && kTableBits % kMaxBits == 0 && kTableBits % kLanes == 0);
  BitWeights out;
  const auto top_code = static_cast<float>((1 << shape.bits) - 1);
  // A table is of whole coordinates.
  float largest = 0.0f, total = 0.0f;
  for (int first = 0, each = kTableBits / shape.bits; first < shape.dims; first += each) {
    float sum = 0.0f;
    for (int j = first; j < std::min(first + each, shape.dims); ++j) {
      sum += std::fabs(query[j]);
      total += query[j];
    }
    largest = std::max(largest, top_code * sum);
  }
  // Rounding may add half a level for each bit.
  out.step = std::max(largest / static_cast<float>(kTableLevels - kTableBits / 2), 1e-30f);
  const float inverse = 1.0f / out.step;
  float exact[kMostWeights] = {}, squares[kLanes] = {};
  for (int j = 0, i = 0; j < shape.dims; ++j) {
    for (int p = 0; p < shape.bits; ++p) exact[i++] = query[j] * inverse * static_cast<float>(1 << p);
  }
  int sum = 0, lowest = 0;
  for (int first = 0; first < num_tables(shape.num_pieces()) * kTableBits; first += kLanes) {
    for (int i = first; i < first + kLanes; ++i) {
      const int weight = static_cast<int>(exact[i] + std::copysign(0.5f, exact[i]));
      const float error = static_cast<float>(weight) - exact[i];
      out.weights[i] = static_cast<std::int16_t>(weight);
      squares[i - first] += error * error;
      sum += weight;
      lowest += std::min(0, weight);
    }
  }
  // Half of all bits are set, so half of what rounding adds to them.
  const float too_much = out.step * static_cast<float>(sum) - top_code * total;
  out.least = 2.0f * out.step * static_cast<float>(lowest) - too_much - top_code * total;
  out.rounding = out.step * std::sqrt(std::accumulate(squares, squares + kLanes, 0.0f));
  return out;
}

}  // namespace

CodeQuery prepare_query(const LayerCodes& codes, int head, const Queries& queries, float deviations, Arena& arena) {
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
    out.base[h] = dot(query, held.centroid.data(), dims);
    out.norm[h] = std::sqrt(dot(rotated, rotated, dims));
    coded_norm[h] = std::sqrt(dot(rotated, rotated, num_coded));
  }
  for (CodeReading* reading : {&out.keys, &out.means}) {
    const bool is_of_keys = reading == &out.keys;
    const CodeShape shape = is_of_keys ? held.shape : held.shape.of_means();
    const int tables = num_tables(shape.num_pieces());
    reading->tables = arena.take<std::uint8_t>(static_cast<std::size_t>(queries.num * tables * kTableBytes));
    const auto most = static_cast<float>(tables * kTableLevels);
    float offsets[kMaxGroup], largest = 1.0f;
    for (int h = 0; h < queries.num; ++h) {
      const float* rotated = mapped + h * dims;
      const BitWeights bits = weigh_bits(rotated, shape);
      kernels().tabulate(bits.weights, tables, reading->tables + h * tables * kTableBytes);
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
    while (reading->shift < kMaxShift && largest * static_cast<float>(2 << reading->shift) <= 32767.0f) ++reading->shift;
    for (int h = 0; h < queries.num; ++h) {
      reading->offsets[h] = static_cast<std::int16_t>(offsets[h]);
      reading->slope[h] /= static_cast<float>(1 << reading->shift);
    }
  }
  return out;
}

}  // namespace retrieval
