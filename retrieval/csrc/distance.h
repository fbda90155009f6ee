// The inner loops: one table of function pointers per instruction set, chosen once at run time.
//
// Every level computes the same thing. The integer kernels (scan, draw, select) agree bit for bit; the
// float kernels differ by summation order only. Translation units behind a level are compiled with
// that level's flags, so they must not instantiate inline functions of the standard library: the
// linker could keep the wide copy for everyone.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace retrieval {

inline constexpr int kMaxGroup = 8;      // query heads handled by one kernel call
inline constexpr int kMaxHeadDim = 256;  // widest head
inline constexpr int kGroupKeys = 64;    // keys whose code bits are interleaved: one 512-bit register of bytes

// Query heads that share one KV head.
struct Queries {
  const float* values;          // [num][head_dim]
  const std::uint16_t* bf16;    // [num][head_dim] when the queries came as bf16 (nothing is lost), else null
  int num;                      // <= kMaxGroup
  int head_dim;
};

// Rows of keys or values of one KV head.
struct Rows {
  const void* data;             // [capacity][head_dim]
  const float* scales;          // [capacity] when dtype is int8, else null
  DType dtype;
  int head_dim;
};

inline constexpr int kScanGroups = 32;   // groups that one call of scan covers
inline constexpr int kMaxShift = 6;      // of sums of weights

// A key's code is a string of bits, each with a weight of the query's; <query, key> is estimated from the sum of weights
// of the bits that are set. Codes of 64 consecutive keys lie byte by byte: key i has byte byte_of(i) of piece b for bits
// 8b..8b+7. The first half of the keys has the even bytes and the second the odd ones, so that sums widened to 16 bits
// are in order.
inline constexpr int byte_of(int key) { return key < kGroupKeys / 2 ? 2 * key : 2 * key - kGroupKeys + 1; }

// Weights are looked up for some bits at once. Tables are made for three pieces at a time (the last ones' may be fewer),
// whose entries are shifted to begin at zero and add up to a byte at most.
inline constexpr int kTablePieces = 3, kTableBits = 8 * kTablePieces, kTableBytes = 256, kTableLevels = 255;
inline constexpr int num_tables(int num_pieces) { return (num_pieces + kTablePieces - 1) / kTablePieces; }

// Binary logarithm of a key's weight, by estimate: at most 0 and base + slope * bound - lift * factor.
struct Weigher {
  float base, slope, lift;
};

// What a query asks of the keys that it takes (draw); without lift and spread, a bound of at least floor.
struct Draw {
  std::int16_t floor = -32768, lift = 0, spread = 0;
  int doublings = 0;
  std::int16_t sure = 32767;  // take: a bound that suffices whatever the luck
};

// How a query took keys, and what a key that it drew weighs over its chance. step: of a bound, in nats; 0: it does not draw.
struct Odds {
  Draw draw;
  float step = 0.0f, weight = 0.0f;
};
inline constexpr float kLogLeastChance = -9.01091335f;  // of 1 / kNumLucks (luck.h)

// Keys that were taken, in order, with the bounds [num][kTakenStride] that all queries have of them.
inline constexpr int kTakenStride = kScanGroups * kGroupKeys + kGroupKeys;  // the end of it is scratch
struct Taken {
  std::int16_t* slots;    // [kTakenStride]
  std::int16_t* factors;  // [kTakenStride]
  std::int16_t* bounds;
};

struct Kernels {
  const char* name;

  // out[h * stride + i] = <query h, row>, row = positions ? positions[i] : first + i. Of any head_dim.
  void (*score)(const Queries& queries, const Rows& rows, const std::int32_t* positions, std::int64_t first, int n,
                float* out, int stride);

  // acc[h * head_dim + j] += sum over i of weights[h * stride + i] * row[j], rows as in score.
  void (*accumulate)(const float* weights, int stride, int num, const Rows& rows, const std::int32_t* positions,
                     std::int64_t first, int n, float* acc);

