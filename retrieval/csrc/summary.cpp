#include "summary.h"

#include <algorithm>
#include <cmath>

namespace retrieval {
namespace {

// Rounded up: a radius may be too large, not too small.
void keep_radius(CodeChunk& chunk, int run, float radius) {
  const auto steps = [](float value) { return static_cast<std::int16_t>(std::ceil(value)); };
  if (radius > chunk.radius_unit * kRadiusSteps) {
    const float larger = radius * 1.25f / kRadiusSteps;
    for (int r = 0; r < run; ++r) chunk.radii[r] = steps(static_cast<float>(chunk.radii[r]) * chunk.radius_unit / larger);
    chunk.radius_unit = larger;
  }
  chunk.radii[run] = chunk.radius_unit > 0.0f ? steps(radius / chunk.radius_unit) : std::int16_t{0};
  chunk.full_runs |= std::uint64_t{1} << run;
}

// Units of the chunk before, where they serve as well.
void follow(CodeChunk& chunk, const CodeChunk& before) {
  chunk.means.follow(before.means);
  const std::int16_t largest = *std::max_element(before.radii, before.radii + kChunkRuns);
  const bool is_fine = static_cast<float>(largest) >= 0.125f * kRadiusSteps;
  chunk.radius_unit = is_fine ? before.radius_unit : 1.25f * before.radius_unit * static_cast<float>(largest) / kRadiusSteps;
}

// sum [num][num] += x x^T.
void add_square(const float* x, std::size_t num, float* sum) {
  for (std::size_t a = 0; a < num; ++a) {
    for (std::size_t b = 0; b < num; ++b) sum[a * num + b] += x[a] * x[b];
  }
}

}  // namespace

RunSummaries::RunSummaries(std::int64_t num_runs, int head_dim, CodeShape shape)
    : head_dim_(head_dim), shape_(shape), codes_(static_cast<std::size_t>(num_runs * shape.dims)),
      factors_(static_cast<std::size_t>(num_runs)), radii_(static_cast<std::size_t>(num_runs)),
      offsets_(static_cast<std::size_t>(num_runs * head_dim)),
      means_(static_cast<std::size_t>(num_runs * (head_dim - shape.dims))),
      key_factors_(static_cast<std::size_t>(num_runs)) {}

void RunSummaries::fill(std::int64_t at, std::int64_t number, const float* keys) {
  const auto slot = static_cast<std::size_t>(at), dims = static_cast<std::size_t>(head_dim_);
  float mean[kMaxHeadDim] = {}, farthest = 0.0f;
  for (std::size_t i = 0; i < kRunKeys; ++i) {
    for (std::size_t j = 0; j < dims; ++j) mean[j] += keys[i * dims + j] / kRunKeys;
  }
  const auto num_coded = static_cast<std::size_t>(shape_.dims);
  factors_[slot] = nearest_code(mean, shape_.of_means(), codes_.data() + slot * num_coded);
  std::copy(mean + num_coded, mean + dims, means_.data() + slot * (dims - num_coded));
  for (std::size_t i = 0; i < kRunKeys; ++i) {
    float squared = 0.0f;
    for (std::size_t j = 0; j < dims; ++j) {
      const float offset = keys[i * dims + j] - mean[j];
      squared += offset * offset;
    }
    farthest = std::max(farthest, squared);
  }
  radii_[slot] = std::sqrt(farthest);
  const auto one = static_cast<std::size_t>(number % kRunKeys);  // any of them will do
  for (std::size_t j = 0; j < dims; ++j) offsets_[slot * dims + j] = keys[one * dims + j] - mean[j];
  std::uint8_t code[kMaxHeadDim];
  if (num_coded < dims) key_factors_[slot] = nearest_code(keys + one * dims, shape_, code);
}

void RunSummaries::add_to(HeadCodes& head, std::int64_t num_runs) const {
  const auto dims = static_cast<std::size_t>(head_dim_), num_coded = static_cast<std::size_t>(shape_.dims);
  const std::size_t num_uncoded = dims - num_coded;
  if (!factors_.empty()) {
    head.scatter.resize(dims * dims);
    for (Uncoded* uncoded : {&head.keys, &head.means}) uncoded->moment.resize(num_uncoded * num_uncoded);
  }
  for (std::size_t i = 0; i < factors_.size(); ++i) {
    const std::int64_t run = num_runs + static_cast<std::int64_t>(i);
    CodeChunk& chunk = head.chunks[static_cast<std::size_t>(run / kChunkRuns)];
    const auto at = static_cast<int>(run % kChunkRuns);
    if (at == 0 && run > 0) follow(chunk, head.chunks[static_cast<std::size_t>(run / kChunkRuns) - 1]);
    chunk.means.put(at, codes_.data() + i * num_coded, factors_[i]);
    keep_radius(chunk, at, radii_[i]);
    const float *offset = offsets_.data() + i * dims, *mean = means_.data() + i * num_uncoded;
    add_square(offset, dims, head.scatter.data());
    ++head.num_scattered;
    if (num_uncoded == 0) continue;
    float key[kMaxHeadDim];
    for (std::size_t j = 0; j < num_uncoded; ++j) key[j] = mean[j] + offset[num_coded + j];
    add_square(key, num_uncoded, head.keys.moment.data());
    add_square(mean, num_uncoded, head.means.moment.data());
    head.keys.factors += double{key_factors_[i]} * key_factors_[i];
    head.means.factors += double{factors_[i]} * factors_[i];
  }
}

float own_radius(const HeadCodes& head, int head_dim) {
  if (head.num_scattered == 0) return 0.0f;
  float trace = 0.0f;
  for (int j = 0; j < head_dim; ++j) trace += head.scatter[static_cast<std::size_t>(j * (head_dim + 1))];
  return std::sqrt(trace / static_cast<float>(head.num_scattered));
}

void own_deviations(const HeadCodes& head, const float* mapped, int num, int head_dim, float* deviations) {
  std::fill_n(deviations, num, 0.0f);
  if (head.num_scattered == 0) return;
  float images[kMaxGroup * kMaxHeadDim];
  kernels().score({mapped, nullptr, num, head_dim}, {head.scatter.data(), nullptr, DType::kFloat32, head_dim}, nullptr,
                  0, head_dim, images, head_dim);
  for (int h = 0; h < num; ++h) {
    float squared = 0.0f;
    for (int j = 0; j < head_dim; ++j) squared += mapped[h * head_dim + j] * images[h * head_dim + j];
    deviations[h] = std::sqrt(std::max(0.0f, squared) / static_cast<float>(head.num_scattered));
  }
}

float uncoded_deviation(const Uncoded& uncoded, const float* mapped, int num_uncoded) {
  if (!(uncoded.factors > 0.0)) return 0.0f;
  float squared = 0.0f;
  for (int a = 0; a < num_uncoded; ++a) {
    const float* row = uncoded.moment.data() + a * num_uncoded;
    squared += mapped[a] * dot(row, mapped, num_uncoded);
  }
  return std::sqrt(std::max(0.0f, squared) / static_cast<float>(uncoded.factors));
}

}  // namespace retrieval
