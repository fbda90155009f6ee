// The Python face of linear.h.
#include <nanobind/stl/optional.h>

#include <cmath>
#include <optional>

#include "bindings.h"
#include "linear.h"

using namespace nb::literals;
using namespace retrieval;

namespace {

using Strided = nb::ndarray<float, nb::device::cpu, nb::ndim<2>>;

// Taken from Python once and used for many calls: a tensor's way into the core takes longer than a small product.
struct BoundMatrix {
  explicit BoundMatrix(Strided tensor) : tensor(std::move(tensor)) {
    const auto& t = this->tensor;
    require(t.shape(1) <= 1 || t.stride(1) == 1, "a matrix must be [num_rows, num_columns], columns dense");
    matrix = {t.data(), static_cast<std::int64_t>(t.shape(0)), static_cast<std::int64_t>(t.shape(1)), t.stride(0)};
  }
  Strided tensor;
  Matrix matrix;
};

struct BoundLinear {
  BoundLinear(Array weights, std::optional<Floats> bias, std::optional<Floats> norm, float epsilon, bool is_gated)
      : weights(std::move(weights)), bias(std::move(bias)), norm(std::move(norm)) {
    const Array& w = this->weights;
    require(w.ndim() == 2 && w.shape(0) > 0 && w.shape(1) > 0 && w.stride(1) == 1 &&
                (w.shape(0) == 1 || w.stride(0) == static_cast<std::int64_t>(w.shape(1))),
            "weights must be [num_outputs, num_inputs], dense");
    const auto has_length = [](const std::optional<Floats>& vector, std::size_t length) {
      return !vector || (vector->ndim() == 1 && vector->shape(0) == length);
    };
    require(has_length(this->bias, w.shape(0)), "bias must be float32 [num_outputs]");
    require(has_length(this->norm, w.shape(1)), "norm must be float32 [num_inputs]");
    require(std::isfinite(epsilon) && epsilon >= 0.0f, "epsilon must not be negative");
    linear = {w.data(), dtype_of(w, "weights"), static_cast<std::int64_t>(w.shape(0)),
              static_cast<std::int64_t>(w.shape(1)), this->bias ? this->bias->data() : nullptr,
              this->norm ? this->norm->data() : nullptr, epsilon, is_gated};
  }
  Array weights;
  std::optional<Floats> bias, norm;
  Linear linear;
};

void apply_linear(const BoundLinear& bound, const BoundMatrix& in, const BoundMatrix& out, bool add) {
  require(in.matrix.num_columns == bound.linear.num_columns(), "the input has the wrong number of columns");
  require(out.matrix.num_columns == bound.linear.num_outputs, "the output has the wrong number of columns");
  require(in.matrix.num_rows == out.matrix.num_rows, "input and output differ in their rows");
  const auto pool = shared_pool();
  const nb::gil_scoped_release release;
  apply(bound.linear, in.matrix, out.matrix, add, *pool);
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<BoundMatrix>(m, "Matrix").def(nb::init<Strided>(), "rows"_a.noconvert());
  nb::class_<BoundLinear>(m, "Linear")
      .def(nb::init<Array, std::optional<Floats>, std::optional<Floats>, float, bool>(), "weights"_a.noconvert(),
           "bias"_a.noconvert().none() = nb::none(), "norm"_a.noconvert().none() = nb::none(), "epsilon"_a = 0.0f,
           "is_gated"_a = false)
      .def("apply", &apply_linear, "rows"_a, "out"_a, "add"_a = false);
}
