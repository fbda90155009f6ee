// What the files of the graph share: rows as floats, and small numbers per position.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "distance.h"
#include "thread_pool.h"

namespace retrieval {

inline void read_row(const Rows& rows, std::int64_t position, float* out) {
  const float one = 1.0f;
  std::fill_n(out, rows.head_dim, 0.0f);
  kernels().accumulate(&one, 1, 1, rows, nullptr, position, 1, out);
}

inline Rows float_rows(const float* values, int head_dim) { return {values, nullptr, DType::kFloat32, head_dim}; }

// Scores of rows [first, first + count) of a matrix.
inline void score_rows(const float* matrix, const float* query, int head_dim, std::int64_t first, std::int64_t count,
                       float* scores) {
  kernels().score({query, nullptr, 1, head_dim}, float_rows(matrix, head_dim), nullptr, first, static_cast<int>(count),
                  scores, static_cast<int>(count));
}

inline void for_chunks(std::int64_t count, ThreadPool& pool, const std::function<void(std::int64_t)>& work) {
  constexpr std::int64_t kPerTask = 256;
  pool.run((count + kPerTask - 1) / kPerTask, [&](std::int64_t task) {
    const std::int64_t end = std::min(count, (task + 1) * kPerTask);
    for (std::int64_t i = task * kPerTask; i < end; ++i) work(i);
  });
}

// A small number per position and walk, zero at first: stamped, so that nothing is cleared between walks.
template <typename T>
class Marks {
 public:
  void begin(std::size_t size) {
    if (marks_.size() < size) marks_.resize(size);
    if (++now_ == 0) {
      std::fill(marks_.begin(), marks_.end(), Mark{});
      now_ = 1;
    }
  }
  T& operator[](std::int32_t position) {
    Mark& mark = marks_[static_cast<std::size_t>(position)];
    if (mark.stamp != now_) mark = {now_, T{}};
    return mark.value;
  }

 private:
  struct Mark {
    std::uint32_t stamp = 0;
    T value{};
  };
  std::vector<Mark> marks_;
  std::uint32_t now_ = 0;
};

}  // namespace retrieval
