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
                 int threads) {
  expect_threads(threads);
  const auto count = modules.ndim() == 2 ? modules.shape(0) : 0;
  expect_shape("modules", modules, {count, 7});
  expect_shape("quality", quality, {count, 2});
  expect_shape("status", status, {count});
  const auto row = modules.unchecked<2>();
  std::vector<spectral_fast::SvdTask> tasks;
  py::ssize_t size = 0;
  for (py::ssize_t i = 0; i < count; ++i) size += row(i, 4) + 2 * row(i, 4) * row(i, 4);
  expect_shape("out", out, {size});
  double* next = out.mutable_data();
  for (py::ssize_t i = 0; i < count; ++i) {
    const auto m = row(i, 2), n = row(i, 3), r = row(i, 4);
    spectral_fast::SvdTask task{};
    task.b = factor(row(i, 0), row(i, 5), Shape::tall, m, r);
    task.a = factor(row(i, 1), row(i, 6), Shape::flat, n, r);
    task.s = next;
    task.t_b = task.s + r;
    task.t_a = task.t_b + r * r;
    next = task.t_a + r * r;
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

void top_logits(std::int64_t logits, std::int64_t dtype, py::ssize_t vocabulary, const Array<std::int64_t>& labels,
                Array<float>& logsumexp, Array<float>& gold, Array<float>& values, Array<std::int64_t>& ids,
                int threads) {
  expect_threads(threads);
  const auto rows = labels.size(), top = values.ndim() == 2 ? values.shape(1) : 0;
  expect_shape("labels", labels, {rows});
  expect_shape("logsumexp", logsumexp, {rows});
  expect_shape("gold", gold, {rows});
  expect_shape("values", values, {rows, top});
  expect_shape("ids", ids, {rows, top});
  if (top < 1 || top > vocabulary) throw std::invalid_argument("values must have from 1 to vocabulary columns");
  if (std::any_of(labels.data(), labels.data() + rows, [&](std::int64_t id) {
        return id >= vocabulary || (id < 0 && id != spectral_fast::kIgnored && id != spectral_fast::kElsewhere);
      }))
    throw std::invalid_argument("labels must be ids below vocabulary, -1 or -100");
  if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be from 0 to 2, got " + std::to_string(dtype));
  const spectral_fast::TopLogitsTask task{
      address<const void>(logits), static_cast<DType>(dtype), size_of(vocabulary),   size_of(top),      labels.data(),
      logsumexp.mutable_data(),    gold.mutable_data(),       values.mutable_data(), ids.mutable_data()};
  py::gil_scoped_release release;
  spectral_fast::top_logits(task, static_cast<std::size_t>(rows), threads);
}

void expect_buckets(const char* name, const Array<std::int32_t>& buckets, py::ssize_t m) {
  if (std::any_of(buckets.data(), buckets.data() + buckets.size(),
                  [m](std::int32_t bucket) { return bucket < 0 || bucket >= m; }))
    throw std::invalid_argument(std::string(name) + " must be from 0 to m - 1");
}

void tensor_sketch(std::int64_t hidden, std::int64_t dtype, const Array<float>& logsumexp, const Array<float>& gold,
                   const Array<float>& values, const Array<std::int64_t>& ids, const Array<std::int64_t>& labels,
                   const Array<std::int32_t>& bucket_h, const Array<float>& sign_h, const Array<std::int32_t>& bucket_e,
                   const Array<float>& sign_e, Array<float>& z, int threads) {
  expect_threads(threads);
  const auto tokens = labels.size(), top = values.ndim() == 2 ? values.shape(1) : 0, vocabulary = bucket_e.size();
  expect_shape("logsumexp", logsumexp, {tokens});
  expect_shape("gold", gold, {tokens});
  expect_shape("values", values, {tokens, top});
  expect_shape("ids", ids, {tokens, top});
  expect_shape("labels", labels, {tokens});
  expect_shape("bucket_h", bucket_h, {bucket_h.size()});
  expect_shape("sign_h", sign_h, {bucket_h.size()});
  expect_shape("bucket_e", bucket_e, {vocabulary});
  expect_shape("sign_e", sign_e, {vocabulary});
  expect_shape("z", z, {z.size()});
  expect_buckets("bucket_h", bucket_h, z.size());
  expect_buckets("bucket_e", bucket_e, z.size());
  const auto is_id = [vocabulary](std::int64_t id) { return id >= 0 && id < vocabulary; };
  if (!std::all_of(ids.data(), ids.data() + ids.size(), is_id))
    throw std::invalid_argument("ids must be below the vocabulary");
  if (!std::all_of(labels.data(), labels.data() + tokens,
                   [&](std::int64_t id) { return is_id(id) || id == spectral_fast::kIgnored; }))
    throw std::invalid_argument("labels must be ids below the vocabulary, or -100");
  if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be from 0 to 2, got " + std::to_string(dtype));
  spectral_fast::TensorSketchTask task{};
  task.hidden = address<const void>(hidden);
  task.dtype = static_cast<DType>(dtype);
  task.tokens = size_of(tokens);
  task.features = size_of(bucket_h.size());
  task.top = size_of(top);
  task.m = size_of(z.size());
  task.logsumexp = logsumexp.data();
  task.gold = gold.data();
  task.values = values.data();
  task.ids = ids.data();
  task.labels = labels.data();
  task.bucket_h = bucket_h.data();
  task.bucket_e = bucket_e.data();
  task.sign_h = sign_h.data();
  task.sign_e = sign_e.data();
  float* out = z.mutable_data();
  py::gil_scoped_release release;
  spectral_fast::tensor_sketch(task, out, threads);
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

double frequent_directions(const Array<double>& basis, const Array<double>& squares, const Array<double>& z,
                           Array<double>& out, Array<double>& out_squares) {
  const auto k = squares.size(), m = z.size();
  expect_shape("basis", basis, {k, m});
  expect_shape("squares", squares, {k});
  expect_shape("z", z, {m});
  expect_shape("out", out, {k, m});
  expect_shape("out_squares", out_squares, {k});
  const spectral_fast::FrequentDirectionsTask task{
      basis.data(), squares.data(), z.data(), size_of(k), size_of(m), out.mutable_data(), out_squares.mutable_data()};
  py::gil_scoped_release release;
  return spectral_fast::kernels().frequent_directions(task);
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
      py::arg("quality").noconvert(), py::arg("status").noconvert(), py::arg("threads"),
      "Per row (b, a, m, n, r, dtype of b, of a): s (r), t_b and t_a (r, r), one after the other in out; loss and "
      "amplification in quality.");
  module.def("recompose", &recompose, py::arg("factors").noconvert(), py::arg("finite").noconvert(), py::arg("threads"),
             "Per row (basis, dtype, flat, length, r, transform, scale, rank, out, dtype of out, wide): the product.");
  module.def("segment_products", &segment_products, py::arg("p"), py::arg("q"), py::arg("dtype"),
             py::arg("starts").noconvert(), py::arg("out").noconvert(), py::arg("threads"),
             "out[t] = sum of p[n] * q[n] over starts[t] <= n < starts[t + 1].");
  module.def("top_logits", &top_logits, py::arg("logits"), py::arg("dtype"), py::arg("vocabulary"),
             py::arg("labels").noconvert(), py::arg("logsumexp").noconvert(), py::arg("gold").noconvert(),
             py::arg("values").noconvert(), py::arg("ids").noconvert(), py::arg("threads"),
             "Logsumexp, logit at the label, and the largest logits with their ids, of every row.");
  module.def("tensor_sketch", &tensor_sketch, py::arg("hidden"), py::arg("dtype"), py::arg("logsumexp").noconvert(),
             py::arg("gold").noconvert(), py::arg("values").noconvert(), py::arg("ids").noconvert(),
             py::arg("labels").noconvert(), py::arg("bucket_h").noconvert(), py::arg("sign_h").noconvert(),
             py::arg("bucket_e").noconvert(), py::arg("sign_e").noconvert(), py::arg("z").noconvert(),
             py::arg("threads"), "Sum over the tokens of the circular convolution of two CountSketches.");
  module.def("jacobi_svd", &jacobi_svd, py::arg("m").noconvert(), py::arg("wt").noconvert(), py::arg("s").noconvert(),
             py::arg("vt").noconvert(), py::arg("status").noconvert(), py::arg("threads"),
             "Left vectors, singular values and right vectors of each matrix of a batch m (count, r, r).");
  module.def("frequent_directions", &frequent_directions, py::arg("basis").noconvert(), py::arg("squares").noconvert(),
             py::arg("z").noconvert(), py::arg("out").noconvert(), py::arg("out_squares").noconvert(),
             "A vector folded into a weighted subspace; the eigenvalue that was taken off, NaN if z is not finite.");
  module.def("isa", &isa, "The instruction set in use, those of this processor, and those of this build.");
}
