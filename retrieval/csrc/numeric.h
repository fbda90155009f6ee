// Element types of keys and values and their conversion to float32.
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

}  // namespace retrieval
