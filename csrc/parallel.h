// Independent tasks over a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <future>
#include <numeric>
#include <system_error>
#include <vector>

namespace spectral_fast {

// Runs task(i) for every i in [0, cost.size()), the most expensive first, on at most `threads` threads, the caller's
// own among them; a thread is only started for work that takes longer than starting it. Threads do not outlive the
// call, so forking afterwards is safe. An exception reaches the caller once all threads have stopped.
template <typename Task>
void parallel_for(const std::vector<double>& cost, int threads, Task task) {
  constexpr double kThreadCost = 2e6;  // about 0.1 ms of multiply-adds
  std::vector<std::size_t> order(cost.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return cost[i] > cost[j]; });
  std::atomic<std::size_t> next{0};
  auto drain = [&] {
    for (std::size_t i = next++; i < order.size(); i = next++) task(order[i]);
  };
  const double total = std::accumulate(cost.begin(), cost.end(), 0.0);
  const double useful = std::min({static_cast<double>(threads), static_cast<double>(cost.size()), total / kThreadCost});
  std::vector<std::future<void>> helpers;  // a future of std::async joins its thread when destroyed
  try {
    for (double started = 1; started < useful; ++started) helpers.push_back(std::async(std::launch::async, drain));
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do the work.
  }
  drain();
  for (auto& helper : helpers) helper.get();
}

}  // namespace spectral_fast
