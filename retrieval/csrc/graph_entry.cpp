// Where a search begins: at the keys that the sampled queries most like the new one vote for.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "graph.h"
#include "graph_metric.h"
#include "graph_parts.h"

namespace retrieval {
namespace {

constexpr std::int64_t kSamplesPerGroup = 64;  // sampled queries per leader, on average
constexpr std::int64_t kGroupsVisited = 24;    // groups of sampled queries compared with a query, about
constexpr float kRidge = 2.0f;                 // holds the weights of voters small: their lists are cut off
constexpr int kRidgeSteps = 6;                 // of conjugate gradients; more change no choice
constexpr std::size_t kBuckets = 1024;         // that votes are sorted into
constexpr float kListed = 5.0f;                // what a list's last key is above one that is not in it

// A number per key, all zero between calls.
std::vector<float>& calling_votes(std::int64_t num_keys) {
  thread_local std::vector<float> votes;
  if (static_cast<std::int64_t>(votes.size()) < num_keys) votes.resize(static_cast<std::size_t>(num_keys));
  return votes;
}

// What naming a key is worth: the scores of a query's best keys fall about as the logarithm of their rank.
std::vector<float> worth_by_rank(std::int64_t list_size) {
  std::vector<float> worth;
  for (std::int64_t r = 0; r < list_size; ++r) {
    worth.push_back(kListed + std::log(static_cast<float>(list_size) / static_cast<float>(r + 1)));
  }
  return worth;
}

// Leaves the count first of the hits that stand before all others; order within is not kept. A histogram tells which
// are surely in, so that only the hits of one bucket are compared with each other.
template <typename Hit, typename Before>
void keep_best(std::vector<Hit>& hits, std::size_t count, const Before& is_before) {
  if (hits.size() <= count) return;
  const auto is_lower = [](const Hit& a, const Hit& b) { return a.score < b.score; };
  const auto [low, high] = std::minmax_element(hits.begin(), hits.end(), is_lower);
  const float base = low->score, width = (high->score - base) / static_cast<float>(kBuckets - 1);
  const float inverse = width > std::numeric_limits<float>::min() ? 1.0f / width : 0.0f;
  const auto bucket_of = [&](const Hit& hit) { return static_cast<std::size_t>((hit.score - base) * inverse); };
  std::array<std::size_t, kBuckets + 1> sizes{};
  for (const Hit& hit : hits) ++sizes[bucket_of(hit)];
  std::size_t cut = kBuckets, num_in = 0;  // hits of buckets above `cut` are in
  while (num_in + sizes[cut] <= count) num_in += sizes[cut--];
  std::vector<Hit> close;
  std::size_t kept = 0;
  for (const Hit& hit : hits) {
    const std::size_t bucket = bucket_of(hit);
    if (bucket == cut) close.push_back(hit);
    if (bucket > cut) hits[kept++] = hit;
  }
  const auto middle = close.begin() + static_cast<std::ptrdiff_t>(count - num_in);
  std::nth_element(close.begin(), middle, close.end(), is_before);
  std::copy(close.begin(), middle, hits.begin() + static_cast<std::ptrdiff_t>(kept));
  hits.resize(count);
}

}  // namespace

bool Graph::is_better(const Hit& a, const Hit& b) {
  return a.score != b.score ? a.score > b.score : a.position < b.position;
}

// Samples sorted into groups round evenly spaced leaders, so that a query is compared with a few groups only.
void Graph::keep_lists(const float* queries, const std::int32_t* lists, std::int64_t num_lists, int list_size,
                       int head_dim, ThreadPool& pool) {
  const auto dims = static_cast<std::size_t>(head_dim);
  const auto count = static_cast<std::size_t>(num_lists);
  const std::int64_t num_groups = (num_lists + kSamplesPerGroup - 1) / kSamplesPerGroup;
  const GraphMetric metric(state_.metric, head_dim);
  std::vector<float> samples(count * dims);
  for_chunks(num_lists, pool, [&](std::int64_t i) {
    metric.whiten(queries + i * head_dim, samples.data() + i * head_dim);
  });
  std::vector<float> leaders;
  for (std::int64_t g = 0; g < num_groups; ++g) {
    const float* leader = samples.data() + g * num_lists / num_groups * head_dim;
    leaders.insert(leaders.end(), leader, leader + dims);
  }
  std::vector<std::int32_t> group_of(count);
  for_chunks(num_lists, pool, [&](std::int64_t i) {
    std::vector<float> scores(static_cast<std::size_t>(num_groups));
    score_rows(leaders.data(), samples.data() + i * head_dim, head_dim, 0, num_groups, scores.data());
    group_of[static_cast<std::size_t>(i)] =
        static_cast<std::int32_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
  });
  for (std::int64_t g = 0; g < num_groups; ++g) {
    const std::int64_t leader = g * num_lists / num_groups;
    group_of[static_cast<std::size_t>(leader)] = static_cast<std::int32_t>(g);
    auto at = static_cast<std::int32_t>(num_samples(head_dim));
    for (std::int64_t i = 0; i < num_lists; ++i) {
      if (group_of[static_cast<std::size_t>(i)] != g) continue;
      if (i == leader) at = static_cast<std::int32_t>(num_samples(head_dim));
      state_.samples.insert(state_.samples.end(), samples.data() + i * head_dim, samples.data() + (i + 1) * head_dim);
      state_.lists.insert(state_.lists.end(), lists + i * list_size, lists + (i + 1) * list_size);
    }
    state_.groups.insert(state_.groups.end(), {at, static_cast<std::int32_t>(num_samples(head_dim))});
  }
}

// The sampled queries most like a whitened one, from the groups whose leaders are.
std::vector<Graph::Hit> Graph::voters(const float* whitened, int head_dim, int count, Cost& cost) const {
  const std::int64_t num_groups = static_cast<std::int64_t>(state_.groups.size()) / 2;
  if (num_groups == 0) return {};
  std::vector<Hit> leaders;
  for (std::int64_t g = 0; g < num_groups; ++g) {
    float score;
    score_rows(state_.samples.data(), whitened, head_dim, state_.groups[static_cast<std::size_t>(2 * g)], 1, &score);
    leaders.push_back({score, static_cast<std::int32_t>(g)});
  }
  std::sort(leaders.begin(), leaders.end(), is_better);
  cost.num_compared += num_groups;
  const std::int64_t wanted = std::max<std::int64_t>(kGroupsVisited * kSamplesPerGroup, count);
  std::vector<Hit> found;
  std::vector<float> scores;
  for (const Hit& leader : leaders) {
    if (static_cast<std::int64_t>(found.size()) >= wanted) break;
    const auto g = static_cast<std::size_t>(leader.position);
    const std::int32_t begin = g == 0 ? 0 : state_.groups[2 * g - 1], end = state_.groups[2 * g + 1];
    scores.resize(static_cast<std::size_t>(end - begin));
    score_rows(state_.samples.data(), whitened, head_dim, begin, end - begin, scores.data());
    for (std::int32_t i = begin; i < end; ++i) found.push_back({scores[static_cast<std::size_t>(i - begin)], i});
  }
  cost.num_compared += static_cast<std::int64_t>(found.size());
  const std::size_t kept = std::min(found.size(), static_cast<std::size_t>(count));
  std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(kept), found.end(), is_better);
  found.resize(kept);
  return found;
}

