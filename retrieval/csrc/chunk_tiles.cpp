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

// Tiles 0 to 3 hold sums of values that are being accumulated, 4 and 5 scores, 6 and 7 what is multiplied. Tile
// work is cut into units of two products, so that it can be dealt out between the vector work: the processor looks
// ahead far enough to overlap a unit with its surroundings, but not a whole step of either.

// Scores of 32 keys by 32 rows, [2 halves of keys][2 tiles of rows][16][16]: 2 * num_slices units.
struct Scorer {
  const std::uint16_t* keys;  // [32][num_slices * 32]
  const std::uint16_t* queries;
  float* scores;
  int half = 0, slice = 0;

  void advance(int num_slices) {
    if (slice == 0) {
      _tile_zero(4);
      _tile_zero(5);
    }
    _tile_loadd(6, keys + half * num_slices * kTile + slice * 32, static_cast<size_t>(num_slices) * 64);
    _tile_loadd(7, queries + slice * kTile, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, queries + (num_slices + slice) * kTile, 64);
    _tile_dpbf16ps(5, 6, 7);
    if (++slice < num_slices) return;
    _tile_stored(4, scores + 2 * half * kFloatTile, 64);
    _tile_stored(5, scores + (2 * half + 1) * kFloatTile, 64);
    slice = 0;
    ++half;
  }
};

// One unit of the waiting weights: 16 dims by 32 rows by 32 keys. Two units are a step of a slice; a slice's sums
// stay in tiles over all its steps.
inline void accumulate(Pipeline& p, int num_slices) {
  float* sums = p.waiting_rows->sums + p.waiting_slice * 4 * kFloatTile;
  const std::uint16_t* values =
      p.waiting_values + p.waiting_step * packed_size(num_slices) + (2 * p.waiting_slice + p.waiting_half) * kTile;
  const std::uint16_t* weights = p.waiting_weights + p.waiting_step * kStepKeys * kRows;
  _tile_loadd(6, values, 64);
  _tile_loadd(7, weights, 64);
  if (p.waiting_half == 0) {
    if (p.waiting_step == p.waiting_first) {
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + kFloatTile, 64);
      _tile_loadd(2, sums + 2 * kFloatTile, 64);
      _tile_loadd(3, sums + 3 * kFloatTile, 64);
    }
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(7, weights + kTile, 64);
    _tile_dpbf16ps(1, 6, 7);
    p.waiting_half = 1;
    return;
  }
  _tile_dpbf16ps(2, 6, 7);
  _tile_loadd(7, weights + kTile, 64);
  _tile_dpbf16ps(3, 6, 7);
  p.waiting_half = 0;
  if (++p.waiting_step < p.waiting_last) return;
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kFloatTile, 64);
  _tile_stored(2, sums + 2 * kFloatTile, 64);
  _tile_stored(3, sums + 3 * kFloatTile, 64);
  p.waiting_step = p.waiting_first;
  if (++p.waiting_slice == num_slices) p.waiting_rows = nullptr;
}

// Into the second-level cache: the first has no room beside what a step works on.
inline void fetch(Ahead& ahead) {
  for (int i = 0; i < ahead.lines_per_turn && ahead.next < ahead.end; ++i, ahead.next += 64) {
    _mm_prefetch(ahead.next, _MM_HINT_T1);
  }
}

inline void accumulate_all(Pipeline& p, int num_slices) {
  publish();
  while (p.waiting_rows != nullptr) accumulate(p, num_slices);
  publish();
}

inline void let_wait(Pipeline& p, RowBlock& rows, const KeyBlock& block, const std::uint16_t* weights, int first,
                     int last) {
  if (first == last) return;
  p.waiting_rows = &rows;
  p.waiting_values = block.values;
  p.waiting_weights = weights;
  p.waiting_first = p.waiting_step = first;
  p.waiting_last = last;
  p.waiting_slice = p.waiting_half = 0;
}

// A float between 2^14 and 2^15 has steps of 2^-9, so the low 16 bits of 24576 + 111 + x are 512 * (x + 111)
// rounded to nearest: x in fixed point, its integer part biased as the exponent of 2^(x - 16) is, good for x from
// -64 (lower ones are raised to that) to 17 (from there on the float's upper half differs: kUpperHalf).
constexpr float kLowest = 24576.0f + 111.0f - 64.0f;
constexpr int kUpperHalf = 0x46c00000;

