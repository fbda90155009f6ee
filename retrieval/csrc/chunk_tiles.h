// The inner loops of chunk.cpp on AMX tiles; plain pointers only, see distance.h on why.
//
// Everything is transposed: scores are [key][row], so that running maxima and sums are vectors over rows,
// keys are read where they lie unless they need padding, and the weights leave the exponential in the pair
// layout that the second product wants. A step is 32 keys; a weight pair is keys i and i + 16 of a step, and
// packed values follow that order.
#pragma once

#include <cstdint>

namespace retrieval {
namespace tiles {

inline constexpr int kRows = 32;        // rows of a row block: two tiles wide
inline constexpr int kStepKeys = 32;    // keys per step
inline constexpr int kBlockKeys = 512;  // keys packed at a time
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

inline constexpr float kBiasOfZero = 24576.0f + 111.0f + 2.0f / 512.0f;  // see exp2_bits() in chunk_tiles.cpp
inline constexpr float kNoBias = 1e30f;     // of a row that has seen no key
inline constexpr int kWeightExponent = 16;  // weights are 2^-16 times what they stand for

// Keys and values of up to kBlockKeys consecutive positions.
struct KeyBlock {
  const std::uint16_t* keys[kBlockSteps];  // each step's, [32][num_slices * 32]
  const std::uint16_t* values;             // packed, one step after the other
};

// Steps [first, last) of a key block, to be folded into a row block.
struct Fold {
  const KeyBlock* block;
  RowBlock* rows;
  int first, last;
  const int* begin;  // row r sees keys [begin[r], end[r]) of the block; null: all rows see all keys of the steps
  const int* end;
};

// Rows of the key block to come, on their way into the cache while this one is folded. A chunk of few queries would
// else wait for memory most of the time.
struct Ahead {
  static constexpr int kTurns = 2;  // per step
  const char* next = nullptr;
  const char* end = nullptr;
  int lines_per_turn = 0;  // of 64 bytes
};

// What one task carries from fold to fold.
struct Pipeline {
  int num_slices;
  float scale_log2;           // of scores, to the base-2 logarithm
  float* scores;              // [2][kStepKeys * kRows]
  std::uint16_t* weights[2];  // [kBlockSteps][kStepKeys * kRows]
  int scores_in = 0;          // which of the two scores the next step reads
  int weights_in = 0;         // which of the two weights the next fold writes
  const std::uint16_t* scored_keys = nullptr;  // the step whose scores are ready
  const std::uint16_t* scored_queries = nullptr;
  // Weights that have not met their values: steps [waiting_step, waiting_last) of slice waiting_slice, then all
  // steps of the slices after it.
  RowBlock* waiting_rows = nullptr;
  const std::uint16_t* waiting_values = nullptr;  // of the block's first step
  const std::uint16_t* waiting_weights = nullptr;
  int waiting_first = 0, waiting_last = 0, waiting_step = 0, waiting_slice = 0, waiting_half = 0;
  Ahead keys_ahead, values_ahead;
};

// Save the thread's tile configuration and set ours; leave restores it.
void enter(unsigned char* saved64);
void leave(const unsigned char* saved64);

// rows[i]: row i of head_dim elements, or null for a row of zeros; 32 rows.
void pack_queries(const std::uint16_t* const* rows, int head_dim, int num_slices, std::uint16_t* packed);
// num_keys <= 32 consecutive rows of head_dim elements; the rest is zero. Keys stay rows, [32][num_slices * 32].
void pack_keys(const std::uint16_t* rows, int num_keys, int head_dim, int num_slices, std::uint16_t* packed);
void pack_values(const std::uint16_t* rows, int num_keys, int head_dim, int num_slices, std::uint16_t* packed);

// Fold one range of steps. The tile unit computes the scores of the step after and the weighted values of the
// fold before while the vector units weigh; `next` is the fold to come, or null. After the last fold over a key
// block, and before it is packed anew, settle.
void fold(const Fold& fold, const Fold* next, Pipeline& pipeline);
void settle(Pipeline& pipeline);

// Divide by the totals and write row r to targets[r] (null: not wanted) as float32 or bf16.
void finish(const RowBlock& rows, int num_slices, int head_dim, bool is_bf16, void* const* targets);

}  // namespace tiles
}  // namespace retrieval
