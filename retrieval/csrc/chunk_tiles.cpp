// Compiled with the AVX-512 flags of distance_avx512.cpp and -mavx512bf16 -mamx-tile -mamx-bf16.
#include "chunk_tiles.h"

#include <immintrin.h>

#include <cstddef>

namespace retrieval {
namespace tiles {
namespace {

using std::size_t;

constexpr int kTile = 16 * 32;   // bf16 elements of a tile
constexpr int kFloatTile = 256;  // float elements of a tile

// The compiler does not know that tile loads read memory.
inline void publish() { asm volatile("" ::: "memory"); }

inline __mmask32 dims_mask(int left) {
  return left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
}

inline __m512i load_dims(const std::uint16_t* row, int offset, int head_dim) {
  return row == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(dims_mask(head_dim - offset), row + offset);
}

// Rows become columns.
inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// Scores of 32 keys by 32 rows: [2 halves of keys][2 tiles of rows][16][16].
inline void score(const std::uint16_t* keys, const std::uint16_t* queries, int num_slices, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const std::uint16_t* late_keys = keys + num_slices * kTile;
  const std::uint16_t* late_queries = queries + num_slices * kTile;
  for (int s = 0; s < num_slices; ++s) {
    _tile_loadd(4, keys + s * kTile, 64);
    _tile_loadd(6, queries + s * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, late_queries + s * kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, late_keys + s * kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + kFloatTile, 64);
  _tile_stored(2, scores + 2 * kFloatTile, 64);
  _tile_stored(3, scores + 3 * kFloatTile, 64);
}

// sums += values of steps [first, last) times their weights.
void accumulate(const KeyBlock& block, const std::uint16_t* weights, int first, int last, int num_slices,
                float* sums) {
  publish();
  for (int s = 0; s < num_slices; ++s) {
    float* target = sums + s * 4 * kFloatTile;
    _tile_loadd(0, target, 64);
    _tile_loadd(1, target + kFloatTile, 64);
    _tile_loadd(2, target + 2 * kFloatTile, 64);
    _tile_loadd(3, target + 3 * kFloatTile, 64);
    for (int step = first; step < last; ++step) {
      const std::uint16_t* values = block.values + step * packed_size(num_slices) + 2 * s * kTile;
      const std::uint16_t* weight = weights + step * kStepKeys * kRows;
      _tile_loadd(4, values, 64);
      _tile_loadd(6, weight, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, weight + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, values + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, target, 64);
    _tile_stored(1, target + kFloatTile, 64);
    _tile_stored(2, target + 2 * kFloatTile, 64);
    _tile_stored(3, target + 3 * kFloatTile, 64);
  }
}

// A float between 2^14 and 2^15 has steps of 2^-9, so the low 16 bits of kBiasOfZero + x are
// 512 * (x + 111) rounded to nearest: x in fixed point, its integer part biased as the exponent of
// 2^(x - 16) is. That leaves room for x up to 16 above the reference in 16 unsigned bits.
constexpr float kLowest = kBiasOfZero - 64.0f;   // 2^-64 of the reference counts as this much
constexpr float kHighest = kBiasOfZero + 8.0f;   // above it the reference is raised

// Bits of the bf16 2^(x - 16) of 32 such fixed-point numbers at once. A float's bits, read as a number, are
// its logarithm but for the mantissa: 2^f - 1 against f. Their difference is f (1 - f) (81/256 + 18/256 f)
// with an error of 0.1 of a bf16 step; together with the rounding the relative error is 0.0018 (root mean
// square; correct rounding alone gives 0.0017) with a mean of -1.5e-6.
inline __m512i exp2_bits(__m512i fixed) {
  const __m512i fraction = _mm512_slli_epi16(fixed, 7);
  const __m512i rest = _mm512_xor_si512(fraction, _mm512_set1_epi16(-1));
  const __m512i bow = _mm512_mulhi_epu16(fraction, rest);
  const __m512i slope = _mm512_add_epi16(_mm512_mulhi_epu16(fraction, _mm512_set1_epi16(18)), _mm512_set1_epi16(81));
  const __m512i excess = _mm512_mulhrs_epi16(bow, slope);
  const __m512i rounded = _mm512_add_epi16(_mm512_sub_epi16(fixed, excess), _mm512_set1_epi16(2));
  return _mm512_srli_epi16(rounded, 2);
}

// Which of 16 rows see a key.
struct Visible {
  __m512i begin, end;
  __mmask16 of(int key) const {
    const __m512i position = _mm512_set1_epi32(key);
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(begin, position), position, end);
  }
};

// Weights of one step for 16 rows, [16 pairs of keys][16 rows][2], from scores [2][..][16][16]. Adds to
// total and raises top to the largest biased score; the weights are of use only if that stays below kHighest.
template <bool is_masked>
inline void weigh(const float* scores, int key, const Visible& visible, __m512 scale, __m512 bias,
                  std::uint16_t* weights, __m512& top, __m512& total) {
  const __m512 lowest = _mm512_set1_ps(kLowest);
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  // Moves the low half of each 32-bit lane to the high half.
  const __m512i upper = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
  __m512 odd_total = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 16; ++i) {
    __m512 early = _mm512_fmadd_ps(_mm512_load_ps(scores + i * 16), scale, bias);
    __m512 late = _mm512_fmadd_ps(_mm512_load_ps(scores + 2 * kFloatTile + i * 16), scale, bias);
    __mmask16 sees_early = 0xffff, sees_late = 0xffff;
    if constexpr (is_masked) {
      sees_early = visible.of(key + i);
      sees_late = visible.of(key + i + 16);
      early = _mm512_mask_mov_ps(lowest, sees_early, early);
      late = _mm512_mask_mov_ps(lowest, sees_late, late);
    }
    top = _mm512_max_ps(top, _mm512_max_ps(early, late));
    const __m512i low = _mm512_castps_si512(_mm512_max_ps(early, lowest));
    const __m512i high = _mm512_castps_si512(_mm512_max_ps(late, lowest));
    __m512i bits = exp2_bits(_mm512_mask_shuffle_epi8(low, 0xccccccccccccccccull, high, upper));
    if constexpr (is_masked) {
      bits = _mm512_and_si512(bits, _mm512_or_si512(_mm512_maskz_set1_epi32(sees_early, 0x0000ffff),
                                                    _mm512_maskz_set1_epi32(sees_late, static_cast<int>(0xffff0000u))));
    }
    __m512& sum = i % 2 == 0 ? total : odd_total;
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(bits), ones);
    _mm512_store_si512(weights + i * 32, bits);
  }
  total = _mm512_add_ps(total, odd_total);
}

// Largest scaled score of one step for each of 16 rows; -inf where a row sees none.
__m512 largest(const float* scores, int key, const Visible& visible, __m512 scale) {
  __m512 top = _mm512_set1_ps(-__builtin_inff());
  for (int i = 0; i < 32; ++i) {
    const __m512 values = _mm512_load_ps(scores + (i / 16) * 2 * kFloatTile + (i % 16) * 16);
    top = _mm512_mask_max_ps(top, visible.of(key + i), top, _mm512_mul_ps(values, scale));
  }
  return top;
}

// 2^x for x <= 0, good to float's last bits where it matters: the factor of a raised reference.
__m512 exp2_exact(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
  const __m512 f = _mm512_mul_ps(_mm512_sub_ps(x, whole), _mm512_set1_ps(0.69314718f));
  __m512 p = _mm512_set1_ps(1.0f / 720.0f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 120.0f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24.0f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6.0f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// Raise the reference of 16 rows to the largest score of a step, and scale down what was summed.
void raise_reference(const float* scores, int key, const Visible& visible, __m512 scale, int tile, int num_slices,
                     RowBlock& rows) {
  const __m512 old_bias = _mm512_load_ps(rows.bias + 16 * tile);
  const __m512 wanted = _mm512_sub_ps(_mm512_set1_ps(kBiasOfZero), largest(scores, key, visible, scale));
  const __m512 bias = _mm512_min_ps(old_bias, wanted);
  _mm512_store_ps(rows.bias + 16 * tile, bias);
  const __m512 factor = exp2_exact(_mm512_sub_ps(bias, old_bias));
  _mm512_store_ps(rows.total + 16 * tile, _mm512_mul_ps(_mm512_load_ps(rows.total + 16 * tile), factor));
  for (int t = 0; t < 2 * num_slices; ++t) {
    float* sums = rows.sums + (2 * t + tile) * kFloatTile;
    for (int i = 0; i < 16; ++i) {
      _mm512_store_ps(sums + 16 * i, _mm512_mul_ps(_mm512_load_ps(sums + 16 * i), factor));
    }
  }
}

// A step's weights and totals from its scores; false, and nothing changed, if the reference is too low.
template <bool is_masked>
bool weigh_step(const float* scores, int key, const Visible* visible, __m512 scale, std::uint16_t* weights,
                RowBlock& rows) {
  __m512 top = _mm512_set1_ps(kLowest);
  __m512 totals[2];
  for (int tile = 0; tile < 2; ++tile) {
    totals[tile] = _mm512_load_ps(rows.total + 16 * tile);
    weigh<is_masked>(scores + tile * kFloatTile, key, visible[tile], scale, _mm512_load_ps(rows.bias + 16 * tile),
                     weights + tile * kTile, top, totals[tile]);
  }
  if (_mm512_cmp_ps_mask(top, _mm512_set1_ps(kHighest), _CMP_GT_OQ) != 0) return false;
  for (int tile = 0; tile < 2; ++tile) _mm512_store_ps(rows.total + 16 * tile, totals[tile]);
  return true;
}

template <bool is_masked>
void fold_steps(const KeyBlock& block, int first, int last, const Visible* visible, int num_slices, __m512 scale,
                const Scratch& scratch, RowBlock& rows) {
  const auto keys = [&](int step) { return block.keys + step * packed_size(num_slices); };
  const auto scores = [&](int step) { return scratch.scores + (step % 2) * kStepKeys * kRows; };
  const auto weights = [&](int step) { return scratch.weights + step * kStepKeys * kRows; };
  publish();
  score(keys(first), rows.queries, num_slices, scores(first));
  int pending = first;  // weights from here on have not met their values yet
  for (int step = first; step < last; ++step) {
    // One step ahead, so that the tile unit works while the vector units weigh.
    if (step + 1 < last) score(keys(step + 1), rows.queries, num_slices, scores(step + 1));
    if (weigh_step<is_masked>(scores(step), step * kStepKeys, visible, scale, weights(step), rows)) continue;
    accumulate(block, scratch.weights, pending, step, num_slices, rows.sums);
    pending = step;
    for (int tile = 0; tile < 2; ++tile) {
      raise_reference(scores(step) + tile * kFloatTile, step * kStepKeys, visible[tile], scale, tile, num_slices, rows);
    }
    weigh_step<is_masked>(scores(step), step * kStepKeys, visible, scale, weights(step), rows);
  }
  accumulate(block, scratch.weights, pending, last, num_slices, rows.sums);
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline __m256i to_bf16(__m512 values) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)); }

}  // namespace

void enter(unsigned char* saved64) {
  const TileConfig config;
  _tile_storeconfig(saved64);
  publish();
  _tile_loadconfig(&config);
}

void leave(const unsigned char* saved64) {
  // Another library may count on the configuration it left on this thread.
  if (saved64[0] != 0) {
    _tile_loadconfig(saved64);
  } else {
    _tile_release();
  }
}

void pack_queries(const std::uint16_t* const* rows, int head_dim, int num_slices, std::uint16_t* packed) {
  for (int tile = 0; tile < 2; ++tile) {
    for (int s = 0; s < num_slices; ++s) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) block[i] = load_dims(rows[16 * tile + i], 32 * s, head_dim);
      transpose16(block);
      std::uint16_t* target = packed + (tile * num_slices + s) * kTile;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(target + 32 * i, block[i]);
    }
  }
}