// Bits of the bf16 2^(x - 16) of 32 such fixed-point numbers at once. A float's bits, read as a number, are its
// logarithm but for the mantissa: 2^f - 1 against f. Their difference is close to f (1 - f) (77 + 26 f) / 256. The
// result is truncated, not rounded, which costs nothing since kBiasOfZero counts the mean loss, 2/512 in x, back in.
// Relative error of a weight: 0.0018 root mean square (rounding the exact value to bf16: 0.0017), mean -2e-5, at
// most 0.0046; all as enumerated over every fraction and rounding of x.
inline __m512i exp2_bits(__m512i fixed) {
  const __m512i fraction = _mm512_slli_epi16(fixed, 7);
  const __m512i rest = _mm512_sub_epi16(_mm512_setzero_si512(), fraction);
  const __m512i bow = _mm512_mulhi_epu16(fraction, rest);
  const __m512i slope = _mm512_add_epi16(_mm512_mulhi_epu16(fraction, _mm512_set1_epi16(26)), _mm512_set1_epi16(77));
  const __m512i excess = _mm512_mulhrs_epi16(bow, slope);
  return _mm512_srli_epi16(_mm512_sub_epi16(fixed, excess), 2);
}

// Which of 16 rows see a key.
struct Visible {
  __m512i begin, end;
  __mmask16 of(int key) const {
    const __m512i position = _mm512_set1_epi32(key);
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(begin, position), position, end);
  }
};

// 16 rows meeting a step.
struct Weigher {
  Visible visible;  // if masked
  __m512 scale, bias;
  __m512 totals[2];  // two, for the latency of their sums
  __m512i seen;      // bitwise or of all biased scores

  // Weights of pairs of keys [first, first + 4), [..][16 rows][2], from scores [2][..][16][16].
  template <bool is_masked>
  void weigh(const float* scores, int key, int first, std::uint16_t* weights) {
    const __m512 lowest = _mm512_set1_ps(kLowest);
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    // Moves the low half of each 32-bit lane to the high half.
    const __m512i upper = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int i = first + j;
      __m512 early = _mm512_fmadd_ps(_mm512_load_ps(scores + i * 16), scale, bias);
      __m512 late = _mm512_fmadd_ps(_mm512_load_ps(scores + 2 * kFloatTile + i * 16), scale, bias);
      __mmask16 sees_early = 0xffff, sees_late = 0xffff;
      if constexpr (is_masked) {
        sees_early = visible.of(key + i);
        sees_late = visible.of(key + i + 16);
        early = _mm512_mask_mov_ps(lowest, sees_early, early);
        late = _mm512_mask_mov_ps(lowest, sees_late, late);
      }
      // In this order, NaN stays NaN.
      const __m512i low = _mm512_castps_si512(_mm512_max_ps(lowest, early));
      const __m512i high = _mm512_castps_si512(_mm512_max_ps(lowest, late));
      seen = _mm512_ternarylogic_epi32(seen, low, high, 0xfe);
      __m512i bits = exp2_bits(_mm512_mask_shuffle_epi8(low, 0xccccccccccccccccull, high, upper));
      if constexpr (is_masked) {
        const __m512i late_bits = _mm512_maskz_set1_epi32(sees_late, static_cast<int>(0xffff0000u));
        bits = _mm512_and_si512(bits, _mm512_or_si512(_mm512_maskz_set1_epi32(sees_early, 0xffff), late_bits));
      }
      totals[j % 2] = _mm512_dpbf16_ps(totals[j % 2], reinterpret_cast<__m512bh>(bits), ones);
      _mm512_store_si512(weights + i * 32, bits);
    }
  }

  // Rows with a score too far above their reference, or NaN: their weights are of no use.
  __mmask16 out_of_range() const {
    return _mm512_cmpneq_epi32_mask(_mm512_and_si512(seen, _mm512_set1_epi32(static_cast<int>(0xffff0000u))),
                                    _mm512_set1_epi32(kUpperHalf));
  }
};

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

// A step's weights and totals from its scores, with the units of tile work dealt out among them. Returns the rows
// out of range; if there are any, the totals stay as they were unless they are wanted anyway.
template <bool is_masked, bool is_final, typename Units>
unsigned weigh_step(const float* scores, int key, const Visible* visible, __m512 scale, std::uint16_t* weights,
                    RowBlock& rows, const Units& units) {
  __m512 totals[2];
  unsigned out_of_range = 0;
  for (int tile = 0; tile < 2; ++tile) {
    Weigher weigher{visible[tile], scale, _mm512_load_ps(rows.bias + 16 * tile),
                    {_mm512_load_ps(rows.total + 16 * tile), _mm512_setzero_ps()}, _mm512_set1_epi32(kUpperHalf)};
    for (int quarter = 0; quarter < 4; ++quarter) {
      units(4 * tile + quarter);
      weigher.weigh<is_masked>(scores + tile * kFloatTile, key, 4 * quarter, weights + tile * kTile);
    }
    totals[tile] = _mm512_add_ps(weigher.totals[0], weigher.totals[1]);
    out_of_range |= static_cast<unsigned>(weigher.out_of_range()) << (16 * tile);
  }
  if (out_of_range != 0 && !is_final) return out_of_range;
  for (int tile = 0; tile < 2; ++tile) _mm512_store_ps(rows.total + 16 * tile, totals[tile]);
  return out_of_range;
}

