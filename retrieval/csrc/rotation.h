// The random rotation of keys before they are encoded, and of queries alike, as a matrix by itself or times another.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace retrieval {

// A random orthogonal matrix R: sign flips and Hadamard transforms over the first and the last power of two.
class Rotation {
 public:
  Rotation(int dims, std::uint64_t seed);
  void apply(float* vector) const;
  // A matrix [width][width], or the identity for none, with its first `dims` rows multiplied by R.
  void multiply(const float* matrix, int width, float* out) const;

 private:
  int dims_;
  int span_;                  // largest power of two <= dims
  std::vector<float> signs_;  // [rounds][dims]
};

// The matrix R, one copy for as long as anybody holds it.
std::shared_ptr<const std::vector<float>> shared_rotation(int head_dim, std::uint64_t seed);

// out[i] = map [d][d] * vectors[i], num <= kMaxGroup.
void apply_map(const float* map, const float* vectors, int num, int head_dim, float* out);

// Whether a, b [d][d] satisfy a^T b = 1, so that <a x, b y> = <x, y>.
bool are_dual(const float* a, const float* b, int d);

}  // namespace retrieval
