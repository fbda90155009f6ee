// The Python face of attend.h and chunk.h.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attend.h"
#include "bindings.h"
#include "chunk.h"
#include "codes.h"
#include "distance.h"

using namespace nb::literals;
using namespace retrieval;

namespace {

// A part and the tensors it reads.
struct BoundPart {
  Part part;
  Array keys, values;
  std::optional<Floats> key_scales, value_scales;
  std::shared_ptr<LayerCodes> codes;
};

std::shared_ptr<BoundPart> make_part(Array keys, Array values, std::int64_t begin, std::int64_t end,
                                     std::shared_ptr<LayerCodes> codes, std::optional<Floats> key_scales,
                                     std::optional<Floats> value_scales) {
  require_head_rows(keys, "keys");
  require_head_rows(values, "values");
  auto bound = std::make_shared<BoundPart>();
  Part& part = bound->part;
  part.dtype = dtype_of(keys, "keys", true);
  require(dtype_of(values, "values", true) == part.dtype, "keys and values must have one dtype");
  require(keys.shape(0) == values.shape(0) && keys.shape(1) == values.shape(1) && keys.shape(2) == values.shape(2),
          "keys and values must have one shape");
  require(keys.shape(2) >= 8 && keys.shape(2) <= kMaxHeadDim && keys.shape(2) % 8 == 0,
          "head_dim must be a multiple of 8 up to 256");
  part.keys = keys.data();
  part.values = values.data();
  part.num_kv_heads = static_cast<int>(keys.shape(0));
  part.capacity = static_cast<std::int64_t>(keys.shape(1));
  part.head_dim = static_cast<int>(keys.shape(2));
  part.key_head_stride = keys.stride(0);
  part.value_head_stride = values.stride(0);
  if (part.dtype == DType::kInt8) {
    require(key_scales && value_scales, "int8 keys and values need key_scales and value_scales");
    for (const Floats* scales : {&*key_scales, &*value_scales}) {
      require(scales->ndim() == 2 && scales->shape(0) == keys.shape(0) && scales->shape(1) == keys.shape(1),
              "scales must be float32 [num_kv_heads, capacity]");
    }
    part.key_scales = key_scales->data();
    part.value_scales = value_scales->data();
  } else {
    require(!key_scales && !value_scales, "only int8 keys and values have scales");
  }
  require(0 <= begin && begin <= end && end <= part.capacity, "need 0 <= begin <= end <= capacity");
  require(part.capacity <= 0x7fffffff, "a part holds at most 2^31 - 1 keys");
  if (codes) {
    require(codes->num_kv_heads() == part.num_kv_heads && codes->head_dim() == part.head_dim,
            "codes of another number of heads or width");
  }
  part.begin = begin;
  part.end = end;
  part.codes = codes;
  bound->keys = std::move(keys);
  bound->values = std::move(values);
  bound->key_scales = std::move(key_scales);
  bound->value_scales = std::move(value_scales);
  bound->codes = std::move(codes);
  return bound;
}

// Queries as float32, and as bf16 if they are.
struct ReadQueries {
  std::vector<float> values;
  std::vector<std::uint16_t> bf16;

