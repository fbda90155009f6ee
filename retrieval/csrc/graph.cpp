#include "graph.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>

#include "graph_metric.h"
#include "graph_near.h"
#include "graph_parts.h"

namespace retrieval {
namespace {

constexpr std::int64_t kLinkBatches = 8;  // new keys linked in one batch are found by the next
constexpr int kLinkVoters = 16;           // sampled queries that name them
constexpr std::size_t kLinkStarts = 64;   // keys that a new key's search begins with

Marks<bool>& seen_keys() {
  thread_local Marks<bool> seen;
  return seen;
}

}  // namespace

Graph::Graph(GraphOptions options) : options_(options) {
  const bool is_valid = options.degree >= 1 && options.degree <= 1024 && options.num_pivots >= 1 &&
                        options.extra_degree >= 0 && options.extra_degree <= 1024 && options.link_width >= 1 &&
                        options.num_voters >= 1 && options.num_linked >= 1 && options.start_share >= 1;
  if (!is_valid) throw std::invalid_argument("graph options out of range");
}

bool Graph::add_edge(std::int64_t from, std::int32_t to) {
  std::int32_t* edges = edges_of(from);
  for (int e = 0; e < slots(); ++e) {
    if (edges[e] == to) return true;
    if (edges[e] >= 0) continue;
    edges[e] = to;
    return true;
  }
  return false;
}

// The nearest of the candidates by the metric, at most `degree`; the key itself and repetitions are left out.
std::vector<std::int32_t> Graph::nearest(const std::vector<float>& places, int head_dim, std::int64_t key,
                                         std::vector<std::int32_t> candidates) const {
  std::sort(candidates.begin(), candidates.end());
  candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
  std::vector<Hit> order;
  const float* from = places.data() + key * head_dim;
  for (const std::int32_t candidate : candidates) {
    if (candidate == key) continue;
    const float* to = places.data() + std::int64_t{candidate} * head_dim;
    float sum = 0.0f;
    for (int j = 0; j < head_dim; ++j) sum += (from[j] - to[j]) * (from[j] - to[j]);
    order.push_back({sum, candidate});
  }
  const std::size_t kept = std::min(order.size(), static_cast<std::size_t>(options_.degree));
  const auto is_nearer = [](const Hit& a, const Hit& b) {
    return a.score != b.score ? a.score < b.score : a.position < b.position;
  };
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(), is_nearer);
  std::vector<std::int32_t> found;
  for (std::size_t i = 0; i < kept; ++i) found.push_back(order[i].position);
  return found;
}

void Graph::build(const Rows& keys, std::int64_t num_keys, const float* queries, const std::int32_t* lists,
                  std::int64_t num_lists, int list_size, ThreadPool& pool) {
  num_keys_ = num_keys;
  state_ = State{};
  state_.edges.assign(static_cast<std::size_t>(num_keys * slots()), -1);
  state_.metric = GraphMetric::measure(keys, num_keys, queries, num_lists);
  keep_lists(queries, lists, num_lists, list_size, keys.head_dim, pool);
  std::vector<float> places(static_cast<std::size_t>(num_keys * keys.head_dim));
  const GraphMetric metric(state_.metric, keys.head_dim);
  for_chunks(num_keys, pool, [&](std::int64_t i) { metric.place(keys, i, places.data() + i * keys.head_dim); });
  project(places, keys.head_dim, lists, num_lists, list_size, pool);
  keep_norms(keys, 0, pool);
}

// Keys of one list become neighbours, and so do those nearest by the metric, for keys that no list names.
void Graph::project(const std::vector<float>& places, int head_dim, const std::int32_t* lists, std::int64_t num_lists,
                    int list_size, ThreadPool& pool) {
  const int num_linked = std::min(options_.num_linked, list_size);
  std::vector<std::vector<std::int32_t>> candidates(static_cast<std::size_t>(num_keys_));
  for (std::int64_t q = 0; q < num_lists; ++q) {
    const std::int32_t* list = lists + q * list_size;
    for (int p = 0; p < std::min(options_.num_pivots, num_linked) && list[p] >= 0; ++p) {
      auto& pivot = candidates[static_cast<std::size_t>(list[p])];
      for (int i = 0; i < num_linked && list[i] >= 0; ++i) pivot.push_back(list[i]);
    }
  }
  const int num_near = options_.degree;
  const std::vector<std::int32_t> near = near_vectors(places, head_dim, num_near, pool);
  for_chunks(num_keys_, pool, [&](std::int64_t i) {
    std::vector<std::int32_t> all = std::move(candidates[static_cast<std::size_t>(i)]);
    const std::int32_t* own = near.data() + i * num_near;
    all.insert(all.end(), own, std::find(own, own + num_near, -1));
    const std::vector<std::int32_t> kept = nearest(places, head_dim, i, std::move(all));
    std::copy(kept.begin(), kept.end(), edges_of(i));
  });
  // Edges back, where there is room, from the nearest keys first.
  const std::vector<std::int32_t> forth = state_.edges;
  for (int e = 0; e < options_.degree; ++e) {
    for (std::int64_t i = 0; i < num_keys_; ++i) {
      const std::int32_t to = forth[static_cast<std::size_t>(i * slots() + e)];
      if (to >= 0) add_edge(to, static_cast<std::int32_t>(i));
    }
  }
}

