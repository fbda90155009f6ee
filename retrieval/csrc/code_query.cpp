#include "code_query.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "rotation.h"
#include "summary.h"

namespace retrieval {

CodeQuery prepare_query(const LayerCodes& codes, int head, const Queries& queries, float deviations) {
  const int dims = codes.head_dim();
  const HeadCodes& held = codes.head(head);
  const int num_coded = held.shape.dims, num_tables = num_coded / 4;
  CodeQuery out;
  out.tables.resize(static_cast<std::size_t>(queries.num * num_tables) * 16);
  float steps[kMaxGroup], lowest[kMaxGroup] = {}, total[kMaxGroup] = {}, coded_norm[kMaxGroup];
  float mapped[kMaxGroup * kMaxHeadDim];
  apply_map(codes.query_map(head), queries.values, queries.num, dims, mapped);
  out.radius = own_radius(held, dims);
  own_deviations(held, mapped, queries.num, dims, out.own);
  for (int h = 0; h < queries.num; ++h) {
    const float* rotated = mapped + h * dims;
    const float* query = queries.values + h * dims;
    out.base[h] = std::inner_product(query, query + dims, held.centroid.data(), 0.0f);
    out.norm[h] = std::sqrt(std::inner_product(rotated, rotated + dims, rotated, 0.0f));
    coded_norm[h] = std::sqrt(std::inner_product(rotated, rotated + num_coded, rotated, 0.0f));
    float range = 0.0f;
    for (int s = 0; s < num_tables; ++s) {
      float piece = 0.0f;
      for (int j = 4 * s; j < 4 * s + 4; ++j) {
        piece += std::fabs(rotated[j]);
        total[h] += rotated[j];
        lowest[h] += std::min(0.0f, rotated[j]);
      }
      range = std::max(range, piece);
    }
    // A table holds the sums over the subsets of four coordinates, shifted to begin at zero.
    const float step = steps[h] = std::max(range / kTableLevels, 1e-30f);
    for (int s = 0; s < num_tables; ++s) {
      const float* q = rotated + 4 * s;
      std::uint8_t* table = out.tables.data() + static_cast<std::ptrdiff_t>(h * num_tables + s) * 16;
      float low = 0.0f;
      for (int j = 0; j < 4; ++j) low += std::min(0.0f, q[j]);
      for (unsigned subset = 0; subset < 16; ++subset) {
        float sum = -low;
        for (unsigned j = 0; j < 4; ++j) sum += (subset >> j & 1u) != 0 ? q[j] : 0.0f;
        table[subset] = static_cast<std::uint8_t>(sum / step + 0.5f);
      }
    }
  }
  for (CodeReading* reading : {&out.keys, &out.means}) {
    const bool is_of_keys = reading == &out.keys;
    const int bits = is_of_keys ? held.shape.bits : held.shape.of_means().bits;
    const auto top_code = static_cast<float>((1 << bits) - 1);
    const float planes = top_code * (top_code + 2.0f) / 3.0f;  // sum of 4^p
    const float most = static_cast<float>(num_tables * kTableLevels) * top_code;
    float offsets[kMaxGroup], largest = 1.0f;
    for (int h = 0; h < queries.num; ++h) {
      // |u| sqrt((1 - a^2) / (d - 1)) is 0.60 to 0.65 on average for 1 to 4 bits, give or take 0.05.
      constexpr float kMeanError = 0.63f, kLargeError = 0.7f;
      // <u, q'> = 2 step * sum + least; rounding the tables adds a deviation of its own, plane by plane.
      const float least = top_code * (2.0f * lowest[h] - total[h]);
      const float rounding = 2.0f * steps[h] * std::sqrt(static_cast<float>(num_tables) / 12.0f * planes);
      const float left_out = uncoded_deviation(is_of_keys ? held.keys : held.means, mapped + h * dims + num_coded,
                                               dims - num_coded);
      const float beside = std::hypot(rounding, left_out);
      const float reach = (is_of_keys ? deviations : 0.0f) * std::hypot(kLargeError * coded_norm[h], beside);
      reading->deviation[h] = std::hypot(kMeanError * coded_norm[h], beside);
      reading->slope[h] = 2.0f * steps[h];
      // A bound beyond 16 bits is cut; only deviations of hundreds lead there.
      offsets[h] = std::clamp(std::ceil((least + reach) / reading->slope[h]), -32767.0f, 32767.0f - most);
      reading->lift[h] = offsets[h] * reading->slope[h] - least;
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