// How the voters make up the query: scores are linear in the query, so a key's are what these weights make of the
// voters'. Ridge regression, w = A (A'A + ridge)^-1 q over the voters' rows A, by conjugate gradients.
void Graph::weigh(const float* whitened, int head_dim, std::vector<Hit>& voters) const {
  const auto count = static_cast<int>(voters.size());
  const auto dims = static_cast<std::size_t>(head_dim);
  const Rows rows = float_rows(state_.samples.data(), head_dim);
  std::vector<std::int32_t> positions;
  for (const Hit& voter : voters) positions.push_back(voter.position);
  std::vector<float> along(voters.size());
  const auto score = [&](const float* vector) {
    kernels().score({vector, nullptr, 1, head_dim}, rows, positions.data(), 0, count, along.data(), count);
  };
  const auto dot = [&](const float* a, const float* b) {
    float sum = 0.0f;
    for (std::size_t j = 0; j < dims; ++j) sum += a[j] * b[j];
    return sum;
  };
  std::array<float, kMaxHeadDim> solution{}, rest{}, direction{}, image{};
  std::copy_n(whitened, dims, rest.begin());
  direction = rest;
  float squared = dot(rest.data(), rest.data());
  for (int step = 0; step < kRidgeSteps && squared > 1e-10f; ++step) {
    score(direction.data());
    for (std::size_t j = 0; j < dims; ++j) image[j] = kRidge * direction[j];
    kernels().accumulate(along.data(), count, 1, rows, positions.data(), 0, count, image.data());
    const float pace = squared / dot(direction.data(), image.data());
    for (std::size_t j = 0; j < dims; ++j) {
      solution[j] += pace * direction[j];
      rest[j] -= pace * image[j];
    }
    const float left = dot(rest.data(), rest.data());
    for (std::size_t j = 0; j < dims; ++j) direction[j] = rest[j] + left / squared * direction[j];
    squared = left;
  }
  score(solution.data());
  for (std::size_t i = 0; i < voters.size(); ++i) voters[i].score = along[i];
}

// The keys that the lists of the voters name most, at most count; without lists, keys at even distances.
std::vector<std::int32_t> Graph::entry_points(const float* query, int head_dim, int num_voters, std::size_t count,
                                              Cost& cost) const {
  std::vector<std::int32_t> named;
  float whitened[kMaxHeadDim];
  GraphMetric(state_.metric, head_dim).whiten(query, whitened);
  std::vector<Hit> nearest = voters(whitened, head_dim, num_voters, cost);
  if (nearest.empty()) {
    const std::int64_t num_spread = std::min(num_keys_, static_cast<std::int64_t>(count));
    for (std::int64_t i = 0; i < num_spread; ++i) {
      named.push_back(static_cast<std::int32_t>(i * num_keys_ / num_spread));
    }
    return named;
  }
  weigh(whitened, head_dim, nearest);
  const std::int64_t list_size = static_cast<std::int64_t>(state_.lists.size()) / num_samples(head_dim);
  const std::vector<float> worth = worth_by_rank(list_size);
  std::vector<float>& votes = calling_votes(num_keys_);
  named.resize(nearest.size() * worth.size());
  std::size_t num_named = 0;
  for (const Hit& voter : nearest) {
    const std::int32_t* list = state_.lists.data() + voter.position * list_size;
    for (std::size_t r = 0; r < worth.size() && list[r] >= 0; ++r) {
      float& sum = votes[static_cast<std::size_t>(list[r])];
      named[num_named] = list[r];
      num_named += sum == 0.0f ? 1 : 0;  // twice where votes cancel out: a search looks at a key once
      sum += voter.score * worth[r];
    }
  }
  std::vector<Hit> order(num_named);
  for (std::size_t i = 0; i < num_named; ++i) order[i] = {votes[static_cast<std::size_t>(named[i])], named[i]};
  for (std::size_t i = 0; i < num_named; ++i) votes[static_cast<std::size_t>(named[i])] = 0.0f;
  keep_best(order, count, &Graph::is_better);
  named.clear();
  for (const Hit& hit : order) named.push_back(hit.position);
  return named;
}

}  // namespace retrieval
