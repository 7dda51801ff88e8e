// The only file that knows Python: checks shapes, releases the GIL, hands pointers on.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

using spectral_fast::DType, spectral_fast::Factor, spectral_fast::Shape;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
// One task per row; addresses of tensors' memory, sizes and codes. The caller keeps the tensors alive.
using Table = Array<std::int64_t>;

template <typename T>
void expect_shape(const char* name, const Array<T>& array, std::initializer_list<py::ssize_t> shape) {
  if (std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim())) return;
  std::string wanted;
  for (const auto n : shape) wanted += (wanted.empty() ? "" : " x ") + std::to_string(n);
  throw std::invalid_argument(std::string(name) + " must be " + wanted + ", got " +
                              py::str(array.attr("shape")).cast<std::string>());
}

void expect_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
}

template <typename T>
T* address(std::int64_t value) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(value));
}

DType dtype_of(std::int64_t code) {
  if (code < 0 || code > 3) throw std::invalid_argument("a dtype must be from 0 to 3, got " + std::to_string(code));
  return static_cast<DType>(code);
}

std::size_t size_of(std::int64_t value) {
  if (value < 0) throw std::invalid_argument("a size must not be negative, got " + std::to_string(value));
  return static_cast<std::size_t>(value);
}

Factor factor(std::int64_t data, std::int64_t dtype, Shape shape, std::int64_t length, std::int64_t r) {
  return {address<const void>(data), dtype_of(dtype), shape, size_of(length), size_of(r)};
}

void lowrank_svd(const Table& modules, Array<double>& out, Array<double>& quality, Array<std::int32_t>& status,
                 int threads, bool vectors) {
  expect_threads(threads);
  const auto count = modules.ndim() == 2 ? modules.shape(0) : 0;
  expect_shape("modules", modules, {count, 7});
  expect_shape("quality", quality, {count, 2});
  expect_shape("status", status, {count});
  const auto row = modules.unchecked<2>();
  std::vector<spectral_fast::SvdTask> tasks;
  py::ssize_t size = 0;
  for (py::ssize_t i = 0; i < count; ++i) size += row(i, 4) + (vectors ? 2 * row(i, 4) * row(i, 4) : 0);
  expect_shape("out", out, {size});
  double* next = out.mutable_data();
  for (py::ssize_t i = 0; i < count; ++i) {
    const auto m = row(i, 2), n = row(i, 3), r = row(i, 4);
    spectral_fast::SvdTask task{};
    task.b = factor(row(i, 0), row(i, 5), Shape::tall, m, r);
    task.a = factor(row(i, 1), row(i, 6), Shape::flat, n, r);
    task.s = next;
    next += r;
    if (vectors) {
      task.t_b = next;
      task.t_a = task.t_b + r * r;
      next = task.t_a + r * r;
    }
    tasks.push_back(task);
  }
  double* qualities = quality.mutable_data();
  std::int32_t* outcome = status.mutable_data();
  py::gil_scoped_release release;
  spectral_fast::lowrank_svd(tasks, threads);
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    qualities[2 * i] = tasks[i].loss;
    qualities[2 * i + 1] = tasks[i].amplification;
    outcome[i] = static_cast<std::int32_t>(tasks[i].status);
  }
}

// All products are formed at once, so what one writes no other may read or write.
void expect_no_overlap(const std::vector<spectral_fast::RecomposeTask>& tasks) {
  struct Span {
    const char *begin, *end;
    bool written;
    std::size_t task;
  };
  std::vector<Span> spans;
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    const auto& [basis, transform, scale, rank, out, out_dtype, wide, finite] = tasks[i];
    const auto add = [&](const void* data, std::size_t values, bool written) {
      const char* begin = static_cast<const char*>(data);
      if (values > 0) spans.push_back({begin, begin + values, written, i});
    };
    const std::size_t read = basis.length * basis.r * spectral_fast::size_of(basis.dtype);
    const std::size_t written = basis.length * rank * spectral_fast::size_of(out_dtype);
    add(out, written, true);
    if (out != basis.data || basis.dtype != out_dtype || basis.r != rank) add(basis.data, read, false);
  }
  std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
  const Span* furthest[2] = {};  // of what is only read, and of what is written
  for (const Span& span : spans) {
    for (const Span* other : furthest)
      if (other != nullptr && (span.written || other->written) && span.begin < other->end)
        throw std::invalid_argument("products " + std::to_string(other->task) + " and " + std::to_string(span.task) +
                                    " share memory that one of them writes; give each its own out");
    const Span*& reached = furthest[span.written];
    if (reached == nullptr || reached->end < span.end) reached = &span;
  }
}

