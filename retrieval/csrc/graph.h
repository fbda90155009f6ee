// The attention-aware graph over the keys of one head (RetrievalAttention, arXiv 2409.10516, on RoarGraph,
// arXiv 2408.08933): exact lists of the best keys of sampled queries, projected to edges between keys.
//
// Deviations: several pivots per list instead of the first key alone; the neighbours in the sequence are edges
// that need no storing; the connectivity pass looks only after keys that no edge leads to.
#pragma once

#include <cstdint>
#include <vector>

#include "distance.h"
#include "thread_pool.h"

namespace retrieval {

struct GraphOptions {
  int degree = 32;        // edges kept per key by pruning
  int num_pivots = 8;     // keys of a list that are linked to the whole list
  int extra_degree = 8;   // further edges per key, for what the connectivity pass adds
  int link_width = 32;    // keys in view when that pass looks for neighbours
  int num_entries = 8;    // lists that a search begins with
};

class Graph {
 public:
  // Throws std::invalid_argument if an option is out of range.
  explicit Graph(GraphOptions options);

  // keys: num_keys rows; queries: float [num_lists][head_dim]; lists: [num_lists][list_size] best keys of each
  // query, best first, -1 where there are none. Queries and the head of their lists are kept as entry points.
  void build(const Rows& keys, std::int64_t num_keys, const float* queries, const std::int32_t* lists,
             std::int64_t num_lists, int list_size, ThreadPool& pool);

  // Link keys [size(), num_keys) of the same rows.
  void insert(const Rows& keys, std::int64_t num_keys, ThreadPool& pool);

  // Best-first search for the best k of positions below limit; width: keys in view, at least k. hints: positions to
  // begin with besides the entry points, or none. Fills positions padded with -1 and scores padded with
  // -inf, descending; returns the number of exact inner products. Searches may run at once, not beside build or insert.
  std::int64_t search(const Rows& keys, const float* query, int k, int width, std::int64_t limit,
                      const std::vector<std::int32_t>& hints, std::int64_t* positions, float* scores) const;

  std::int64_t size() const { return num_keys_; }
  std::int64_t nbytes() const;
  const GraphOptions& options() const { return options_; }

  // State as flat vectors, for saving.
  struct State {
    std::vector<std::int32_t> edges;    // [num_keys][degree + extra_degree], -1 where none
    std::vector<float> entry_queries;   // [num_entry_lists][head_dim]
    std::vector<std::int32_t> entries;  // [num_entry_lists][kEntryKeys]
    std::vector<float> centre;          // [head_dim] mean of the keys
  };
  const State& state() const { return state_; }
  // Throws std::invalid_argument on a state that no graph of these options can have.
  void restore(State state, std::int64_t num_keys, int head_dim);

  static constexpr int kEntryKeys = 8;
  static constexpr std::int64_t kEntryLists = 512;

 private:
  struct Hit {
    float score;
    std::int32_t position;
  };
  int slots() const { return options_.degree + options_.extra_degree; }
  std::int32_t* edges_of(std::int64_t i) { return state_.edges.data() + i * slots(); }
  const std::int32_t* edges_of(std::int64_t i) const { return state_.edges.data() + i * slots(); }
  bool add_edge(std::int64_t from, std::int32_t to);
  std::vector<std::int32_t> prune(const Rows& keys, std::int64_t pivot, std::vector<std::int32_t> candidates) const;
  std::vector<Hit> walk(const Rows& keys, const float* query, int width, std::int64_t limit,
                        const std::vector<std::int32_t>& starts, std::int64_t& num_scored) const;
  std::vector<std::int32_t> entry_points(const Rows& keys, const float* query) const;
  void link(const Rows& keys, const std::vector<std::int32_t>& orphans, ThreadPool& pool);

  GraphOptions options_;
  std::int64_t num_keys_ = 0;
  State state_;
};

}  // namespace retrieval
