#include "graph.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>

namespace retrieval {
namespace {

constexpr std::int64_t kKeysPerTask = 256;
constexpr std::int64_t kLinkBatches = 8;  // orphans linked in one batch are found by the next

void read_row(const Rows& rows, std::int64_t position, float* out) {
  const float one = 1.0f;
  std::fill_n(out, rows.head_dim, 0.0f);
  kernels().accumulate(&one, 1, 1, rows, nullptr, position, 1, out);
}

// Which positions a walk has seen: one stamp per position, no clearing between walks.
class Visited {
 public:
  void begin(std::size_t size) {
    if (stamps_.size() < size) stamps_.resize(size, 0);
    if (++now_ == 0) {
      std::fill(stamps_.begin(), stamps_.end(), 0u);
      now_ = 1;
    }
  }
  bool insert(std::int32_t position) {
    std::uint32_t& stamp = stamps_[static_cast<std::size_t>(position)];
    const bool is_new = stamp != now_;
    stamp = now_;
    return is_new;
  }

 private:
  std::vector<std::uint32_t> stamps_;
  std::uint32_t now_ = 0;
};

Visited& calling_visited() {
  thread_local Visited visited;
  return visited;
}

void for_chunks(std::int64_t count, ThreadPool& pool, const std::function<void(std::int64_t)>& work) {
  pool.run((count + kKeysPerTask - 1) / kKeysPerTask, [&](std::int64_t task) {
    const std::int64_t end = std::min(count, (task + 1) * kKeysPerTask);
    for (std::int64_t i = task * kKeysPerTask; i < end; ++i) work(i);
  });
}

}  // namespace

Graph::Graph(GraphOptions options) : options_(options) {
  const bool is_valid = options.degree >= 1 && options.degree <= 1024 && options.num_pivots >= 1 &&
                        options.extra_degree >= 0 && options.extra_degree <= 1024 && options.link_width >= 1 &&
                        options.num_entries >= 1;
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

// RoarGraph's occlusion rule: a candidate nearer to a kept neighbour than to the pivot is reached through it.
std::vector<std::int32_t> Graph::prune(const Rows& keys, std::int64_t pivot, std::vector<std::int32_t> candidates) const {
  std::sort(candidates.begin(), candidates.end());
  candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
  candidates.erase(std::remove(candidates.begin(), candidates.end(), static_cast<std::int32_t>(pivot)), candidates.end());
  const auto count = static_cast<int>(candidates.size());
  const auto dims = static_cast<std::size_t>(keys.head_dim);
  std::vector<float> rows(static_cast<std::size_t>(count) * dims);
  std::vector<std::pair<float, int>> order;
  float centre[kMaxHeadDim];
  read_row(keys, pivot, centre);
  const auto distance = [&](const float* a, const float* b) {
    float sum = 0.0f;
    for (std::size_t j = 0; j < dims; ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
    return sum;
  };
  for (int i = 0; i < count; ++i) {
    float* row = rows.data() + static_cast<std::size_t>(i) * dims;
    read_row(keys, candidates[static_cast<std::size_t>(i)], row);
    order.emplace_back(distance(centre, row), i);
  }
  std::sort(order.begin(), order.end());
  std::vector<std::int32_t> kept;
  std::vector<const float*> kept_rows;
  for (const auto& [to_pivot, i] : order) {
    const float* row = rows.data() + static_cast<std::size_t>(i) * dims;
    const bool is_occluded = std::any_of(kept_rows.begin(), kept_rows.end(),
                                         [&, away = to_pivot](const float* other) { return distance(other, row) < away; });
    if (is_occluded) continue;
    kept.push_back(candidates[static_cast<std::size_t>(i)]);
    kept_rows.push_back(row);
    if (static_cast<int>(kept.size()) == options_.degree) return kept;
  }
  // Room left: the nearest of those passed over, so that no list is lost.
  for (const auto& [to_pivot, i] : order) {
    if (static_cast<int>(kept.size()) >= options_.degree) break;
    const std::int32_t candidate = candidates[static_cast<std::size_t>(i)];
    if (std::find(kept.begin(), kept.end(), candidate) == kept.end()) kept.push_back(candidate);
  }
  return kept;
}

void Graph::build(const Rows& keys, std::int64_t num_keys, const float* queries, const std::int32_t* lists,
                  std::int64_t num_lists, int list_size, ThreadPool& pool) {
  num_keys_ = num_keys;
  state_ = State{};
  state_.edges.assign(static_cast<std::size_t>(num_keys * slots()), -1);
  state_.centre.assign(static_cast<std::size_t>(keys.head_dim), 0.0f);
  const float share = num_keys > 0 ? 1.0f / static_cast<float>(num_keys) : 0.0f;
  for (std::int64_t i = 0; i < num_keys; ++i) {
    kernels().accumulate(&share, 1, 1, keys, nullptr, i, 1, state_.centre.data());
  }
  std::vector<std::vector<std::int32_t>> candidates(static_cast<std::size_t>(num_keys));
  for (std::int64_t q = 0; q < num_lists; ++q) {
    const std::int32_t* list = lists + q * list_size;
    for (int p = 0; p < std::min(options_.num_pivots, list_size) && list[p] >= 0; ++p) {
      auto& pivot = candidates[static_cast<std::size_t>(list[p])];
      for (int i = 0; i < list_size && list[i] >= 0; ++i) pivot.push_back(list[i]);
    }
  }
  std::vector<std::vector<std::int32_t>> kept(static_cast<std::size_t>(num_keys));
  for_chunks(num_keys, pool, [&](std::int64_t i) {
    const auto at = static_cast<std::size_t>(i);
    if (!candidates[at].empty()) kept[at] = prune(keys, i, std::move(candidates[at]));
    candidates[at].clear();
  });
  // Edges back, pruned again where there are too many.
  std::vector<std::vector<std::int32_t>> merged = kept;
  for (std::int64_t i = 0; i < num_keys; ++i) {
    for (const std::int32_t to : kept[static_cast<std::size_t>(i)]) {
      merged[static_cast<std::size_t>(to)].push_back(static_cast<std::int32_t>(i));
    }
  }
  for_chunks(num_keys, pool, [&](std::int64_t i) {
    auto& all = merged[static_cast<std::size_t>(i)];
    if (static_cast<int>(all.size()) > options_.degree) all = prune(keys, i, std::move(all));
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    std::copy(all.begin(), all.end(), edges_of(i));
  });
  // Entry points: lists taken at even distances.
  const std::int64_t num_entry_lists = std::min(num_lists, kEntryLists);
  for (std::int64_t e = 0; e < num_entry_lists; ++e) {
    const std::int64_t q = e * num_lists / num_entry_lists;
    state_.entry_queries.insert(state_.entry_queries.end(), queries + q * keys.head_dim, queries + (q + 1) * keys.head_dim);
    for (int i = 0; i < kEntryKeys; ++i) state_.entries.push_back(i < list_size ? lists[q * list_size + i] : -1);
  }
  std::vector<bool> is_reached(static_cast<std::size_t>(num_keys), false);
  for (const std::int32_t to : state_.edges) {
    if (to >= 0) is_reached[static_cast<std::size_t>(to)] = true;
  }
  std::vector<std::int32_t> orphans;
  for (std::int64_t i = 0; i < num_keys; ++i) {
    if (!is_reached[static_cast<std::size_t>(i)]) orphans.push_back(static_cast<std::int32_t>(i));
  }
  link(keys, orphans, pool);
}

void Graph::insert(const Rows& keys, std::int64_t num_keys, ThreadPool& pool) {
  std::vector<std::int32_t> orphans;
  for (std::int64_t i = num_keys_; i < num_keys; ++i) orphans.push_back(static_cast<std::int32_t>(i));
  state_.edges.resize(static_cast<std::size_t>(num_keys * slots()), -1);
  num_keys_ = num_keys;
  link(keys, orphans, pool);
}

// Keys that no edge leads to look for neighbours by themselves as queries, less the mean, and are linked both ways.
void Graph::link(const Rows& keys, const std::vector<std::int32_t>& orphans, ThreadPool& pool) {
  const auto count = static_cast<std::int64_t>(orphans.size());
  std::vector<std::vector<Hit>> found(orphans.size());
  for (std::int64_t batch = 0; batch < kLinkBatches; ++batch) {
    const std::int64_t begin = count * batch / kLinkBatches, end = count * (batch + 1) / kLinkBatches;
    for_chunks(end - begin, pool, [&](std::int64_t i) {
      float query[kMaxHeadDim];
      const auto at = static_cast<std::size_t>(begin + i);
      read_row(keys, orphans[at], query);
      for (int j = 0; j < keys.head_dim; ++j) query[j] -= state_.centre[static_cast<std::size_t>(j)];
      std::int64_t num_scored = 0;
      found[at] = walk(keys, query, options_.link_width, num_keys_, entry_points(keys, query), num_scored);
    });
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int32_t orphan = orphans[static_cast<std::size_t>(i)];
      int num_linked = 0;
      for (const Hit& hit : found[static_cast<std::size_t>(i)]) {
        if (hit.position == orphan) continue;
        add_edge(orphan, hit.position);
        add_edge(hit.position, orphan);
        if (++num_linked == 2 * options_.extra_degree) break;
      }
      found[static_cast<std::size_t>(i)] = {};
    }
  }
}

// The heads of the lists whose queries are most like this one; without lists, keys at even distances.
std::vector<std::int32_t> Graph::entry_points(const Rows& keys, const float* query) const {
  std::vector<std::int32_t> starts;
  const std::size_t num_lists = state_.entries.size() / kEntryKeys;
  if (num_lists > 0) {
    const Rows samples{state_.entry_queries.data(), nullptr, DType::kFloat32, keys.head_dim};
    std::vector<float> scores(num_lists);
    const Queries one{query, nullptr, 1, keys.head_dim};
    kernels().score(one, samples, nullptr, 0, static_cast<int>(num_lists), scores.data(), static_cast<int>(num_lists));
    std::vector<std::size_t> order(num_lists);
    for (std::size_t i = 0; i < num_lists; ++i) order[i] = i;
    const std::size_t kept = std::min(num_lists, static_cast<std::size_t>(options_.num_entries));
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
                      [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
    for (std::size_t i = 0; i < kept; ++i) {
      for (int e = 0; e < kEntryKeys; ++e) starts.push_back(state_.entries[order[i] * kEntryKeys + static_cast<std::size_t>(e)]);
    }
  } else {
    for (std::int64_t i = 0; i < 64; ++i) starts.push_back(static_cast<std::int32_t>(i * num_keys_ / 64));
  }
  return starts;
}

std::vector<Graph::Hit> Graph::walk(const Rows& keys, const float* query, int width, std::int64_t limit,
                                    const std::vector<std::int32_t>& starts, std::int64_t& num_scored) const {
  const auto is_better = [](const Hit& a, const Hit& b) { return a.score > b.score; };
  const auto is_worse = [](const Hit& a, const Hit& b) { return a.score < b.score; };
  std::priority_queue<Hit, std::vector<Hit>, decltype(is_better)> best(is_better);    // its top is the worst kept
  std::priority_queue<Hit, std::vector<Hit>, decltype(is_worse)> frontier(is_worse);  // its top is the best
  Visited& visited = calling_visited();
  visited.begin(static_cast<std::size_t>(num_keys_));
  const Queries one{query, nullptr, 1, keys.head_dim};
  std::vector<std::int32_t> batch;
  std::vector<float> scores;
  const auto look_at = [&] {
    const auto count = static_cast<int>(batch.size());
    if (count == 0) return;
    scores.resize(batch.size());
    kernels().score(one, keys, batch.data(), 0, count, scores.data(), count);
    num_scored += count;
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
    if (visited.insert(static_cast<std::int32_t>(position))) batch.push_back(static_cast<std::int32_t>(position));
  };
  for (const std::int32_t start : starts) visit(start);
  look_at();
  while (!frontier.empty()) {
    const Hit next = frontier.top();
    if (static_cast<int>(best.size()) >= width && next.score < best.top().score) break;
    frontier.pop();
    const std::int32_t* edges = edges_of(next.position);
    for (int e = 0; e < slots() && edges[e] >= 0; ++e) visit(edges[e]);
    visit(next.position - 1);
    visit(std::int64_t{next.position} + 1);
    look_at();
  }
  std::vector<Hit> hits;
  for (; !best.empty(); best.pop()) hits.push_back(best.top());
  std::reverse(hits.begin(), hits.end());
  return hits;
}

std::int64_t Graph::search(const Rows& keys, const float* query, int k, int width, std::int64_t limit,
                           const std::vector<std::int32_t>& hints, std::int64_t* positions, float* scores) const {
  std::fill_n(positions, k, std::int64_t{-1});
  std::fill_n(scores, k, -std::numeric_limits<float>::infinity());
  std::int64_t num_scored = 0;
  std::vector<std::int32_t> starts = entry_points(keys, query);
  starts.insert(starts.end(), hints.begin(), hints.end());
  const std::vector<Hit> hits = walk(keys, query, std::max(k, width), limit, starts, num_scored);
  for (std::size_t i = 0; i < hits.size() && i < static_cast<std::size_t>(k); ++i) {
    positions[i] = hits[i].position;
    scores[i] = hits[i].score;
  }
  return num_scored;
}

std::int64_t Graph::nbytes() const {
  return static_cast<std::int64_t>(state_.edges.size() * 4 + state_.entry_queries.size() * 4 +
                                   state_.entries.size() * 4 + state_.centre.size() * 4);
}

void Graph::restore(State state, std::int64_t num_keys, int head_dim) {
  const auto is_position = [&](std::int32_t i) { return i >= -1 && i < num_keys; };
  const std::size_t num_lists = state.entries.size() / kEntryKeys;
  const auto width = static_cast<std::size_t>(head_dim);
  if (state.edges.size() != static_cast<std::size_t>(num_keys * slots()) || state.entries.size() % kEntryKeys != 0 ||
      state.entry_queries.size() != num_lists * width || state.centre.size() != width ||
      !std::all_of(state.edges.begin(), state.edges.end(), is_position) ||
      !std::all_of(state.entries.begin(), state.entries.end(), is_position)) {
    throw std::invalid_argument("not a graph over these keys");
  }
  state_ = std::move(state);
  num_keys_ = num_keys;
}

}  // namespace retrieval