  // [num_rows][row_size], rows apart by a stride; a row is some vectors of head_dim.
  ReadQueries(const Array& array, std::size_t num_rows, std::int64_t stride, std::size_t row_size, int head_dim) {
    const DType dtype = dtype_of(array, "queries");
    values.resize(num_rows * row_size);
    if (dtype == DType::kBFloat16) bf16.resize(values.size());
    for (std::size_t row = 0; row < num_rows; ++row) {
      const std::int64_t offset = static_cast<std::int64_t>(row) * stride * element_bytes(dtype);
      const std::byte* data = static_cast<const std::byte*>(array.data()) + offset;
      float* out = values.data() + row * row_size;
      if (dtype == DType::kBFloat16) {
        std::memcpy(bf16.data() + row * row_size, data, row_size * sizeof(std::uint16_t));
        for (std::size_t i = 0; i < row_size; ++i) out[i] = bf16_to_float(bf16[row * row_size + i]);
      } else if (dtype == DType::kFloat32) {
        std::memcpy(out, data, row_size * sizeof(float));
      } else {
        const float one = 1.0f;
        const Rows heads{data, nullptr, dtype, head_dim};
        const auto width = static_cast<std::size_t>(head_dim);
        for (std::size_t i = 0; i * width < row_size; ++i) {
          kernels().accumulate(&one, 1, 1, heads, nullptr, static_cast<std::int64_t>(i), 1, out + i * width);
        }
      }
    }
    for (const float value : values) require(std::isfinite(value), "queries hold NaN or infinity");
  }
};

// Where queries come from and results go, taken from Python once and used for many calls: a search's codes drive the
// interpreter out of the caches, and then three tensors' way into the core takes a twentieth of the search's time.
struct BoundRows {
  BoundRows(Array queries_in, Floats out_in, Floats lse_in)
      : queries(std::move(queries_in)), out(std::move(out_in)), lse(std::move(lse_in)) {
    require(queries.ndim() == 3, "queries must be [num_seqs, num_q_heads, head_dim]");
    dtype_of(queries, "queries");
    require((queries.shape(2) <= 1 || queries.stride(2) == 1) &&
                (queries.shape(1) <= 1 || queries.stride(1) == static_cast<std::int64_t>(queries.shape(2))),
            "queries must be contiguous in each sequence");
    require(out.ndim() == 3 && out.shape(0) == queries.shape(0) && out.shape(1) == queries.shape(1) &&
                out.shape(2) == queries.shape(2),
            "out must be float32 [num_seqs, num_q_heads, head_dim]");
    require(lse.ndim() == 2 && lse.shape(0) == queries.shape(0) && lse.shape(1) == queries.shape(1),
            "lse must be float32 [num_seqs, num_q_heads]");
  }
  Array queries;
  Floats out, lse;
};

AttendStats attend_rows(const BoundRows& rows, const std::vector<std::vector<std::shared_ptr<BoundPart>>>& parts,
                        float scale, const Budget& budget) {
  const Array& queries = rows.queries;
  require(parts.size() == queries.shape(0), "need one list of parts per sequence");
  require(std::isfinite(scale) && scale > 0.0f, "scale must be positive");
  int num_kv_heads = 0;
  std::vector<std::vector<const Part*>> views(parts.size());
  for (std::size_t s = 0; s < parts.size(); ++s) {
    for (const auto& bound : parts[s]) {
      require(bound != nullptr, "a part is None");
      if (num_kv_heads == 0) num_kv_heads = bound->part.num_kv_heads;
      require(bound->part.num_kv_heads == num_kv_heads, "parts differ in num_kv_heads");
      require(bound->part.head_dim == static_cast<int>(queries.shape(2)), "queries and parts differ in head_dim");
      views[s].push_back(&bound->part);
    }
  }
  const int num_q_heads = static_cast<int>(queries.shape(1)), head_dim = static_cast<int>(queries.shape(2));
  if (num_kv_heads == 0) num_kv_heads = num_q_heads;
  require(num_q_heads > 0 && num_q_heads % num_kv_heads == 0, "num_q_heads must be a multiple of num_kv_heads");
  const auto pool = shared_pool();
  const nb::gil_scoped_release release;
  const std::size_t row_size = queries.shape(1) * queries.shape(2);
  const ReadQueries read(queries, queries.shape(0), queries.stride(0), row_size, head_dim);
  const LayerQueries layer{read.values.data(), read.bf16.empty() ? nullptr : read.bf16.data(),
                           static_cast<int>(queries.shape(0)), num_q_heads, num_kv_heads, head_dim};
  return attend_layer(layer, views, scale, budget, *pool, rows.out.data(), rows.lse.data());
}

AttendStats bound_attend_layer(Array queries, const std::vector<std::vector<std::shared_ptr<BoundPart>>>& parts,
                               float scale, Floats out, Floats lse, const Budget& budget) {
  return attend_rows(BoundRows(std::move(queries), std::move(out), std::move(lse)), parts, scale, budget);
}

void bound_attend_chunk(const Array& queries, const std::vector<std::shared_ptr<BoundPart>>& parts,
                        std::int64_t num_new, float scale, const Writable& out, const std::optional<Floats>& lse,
                        std::optional<std::int64_t> sliding_window) {
  const auto require_heads = [](const auto& array, const char* message) {
    require(array.ndim() == 3 && (array.shape(2) <= 1 || array.stride(2) == 1), message);
  };
  require_heads(queries, "queries must be [num_q_heads, num_new, head_dim], dimensions dense");
  require(dtype_of(queries, "queries") == DType::kBFloat16, "queries must be bfloat16");
  const std::int64_t num_q_heads = static_cast<std::int64_t>(queries.shape(0));
  require(num_new >= 1 && static_cast<std::int64_t>(queries.shape(1)) == num_new, "queries must have num_new rows");
  require_heads(out, "out must be [num_q_heads, num_new, head_dim], dimensions dense");
  for (std::size_t i = 0; i < 3; ++i) require(out.shape(i) == queries.shape(i), "out must have the queries' shape");
  const DType out_dtype = dtype_of(Array(out), "out");
  require(out_dtype == DType::kBFloat16 || out_dtype == DType::kFloat32, "out must be bfloat16 or float32");
  require(!lse || (lse->ndim() == 2 && lse->shape(0) == queries.shape(0) && lse->shape(1) == queries.shape(1)),
          "lse must be float32 [num_q_heads, num_new]");
  require(std::isfinite(scale) && scale > 0.0f, "scale must be positive");
  require(!sliding_window || *sliding_window >= 1, "sliding_window must be positive");
  require(!parts.empty(), "need the part that holds the chunk's own keys");
  std::vector<const Part*> views;
  for (const auto& bound : parts) {
    require(bound != nullptr, "a part is None");
    const Part& part = bound->part;
    require(part.dtype == DType::kBFloat16 && !part.codes, "parts must be bfloat16 and without codes");
    require(part.head_dim == static_cast<int>(queries.shape(2)), "queries and parts differ in head_dim");
    require(part.num_kv_heads == parts[0]->part.num_kv_heads, "parts differ in num_kv_heads");
    views.push_back(&part);
  }
  require(views.back()->end - views.back()->begin >= num_new, "the last part must end with the chunk's own keys");
  const int num_kv_heads = views[0]->num_kv_heads;
  require(num_kv_heads > 0 && num_q_heads > 0 && num_q_heads % num_kv_heads == 0,
          "num_q_heads must be a multiple of num_kv_heads");
  if (!can_attend_chunk()) throw std::runtime_error("this machine lacks the instructions of attend_chunk");
  const Chunk chunk{static_cast<const std::uint16_t*>(queries.data()), queries.stride(0), queries.stride(1),
                    out.data(), out_dtype == DType::kBFloat16, out.stride(0), out.stride(1),
                    lse ? lse->data() : nullptr, num_new, static_cast<int>(num_q_heads), num_kv_heads,
                    static_cast<int>(queries.shape(2)), scale, sliding_window.value_or(0)};
  const auto pool = shared_pool();
  const nb::gil_scoped_release release;
  attend_chunk(chunk, views, *pool);
}

AttendStats bound_search(const Array& queries, const std::shared_ptr<BoundPart>& bound, int k, const Integers& positions,
                         const Floats& scores, const Budget& budget, int kv_head) {
  require(queries.ndim() == 2, "queries must be [num_queries, head_dim]");
  require_contiguous(queries, "queries");
  require(kv_head >= 0 && kv_head < bound->part.num_kv_heads, "the part has no such kv_head");
  require(bound->part.head_dim == static_cast<int>(queries.shape(1)), "queries and keys differ in head_dim");
  require(k >= 1, "k must be positive");
  require(positions.ndim() == 2 && scores.ndim() == 2 && positions.shape(0) == queries.shape(0) &&
              scores.shape(0) == queries.shape(0) && positions.shape(1) == static_cast<std::size_t>(k) &&
              scores.shape(1) == static_cast<std::size_t>(k),
          "positions and scores must be [num_queries, k]");
  const auto pool = shared_pool();
  const nb::gil_scoped_release release;
  const auto head_dim = static_cast<int>(queries.shape(1));
  const ReadQueries read(queries, queries.shape(0), head_dim, queries.shape(1), head_dim);
  const LayerQueries layer{read.values.data(), read.bf16.empty() ? nullptr : read.bf16.data(), 1,
                           static_cast<int>(queries.shape(0)), 1, static_cast<int>(queries.shape(1))};
  return search_part(layer, bound->part, kv_head, k, budget, *pool, positions.data(), scores.data());
}

}  // namespace