  // Largest of n >= 1 values.
  float (*maximum)(const float* values, int n);

  // How many of n values are below the limit, and their sum.
  int (*below)(const float* values, int n, float limit, float* sum);

  // values[i] = exp(scale * (values[i] - top)), or 0 where values[i] < floor; returns the sum.
  float (*exponentiate)(float* values, int n, float scale, float top, float floor);

  // Tables [num_tables][kTableBytes] of one query's weights [num_tables][kTableBits], whose magnitudes add up to
  // kTableLevels at most in each of them. Only the same level's scan can read them.
  void (*tabulate)(const std::int16_t* weights, int num_tables, std::uint8_t* tables);

  // For each query h and each key of the groups whose bit is set in `wanted`, at most 32, with sum = sum of weights of the
  // bits that are set, less that of all negative weights: bounds[h * stride + i] = ((sum + offsets[h]) << shift) *
  // factors[i], rounded to the upper 16 of 31 bits. tables: [num][num_tables][kTableBytes]; codes: [32][num_pieces]
  // [kGroupKeys]; factors: [32 * 64]; tops[h * tops_stride + b]: the largest bound of 8 groups, -32768 if none of them is
  // wanted. shift: at most kMaxShift.
  void (*scan)(const std::uint8_t* tables, const std::int16_t* offsets, int num, int num_pieces, int shift,
               const std::uint8_t* codes, std::uint32_t wanted, const std::int16_t* factors, std::int16_t* bounds,
               std::int64_t stride, std::int16_t* tops, std::int64_t tops_stride);

  // Weights of 64 keys, good to a thousandth; 0 of those that are not in `wanted`.
  void (*weigh)(const std::int16_t* bounds, const std::int16_t* factors, const Weigher& weigher, std::uint64_t wanted,
                float* weights);

  // Of 64 keys and for each of num queries h, those that reach a limit by estimate and luck, as bits of masks[h]:
  // bounds[h * stride + i] - factors[i] * lift / 2^15 + luck[i] * spread / 2^15 * 2^doublings >= floor, where products
  // are rounded and sums and doublings stay within 16 bits.
  void (*draw)(const std::int16_t* bounds, std::int64_t stride, int num, const std::int16_t* factors,
               const std::int16_t* luck, const Draw* draws, std::uint64_t* masks);

  // Of the keys [begin, end) of 32 groups those that any of num queries takes, from groups whose bit is set in `wanted`:
  // as in draw with the floors [num][32] of their groups, if there is lift or spread, or by a bound that is sure.
  // Returns how many there are.
  int (*take)(const std::int16_t* bounds, std::int64_t stride, int num, const std::int16_t* factors,
              const std::int16_t* luck, const Draw* draws, const std::int16_t* floors, std::uint32_t wanted, int begin,
              int end, const Taken& taken);

  // One over the chances of n keys that were taken. In logarithms, query h gives a key the chance
  // step * (bound - factor * lift / 2^15, rounded, - floor + 0.5) if step > 0, and at least 0 where its bound is sure; the
  // largest of these, plus log_times of its group [32] (null: nothing), is its chance, 0 at most and kLogLeastChance at
  // least, given that its group is scanned, which has the chance -log_times. If weights is not null, inverses are 0 of keys
  // that all queries leave to chance, and weights[h][i] = odds[h].weight * chance by query h * inverse.
  void (*chances)(const Taken& taken, int num, int n, const Odds* odds, const float* log_times, float* inverses,
                  float* const* weights);

  // Bit i of masks[g]: values[64 g + i] >= floor.
  void (*select)(const std::int16_t* values, int num_groups, std::int16_t floor, std::uint64_t* masks);
};

// The table of a level, or null where this build or this machine lacks it.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* neon_kernels();

// The table in use: the best that the machine has, or the one named by RETRIEVAL_SIMD.
const Kernels& kernels();
// Select a level by name; false if unknown here. Not to be called while a search runs.
bool select_kernels(const char* name);

}  // namespace retrieval
