#include "summary.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace retrieval {
namespace {

constexpr int kPiece = 8;           // dimensions whose bits share a byte

// Bit j of a byte as byte j of a word.
std::array<std::uint64_t, 256> spread_bits() {
  std::array<std::uint64_t, 256> words{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    for (unsigned j = 0; j < 8; ++j) words[byte] |= std::uint64_t{byte >> j & 1u} << (8 * j);
  }
  return words;
}

// Keys of a run of a chunk as their codes tell: [kRunKeys][head_dim].
void decode(const CodeChunk& chunk, int run, int head_dim, int bits, float* keys) {
  static const std::array<std::uint64_t, 256> spread = spread_bits();
  const auto* planes = reinterpret_cast<const std::uint8_t*>(chunk.keys.planes);
  const float middle = 0.5f * static_cast<float>((1 << bits) - 1);
  const int g = run * kRunKeys / kGroupKeys, first = run * kRunKeys % kGroupKeys;
  for (int i = 0; i < kRunKeys; ++i) {
    const float factor = 2.0f * chunk.keys.unit * static_cast<float>(chunk.keys.factors[run * kRunKeys + i]) / 32768.0f;
    std::uint8_t levels[kMaxHeadDim];
    for (int s = 0; s < head_dim / kPiece; ++s) {
      std::uint64_t word = 0;
      for (int p = 0; p < bits; ++p) {
        word = 2 * word + spread[planes[(g * bits + p) * plane_bytes(head_dim) + s * kGroupKeys + first + i]];
      }
      std::memcpy(levels + s * kPiece, &word, kPiece);
    }
    float* key = keys + i * head_dim;
    for (int j = 0; j < head_dim; ++j) key[j] = factor * (static_cast<float>(static_cast<int>(levels[j])) - middle);
  }
}

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

}  // namespace

void summarize(HeadCodes& head, std::int64_t run, int head_dim, int bits) {
  const auto dims = static_cast<std::size_t>(head_dim);
  CodeChunk& chunk = head.chunks[static_cast<std::size_t>(run / kChunkRuns)];
  const auto at = static_cast<int>(run % kChunkRuns);
  float keys[kRunKeys * kMaxHeadDim], mean[kMaxHeadDim] = {};
  decode(chunk, at, head_dim, bits, keys);
  for (std::size_t i = 0; i < kRunKeys; ++i) {
    for (std::size_t j = 0; j < dims; ++j) mean[j] += keys[i * dims + j] / kRunKeys;
  }
  std::uint8_t code[kMaxHeadDim];
  const float factor = nearest_code(mean, head_dim, bits, code);
  chunk.means.put(at, code, factor, head_dim, bits);
  float farthest = 0.0f;
  for (std::size_t i = 0; i < kRunKeys; ++i) {
    float squared = 0.0f;
    for (std::size_t j = 0; j < dims; ++j) {
      keys[i * dims + j] -= mean[j];
      squared += keys[i * dims + j] * keys[i * dims + j];
    }
    farthest = std::max(farthest, squared);
  }
  keep_radius(chunk, at, std::sqrt(farthest));
  head.scatter.resize(dims * dims);
  const float* one = keys + static_cast<std::size_t>(run % kRunKeys) * dims;  // any of them will do
  for (std::size_t a = 0; a < dims; ++a) {
    for (std::size_t b = 0; b < dims; ++b) head.scatter[a * dims + b] += one[a] * one[b];
  }
  ++head.num_scattered;
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

}  // namespace retrieval
