// Element types of keys and values and their conversion to float32; small sums and products.
#pragma once

#include <cstdint>

namespace retrieval {

enum class DType : std::uint8_t { kFloat32, kBFloat16, kFloat16, kInt8 };

static constexpr int element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2;
}

// static: each level keeps a copy of its own.
static inline float bf16_to_float(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Product of a factor in units of 2^-15, rounded.
static inline std::int32_t times(std::int16_t a, std::int16_t factor) {
  return (std::int32_t{a} * factor + (1 << 14)) >> 15;
}

// Eight partial sums, so that the loop vectorizes without leave to reorder.
static inline float dot(const float* a, const float* b, int n) {
  float sums[8] = {};
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += a[j + lane] * b[j + lane];
  }
  for (; j < n; ++j) sums[0] += a[j] * b[j];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

}  // namespace retrieval