void bind_attend(nb::module_& m) {
  nb::class_<Budget>(m, "Budget")
      .def("__init__", [](Budget* self, int k, float beta, float deviations, int min_keys, int max_keys,
                          float rest, int rest_keys, int exact_keys, float reach, std::int64_t reach_products) {
        require(k >= 0 && beta > 0.0f && deviations >= 0.0f && min_keys >= 0 && max_keys >= 1 && rest >= 0.0f &&
                    rest_keys >= 1 && exact_keys >= 0 && reach >= 0.0f && reach_products >= 0,
                "budget out of range");
        new (self) Budget{k, beta, deviations, min_keys, max_keys, rest, rest_keys, exact_keys, reach, reach_products};
      }, "k"_a = Budget{}.k, "beta"_a = Budget{}.beta, "deviations"_a = Budget{}.deviations,
         "min_keys"_a = Budget{}.min_keys, "max_keys"_a = Budget{}.max_keys, "rest"_a = Budget{}.rest,
         "rest_keys"_a = Budget{}.rest_keys, "exact_keys"_a = Budget{}.exact_keys,
         "reach"_a = Budget{}.reach, "reach_products"_a = Budget{}.reach_products)
      .def_ro("k", &Budget::k)
      .def_ro("beta", &Budget::beta)
      .def_ro("deviations", &Budget::deviations)
      .def_ro("min_keys", &Budget::min_keys)
      .def_ro("max_keys", &Budget::max_keys)
      .def_ro("rest", &Budget::rest)
      .def_ro("rest_keys", &Budget::rest_keys)
      .def_ro("exact_keys", &Budget::exact_keys)
      .def_ro("reach", &Budget::reach)
      .def_ro("reach_products", &Budget::reach_products);

  nb::class_<AttendStats>(m, "AttendStats")
      .def_ro("num_visible", &AttendStats::num_visible)
      .def_ro("num_scored", &AttendStats::num_scored)
      .def_ro("num_retrieved", &AttendStats::num_retrieved)
      .def_ro("num_drawn", &AttendStats::num_drawn)
      .def_ro("bytes_read", &AttendStats::bytes_read);

  const auto set_range = [](BoundPart& bound, std::int64_t begin, std::int64_t end) {
    require(0 <= begin && begin <= end && end <= bound.part.capacity, "need 0 <= begin <= end <= capacity");
    bound.part.begin = begin;
    bound.part.end = end;
  };
  nb::class_<BoundPart>(m, "Part")
      .def(nb::new_(&make_part), "keys"_a.noconvert(), "values"_a.noconvert(), "begin"_a, "end"_a,
           "codes"_a.none() = nb::none(), "key_scales"_a.noconvert().none() = nb::none(),
           "value_scales"_a.noconvert().none() = nb::none())
      .def_prop_rw("begin", [](const BoundPart& bound) { return bound.part.begin; },
                   [=](BoundPart& bound, std::int64_t begin) { set_range(bound, begin, bound.part.end); })
      .def_prop_rw("end", [](const BoundPart& bound) { return bound.part.end; },
                   [=](BoundPart& bound, std::int64_t end) { set_range(bound, bound.part.begin, end); })
      .def_prop_ro("codes", [](const BoundPart& bound) { return bound.codes; });

  m.def("attend_layer", &bound_attend_layer, "queries"_a.noconvert(), "parts"_a, "scale"_a, "out"_a.noconvert(),
        "lse"_a.noconvert(), "budget"_a = Budget{});
  nb::class_<BoundRows>(m, "DecodeRows")
      .def(nb::init<Array, Floats, Floats>(), "queries"_a.noconvert(), "out"_a.noconvert(), "lse"_a.noconvert())
      .def("attend", &attend_rows, "parts"_a, "scale"_a, "budget"_a = Budget{});
  m.def("can_attend_chunk", &can_attend_chunk);
  m.def("attend_chunk", &bound_attend_chunk, "queries"_a.noconvert(), "parts"_a, "num_new"_a, "scale"_a,
        "out"_a.noconvert(), "lse"_a.noconvert().none() = nb::none(), "sliding_window"_a.none() = nb::none());
  m.def("search", &bound_search, "queries"_a.noconvert(), "part"_a, "k"_a, "positions"_a.noconvert(),
        "scores"_a.noconvert(), "budget"_a = Budget{}, "kv_head"_a = 0);
}