// New keys look for those nearest by the metric, and are linked both ways.
void Graph::insert(const Rows& keys, std::int64_t num_keys, ThreadPool& pool) {
  const std::int64_t first = num_keys_, count = num_keys - first;
  state_.edges.resize(static_cast<std::size_t>(num_keys * slots()), -1);
  num_keys_ = num_keys;
  keep_norms(keys, first, pool);
  const GraphMetric metric(state_.metric, keys.head_dim);
  std::vector<std::vector<Hit>> found(static_cast<std::size_t>(count));
  for (std::int64_t batch = 0; batch < kLinkBatches; ++batch) {
    const std::int64_t begin = count * batch / kLinkBatches, end = count * (batch + 1) / kLinkBatches;
    for_chunks(end - begin, pool, [&](std::int64_t i) {
      float placed[kMaxHeadDim], query[kMaxHeadDim];
      metric.place(keys, first + begin + i, placed);
      metric.ask(placed, query);
      Cost cost;
      const std::vector<std::int32_t> starts = entry_points(query, keys.head_dim, kLinkVoters, kLinkStarts, cost);
      found[static_cast<std::size_t>(begin + i)] =
          walk(keys, query, options_.link_width, num_keys_, starts, state_.norms.data(), cost);
    });
    for (std::int64_t i = begin; i < end; ++i) {
      const auto key = static_cast<std::int32_t>(first + i);
      int num_links = 0;
      for (const Hit& hit : found[static_cast<std::size_t>(i)]) {
        if (hit.position == key) continue;
        add_edge(key, hit.position);
        if (!add_edge(hit.position, key)) replace_edge(hit.position, key);
        if (++num_links == slots()) break;
      }
      found[static_cast<std::size_t>(i)] = {};
    }
  }
}

// One of the edges beyond `degree` gives way, another one each time.
void Graph::replace_edge(std::int64_t from, std::int32_t to) {
  if (options_.extra_degree > 0) edges_of(from)[options_.degree + to % options_.extra_degree] = to;
}

// Of the keys from `first` on.
void Graph::keep_norms(const Rows& keys, std::int64_t first, ThreadPool& pool) {
  const GraphMetric metric(state_.metric, keys.head_dim);
  state_.norms.resize(static_cast<std::size_t>(num_keys_));
  for_chunks(num_keys_ - first, pool, [&](std::int64_t i) {
    float placed[kMaxHeadDim];
    metric.place(keys, first + i, placed);
    float squared = 0.0f;
    for (int j = 0; j < keys.head_dim; ++j) squared += placed[j] * placed[j];
    state_.norms[static_cast<std::size_t>(first + i)] = squared / 2;
  });
}

