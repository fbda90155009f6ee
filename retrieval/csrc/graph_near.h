// The nearest neighbours among vectors, by cells: most of them, for little.
#pragma once

#include <cstdint>
#include <vector>

#include "thread_pool.h"

namespace retrieval {

// [count][num_near] positions, nearest first, -1 where there are none, of vectors [count][head_dim]. A vector is
// compared with the vectors of its own cell and of the cells next to it; cells lie round evenly spaced vectors.
std::vector<std::int32_t> near_vectors(const std::vector<float>& vectors, int head_dim, int num_near, ThreadPool& pool);

}  // namespace retrieval
