#include "graph_near.h"

#include <algorithm>
#include <utility>

#include "distance.h"
#include "graph_parts.h"

namespace retrieval {
namespace {

constexpr std::int64_t kCellSize = 256;    // vectors, on average
constexpr std::size_t kFullCell = 1024;    // a cell of more (equal vectors, at worst all) is several of one leader
constexpr std::size_t kCompared = 3072;    // vectors that each is compared with, about

using Near = std::pair<float, std::int32_t>;  // inner product less half the squared length; position

bool is_nearer(const Near& a, const Near& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; }

float half_square(const float* vector, int head_dim) {
  float sum = 0.0f;
  for (int j = 0; j < head_dim; ++j) sum += vector[j] * vector[j];
  return sum / 2;
}

struct Cells {
  std::vector<float> leaders, norms;               // norms: half the squared lengths
  std::vector<std::vector<std::int32_t>> members;  // ascending
};

Cells divide(const std::vector<float>& vectors, std::int64_t count, int head_dim, ThreadPool& pool) {
  Cells cells;
  const std::int64_t num_cells = (count + kCellSize - 1) / kCellSize;
  for (std::int64_t c = 0; c < num_cells; ++c) {
    const float* leader = vectors.data() + c * count / num_cells * head_dim;
    cells.leaders.insert(cells.leaders.end(), leader, leader + head_dim);
    cells.norms.push_back(half_square(leader, head_dim));
  }
  std::vector<std::int32_t> cell_of(static_cast<std::size_t>(count));
  pool.run((count + kMaxGroup - 1) / kMaxGroup, [&](std::int64_t task) {
    const std::int64_t first = task * kMaxGroup;
    const int num = static_cast<int>(std::min<std::int64_t>(kMaxGroup, count - first));
    std::vector<float> scores(static_cast<std::size_t>(num * num_cells));
    const auto stride = static_cast<int>(num_cells);
    kernels().score({vectors.data() + first * head_dim, nullptr, num, head_dim},
                    float_rows(cells.leaders.data(), head_dim), nullptr, 0, stride, scores.data(), stride);
    for (int i = 0; i < num; ++i) {
      float* of = scores.data() + i * num_cells;
      for (std::int64_t c = 0; c < num_cells; ++c) of[c] -= cells.norms[static_cast<std::size_t>(c)];
      const std::int64_t best = std::max_element(of, of + num_cells) - of;
      cell_of[static_cast<std::size_t>(first + i)] = static_cast<std::int32_t>(best);
    }
  });
  cells.members.resize(static_cast<std::size_t>(num_cells));
  for (std::int64_t i = 0; i < count; ++i) {
    const auto c = static_cast<std::size_t>(cell_of[static_cast<std::size_t>(i)]);
    cells.members[c].push_back(static_cast<std::int32_t>(i));
    if (cells.members[c].size() < kFullCell) continue;
    std::vector<std::int32_t> full;
    full.swap(cells.members[c]);
    cells.members.push_back(std::move(full));
    const std::vector<float> leader(cells.leaders.begin() + static_cast<std::ptrdiff_t>(c) * head_dim,
                                    cells.leaders.begin() + static_cast<std::ptrdiff_t>(c + 1) * head_dim);
    cells.leaders.insert(cells.leaders.end(), leader.begin(), leader.end());
    cells.norms.push_back(cells.norms[c]);
  }
  return cells;
}

// Members of the cells nearest to a cell, its own included.
std::vector<std::int32_t> around(const Cells& cells, std::size_t cell, int head_dim) {
  const auto num_cells = static_cast<std::int64_t>(cells.members.size());
  std::vector<float> scores(cells.members.size());
  const float* leader = cells.leaders.data() + cell * static_cast<std::size_t>(head_dim);
  score_rows(cells.leaders.data(), leader, head_dim, 0, num_cells, scores.data());
  std::vector<Near> order;
  for (std::size_t c = 0; c < cells.members.size(); ++c) {
    order.emplace_back(scores[c] - cells.norms[c], static_cast<std::int32_t>(c));
  }
  std::sort(order.begin(), order.end(), is_nearer);
  std::vector<std::int32_t> found = cells.members[cell];
  for (const Near& next : order) {
    if (found.size() >= kCompared) break;
    const auto c = static_cast<std::size_t>(next.second);
    if (c != cell) found.insert(found.end(), cells.members[c].begin(), cells.members[c].end());
  }
  return found;
}

}  // namespace

std::vector<std::int32_t> near_vectors(const std::vector<float>& vectors, int head_dim, int num_near,
                                       ThreadPool& pool) {
  const std::int64_t count = static_cast<std::int64_t>(vectors.size()) / head_dim;
  std::vector<std::int32_t> near(static_cast<std::size_t>(count * num_near), -1);
  const Cells cells = divide(vectors, count, head_dim, pool);
  pool.run(static_cast<std::int64_t>(cells.members.size()), [&](std::int64_t cell) {
    const std::vector<std::int32_t>& members = cells.members[static_cast<std::size_t>(cell)];
    const std::vector<std::int32_t> others = around(cells, static_cast<std::size_t>(cell), head_dim);
    const auto dims = static_cast<std::size_t>(head_dim);
    std::vector<float> rows(others.size() * dims), norms, scores(kMaxGroup * others.size());
    for (std::size_t i = 0; i < others.size(); ++i) {
      std::copy_n(vectors.data() + static_cast<std::size_t>(others[i]) * dims, dims, rows.data() + i * dims);
      norms.push_back(half_square(rows.data() + i * dims, head_dim));
    }
    std::vector<Near> order;
    for (std::size_t first = 0; first < members.size(); first += kMaxGroup) {  // members stand first among the others
      const int num = static_cast<int>(std::min<std::size_t>(kMaxGroup, members.size() - first));
      const auto stride = static_cast<int>(others.size());
      kernels().score({rows.data() + first * dims, nullptr, num, head_dim}, float_rows(rows.data(), head_dim), nullptr,
                      0, stride, scores.data(), stride);
      for (std::size_t i = first; i < first + static_cast<std::size_t>(num); ++i) {
        const float* of = scores.data() + (i - first) * others.size();
        order.clear();
        for (std::size_t j = 0; j < others.size(); ++j) {
          if (j != i) order.emplace_back(of[j] - norms[j], others[j]);
        }
        const std::size_t kept = std::min(order.size(), static_cast<std::size_t>(num_near));
        std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(), is_nearer);
        std::int32_t* to = near.data() + static_cast<std::int64_t>(members[i]) * num_near;
        for (std::size_t j = 0; j < kept; ++j) to[j] = order[j].second;
      }
    }
  });
  return near;
}

}  // namespace retrieval
