// The Python face of the core: checks shapes, releases the GIL, calls. No algorithm lives here.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
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

// [heads][rows][head_dim], rows contiguous, heads apart by any stride.
void require_head_rows(const Array& array, const char* name) {
  const bool is_dense = array.ndim() == 3 && (array.shape(2) == 1 || array.stride(2) == 1) &&
                        (array.shape(1) <= 1 || array.stride(1) == static_cast<std::int64_t>(array.shape(2)));
  if (!is_dense) throw std::invalid_argument(std::string(name) + " must be [num_kv_heads, count, head_dim] with dense rows");
}

namespace {

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
                                       const std::optional<Floats>& query_stretch,
                                       const std::optional<std::vector<std::pair<int, int>>>& shapes) {
  require(key_stretch.has_value() == query_stretch.has_value(), "key_stretch and query_stretch come together");
  require(key_stretch || !shapes, "shapes come with stretches");
  if (!key_stretch) return std::make_shared<LayerCodes>(num_kv_heads, head_dim, bits, seed);
  const auto heads = static_cast<std::size_t>(num_kv_heads), width = static_cast<std::size_t>(head_dim);
  for (const Floats* stretch : {&*key_stretch, &*query_stretch}) {
    require(stretch->ndim() == 3 && stretch->shape(0) == heads && stretch->shape(1) == width && stretch->shape(2) == width,
            "a stretch must be [num_kv_heads, head_dim, head_dim]");
  }
  std::vector<CodeShape> of_heads(heads, CodeShape{head_dim, bits});
  if (shapes) {
    of_heads.clear();
    for (const auto& [dims, each] : *shapes) of_heads.push_back({dims, each});
  }
  return std::make_shared<LayerCodes>(num_kv_heads, head_dim, bits, seed, key_stretch->data(), query_stretch->data(),
                                      of_heads);
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
           "key_stretch"_a.noconvert().none() = nb::none(), "query_stretch"_a.noconvert().none() = nb::none(),
           "shapes"_a.none() = nb::none())
      .def("append", &append_keys, "keys"_a.noconvert())
      .def_prop_ro("num_kv_heads", &LayerCodes::num_kv_heads)
      .def_prop_ro("head_dim", &LayerCodes::head_dim)
      .def_prop_ro("bits", &LayerCodes::bits)
      .def_prop_ro("seed", &LayerCodes::seed)
      .def_prop_ro("shapes", [](const LayerCodes& codes) {
        std::vector<std::pair<int, int>> shapes;
        for (int h = 0; h < codes.num_kv_heads(); ++h) shapes.emplace_back(codes.head(h).shape.dims, codes.head(h).shape.bits);
        return shapes;
      })
      .def_prop_ro("num_keys", &LayerCodes::num_keys)
      .def_prop_ro("nbytes", &LayerCodes::nbytes)
      .def_static("most_bytes", &LayerCodes::most_bytes, "num_kv_heads"_a, "head_dim"_a, "bits"_a, "num_keys"_a,
                  "is_stretched"_a = false)
      .def("save", [](const LayerCodes& codes) {
        const std::string bytes = codes.save();
        return nb::bytes(bytes.data(), bytes.size());
      })
      .def_static("load", [](const nb::bytes& data) { return LayerCodes::load(data.c_str(), data.size()); }, "data"_a);

  bind_attend(m);
  bind_graph(m);
  bind_linear(m);
}
