// The Python face of the core: checks shapes, releases the GIL, calls. No algorithm lives here.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attend.h"
#include "bindings.h"
#include "chunk.h"
#include "codes.h"
#include "distance.h"
#include "thread_pool.h"

using namespace nb::literals;
using namespace retrieval;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

DType dtype_of(const Array& array, const char* name, bool allow_int8) {
  const nb::dlpack::dtype dtype = array.dtype();
  const auto is = [&](nb::dlpack::dtype_code code, int bits) {
    return dtype.code == static_cast<std::uint8_t>(code) && dtype.bits == bits && dtype.lanes == 1;
  };
  if (is(nb::dlpack::dtype_code::Float, 32)) return DType::kFloat32;
  if (is(nb::dlpack::dtype_code::Bfloat, 16)) return DType::kBFloat16;
  if (is(nb::dlpack::dtype_code::Float, 16)) return DType::kFloat16;
  if (allow_int8 && is(nb::dlpack::dtype_code::Int, 8)) return DType::kInt8;
  throw std::invalid_argument(std::string(name) + " must be bfloat16, float16 or float32" +
                              (allow_int8 ? " or int8" : ""));
}

void require_contiguous(const Array& array, const char* name) {
  std::int64_t stride = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) > 1 && array.stride(i) != stride) {
      throw std::invalid_argument(std::string(name) + " must be contiguous");
    }
    stride *= static_cast<std::int64_t>(array.shape(i));
  }
}

namespace {

// [heads][rows][head_dim], rows contiguous, heads apart by any stride.
void require_head_rows(const Array& array, const char* name) {
  const bool is_dense = array.ndim() == 3 && (array.shape(2) == 1 || array.stride(2) == 1) &&
                        (array.shape(1) <= 1 || array.stride(1) == static_cast<std::int64_t>(array.shape(2)));
  if (!is_dense) throw std::invalid_argument(std::string(name) + " must be [num_kv_heads, count, head_dim] with dense rows");
}

// One pool for the process, as there is one set of cores. Replaced, not resized, so a running call keeps its own.
class PoolOwner {
 public:
  std::shared_ptr<ThreadPool> get() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!pool_) pool_ = std::make_shared<ThreadPool>(default_num_threads());
    return pool_;
  }
  void resize(int num_threads) {
    require(num_threads >= 1 && num_threads <= 1024, "num_threads must be 1 to 1024");
    auto pool = std::make_shared<ThreadPool>(num_threads);
    const std::lock_guard<std::mutex> lock(mutex_);
    pool_.swap(pool);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<ThreadPool> pool_;
};

PoolOwner& pool_owner() {
  static PoolOwner owner;
  return owner;
}

}  // namespace

std::shared_ptr<ThreadPool> shared_pool() { return pool_owner().get(); }

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

  explicit ReadQueries(const Array& array) {
    const DType dtype = dtype_of(array, "queries");
    const std::size_t count = array.size();
    values.resize(count);
    if (dtype == DType::kBFloat16) {
      const auto* data = static_cast<const std::uint16_t*>(array.data());
      bf16.assign(data, data + count);
      for (std::size_t i = 0; i < count; ++i) values[i] = bf16_to_float(data[i]);
    } else if (dtype == DType::kFloat32) {
      const auto* data = static_cast<const float*>(array.data());
      values.assign(data, data + count);
    } else {
      const float one = 1.0f;
      const auto width = static_cast<int>(array.shape(array.ndim() - 1));
      const Rows rows{array.data(), nullptr, dtype, width};
      for (std::size_t row = 0; row * static_cast<std::size_t>(width) < count; ++row) {
        kernels().accumulate(&one, 1, 1, rows, nullptr, static_cast<std::int64_t>(row), 1,
                             values.data() + row * static_cast<std::size_t>(width));
      }
    }
    for (const float value : values) require(std::isfinite(value), "queries hold NaN or infinity");
  }
};

AttendStats bound_attend_layer(const Array& queries, const std::vector<std::vector<std::shared_ptr<BoundPart>>>& parts,
                               float scale, const Floats& out, const Floats& lse, const Budget& budget) {
  require(queries.ndim() == 3, "queries must be [num_seqs, num_q_heads, head_dim]");
  require_contiguous(queries, "queries");
  require(parts.size() == queries.shape(0), "need one list of parts per sequence");
  require(out.ndim() == 3 && out.shape(0) == queries.shape(0) && out.shape(1) == queries.shape(1) &&
              out.shape(2) == queries.shape(2),
          "out must be float32 [num_seqs, num_q_heads, head_dim]");
  require(lse.ndim() == 2 && lse.shape(0) == queries.shape(0) && lse.shape(1) == queries.shape(1),
          "lse must be float32 [num_seqs, num_q_heads]");
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
  const int num_q_heads = static_cast<int>(queries.shape(1));
  if (num_kv_heads == 0) num_kv_heads = num_q_heads;
  require(num_q_heads > 0 && num_q_heads % num_kv_heads == 0, "num_q_heads must be a multiple of num_kv_heads");
  const auto pool = shared_pool();
  const nb::gil_scoped_release release;
  const ReadQueries read(queries);
  const LayerQueries layer{read.values.data(), read.bf16.empty() ? nullptr : read.bf16.data(),
                           static_cast<int>(queries.shape(0)), num_q_heads, num_kv_heads,
                           static_cast<int>(queries.shape(2))};
  return attend_layer(layer, views, scale, budget, *pool, out.data(), lse.data());
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
  const ReadQueries read(queries);
  const LayerQueries layer{read.values.data(), read.bf16.empty() ? nullptr : read.bf16.data(), 1,
                           static_cast<int>(queries.shape(0)), 1, static_cast<int>(queries.shape(1))};
  return search_part(layer, bound->part, kv_head, k, budget, *pool, positions.data(), scores.data());
}

