// All kernel bodies, in the order in which they build on each other; the table's entries at the end.

// clang-format off
#include "vectors-inl.h"
#include "convert-inl.h"
#include "products-inl.h"
#include "gram-inl.h"
#include "eigen-inl.h"
#include "jacobi-inl.h"
#include "rank_one-inl.h"
#include "frequent_directions-inl.h"
#include "lowrank_svd-inl.h"
#include "recompose-inl.h"
#include "sensitivity-inl.h"
#include "head_sketch-inl.h"
#include "spline-inl.h"
// clang-format on

// A workspace per thread, freed when the thread ends.
inline void lowrank_svd(SvdTask& task) {
  thread_local LowrankSvd solve;
  solve(task);
}

inline void recompose(RecomposeTask& task) {
  thread_local RecomposeWorkspace work;
  if (task.wide)
    recompose_as<double>(task, work);
  else
    recompose_as<float>(task, work);
}

inline double frequent_directions(const FrequentDirectionsTask& task) {
  thread_local FrequentDirections fold;
  return fold(task);
}

// The matrices take turns: see SymmetricEigen. None changes another's bits.
inline void jacobi_svd(const double* m, double* wt, double* s, double* vt, SvdStatus* status, std::size_t count,
                       std::size_t r) {
  thread_local JacobiSvd solvers[kTogether];
  for (std::size_t k = 0; k < count; ++k) solvers[k].begin(m + k * r * r, r, true);
  for (bool busy = true; busy;) {
    busy = false;
    for (std::size_t k = 0; k < count; ++k) busy |= solvers[k].advance();
  }
  for (std::size_t k = 0; k < count; ++k) status[k] = solvers[k].finish(wt + k * r * r, s + k * r, vt + k * r * r);
}
