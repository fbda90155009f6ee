// The attention-aware graph over the keys of one head (RetrievalAttention, arXiv 2409.10516, on RoarGraph,
// arXiv 2408.08933): exact lists of the best keys of sampled queries, projected to edges between keys.
//
// Deviations:
// - Neighbours are chosen by how alike the sampled queries score them (GraphMetric), not by the keys' own distance,
//   which says little where queries lie far from keys; the nearest are kept, whether or not one hides another.
// - Several pivots per list instead of the first key alone; the neighbours in the sequence are edges that need no
//   storing.
// - The connectivity pass gives every key those nearest to it, found by cells, instead of searching for each.
// - The lists are kept, longer than edges need them: those of the sampled queries that a new one is made up of vote
//   for the keys that its search begins with.
#pragma once

#include <cstdint>
#include <vector>

#include "distance.h"
#include "thread_pool.h"

namespace retrieval {

struct GraphOptions {
  int degree = 16;        // nearest neighbours kept per key
  int num_linked = 100;   // keys of a list that edges lead to
  int num_pivots = 16;    // keys of a list that are linked to those
  int extra_degree = 16;  // further edges per key: from those whose neighbour it is, and to inserted keys
  int link_width = 32;    // keys in view when an inserted key looks for neighbours
  int num_voters = 64;    // sampled queries whose lists vote for the keys that a search begins with
  int start_share = 64;   // one key in so many is begun with
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
  // What nbytes is at most over so many keys, of which num_samples lists name num_listed in all.
  std::int64_t most_bytes(std::int64_t num_keys, int head_dim, std::int64_t num_samples, std::int64_t num_listed) const;
  const GraphOptions& options() const { return options_; }

  // State as flat vectors, for saving.
  struct State {
    std::vector<std::int32_t> edges;   // [num_keys][degree + extra_degree], -1 where none
    std::vector<float> samples;        // [num_lists][head_dim] sampled queries, whitened
    std::vector<std::int32_t> lists;   // [num_lists][list_size]
    std::vector<std::int32_t> groups;  // [num_groups][2]: the sample that leads it, its end, where the next begins
    std::vector<float> metric;         // see GraphMetric
    std::vector<float> norms;          // [num_keys] half the squared length of the placed key
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
  void project(const std::vector<float>& places, int head_dim, const std::int32_t* lists, std::int64_t num_lists,
               int list_size, ThreadPool& pool);
  std::vector<std::int32_t> nearest(const std::vector<float>& places, int head_dim, std::int64_t key,
                                    std::vector<std::int32_t> candidates) const;
  void replace_edge(std::int64_t from, std::int32_t to);
  void keep_norms(const Rows& keys, std::int64_t first, ThreadPool& pool);
  // norms: what is taken off the scores, or null.
  std::vector<Hit> walk(const Rows& keys, const float* query, int width, std::int64_t limit,
                        const std::vector<std::int32_t>& starts, const float* norms, Cost& cost) const;

  // graph_entry.cpp
  static bool is_better(const Hit& a, const Hit& b);
  void keep_lists(const float* queries, const std::int32_t* lists, std::int64_t num_lists, int list_size, int head_dim,
                  ThreadPool& pool);
  std::vector<Hit> voters(const float* whitened, int head_dim, int count, Cost& cost) const;
  void weigh(const float* whitened, int head_dim, std::vector<Hit>& voters) const;
  std::vector<std::int32_t> entry_points(const float* query, int head_dim, int num_voters, std::size_t count,
                                         Cost& cost) const;

  GraphOptions options_;
  std::int64_t num_keys_ = 0;
  State state_;
};

}  // namespace retrieval