void recompose(const Table& factors, Array<bool>& finite, int threads) {
  expect_threads(threads);
  const auto count = factors.ndim() == 2 ? factors.shape(0) : 0;
  expect_shape("factors", factors, {count, 11});
  expect_shape("finite", finite, {count});
  const auto row = factors.unchecked<2>();
  std::vector<spectral_fast::RecomposeTask> tasks;
  for (py::ssize_t i = 0; i < count; ++i) {
    spectral_fast::RecomposeTask task{};
    task.basis = factor(row(i, 0), row(i, 1), row(i, 2) == 0 ? Shape::tall : Shape::flat, row(i, 3), row(i, 4));
    task.transform = address<const double>(row(i, 5));
    task.scale = address<const double>(row(i, 6));
    task.rank = size_of(row(i, 7));
    task.out = address<void>(row(i, 8));
    task.out_dtype = dtype_of(row(i, 9));
    task.wide = row(i, 10) != 0;
    tasks.push_back(task);
  }
  expect_no_overlap(tasks);
  bool* all_finite = finite.mutable_data();
  py::gil_scoped_release release;
  spectral_fast::recompose(tasks, threads);
  for (std::size_t i = 0; i < tasks.size(); ++i) all_finite[i] = tasks[i].finite;
}

void segment_products(std::int64_t p, std::int64_t q, std::int64_t dtype, const Array<std::int64_t>& starts,
                      Array<float>& out, int threads) {
  expect_threads(threads);
  if (starts.ndim() != 1 || starts.shape(0) < 1) throw std::invalid_argument("starts must be a vector, segments + 1");
  const auto segments = starts.shape(0) - 1;
  if (!std::is_sorted(starts.data(), starts.data() + starts.size()) || starts.at(0) < 0)
    throw std::invalid_argument("starts must not be negative nor descend");
  const auto r = out.ndim() == 2 ? out.shape(1) : 0;
  expect_shape("out", out, {segments, r});
  if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be from 0 to 2, got " + std::to_string(dtype));
  const spectral_fast::SensitivityTask task{
      address<const void>(p),      address<const void>(q), static_cast<DType>(dtype),
      static_cast<std::size_t>(r), starts.data(),          out.mutable_data()};
  py::gil_scoped_release release;
  spectral_fast::segment_products(task, static_cast<std::size_t>(segments), threads);
}

void jacobi_svd(const Array<double>& m, Array<double>& wt, Array<double>& s, Array<double>& vt,
                Array<std::int32_t>& status, int threads) {
  expect_threads(threads);
  if (m.ndim() != 3) throw std::invalid_argument("m must have three axes, got " + std::to_string(m.ndim()));
  const auto count = m.shape(0), r = m.shape(1);
  expect_shape("m", m, {count, r, r});
  expect_shape("wt", wt, {count, r, r});
  expect_shape("s", s, {count, r});
  expect_shape("vt", vt, {count, r, r});
  expect_shape("status", status, {count});
  const double* in = m.data();
  double *left = wt.mutable_data(), *values = s.mutable_data(), *right = vt.mutable_data();
  auto* outcome = reinterpret_cast<spectral_fast::SvdStatus*>(status.mutable_data());
  py::gil_scoped_release release;
  spectral_fast::jacobi_svd(in, left, values, right, outcome, static_cast<std::size_t>(count),
                            static_cast<std::size_t>(r), threads);
}

py::dict isa() {
  std::vector<std::string> built, supported;
  for (std::size_t i = 0; i < spectral_fast::kImplementationCount; ++i) {
    const auto& candidate = *spectral_fast::kImplementations[i];
    built.emplace_back(candidate.isa);
    if (candidate.supported()) supported.emplace_back(candidate.isa);
  }
  py::dict result;
  result["chosen"] = spectral_fast::kernels().isa;
  result["supported"] = supported;
  result["built"] = built;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of spectral_fast; arrays are C-contiguous and are written in place.";
  // noconvert: a converted copy of an output would take the result with it.
  module.def(
      "lowrank_svd", &lowrank_svd, py::arg("modules").noconvert(), py::arg("out").noconvert(),
      py::arg("quality").noconvert(), py::arg("status").noconvert(), py::arg("threads"), py::arg("vectors") = true,
      "Per row (b, a, m, n, r, dtype of b, of a): s (r), t_b and t_a (r, r), one after the other in out, or s alone; "
      "loss and amplification in quality.");
  module.def("recompose", &recompose, py::arg("factors").noconvert(), py::arg("finite").noconvert(), py::arg("threads"),
             "Per row (basis, dtype, flat, length, r, transform, scale, rank, out, dtype of out, wide): the product.");
  module.def("segment_products", &segment_products, py::arg("p"), py::arg("q"), py::arg("dtype"),
             py::arg("starts").noconvert(), py::arg("out").noconvert(), py::arg("threads"),
             "out[t] = sum of p[n] * q[n] over starts[t] <= n < starts[t + 1].");
  module.def("jacobi_svd", &jacobi_svd, py::arg("m").noconvert(), py::arg("wt").noconvert(), py::arg("s").noconvert(),
             py::arg("vt").noconvert(), py::arg("status").noconvert(), py::arg("threads"),
             "Left vectors, singular values and right vectors of each matrix of a batch m (count, r, r).");
  module.def("isa", &isa, "The instruction set in use, those of this processor, and those of this build.");
}
