// The only file that knows Python: checks shapes, releases the GIL, hands pointers on.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
void expect_shape(const char* name, const Array<T>& array, std::initializer_list<py::ssize_t> shape) {
  if (std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim())) return;
  std::string wanted;
  for (const auto n : shape) wanted += (wanted.empty() ? "" : " x ") + std::to_string(n);
  throw std::invalid_argument(std::string(name) + " must be " + wanted + ", got " +
                              py::str(array.attr("shape")).cast<std::string>());
}

void jacobi_svd(const Array<double>& m, Array<double>& wt, Array<double>& s, Array<std::int32_t>& status, int threads) {
  if (m.ndim() != 3) throw std::invalid_argument("m must have three axes, got " + std::to_string(m.ndim()));
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  const auto count = m.shape(0), r = m.shape(1);
  expect_shape("m", m, {count, r, r});
  expect_shape("wt", wt, {count, r, r});
  expect_shape("s", s, {count, r});
  expect_shape("status", status, {count});
  const double* in = m.data();
  double *vectors = wt.mutable_data(), *values = s.mutable_data();
  std::int32_t* outcome = status.mutable_data();
  py::gil_scoped_release release;
  spectral_fast::jacobi_svd(in, vectors, values, outcome, count, r, threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of spectral_fast; arrays are C-contiguous and are written in place.";
  // noconvert: a converted copy of an output would take the result with it.
  module.def("jacobi_svd", &jacobi_svd, py::arg("m").noconvert(), py::arg("wt").noconvert(), py::arg("s").noconvert(),
             py::arg("status").noconvert(), py::arg("threads"),
             "Singular values and left vectors of each matrix of a batch m (count, r, r).");
}
