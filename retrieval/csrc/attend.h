// Attention of one decode step in one layer: all sequences, all heads.
//
// A sequence is a list of parts, disjoint runs of positions. A part without codes is attended exactly.
// A part with codes is searched: the codes are scanned once for all query heads of a KV head, keys whose
// bound could matter are rescored exactly, and those that do matter enter the output. A head that looks so
// widely that too much would be left out takes a sample instead: keys drawn in proportion to their estimated
// weights, each with its weight over its chance (MagicPIG, arXiv 2410.16179, draws too, by hash collisions; here the
// chances follow the codes, luck.h). Where estimates are clear, that weight is by estimate too, and only the value is
// read (sample.h). Of a long context, runs of keys are left out by their means before any key is looked at (choose.h).
// Everything is merged in float32.
// The result depends neither on the number of threads nor on their timing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codes.h"
#include "distance.h"
#include "thread_pool.h"

namespace retrieval {

// Keys and values of one segment and layer: [num_kv_heads][capacity][head_dim], heads apart by a stride.
struct Part {
  const void* keys = nullptr;
  const void* values = nullptr;
  const float* key_scales = nullptr;    // [num_kv_heads][capacity] when dtype is int8
  const float* value_scales = nullptr;
  DType dtype = DType::kFloat32;
  int num_kv_heads = 0;
  int head_dim = 0;
  std::int64_t capacity = 0;
  std::int64_t key_head_stride = 0;     // in elements
  std::int64_t value_head_stride = 0;
  std::int64_t begin = 0, end = 0;      // positions attended
  std::shared_ptr<const LayerCodes> codes;  // of positions [0, codes->num_keys()); later ones are attended exactly

  Rows key_rows(int head) const { return rows(keys, key_scales, key_head_stride, head); }
  Rows value_rows(int head) const { return rows(values, value_scales, value_head_stride, head); }

 private:
  Rows rows(const void* data, const float* scales, std::int64_t stride, int head) const {
    const auto* bytes = static_cast<const std::byte*>(data) + head * stride * element_bytes(dtype);
    return {bytes, scales != nullptr ? scales + head * capacity : nullptr, dtype, head_dim};
  }
};

// How much of the searched parts is looked at, per query head.
struct Budget {
  int k = 0;                // > 0: the k best keys; 0: every key that matters
  float beta = 10.0f;       // what matters: a logit at most this many nats below the best one
  float deviations = 3.5f;  // a key is ruled out when even that many standard deviations would not lift it
  int min_keys = 1;         // retrieved at least (as far as there are keys)
  int max_keys = 16384;     // rescored or drawn at most, per KV head and sequence
  float rest = 0.003f;      // a head whose unretrieved keys weigh more than this share draws some of them
  int rest_keys = 1792;     // keys such a head takes, about; one that two heads take is fetched once
  int exact_keys = 4096;    // fewer searched keys of a sequence in all are attended exactly, which is faster then
  float reach = 6.0f;       // a run of neighbours is left out when no key that many deviations above their mean would
                            // become the best; 0: none is
  std::int64_t reach_products = std::int64_t{1} << 23;  // a search of fewer products of coordinates, of a KV head and
                            // sequence, scans every run: to look at some groups first takes longer than it saves
};

// Sums over sequences and query heads.
struct AttendStats {
  std::int64_t num_visible = 0;    // keys attended or searched
  std::int64_t num_scored = 0;     // exact inner products
  std::int64_t num_retrieved = 0;  // keys of searched parts whose value entered the output
  std::int64_t num_drawn = 0;      // keys drawn by units whose heads look widely, once per unit
  std::int64_t bytes_read = 0;     // codes, keys and values
};

struct LayerQueries {
  const float* values;        // [num_seqs][num_q_heads][head_dim]
  const std::uint16_t* bf16;  // the same as bf16 if they came so, else null
  int num_seqs, num_q_heads, num_kv_heads, head_dim;
};

// out: [num_seqs][num_q_heads][head_dim], lse: [num_seqs][num_q_heads]; no key at all: 0 and -inf.
// Shapes of parts have been checked by the caller.
AttendStats attend_layer(const LayerQueries& queries, const std::vector<std::vector<const Part*>>& parts, float scale,
                         const Budget& budget, ThreadPool& pool, float* out, float* lse);

// The best k keys of one KV head of part for each of num_queries queries: positions [num_queries][k]
// padded with -1, scores descending and padded with -inf. Exact if the part has no codes.
AttendStats search_part(const LayerQueries& queries, const Part& part, int kv_head, int k, const Budget& budget,
                        ThreadPool& pool, std::int64_t* positions, float* scores);

}  // namespace retrieval
