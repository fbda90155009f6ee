// The attention-aware graph over the keys of one head (RetrievalAttention, arXiv 2409.10516, on RoarGraph,
// arXiv 2408.08933): exact lists of the best keys of sampled queries, projected to edges between keys.
//
// Deviations: several pivots per list instead of the first key alone; the neighbours in the sequence are edges
// that need no storing; the connectivity pass looks only after keys that no edge leads to; the lists are kept, and
// those of the sampled queries most like a new one vote for the keys that its search begins with; a key that is
// led to once only is not worth scoring yet.
#pragma once

#include <cstdint>
#include <vector>

#include "distance.h"
#include "thread_pool.h"

namespace retrieval {

struct GraphOptions {
  int degree = 48;        // edges kept per key by pruning
  int num_pivots = 16;    // keys of a list that are linked to the whole list
  int extra_degree = 8;   // further edges per key, for what the connectivity pass adds
  int link_width = 32;    // keys in view when that pass looks for neighbours
  int num_voters = 64;    // sampled queries whose lists vote for the keys that a search begins with
  int start_share = 64;   // one key in so many is begun with
  int min_calls = 2;      // a key is scored when so many edges led to it
};

class Graph {
 public:
  // Throws std::invalid_argument if an option is out of range.
  explicit Graph(GraphOptions options);

  // keys: num_keys rows; queries: float [num_lists][head_dim]; lists: [num_lists][list_size] best keys of each
  // query, best first, -1 where there are none. Queries and their lists are kept as entry points.
  void build(const Rows& keys, std::int64_t num_keys, const float* queries, const std::int32_t* lists,
             std::int64_t num_lists, int list_size, ThreadPool& pool);

  // Link keys [size(), num_keys) of the same rows.
  void insert(const Rows& keys, std::int64_t num_keys, ThreadPool& pool);

  // What searches cost: inner products with keys, and with sampled queries.
  struct Cost {
    std::int64_t num_scored = 0, num_compared = 0;
  };

  // Best-first search for the best k of positions below limit; width: keys in view, at least k. hints: positions to
  // begin with besides the entry points, or none. Fills positions padded with -1 and scores padded with
  // -inf, descending. Searches may run at once, not beside build or insert.
  Cost search(const Rows& keys, const float* query, int k, int width, std::int64_t limit,
              const std::vector<std::int32_t>& hints, std::int64_t* positions, float* scores) const;

  std::int64_t size() const { return num_keys_; }
  std::int64_t nbytes() const;
  const GraphOptions& options() const { return options_; }

  // State as flat vectors, for saving.
  struct State {
    std::vector<std::int32_t> edges;   // [num_keys][degree + extra_degree], -1 where none
    std::vector<float> samples;        // [num_lists][head_dim] sampled queries, of length one in the keys' covariance
    std::vector<std::int32_t> lists;   // [num_lists][list_size]
    std::vector<std::int32_t> groups;  // [num_groups][2]: the sample that leads it, its end; it begins where the last ends
    std::vector<float> metric;         // [1 + head_dim][head_dim]: mean of the keys, their covariance
  };
  const State& state() const { return state_; }
  // Throws std::invalid_argument on a state that no graph of these options can have.
  void restore(State state, std::int64_t num_keys, int head_dim);

 private:
  struct Hit {
    float score;
    std::int32_t position;
  };
  int slots() const { return options_.degree + options_.extra_degree; }
  std::int32_t* edges_of(std::int64_t i) { return state_.edges.data() + i * slots(); }
  const std::int32_t* edges_of(std::int64_t i) const { return state_.edges.data() + i * slots(); }
  std::int64_t num_samples(int head_dim) const { return static_cast<std::int64_t>(state_.samples.size()) / head_dim; }
  bool add_edge(std::int64_t from, std::int32_t to);
  void measure(const Rows& keys);
  void keep_lists(const float* queries, const std::int32_t* lists, std::int64_t num_lists, int list_size, int head_dim,
                  ThreadPool& pool);
  void project(const Rows& keys, const std::int32_t* lists, std::int64_t num_lists, int list_size, ThreadPool& pool);
  std::vector<std::int32_t> prune(const Rows& keys, std::int64_t pivot, std::vector<std::int32_t> candidates) const;
  std::vector<Hit> walk(const Rows& keys, const float* query, int width, std::int64_t limit, int min_calls,
                        const std::vector<std::int32_t>& starts, Cost& cost) const;
  std::vector<Hit> voters(const float* query, int head_dim, Cost& cost) const;
  std::vector<std::int32_t> entry_points(const float* query, int head_dim, std::size_t count, Cost& cost) const;
  void link(const Rows& keys, const std::vector<std::int32_t>& orphans, ThreadPool& pool);

  GraphOptions options_;
  std::int64_t num_keys_ = 0;
  State state_;
};

}  // namespace retrieval
