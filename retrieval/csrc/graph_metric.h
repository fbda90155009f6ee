// How alike two queries are to the keys, and two keys to the queries.
#pragma once

#include <cstdint>
#include <vector>

#include "distance.h"

namespace retrieval {

// Two queries are alike when they score keys alike: the inner product of whitened queries is the covariance of their
// scores over the keys. Two keys are alike when queries score them alike: the distance of placed keys is that of
// their scores, averaged over the sampled queries. Neither asks for queries to lie near keys, nor for a scale.
class GraphMetric {
 public:
  // [1 + 2 * head_dim][head_dim]: mean of the keys, the factors (transposed) of the keys' covariance and of the
  // queries' second moment.
  static std::vector<float> measure(const Rows& keys, std::int64_t num_keys, const float* queries,
                                    std::int64_t num_queries);
  static std::size_t size(int head_dim) {
    return static_cast<std::size_t>(1 + 2 * head_dim) * static_cast<std::size_t>(head_dim);
  }

  GraphMetric(const std::vector<float>& values, int head_dim) : values_(values.data()), head_dim_(head_dim) {}

  // whitened [head_dim], of length one, or zero where all keys score the same or beyond all numbers.
  void whiten(const float* query, float* whitened) const;

  // placed [head_dim].
  void place(const Rows& keys, std::int64_t position, float* placed) const;

  // The query [head_dim] whose scores are inner products with this placed key, but for a constant.
  void ask(const float* placed, float* query) const;

 private:
  const float* values_;
  int head_dim_;
};

}  // namespace retrieval
