#include "graph_metric.h"

#include <algorithm>
#include <cmath>

#include "graph_parts.h"

namespace retrieval {
namespace {

constexpr std::int64_t kMeasuredKeys = 8192;  // whose covariance is taken
constexpr double kKeyRidge = 1e-5;            // of the mean variance, so that flat directions count for something
constexpr double kQueryRidge = 1e-3;

double mean_diagonal(const std::vector<double>& moments, std::size_t dims) {
  double sum = 0.0;
  for (std::size_t a = 0; a < dims; ++a) sum += moments[a * dims + a];
  return sum / static_cast<double>(dims);
}

// rows[j] = scale * row j of the transposed lower factor of moments [dims][dims] over the mean of their diagonal;
// moments are overwritten.
void factor(std::vector<double>& moments, double ridge, double scale, std::size_t dims, float* rows) {
  const double mean = mean_diagonal(moments, dims);
  for (double& moment : moments) moment = mean > 0.0 ? moment / mean : 0.0;
  for (std::size_t a = 0; a < dims; ++a) moments[a * dims + a] += ridge;
  for (std::size_t a = 0; a < dims; ++a) {
    for (std::size_t b = 0; b <= a; ++b) {
      double sum = moments[a * dims + b];
      for (std::size_t c = 0; c < b; ++c) sum -= moments[a * dims + c] * moments[b * dims + c];
      const double pivot = moments[b * dims + b];
      moments[a * dims + b] = a == b ? std::sqrt(std::max(sum, 0.0)) : pivot > 0.0 ? sum / pivot : 0.0;
      rows[b * dims + a] = static_cast<float>(scale * moments[a * dims + b]);
    }
  }
}

void add_square(const float* row, std::size_t dims, std::vector<double>& moments) {
  for (std::size_t a = 0; a < dims; ++a) {
    for (std::size_t b = 0; b <= a; ++b) moments[a * dims + b] += double{row[a]} * double{row[b]};
  }
}

}  // namespace

std::vector<float> GraphMetric::measure(const Rows& keys, std::int64_t num_keys, const float* queries,
                                        std::int64_t num_queries) {
  const auto dims = static_cast<std::size_t>(keys.head_dim);
  std::vector<float> values(size(keys.head_dim), 0.0f);
  const float share = num_keys > 0 ? 1.0f / static_cast<float>(num_keys) : 0.0f;
  for (std::int64_t i = 0; i < num_keys; ++i) kernels().accumulate(&share, 1, 1, keys, nullptr, i, 1, values.data());
  std::vector<double> moments(dims * dims, 0.0);
  const std::int64_t step = std::max<std::int64_t>(1, num_keys / kMeasuredKeys);
  float row[kMaxHeadDim];
  for (std::int64_t i = 0; i < num_keys; i += step) {
    read_row(keys, i, row);
    for (std::size_t j = 0; j < dims; ++j) row[j] -= values[j];
    add_square(row, dims, moments);
  }
  const double variance = mean_diagonal(moments, dims) / static_cast<double>((num_keys + step - 1) / step);
  const double scale = variance > 0.0 ? 1.0 / std::sqrt(variance) : 0.0;  // so that placed keys are of ordinary length
  factor(moments, kKeyRidge, scale, dims, values.data() + dims);
  std::fill(moments.begin(), moments.end(), 0.0);
  for (std::int64_t i = 0; i < num_queries; ++i) add_square(queries + i * keys.head_dim, dims, moments);
  factor(moments, kQueryRidge, scale, dims, values.data() + (1 + dims) * dims);
  return values;
}

void GraphMetric::whiten(const float* query, float* whitened) const {
  score_rows(values_, query, head_dim_, 1, head_dim_, whitened);
  float squared = 0.0f;
  for (int j = 0; j < head_dim_; ++j) squared += whitened[j] * whitened[j];
  const bool is_ordinary = squared > 0.0f && std::isfinite(squared);
  const float inverse = 1.0f / std::sqrt(squared);
  for (int j = 0; j < head_dim_; ++j) whitened[j] = is_ordinary ? whitened[j] * inverse : 0.0f;
}

void GraphMetric::place(const Rows& keys, std::int64_t position, float* placed) const {
  float row[kMaxHeadDim];
  read_row(keys, position, row);
  for (int j = 0; j < head_dim_; ++j) row[j] -= values_[j];
  score_rows(values_, row, head_dim_, 1 + head_dim_, head_dim_, placed);
}

void GraphMetric::ask(const float* placed, float* query) const {
  std::fill_n(query, head_dim_, 0.0f);
  kernels().accumulate(placed, 1, 1, float_rows(values_, head_dim_), nullptr, 1 + head_dim_, head_dim_, query);
}

}  // namespace retrieval