void pack_keys(const std::uint16_t* rows, int num_keys, int head_dim, int num_slices, std::uint16_t* packed) {
  for (int i = 0; i < kStepKeys; ++i) {
    const std::uint16_t* row = i < num_keys ? rows + static_cast<size_t>(i) * static_cast<size_t>(head_dim) : nullptr;
    std::uint16_t* target = packed + (i / 16) * num_slices * kTile + (i % 16) * 32;
    for (int s = 0; s < num_slices; ++s) _mm512_store_si512(target + s * kTile, load_dims(row, 32 * s, head_dim));
  }
}

void pack_values(const std::uint16_t* rows, int num_keys, int head_dim, int num_slices, std::uint16_t* packed) {
  const __m512i low_pairs = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high_pairs = _mm512_add_epi16(low_pairs, _mm512_set1_epi16(16));
  const auto row = [&](int i) {
    return i < num_keys ? rows + static_cast<size_t>(i) * static_cast<size_t>(head_dim) : nullptr;
  };
  for (int s = 0; s < num_slices; ++s) {
    __m512i low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      const __m512i early = load_dims(row(i), 32 * s, head_dim);
      const __m512i late = load_dims(row(i + 16), 32 * s, head_dim);
      low[i] = _mm512_permutex2var_epi16(early, low_pairs, late);
      high[i] = _mm512_permutex2var_epi16(early, high_pairs, late);
    }
    transpose16(low);
    transpose16(high);
    std::uint16_t* target = packed + 2 * s * kTile;
    for (int i = 0; i < 16; ++i) {
      _mm512_store_si512(target + 32 * i, low[i]);
      _mm512_store_si512(target + kTile + 32 * i, high[i]);
    }
  }
}

