#include "linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace retrieval {
namespace {

constexpr std::int64_t kOutputsPerTask = 64;

// What is multiplied, of one row.
void prepare_row(const Linear& linear, const float* in, float* out) {
  const auto num = static_cast<std::size_t>(linear.num_inputs);
  if (linear.is_gated) {
    for (std::size_t j = 0; j < num; ++j) out[j] = in[j] / (1.0f + std::exp(-in[j])) * in[num + j];
  } else {
    std::copy_n(in, num, out);
  }
  if (linear.norm == nullptr) return;
  constexpr std::size_t kLanes = 8;  // sums side by side, or they would wait
  float sums[kLanes] = {}, squared = 0.0f;
  for (std::size_t j = 0; j < num; ++j) sums[j % kLanes] += out[j] * out[j];
  for (const float sum : sums) squared += sum;
  const float factor = 1.0f / std::sqrt(squared / static_cast<float>(num) + linear.epsilon);
  for (std::size_t j = 0; j < num; ++j) out[j] *= factor * linear.norm[j];
}

}  // namespace

void apply(const Linear& linear, const Matrix& in, const Matrix& out, bool add, ThreadPool& pool) {
  thread_local std::vector<float> prepared;
  prepared.resize(static_cast<std::size_t>(in.num_rows * linear.num_inputs));
  for (std::int64_t n = 0; n < in.num_rows; ++n) {
    prepare_row(linear, in.data + n * in.stride, prepared.data() + n * linear.num_inputs);
  }
  const float* rows = prepared.data();
  const Rows weights{linear.weights, nullptr, linear.dtype, static_cast<int>(linear.num_inputs)};
  pool.run((linear.num_outputs + kOutputsPerTask - 1) / kOutputsPerTask, [&](std::int64_t task) {
    const std::int64_t first = task * kOutputsPerTask, count = std::min(kOutputsPerTask, linear.num_outputs - first);
    for (std::int64_t n = 0; n < in.num_rows; n += kMaxGroup) {
      const int num = static_cast<int>(std::min<std::int64_t>(kMaxGroup, in.num_rows - n));
      float products[kMaxGroup * kOutputsPerTask];
      kernels().score({rows + n * linear.num_inputs, nullptr, num, weights.head_dim}, weights, nullptr, first,
                      static_cast<int>(count), products, kOutputsPerTask);
      for (int h = 0; h < num; ++h) {
        float* target = out.data + (n + h) * out.stride + first;
        for (std::int64_t i = 0; i < count; ++i) {
          const float bias = linear.bias != nullptr ? linear.bias[first + i] : 0.0f;
          target[i] = products[h * kOutputsPerTask + i] + bias + (add ? target[i] : 0.0f);
        }
      }
    }
  });
}

}  // namespace retrieval