std::vector<Rows> head_rows(const Array& array, const char* name, const LayerCodes& codes) {
  require_head_rows(array, name);
  require(static_cast<int>(array.shape(0)) == codes.num_kv_heads() && static_cast<int>(array.shape(2)) == codes.head_dim(),
          "keys must be [num_kv_heads, count, head_dim] of the codes' own heads and width");
  const DType dtype = dtype_of(array, name);
  std::vector<Rows> heads;
  for (int h = 0; h < codes.num_kv_heads(); ++h) {
    const auto* data = static_cast<const std::byte*>(array.data()) + h * array.stride(0) * element_bytes(dtype);
    heads.push_back({data, nullptr, dtype, codes.head_dim()});
  }
  return heads;
}

std::shared_ptr<LayerCodes> make_codes(int num_kv_heads, int head_dim, int bits, std::uint64_t seed,
                                       const std::optional<Floats>& key_stretch,
                                       const std::optional<Floats>& query_stretch) {
  require(key_stretch.has_value() == query_stretch.has_value(), "key_stretch and query_stretch come together");
  if (!key_stretch) return std::make_shared<LayerCodes>(num_kv_heads, head_dim, bits, seed);
  const auto heads = static_cast<std::size_t>(num_kv_heads), width = static_cast<std::size_t>(head_dim);
  for (const Floats* stretch : {&*key_stretch, &*query_stretch}) {
    require(stretch->ndim() == 3 && stretch->shape(0) == heads && stretch->shape(1) == width && stretch->shape(2) == width,
            "a stretch must be [num_kv_heads, head_dim, head_dim]");
  }
  return std::make_shared<LayerCodes>(num_kv_heads, head_dim, bits, seed, key_stretch->data(), query_stretch->data());
}

void append_keys(LayerCodes& codes, const Array& keys) {
  const std::vector<Rows> rows = head_rows(keys, "keys", codes);
  const auto count = static_cast<std::int64_t>(keys.shape(1));
  const auto pool = shared_pool();
  const nb::gil_scoped_release release;
  codes.append(rows, count, *pool);
}

}  // namespace

NB_MODULE(_core, m) {
  nb::set_leak_warnings(false);  // the interpreter ends before the default arguments do
  m.def("simd_level", [] { return std::string(kernels().name); });
  m.def("set_simd_level", [](const std::string& name) {
    if (!select_kernels(name.c_str())) throw std::invalid_argument("no SIMD level " + name + " here");
  }, "name"_a);
  m.def("num_threads", [] { return pool_owner().get()->num_threads(); });
  m.def("wake", [] { pool_owner().get()->wake(); });
  m.def("set_num_threads", [](int n) { pool_owner().resize(n); }, "num_threads"_a);

  nb::class_<LayerCodes>(m, "LayerCodes")
      .def(nb::new_(&make_codes), "num_kv_heads"_a, "head_dim"_a, "bits"_a = 2, "seed"_a = 0,
           "key_stretch"_a.noconvert().none() = nb::none(), "query_stretch"_a.noconvert().none() = nb::none())
      .def("append", &append_keys, "keys"_a.noconvert())
      .def_prop_ro("num_kv_heads", &LayerCodes::num_kv_heads)
      .def_prop_ro("head_dim", &LayerCodes::head_dim)
      .def_prop_ro("bits", &LayerCodes::bits)
      .def_prop_ro("seed", &LayerCodes::seed)
      .def_prop_ro("num_keys", &LayerCodes::num_keys)
      .def_prop_ro("nbytes", &LayerCodes::nbytes)
      .def_static("most_bytes", &LayerCodes::most_bytes, "num_kv_heads"_a, "head_dim"_a, "bits"_a, "num_keys"_a,
                  "is_stretched"_a = false)
      .def("save", [](const LayerCodes& codes) {
        const std::string bytes = codes.save();
        return nb::bytes(bytes.data(), bytes.size());
      })
      .def_static("load", [](const nb::bytes& data) { return LayerCodes::load(data.c_str(), data.size()); }, "data"_a);

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
  m.def("can_attend_chunk", &can_attend_chunk);
  m.def("attend_chunk", &bound_attend_chunk, "queries"_a.noconvert(), "parts"_a, "num_new"_a, "scale"_a,
        "out"_a.noconvert(), "lse"_a.noconvert().none() = nb::none(), "sliding_window"_a.none() = nb::none());
  m.def("search", &bound_search, "queries"_a.noconvert(), "part"_a, "k"_a, "positions"_a.noconvert(),
        "scores"_a.noconvert(), "budget"_a = Budget{}, "kv_head"_a = 0);
  bind_graph(m);
  bind_linear(m);
}