void fold(const KeyBlock& block, int first, int last, const int* begin, const int* end, int num_slices,
          float scale_log2, const Scratch& scratch, RowBlock& rows) {
  const __m512 scale = _mm512_set1_ps(scale_log2);
  if (begin == nullptr) {
    const Visible all{_mm512_setzero_si512(), _mm512_set1_epi32(kBlockKeys)};
    const Visible visible[2] = {all, all};
    fold_steps<false>(block, first, last, visible, num_slices, scale, scratch, rows);
  } else {
    const Visible visible[2] = {{_mm512_loadu_si512(begin), _mm512_loadu_si512(end)},
                                {_mm512_loadu_si512(begin + 16), _mm512_loadu_si512(end + 16)}};
    fold_steps<true>(block, first, last, visible, num_slices, scale, scratch, rows);
  }
}

void finish(const RowBlock& rows, int num_slices, int head_dim, bool is_bf16, void* const* targets) {
  for (int tile = 0; tile < 2; ++tile) {
    const __m512 total = _mm512_load_ps(rows.total + 16 * tile);
    const __mmask16 has_keys = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 factor = _mm512_maskz_div_ps(has_keys, _mm512_set1_ps(1.0f), total);
    for (int t = 0; t < 2 * num_slices && 16 * t < head_dim; ++t) {
      const float* sums = rows.sums + (2 * t + tile) * kFloatTile;
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sums + 16 * i), factor));
      }
      transpose16(block);
      const __mmask16 dims = static_cast<__mmask16>(dims_mask(head_dim - 16 * t) & 0xffffu);
      for (int i = 0; i < 16; ++i) {
        void* target = targets[16 * tile + i];
        if (target == nullptr) continue;
        const __m512 values = _mm512_castsi512_ps(block[i]);
        if (is_bf16) {
          _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(target) + 16 * t, dims, to_bf16(values));
        } else {
          _mm512_mask_storeu_ps(static_cast<float*>(target) + 16 * t, dims, values);
        }
      }
    }
  }
}

}  // namespace tiles
}  // namespace retrieval