// fixed_slices: num_slices where the compiler may know it, else 0.
template <bool is_masked, int fixed_slices>
void fold_steps(const Fold& fold, const Fold* next, const Visible* visible, Pipeline& p) {
  const int num_slices = fixed_slices != 0 ? fixed_slices : p.num_slices;
  const __m512 scale = _mm512_set1_ps(p.scale_log2);
  RowBlock& rows = *fold.rows;
  std::uint16_t* all_weights = p.weights[p.weights_in];
  const auto keys_of = [&](const Fold& f, int step) { return f.block->keys[step]; };
  const auto scores_in = [&](int which) { return p.scores + which * kStepKeys * kRows; };
  publish();
  if (p.scored_keys != keys_of(fold, fold.first) || p.scored_queries != rows.queries) {
    Scorer scorer{keys_of(fold, fold.first), rows.queries, scores_in(p.scores_in)};
    for (int unit = 0; unit < 2 * num_slices; ++unit) scorer.advance(num_slices);
  }
  int first_waiting = fold.first;
  for (int step = fold.first; step < fold.last; ++step) {
    const float* scores = scores_in(p.scores_in);
    p.scores_in ^= 1;
    Scorer scorer{nullptr, nullptr, scores_in(p.scores_in)};
    if (step + 1 < fold.last) {
      scorer.keys = keys_of(fold, step + 1);
      scorer.queries = rows.queries;
    } else if (next != nullptr) {
      scorer.keys = keys_of(*next, next->first);
      scorer.queries = next->rows->queries;
    }
    p.scored_keys = scorer.keys;
    p.scored_queries = scorer.queries;
    // Eight turns for 2 * num_slices units of scores, then as many of values.
    int num_done = 0;
    const auto units = [&](int turn) {
      if (turn % (8 / Ahead::kTurns) == 0) {
        fetch(p.keys_ahead);
        fetch(p.values_ahead);
      }
      for (; 2 * num_done < (turn + 1) * num_slices; ++num_done) {
        if (num_done < 2 * num_slices) {
          if (scorer.keys != nullptr) scorer.advance(num_slices);
        } else if (p.waiting_rows != nullptr) {
          accumulate(p, num_slices);
        }
      }
    };
    std::uint16_t* weights = all_weights + step * kStepKeys * kRows;
    const int key = step * kStepKeys;
    if (weigh_step<is_masked, false>(scores, key, visible, scale, weights, rows, units) == 0) continue;
    // Rare: settle everything that is relative to the old references, raise them, weigh again.
    accumulate_all(p, num_slices);
    let_wait(p, rows, *fold.block, all_weights, first_waiting, step);
    accumulate_all(p, num_slices);
    first_waiting = step;
    for (int tile = 0; tile < 2; ++tile) {
      raise_reference(scores + tile * kFloatTile, key, visible[tile], scale, tile, num_slices, rows);
    }
    const unsigned is_nan = weigh_step<is_masked, true>(scores, key, visible, scale, weights, rows, [](int) {});
    for (int i = 0; is_nan != 0 && i < kRows; ++i) {
      if ((is_nan >> i & 1) != 0) rows.total[i] = __builtin_nanf("");
    }
  }
  accumulate_all(p, num_slices);
  let_wait(p, rows, *fold.block, all_weights, first_waiting, fold.last);
  p.weights_in ^= 1;
}

template <bool is_masked>
void fold_any(const Fold& fold, const Fold* next, const Visible* visible, Pipeline& p) {
  switch (p.num_slices) {
    case 2: return fold_steps<is_masked, 2>(fold, next, visible, p);
    case 4: return fold_steps<is_masked, 4>(fold, next, visible, p);
    default: return fold_steps<is_masked, 0>(fold, next, visible, p);
  }
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
    std::uint16_t* target = packed + i * num_slices * 32;
    for (int s = 0; s < num_slices; ++s) _mm512_store_si512(target + s * 32, load_dims(row, 32 * s, head_dim));
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

void fold(const Fold& fold, const Fold* next, Pipeline& pipeline) {
  if (fold.begin == nullptr) {
    const Visible all{_mm512_setzero_si512(), _mm512_set1_epi32(kBlockKeys)};
    const Visible visible[2] = {all, all};
    fold_any<false>(fold, next, visible, pipeline);
  } else {
    const Visible visible[2] = {{_mm512_loadu_si512(fold.begin), _mm512_loadu_si512(fold.end)},
                                {_mm512_loadu_si512(fold.begin + 16), _mm512_loadu_si512(fold.end + 16)}};
    fold_any<true>(fold, next, visible, pipeline);
  }
}

void settle(Pipeline& pipeline) { accumulate_all(pipeline, pipeline.num_slices); }

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
