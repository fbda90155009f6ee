// The Python face of graph.h.
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "bindings.h"
#include "graph.h"

using namespace nb::literals;
using namespace retrieval;

namespace {

// Keys of one head, [num_keys][head_dim].
Rows key_matrix(const Array& keys) {
  require(keys.ndim() == 2 && keys.shape(1) >= 8 && keys.shape(1) <= kMaxHeadDim && keys.shape(1) % 8 == 0,
          "keys must be [num_keys, head_dim], head_dim a multiple of 8 up to 256");
  require_contiguous(keys, "keys");
  require(keys.shape(0) <= 0x7fffffff, "a graph holds at most 2^31 - 1 keys");
  return {keys.data(), nullptr, dtype_of(keys, "keys"), static_cast<int>(keys.shape(1))};
}

using Lists = nb::ndarray<std::int32_t, nb::device::cpu, nb::c_contig>;

void build_graph(Graph& graph, const Array& keys, const Floats& queries, const Lists& lists) {
  const Rows rows = key_matrix(keys);
  require(queries.ndim() == 2 && lists.ndim() == 2 && queries.shape(0) == lists.shape(0) &&
              queries.shape(1) == keys.shape(1),
          "queries must be float32 [num_lists, head_dim] and lists int32 [num_lists, list_size]");
  const auto num_keys = static_cast<std::int64_t>(keys.shape(0));
  for (std::size_t i = 0; i < lists.size(); ++i) {
    require(lists.data()[i] >= -1 && lists.data()[i] < num_keys, "lists must hold positions of keys, or -1");
  }
  const auto pool = shared_pool();
  const nb::gil_scoped_release release;
  graph.build(rows, num_keys, queries.data(), lists.data(), static_cast<std::int64_t>(lists.shape(0)),
              static_cast<int>(lists.shape(1)), *pool);
}

void insert_into_graph(Graph& graph, const Array& keys) {
  const Rows rows = key_matrix(keys);
  const auto num_keys = static_cast<std::int64_t>(keys.shape(0));
  require(num_keys >= graph.size(), "the keys held must stay");
  const auto pool = shared_pool();
  const nb::gil_scoped_release release;
  graph.insert(rows, num_keys, *pool);
}

nb::tuple search_graph(const Graph& graph, const Array& keys, const Floats& queries, int width, std::int64_t limit,
                       const Integers& positions, const Floats& scores,
                       const std::vector<std::vector<std::int32_t>>& hints) {
  const Rows rows = key_matrix(keys);
  require(static_cast<std::int64_t>(keys.shape(0)) >= graph.size(), "the graph is over more keys than these");
  require(queries.ndim() == 2 && queries.shape(1) == keys.shape(1), "queries must be float32 [num_queries, head_dim]");
  require(positions.ndim() == 2 && scores.ndim() == 2 && positions.shape(0) == queries.shape(0) &&
              scores.shape(0) == queries.shape(0) && positions.shape(1) == scores.shape(1) && positions.shape(1) > 0,
          "positions and scores must be [num_queries, k]");
  require(hints.empty() || hints.size() == queries.shape(0), "hints are one list per query, or none");
  const auto pool = shared_pool();
  const auto k = static_cast<int>(positions.shape(1));
  std::vector<Graph::Cost> costs(queries.shape(0));
  const auto run = [&] {
    const nb::gil_scoped_release release;
    pool->run(static_cast<std::int64_t>(queries.shape(0)), [&](std::int64_t i) {
      const auto at = static_cast<std::size_t>(i);
      static const std::vector<std::int32_t> no_hints;
      costs[at] = graph.search(rows, queries.data() + at * keys.shape(1), k, width, limit,
                               hints.empty() ? no_hints : hints[at], positions.data() + i * k, scores.data() + i * k);
    });
  };
  run();
  Graph::Cost total;
  for (const Graph::Cost& cost : costs) {
    total.num_scored += cost.num_scored;
    total.num_compared += cost.num_compared;
  }
  return nb::make_tuple(total.num_scored, total.num_compared);
}

template <typename T>
nb::bytes as_bytes(const std::vector<T>& values) {
  return nb::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

template <typename T>
std::vector<T> from_bytes(const nb::bytes& data) {
  require(data.size() % sizeof(T) == 0, "not a graph over these keys");
  std::vector<T> values(data.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), data.c_str(), data.size());
  return values;
}

}  // namespace

void bind_graph(nb::module_& m) {
  nb::class_<Graph>(m, "Graph")
      .def("__init__", [](Graph* self, int degree, int num_linked, int num_pivots, int extra_degree, int link_width,
                          int num_voters, int start_share) {
        new (self) Graph({degree, num_linked, num_pivots, extra_degree, link_width, num_voters, start_share});
      }, "degree"_a = GraphOptions{}.degree, "num_linked"_a = GraphOptions{}.num_linked,
         "num_pivots"_a = GraphOptions{}.num_pivots, "extra_degree"_a = GraphOptions{}.extra_degree,
         "link_width"_a = GraphOptions{}.link_width, "num_voters"_a = GraphOptions{}.num_voters,
         "start_share"_a = GraphOptions{}.start_share)
      .def("build", &build_graph, "keys"_a.noconvert(), "queries"_a.noconvert(), "lists"_a.noconvert())
      .def("insert", &insert_into_graph, "keys"_a.noconvert())
      .def("search", &search_graph, "keys"_a.noconvert(), "queries"_a.noconvert(), "width"_a, "limit"_a,
           "positions"_a.noconvert(), "scores"_a.noconvert(), "hints"_a = std::vector<std::vector<std::int32_t>>{})
      .def_prop_ro("num_keys", &Graph::size)
      .def_prop_ro("nbytes", &Graph::nbytes)
      .def("most_bytes", &Graph::most_bytes, "num_keys"_a, "head_dim"_a, "num_samples"_a, "num_listed"_a)
      .def("save", [](const Graph& graph) {
        const Graph::State& state = graph.state();
        return nb::make_tuple(as_bytes(state.edges), as_bytes(state.samples), as_bytes(state.lists),
                              as_bytes(state.groups), as_bytes(state.metric), as_bytes(state.norms));
      })
      .def("restore", [](Graph& graph, const nb::bytes& edges, const nb::bytes& samples, const nb::bytes& lists,
                         const nb::bytes& groups, const nb::bytes& metric, const nb::bytes& norms,
                         std::int64_t num_keys, int head_dim) {
        graph.restore({from_bytes<std::int32_t>(edges), from_bytes<float>(samples), from_bytes<std::int32_t>(lists),
                       from_bytes<std::int32_t>(groups), from_bytes<float>(metric), from_bytes<float>(norms)}, num_keys, head_dim);
      }, "edges"_a, "samples"_a, "lists"_a, "groups"_a, "metric"_a, "norms"_a, "num_keys"_a, "head_dim"_a);
}
