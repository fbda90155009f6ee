// Products of a few rows with a matrix of weights: what a decode step of a small model does between its attentions.
//
// Such a product reads every weight once for next to no arithmetic. The weights stay as the model has them, in bfloat16
// as a rule, half of what a float32 copy would have to bring from memory, and all threads of the pool read. A row's
// result does not depend on the other rows nor on the number of threads.
#pragma once

#include <cstdint>

#include "distance.h"
#include "thread_pool.h"

namespace retrieval {

// Float32 rows, a stride apart.
struct Matrix {
  float* data;
  std::int64_t num_rows, num_columns, stride;
};

struct Linear {
  const void* weights;   // [num_outputs][num_inputs]
  DType dtype;
  std::int64_t num_outputs, num_inputs;
  const float* bias;     // [num_outputs], or null
  const float* norm;     // [num_inputs] if the input goes through a root mean square norm first, else null
  float epsilon;         // of the norm
  bool is_gated;         // the input is [gate, up], of which silu(gate) * up is multiplied

  std::int64_t num_columns() const { return is_gated ? 2 * num_inputs : num_inputs; }
};

// out = linear(in), or out += linear(in). Shapes have been checked by the caller.
void apply(const Linear& linear, const Matrix& in, const Matrix& out, bool add, ThreadPool& pool);

}  // namespace retrieval