std::vector<Graph::Hit> Graph::walk(const Rows& keys, const float* query, int width, std::int64_t limit,
                                    const std::vector<std::int32_t>& starts, const float* norms, Cost& cost) const {
  const auto is_higher = [](const Hit& a, const Hit& b) { return a.score > b.score; };
  const auto is_lower = [](const Hit& a, const Hit& b) { return a.score < b.score; };
  std::priority_queue<Hit, std::vector<Hit>, decltype(is_higher)> best(is_higher);    // its top is the worst kept
  std::priority_queue<Hit, std::vector<Hit>, decltype(is_lower)> frontier(is_lower);  // its top is the best
  Marks<bool>& seen = seen_keys();
  seen.begin(static_cast<std::size_t>(num_keys_));
  const Queries one{query, nullptr, 1, keys.head_dim};
  std::vector<std::int32_t> batch;
  std::vector<float> scores;
  const auto look_at = [&] {
    const auto count = static_cast<int>(batch.size());
    if (count == 0) return;
    scores.resize(batch.size());
    kernels().score(one, keys, batch.data(), 0, count, scores.data(), count);
    cost.num_scored += count;
    for (std::size_t i = 0; norms != nullptr && i < batch.size(); ++i) scores[i] -= norms[batch[i]];
    for (std::size_t i = 0; i < batch.size(); ++i) {
      const bool is_full = static_cast<int>(best.size()) >= width;
      if (is_full && scores[i] <= best.top().score) continue;
      frontier.push({scores[i], batch[i]});
      if (batch[i] >= limit) continue;  // a way through, not a result
      best.push({scores[i], batch[i]});
      if (is_full) best.pop();
    }
    batch.clear();
  };
  const auto visit = [&](std::int64_t position) {
    if (position < 0 || position >= num_keys_) return;
    bool& is_seen = seen[static_cast<std::int32_t>(position)];
    if (is_seen) return;
    is_seen = true;
    batch.push_back(static_cast<std::int32_t>(position));
  };
  for (const std::int32_t start : starts) visit(start);
  look_at();
  while (!frontier.empty()) {
    const Hit next = frontier.top();
    if (static_cast<int>(best.size()) >= width && next.score < best.top().score) break;
    frontier.pop();
    const std::int32_t* edges = edges_of(next.position);
    for (int e = 0; e < slots() && edges[e] >= 0; ++e) visit(edges[e]);
    visit(std::int64_t{next.position} - 1);
    visit(std::int64_t{next.position} + 1);
    look_at();
  }
  std::vector<Hit> hits;
  for (; !best.empty(); best.pop()) hits.push_back(best.top());
  std::reverse(hits.begin(), hits.end());
  return hits;
}

Graph::Cost Graph::search(const Rows& keys, const float* query, int k, int width, std::int64_t limit,
                          const std::vector<std::int32_t>& hints, std::int64_t* positions, float* scores) const {
  std::fill_n(positions, k, std::int64_t{-1});
  std::fill_n(scores, k, -std::numeric_limits<float>::infinity());
  Cost cost;
  const auto num_starts = static_cast<std::size_t>(std::max<std::int64_t>(64, num_keys_ / options_.start_share));
  std::vector<std::int32_t> starts = entry_points(query, keys.head_dim, options_.num_voters, num_starts, cost);
  starts.insert(starts.end(), hints.begin(), hints.end());
  const std::vector<Hit> hits = walk(keys, query, std::max(k, width), limit, starts, nullptr, cost);
  for (std::size_t i = 0; i < hits.size() && i < static_cast<std::size_t>(k); ++i) {
    positions[i] = hits[i].position;
    scores[i] = hits[i].score;
  }
  return cost;
}

std::int64_t Graph::nbytes() const {
  const std::size_t count = state_.edges.size() + state_.samples.size() + state_.lists.size() + state_.groups.size() +
                            state_.metric.size() + state_.norms.size();
  return static_cast<std::int64_t>(count * 4);
}

std::int64_t Graph::most_bytes(std::int64_t num_keys, int head_dim, std::int64_t num_samples,
                               std::int64_t num_listed) const {
  const std::int64_t per_key = slots() + 1, per_sample = head_dim + 2;  // edges and norm; the sample, and a group's bounds
  const auto metric = static_cast<std::int64_t>(GraphMetric::size(head_dim));
  return 4 * (num_keys * per_key + num_samples * per_sample + num_listed + metric);
}

void Graph::restore(State state, std::int64_t num_keys, int head_dim) {
  const auto is_position = [&](std::int32_t i) { return i >= -1 && i < num_keys; };
  const auto width = static_cast<std::size_t>(head_dim);
  const std::size_t count = state.samples.size() / width;
  bool is_whole = state.edges.size() == static_cast<std::size_t>(num_keys * slots()) &&
                  state.samples.size() == count * width && state.metric.size() == GraphMetric::size(head_dim) &&
                  state.norms.size() == static_cast<std::size_t>(num_keys) &&
                  (count == 0 ? state.lists.empty() : state.lists.size() % count == 0) &&
                  state.groups.size() % 2 == 0 && state.groups.empty() == (count == 0) &&
                  std::all_of(state.edges.begin(), state.edges.end(), is_position) &&
                  std::all_of(state.lists.begin(), state.lists.end(), is_position);
  std::int32_t end = 0;
  for (std::size_t g = 0; is_whole && g + 1 < state.groups.size(); g += 2) {
    is_whole = state.groups[g] >= end && state.groups[g] < state.groups[g + 1];
    end = state.groups[g + 1];
  }
  if (!is_whole || static_cast<std::size_t>(end) != count) throw std::invalid_argument("not a graph over these keys");
  state_ = std::move(state);
  num_keys_ = num_keys;
}

}  // namespace retrieval
