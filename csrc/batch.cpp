// Whole adapters: one task per thread, the most expensive first, so the result has the same bits for any number of
// threads.
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

void jacobi_svd(const double* m, double* wt, double* s, std::int32_t* status, std::size_t count, std::size_t r,
                int threads) {
  const Kernels& chosen = kernels();
  parallel_for(std::vector<double>(count, 50.0 * static_cast<double>(r * r * r)), threads, [&](std::size_t i) {
    status[i] = static_cast<std::int32_t>(chosen.jacobi_svd(m + i * r * r, wt + i * r * r, s + i * r, r));
  });
}

}  // namespace spectral_fast
