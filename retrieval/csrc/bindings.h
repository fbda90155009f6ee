// What the parts of the Python face share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>

#include "distance.h"
#include "thread_pool.h"

namespace nb = nanobind;

using Array = nb::ndarray<nb::device::cpu, nb::ro>;
using Writable = nb::ndarray<nb::device::cpu>;
using Floats = nb::ndarray<float, nb::device::cpu, nb::c_contig>;
using Integers = nb::ndarray<std::int64_t, nb::device::cpu, nb::c_contig>;

// Throws std::invalid_argument, which Python sees as ValueError.
void require(bool condition, const char* message);
retrieval::DType dtype_of(const Array& array, const char* name, bool allow_int8 = false);
void require_contiguous(const Array& array, const char* name);
// [heads][rows][head_dim], rows contiguous, heads apart by any stride.
void require_head_rows(const Array& array, const char* name);
// The pool of the process; a running call keeps its own when it is replaced.
std::shared_ptr<retrieval::ThreadPool> shared_pool();

void bind_attend(nb::module_& m);
void bind_graph(nb::module_& m);
void bind_linear(nb::module_& m);
