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
constexpr std::size_t kLinkStarts = 64;   // keys that an orphan's search begins with
constexpr std::int64_t kMetricKeys = 8192;     // keys whose covariance is taken
constexpr std::int64_t kSamplesPerGroup = 64;  // sampled queries per leader, on average
constexpr std::int64_t kGroupsVisited = 24;     // groups of sampled queries compared with a query, about
constexpr float kRankDiscount = 0.02f;         // how fast votes fade along a list

void read_row(const Rows& rows, std::int64_t position, float* out) {
  const float one = 1.0f;
  std::fill_n(out, rows.head_dim, 0.0f);
  kernels().accumulate(&one, 1, 1, rows, nullptr, position, 1, out);
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

constexpr int kScored = std::numeric_limits<int>::max();

// How often edges led to a position; kScored once it is scored.
Marks<int>& calling_calls() {
  thread_local Marks<int> calls;
  return calls;
}

Marks<float>& calling_votes() {
  thread_local Marks<float> votes;
  return votes;
}

// Scores of rows [first, first + count) of a matrix.
void score_rows(const std::vector<float>& matrix, const float* query, int head_dim, std::int64_t first,
                std::int64_t count, float* scores) {
  const Rows rows{matrix.data(), nullptr, DType::kFloat32, head_dim};
  kernels().score({query, nullptr, 1, head_dim}, rows, nullptr, first, static_cast<int>(count), scores, static_cast<int>(count));
}

// image = covariance * query; returns <query, image>. metric as in Graph::State.
float through(const std::vector<float>& metric, const float* query, float* image, int head_dim) {
  float squared = 0.0f;
  score_rows(metric, query, head_dim, 1, head_dim, image);
  for (int j = 0; j < head_dim; ++j) squared += query[j] * image[j];
  return squared;
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
                        options.num_voters >= 1 && options.start_share >= 1 && options.min_calls >= 1;
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

// Mean and covariance of a sample of the keys: two queries are alike when they score keys alike.
void Graph::measure(const Rows& keys) {
  const auto dims = static_cast<std::size_t>(keys.head_dim);
  state_.metric.assign((dims + 1) * dims, 0.0f);
  const float share = num_keys_ > 0 ? 1.0f / static_cast<float>(num_keys_) : 0.0f;
  for (std::int64_t i = 0; i < num_keys_; ++i) kernels().accumulate(&share, 1, 1, keys, nullptr, i, 1, state_.metric.data());
  const std::int64_t step = std::max<std::int64_t>(1, num_keys_ / kMetricKeys);
  float row[kMaxHeadDim];
  for (std::int64_t i = 0; i < num_keys_; i += step) {
    read_row(keys, i, row);
    for (std::size_t j = 0; j < dims; ++j) row[j] -= state_.metric[j];
    for (std::size_t a = 0; a < dims; ++a) {
      for (std::size_t b = 0; b < dims; ++b) state_.metric[(a + 1) * dims + b] += row[a] * row[b];
    }
  }
}

// Samples sorted into groups round evenly spaced leaders, so that a query is compared with a few groups only.
void Graph::keep_lists(const float* queries, const std::int32_t* lists, std::int64_t num_lists, int list_size,
                       int head_dim, ThreadPool& pool) {
  const auto dims = static_cast<std::size_t>(head_dim);
  const auto count = static_cast<std::size_t>(num_lists);
  const std::int64_t num_groups = (num_lists + kSamplesPerGroup - 1) / kSamplesPerGroup;
  std::vector<float> samples(count * dims), images(count * dims);  // images: through the covariance
  for_chunks(num_lists, pool, [&](std::int64_t i) {
    const float* query = queries + i * head_dim;
    float* image = images.data() + i * head_dim;
    const float squared = through(state_.metric, query, image, head_dim);
    const float inverse = squared > 0.0f ? 1.0f / std::sqrt(squared) : 0.0f;
    for (std::size_t j = 0; j < dims; ++j) samples[static_cast<std::size_t>(i) * dims + j] = query[j] * inverse;
  });
  std::vector<float> leaders;
  for (std::int64_t g = 0; g < num_groups; ++g) {
    const float* leader = samples.data() + g * num_lists / num_groups * head_dim;
    leaders.insert(leaders.end(), leader, leader + dims);
  }
  std::vector<std::int32_t> group_of(count);
  for_chunks(num_lists, pool, [&](std::int64_t i) {
    std::vector<float> scores(static_cast<std::size_t>(num_groups));
    score_rows(leaders, images.data() + i * head_dim, head_dim, 0, num_groups, scores.data());
    group_of[static_cast<std::size_t>(i)] =
        static_cast<std::int32_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
  });
  for (std::int64_t g = 0; g < num_groups; ++g) {
    const std::int64_t leader = g * num_lists / num_groups;
    group_of[static_cast<std::size_t>(leader)] = static_cast<std::int32_t>(g);
    const auto begin = static_cast<std::int32_t>(num_samples(head_dim));
    std::int32_t at = begin;
    for (std::int64_t i = 0; i < num_lists; ++i) {
      if (group_of[static_cast<std::size_t>(i)] != g) continue;
      if (i == leader) at = static_cast<std::int32_t>(num_samples(head_dim));
      state_.samples.insert(state_.samples.end(), samples.data() + i * head_dim, samples.data() + (i + 1) * head_dim);
      state_.lists.insert(state_.lists.end(), lists + i * list_size, lists + (i + 1) * list_size);
    }
    state_.groups.insert(state_.groups.end(), {at, static_cast<std::int32_t>(num_samples(head_dim))});
  }
}

void Graph::build(const Rows& keys, std::int64_t num_keys, const float* queries, const std::int32_t* lists,
                  std::int64_t num_lists, int list_size, ThreadPool& pool) {
  num_keys_ = num_keys;
  state_ = State{};
  state_.edges.assign(static_cast<std::size_t>(num_keys * slots()), -1);
  measure(keys);
  keep_lists(queries, lists, num_lists, list_size, keys.head_dim, pool);
  project(keys, lists, num_lists, list_size, pool);
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

// Lists of queries become edges between keys.
void Graph::project(const Rows& keys, const std::int32_t* lists, std::int64_t num_lists, int list_size,
                    ThreadPool& pool) {
  std::vector<std::vector<std::int32_t>> candidates(static_cast<std::size_t>(num_keys_));
  for (std::int64_t q = 0; q < num_lists; ++q) {
    const std::int32_t* list = lists + q * list_size;
    for (int p = 0; p < std::min(options_.num_pivots, list_size) && list[p] >= 0; ++p) {
      auto& pivot = candidates[static_cast<std::size_t>(list[p])];
      for (int i = 0; i < list_size && list[i] >= 0; ++i) pivot.push_back(list[i]);
    }
  }
  std::vector<std::vector<std::int32_t>> kept(static_cast<std::size_t>(num_keys_));
  for_chunks(num_keys_, pool, [&](std::int64_t i) {
    const auto at = static_cast<std::size_t>(i);
    if (!candidates[at].empty()) kept[at] = prune(keys, i, std::move(candidates[at]));
    candidates[at].clear();
  });
  // Edges back, pruned again where there are too many.
  std::vector<std::vector<std::int32_t>> merged = kept;
  for (std::int64_t i = 0; i < num_keys_; ++i) {
    for (const std::int32_t to : kept[static_cast<std::size_t>(i)]) {
      merged[static_cast<std::size_t>(to)].push_back(static_cast<std::int32_t>(i));
    }
  }
  for_chunks(num_keys_, pool, [&](std::int64_t i) {
    auto& all = merged[static_cast<std::size_t>(i)];
    if (static_cast<int>(all.size()) > options_.degree) all = prune(keys, i, std::move(all));
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    std::copy(all.begin(), all.end(), edges_of(i));
  });
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
      for (int j = 0; j < keys.head_dim; ++j) query[j] -= state_.metric[static_cast<std::size_t>(j)];
      Cost cost;
      const std::vector<std::int32_t> starts = entry_points(query, keys.head_dim, kLinkStarts, cost);
      found[at] = walk(keys, query, options_.link_width, num_keys_, 1, starts, cost);
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

// The sampled queries most like this one, from the groups whose leaders are.
std::vector<Graph::Hit> Graph::voters(const float* query, int head_dim, Cost& cost) const {
  const std::int64_t num_groups = static_cast<std::int64_t>(state_.groups.size()) / 2;
  if (num_groups == 0) return {};
  float image[kMaxHeadDim];
  through(state_.metric, query, image, head_dim);
  const auto is_better = [](const Hit& a, const Hit& b) { return a.score != b.score ? a.score > b.score : a.position < b.position; };
  std::vector<Hit> leaders;
  for (std::int64_t g = 0; g < num_groups; ++g) {
    float score;
    score_rows(state_.samples, image, head_dim, state_.groups[static_cast<std::size_t>(2 * g)], 1, &score);
    leaders.push_back({score, static_cast<std::int32_t>(g)});
  }
  std::sort(leaders.begin(), leaders.end(), is_better);
  cost.num_compared += num_groups;
  const std::int64_t wanted = std::max<std::int64_t>(kGroupsVisited * kSamplesPerGroup, options_.num_voters);
  std::vector<Hit> found;
  std::vector<float> scores;
  for (const Hit& leader : leaders) {
    if (static_cast<std::int64_t>(found.size()) >= wanted) break;
    const auto g = static_cast<std::size_t>(leader.position);
    const std::int32_t begin = g == 0 ? 0 : state_.groups[2 * g - 1], end = state_.groups[2 * g + 1];
    scores.resize(static_cast<std::size_t>(end - begin));
    score_rows(state_.samples, image, head_dim, begin, end - begin, scores.data());
    for (std::int32_t i = begin; i < end; ++i) found.push_back({scores[static_cast<std::size_t>(i - begin)], i});
  }
  cost.num_compared += static_cast<std::int64_t>(found.size());
  const std::size_t kept = std::min(found.size(), static_cast<std::size_t>(options_.num_voters));
  std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(kept), found.end(), is_better);
  found.resize(kept);
  return found;
}

// The keys that the lists of the voters name most, at most count; without lists, keys at even distances.
std::vector<std::int32_t> Graph::entry_points(const float* query, int head_dim, std::size_t count, Cost& cost) const {
  std::vector<std::int32_t> named;
  const std::vector<Hit> nearest = voters(query, head_dim, cost);
  if (nearest.empty()) {
    const std::int64_t num_spread = std::min(num_keys_, static_cast<std::int64_t>(count));
    for (std::int64_t i = 0; i < num_spread; ++i) named.push_back(static_cast<std::int32_t>(i * num_keys_ / num_spread));
    return named;
  }
  Marks<float>& votes = calling_votes();
  votes.begin(static_cast<std::size_t>(num_keys_));
  const std::int64_t list_size = static_cast<std::int64_t>(state_.lists.size()) / num_samples(head_dim);
  for (const Hit& voter : nearest) {
    const std::int32_t* list = state_.lists.data() + voter.position * list_size;
    for (std::int64_t r = 0; r < list_size && list[r] >= 0; ++r) {
      float& sum = votes[list[r]];
      if (sum == 0.0f) named.push_back(list[r]);
      sum += 1.0f / (1.0f + kRankDiscount * static_cast<float>(r));
    }
  }
  if (named.size() <= count) return named;
  std::nth_element(named.begin(), named.begin() + static_cast<std::ptrdiff_t>(count), named.end(),
                   [&](std::int32_t a, std::int32_t b) { return votes[a] != votes[b] ? votes[a] > votes[b] : a < b; });
  named.resize(count);
  return named;
}

std::vector<Graph::Hit> Graph::walk(const Rows& keys, const float* query, int width, std::int64_t limit,
                                    int min_calls, const std::vector<std::int32_t>& starts, Cost& cost) const {
  const auto is_better = [](const Hit& a, const Hit& b) { return a.score > b.score; };
  const auto is_worse = [](const Hit& a, const Hit& b) { return a.score < b.score; };
  std::priority_queue<Hit, std::vector<Hit>, decltype(is_better)> best(is_better);    // its top is the worst kept
  std::priority_queue<Hit, std::vector<Hit>, decltype(is_worse)> frontier(is_worse);  // its top is the best
  Marks<int>& calls = calling_calls();
  calls.begin(static_cast<std::size_t>(num_keys_));
  const Queries one{query, nullptr, 1, keys.head_dim};
  std::vector<std::int32_t> batch;
  std::vector<float> scores;
  const auto look_at = [&] {
    const auto count = static_cast<int>(batch.size());
    if (count == 0) return;
    scores.resize(batch.size());
    kernels().score(one, keys, batch.data(), 0, count, scores.data(), count);
    cost.num_scored += count;
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
  const auto visit = [&](std::int64_t position, int enough) {
    if (position < 0 || position >= num_keys_) return;
    int& count = calls[static_cast<std::int32_t>(position)];
    if (count == kScored || ++count < enough) return;
    count = kScored;
    batch.push_back(static_cast<std::int32_t>(position));
  };
  for (const std::int32_t start : starts) visit(start, 1);
  look_at();
  while (!frontier.empty()) {
    const Hit next = frontier.top();
    if (static_cast<int>(best.size()) >= width && next.score < best.top().score) break;
    frontier.pop();
    const std::int32_t* edges = edges_of(next.position);
    for (int e = 0; e < slots() && edges[e] >= 0; ++e) visit(edges[e], min_calls);
    visit(std::int64_t{next.position} - 1, 1);
    visit(std::int64_t{next.position} + 1, 1);
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
  std::vector<std::int32_t> starts = entry_points(query, keys.head_dim, num_starts, cost);
  starts.insert(starts.end(), hints.begin(), hints.end());
  const std::vector<Hit> hits = walk(keys, query, std::max(k, width), limit, options_.min_calls, starts, cost);
  for (std::size_t i = 0; i < hits.size() && i < static_cast<std::size_t>(k); ++i) {
    positions[i] = hits[i].position;
    scores[i] = hits[i].score;
  }
  return cost;
}

std::int64_t Graph::nbytes() const {
  const std::size_t count = state_.edges.size() + state_.samples.size() + state_.lists.size() + state_.groups.size() +
                            state_.metric.size();
  return static_cast<std::int64_t>(count * 4);
}

void Graph::restore(State state, std::int64_t num_keys, int head_dim) {
  const auto is_position = [&](std::int32_t i) { return i >= -1 && i < num_keys; };
  const auto width = static_cast<std::size_t>(head_dim);
  const std::size_t count = state.samples.size() / width;
  bool is_whole = state.edges.size() == static_cast<std::size_t>(num_keys * slots()) &&
                  state.samples.size() == count * width && state.metric.size() == (width + 1) * width &&
                  (count == 0 ? state.lists.empty() : state.lists.size() % count == 0) && state.groups.size() % 2 == 0 &&
                  state.groups.empty() == (count == 0) &&
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
