// The inner loops of chunk.cpp on AMX tiles; plain pointers only, see distance.h on why.
//
// Everything is transposed: scores are [key][row], so that running maxima and sums are vectors over rows,
// keys need no repacking beyond padding, and the weights leave the exponential in the pair layout that the
// second product wants. A step is 32 keys; a weight pair is keys i and i + 16 of a step, and packed values
// follow that order.
#pragma once

#include <cstdint>

namespace retrieval {
namespace tiles {

inline constexpr int kRows = 32;        // rows of a row block: two tiles wide
inline constexpr int kStepKeys = 32;    // keys per step
inline constexpr int kBlockKeys = 256;  // keys packed at a time
inline constexpr int kBlockSteps = kBlockKeys / kStepKeys;

// bf16 elements of 32 rows, keys or values, head_dim padded to `num_slices` slices of 32.
inline constexpr int packed_size(int num_slices) { return num_slices * 32 * 32; }

// Running state of a row block. Weights are relative to 2^reference, reference = kBiasOfZero - bias.
struct alignas(64) RowBlock {
  float bias[kRows];
  float total[kRows];            // of the weights
  float* sums;                   // [2 * num_slices][2][16][16]: dims by rows, of weights times values
  const std::uint16_t* queries;  // packed
};

inline constexpr float kBiasOfZero = 24576.0f + 111.0f;  // see weigh() in chunk_tiles.cpp
inline constexpr float kNoBias = 1e30f;                  // of a row that has seen no key
inline constexpr int kWeightExponent = 16;               // weights are 2^-16 times what they stand for

struct KeyBlock {
  const std::uint16_t* keys;    // packed, kBlockSteps times
  const std::uint16_t* values;  // packed, kBlockSteps times
  int num_keys;
};

// Scratch of one task.
struct Scratch {
  float* scores;           // [2][kStepKeys * kRows]
  std::uint16_t* weights;  // [kBlockSteps][kStepKeys * kRows]
};

// Save the thread's tile configuration and set ours; leave restores it.
void enter(unsigned char* saved64);
void leave(const unsigned char* saved64);

// rows[i]: row i of head_dim elements, or null for a row of zeros; 32 rows.
void pack_queries(const std::uint16_t* const* rows, int head_dim, int num_slices, std::uint16_t* packed);
// num_keys <= 32 consecutive rows of head_dim elements; the rest is zero.
void pack_keys(const std::uint16_t* rows, int num_keys, int head_dim, int num_slices, std::uint16_t* packed);
void pack_values(const std::uint16_t* rows, int num_keys, int head_dim, int num_slices, std::uint16_t* packed);

// Fold steps [first, last) of a key block into the state. Row r sees keys [begin[r], end[r]) of the block; null
// where all rows see all keys of all those steps. scale_log2: of scores, to the base-2 logarithm.
void fold(const KeyBlock& block, int first, int last, const int* begin, const int* end, int num_slices,
          float scale_log2, const Scratch& scratch, RowBlock& rows);

// Divide by the totals and write row r to targets[r] (null: not wanted) as float32 or bf16.
void finish(const RowBlock& rows, int num_slices, int head_dim, bool is_bf16, void* const* targets);

}  // namespace tiles
}  // namespace retrieval
