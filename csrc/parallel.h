// Independent tasks over a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <future>
#include <vector>

namespace spectral_fast {

// Calls work() on `threads` threads at once (the caller's own among them), where work draws the next task
// from `next` until none is left. An exception in a task reaches the caller after all threads have stopped.
template <typename Worker>
void parallel_for(std::int64_t count, int threads, Worker make_worker) {
  std::atomic<std::int64_t> next{0};
  auto drain = [&] {
    auto task = make_worker();
    for (std::int64_t i = next++; i < count; i = next++) task(i);
  };
  std::vector<std::future<void>> helpers;  // a future of std::async joins its thread when destroyed
  const auto wanted = std::min<std::int64_t>(threads, count);
  for (std::int64_t i = 1; i < wanted; ++i) helpers.push_back(std::async(std::launch::async, drain));
  drain();
  for (auto& helper : helpers) helper.get();
}

}  // namespace spectral_fast
