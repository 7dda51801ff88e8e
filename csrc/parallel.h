// Independent tasks over a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <future>
#include <vector>

namespace spectral_fast {

// Runs task(0) .. task(count - 1) on `threads` threads, the caller's own among them. make_task() gives each
// thread a task of its own, with its workspace. An exception reaches the caller once all threads have
// stopped.
template <typename MakeTask>
void parallel_for(std::int64_t count, int threads, MakeTask make_task) {
  std::atomic<std::int64_t> next{0};
  auto drain = [&] {
    auto task = make_task();
    for (std::int64_t i = next++; i < count; i = next++) task(i);
  };
  std::vector<std::future<void>> helpers;  // a future of std::async joins its thread when destroyed
  const auto wanted = std::min<std::int64_t>(threads, count);
  for (std::int64_t i = 1; i < wanted; ++i) helpers.push_back(std::async(std::launch::async, drain));
  drain();
  for (auto& helper : helpers) helper.get();
}

}  // namespace spectral_fast
