// Exact attention of a chunk of new tokens over all keys before it and, causally, among themselves.
//
// The rows of a KV head are its group's queries ordered by position, so that a block of 32 rows shares every
// key it loads and nearly the same causal limit. A task is a run of rows over a range of keys; ranges of one
// run are merged by log-sum-exp. How the work is cut depends on its shape alone, so the result depends
// neither on the number of threads nor on their timing.
#pragma once

#include <cstdint>
#include <vector>

#include "attend.h"
#include "thread_pool.h"

namespace retrieval {

struct Chunk {
  const std::uint16_t* queries;     // bf16 [num_q_heads][num_new][head_dim]
  std::int64_t query_head_stride;   // in elements
  std::int64_t query_row_stride;
  void* out;                        // [num_q_heads][num_new][head_dim], float32 or bf16
  bool is_out_bf16;
  std::int64_t out_head_stride;
  std::int64_t out_row_stride;
  float* lse;                       // [num_q_heads][num_new] or null; natural log, after scaling
  std::int64_t num_new;
  int num_q_heads, num_kv_heads, head_dim;
  float scale;
  std::int64_t window;              // keys each query sees, its own included; 0: all
};

// Whether this build and this machine have the instructions (AMX-BF16, AVX-512-BF16, VBMI2) and the system
// lets the process use them.
bool can_attend_chunk();

// parts: bf16, without codes, all positions in order, the chunk's own keys last. Shapes have been checked by
// the caller, who has also asked can_attend_chunk().
void attend_chunk(const Chunk& chunk, const std::vector<const Part*>& parts, ThreadPool& pool);

}  // namespace retrieval
