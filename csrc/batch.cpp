// Whole adapters: one task per thread, the most expensive first, so the result has the same bits for any number of
// threads.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace spectral_fast {

void lowrank_svd(std::vector<SvdTask>& tasks, int threads) {
  std::vector<double> cost;
  for (const SvdTask& task : tasks) {
    const double r = static_cast<double>(task.b.r);
    cost.push_back(r * r * (static_cast<double>(task.b.length + task.a.length) + 100 * r));
  }
  const Kernels& chosen = kernels();
  parallel_for(cost, threads, [&](std::size_t i) { chosen.lowrank_svd(tasks[i]); });
}

void recompose(std::vector<RecomposeTask>& tasks, int threads) {
  std::vector<double> cost;
  for (const RecomposeTask& task : tasks)
    cost.push_back(static_cast<double>(task.basis.length) * static_cast<double>(task.basis.r * task.rank));
  const Kernels& chosen = kernels();
  parallel_for(cost, threads, [&](std::size_t i) { chosen.recompose(tasks[i]); });
}

void segment_products(const SensitivityTask& task, std::size_t segments, int threads) {
  std::vector<double> cost;
  for (std::size_t t = 0; t < segments; ++t)
    cost.push_back(static_cast<double>(task.starts[t + 1] - task.starts[t]) * static_cast<double>(task.r));
  const Kernels& chosen = kernels();
  parallel_for(cost, threads, [&](std::size_t t) { chosen.segment_products(task, t); });
}

void top_logits(const TopLogitsTask& task, std::size_t rows, int threads) {
  const Kernels& chosen = kernels();
  std::vector<double> cost;
  for (std::size_t t = 0; t < rows; ++t)
    cost.push_back(task.labels[t] == kIgnored ? 0.0 : 4.0 * static_cast<double>(task.vocabulary));
  parallel_for(cost, threads, [&](std::size_t t) { chosen.top_logits(task, t); });
}

void tensor_sketch(TensorSketchTask task, float* z, int threads) {
  const Kernels& chosen = kernels();
  const std::size_t runs = (task.tokens + kTokensOfSketch - 1) / kTokensOfSketch;
  std::vector<float> sums(runs * task.m);
  task.sums = sums.data();
  const double of_token = static_cast<double>(2 * task.features + task.top * task.m / 8);
  parallel_for(std::vector<double>(runs, kTokensOfSketch * of_token), threads,
               [&](std::size_t run) { chosen.tensor_sketch(task, run); });
  for (std::size_t i = 0; i < task.m; ++i) {
    double total = 0;
    for (std::size_t run = 0; run < runs; ++run) total += static_cast<double>(sums[run * task.m + i]);
    z[i] = static_cast<float>(total);
  }
}

void jacobi_svd(const double* m, double* wt, double* s, double* vt, SvdStatus* status, std::size_t count, std::size_t r,
                int threads) {
  const Kernels& chosen = kernels();
  const std::size_t groups = (count + kTogether - 1) / kTogether, size = r * r;
  parallel_for(std::vector<double>(groups, 50.0 * static_cast<double>(r * size)), threads, [&](std::size_t group) {
    const std::size_t i = group * kTogether, together = std::min(kTogether, count - i);
    chosen.jacobi_svd(m + i * size, wt + i * size, s + i * r, vt + i * size, status + i, together, r);
  });
}

namespace {

constexpr std::size_t kSplineChunk = 1 << 15;

// Every chunk of elements by some thread; their sums, if any, then in order.
void spline_in_chunks(const SplineTask& task, double* sums, int threads) {
  const std::size_t chunks = (task.count + kSplineChunk - 1) / kSplineChunk,
                    size = sums == nullptr ? 0 : task.knots + 1;
  std::vector<double> parts(chunks * size);
  const Kernels& chosen = kernels();
  // An element takes as long as eight multiply-adds that wait for nothing.
  parallel_for(std::vector<double>(chunks, 8.0 * kSplineChunk), threads, [&](std::size_t i) {
    const std::size_t begin = i * kSplineChunk, end = std::min(begin + kSplineChunk, task.count);
    chosen.spline(task, begin, end, sums == nullptr ? nullptr : parts.data() + i * size);
  });
  std::fill(sums, sums + size, 0.0);
  for (std::size_t i = 0; i < chunks * size; ++i) sums[i % size] += parts[i];
}

}  // namespace

void spline(const SplineTask& task, int threads) { spline_in_chunks(task, nullptr, threads); }

void spline_backward(const SplineTask& task, double* sums, int threads) { spline_in_chunks(task, sums, threads); }

}  // namespace spectral_fast
