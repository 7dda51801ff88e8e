// Runs CUDA source on the host, without a GPU or nvcc: every thread of a block is a fiber that runs until it waits at a
// barrier or a shuffle, so results are right only if the synchronisation is. ThreadSanitizer, told of the fibers and
// of what orders their memory accesses, reports a missing barrier as a data race.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SHIM_TSAN(call) call
// What switches between fibers is no access of theirs.
#define SHIM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define SHIM_TSAN(call) static_cast<void>(0)
#define SHIM_UNSEEN
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Fewer lanes to a warp make a test of many warps cheap.
#ifndef SHIM_WARP
#define SHIM_WARP 32
#endif

namespace shim {

constexpr int kWarp = SHIM_WARP;
constexpr std::size_t kStack = 1 << 16;

struct Dimension {
  int x;
};

struct Barrier {
  int arrived = 0;
  long generation = 0;
  char order[2] = {};  // of two generations, so that one does not seem to order the next
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* tsan = nullptr;
  double slot = 0;
  bool done = false;
};

struct Block {
  Fiber* fibers;
  Barrier* warps;
  std::vector<int> votes;
  std::unique_ptr<double[]> shared;
  Barrier barrier;
  ucontext_t host;
  void* host_tsan = nullptr;
  std::function<void()> body;
  long yields = 0;
};

inline Block* block;
inline Dimension thread_index, block_index, block_size;

SHIM_UNSEEN inline void switch_to(int i) {
  ucontext_t* from = &block->fibers[thread_index.x].context;
  thread_index.x = i;
  SHIM_TSAN(__tsan_switch_to_fiber(block->fibers[i].tsan, __tsan_switch_to_fiber_no_sync));
  swapcontext(from, &block->fibers[i].context);
}

// Lets the next thread that has not returned run.
SHIM_UNSEEN inline void yield() {
  if (++block->yields > 4 * block_size.x * block_size.x + 1000) {
    std::fputs("a barrier or a shuffle is not reached by all threads\n", stderr);
    std::abort();
  }
  int next = thread_index.x;
  do next = (next + 1) % block_size.x;
  while (block->fibers[next].done);
  switch_to(next);
}

// A shuffle waits for its warp, but orders no access to memory.
SHIM_UNSEEN inline void wait(Barrier& barrier, int threads, bool ordered) {
  const long generation = barrier.generation;
  if (ordered) SHIM_TSAN(__tsan_release(&barrier.order[generation % 2]));
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    block->yields = 0;
  }
  while (barrier.generation == generation) yield();
  if (ordered) SHIM_TSAN(__tsan_acquire(&barrier.order[generation % 2]));
}

SHIM_UNSEEN inline Dimension thread() { return thread_index; }

SHIM_UNSEEN inline void run_thread() {
  block->body();
  Block& b = *block;
  SHIM_TSAN(__tsan_release(&b.host));
  b.fibers[thread_index.x].done = true;
  b.yields = 0;
  for (int i = 0; i < block_size.x; ++i) {
    if (!b.fibers[i].done) switch_to(i);
  }
  SHIM_TSAN(__tsan_switch_to_fiber(b.host_tsan, 0));
  setcontext(&b.host);
}

inline void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.stack.reset(new char[kStack]);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  SHIM_TSAN(fiber.tsan = __tsan_create_fiber(0));
  makecontext(&fiber.context, run_thread, 0);
}

// Shared memory starts as NaNs.
inline void run_block(int i, int threads, std::size_t shared_bytes, const std::function<void()>& body) {
  Block b;
  block = &b;
  block_index.x = i;
  block_size.x = threads;
  b.body = body;
  std::vector<Barrier> warps((threads + kWarp - 1) / kWarp);
  b.warps = warps.data();
  b.votes.resize(threads);
  b.shared.reset(new double[shared_bytes / sizeof(double) + 1]);
  std::memset(static_cast<void*>(b.shared.get()), 0xff, shared_bytes);
  SHIM_TSAN(b.host_tsan = __tsan_get_current_fiber());
  std::vector<Fiber> fibers(threads);
  b.fibers = fibers.data();
  for (Fiber& fiber : fibers) prepare(fiber);
  thread_index.x = 0;
  SHIM_TSAN(__tsan_switch_to_fiber(b.fibers[0].tsan, 0));
  swapcontext(&b.host, &b.fibers[0].context);
  SHIM_TSAN(__tsan_acquire(&b.host));
  for (int t = 0; t < threads; ++t) SHIM_TSAN(__tsan_destroy_fiber(fibers[t].tsan));
}

inline void launch(int blocks, int threads, std::size_t shared_bytes, const std::function<void()>& body) {
  for (int i = 0; i < blocks; ++i) run_block(i, threads, shared_bytes, body);
}

template <typename T>
SHIM_UNSEEN T shuffle(T value, int source) {
  const int thread = thread_index.x, first = thread - thread % kWarp;
  Barrier& barrier = block->warps[thread / kWarp];
  block->fibers[thread].slot = value;
  wait(barrier, kWarp, false);
  value = static_cast<T>(block->fibers[first + source].slot);
  wait(barrier, kWarp, false);
  return value;
}

}  // namespace shim

#define threadIdx shim::thread()
#define blockIdx shim::block_index
#define blockDim shim::block_size

using cudaStream_t = void*;

inline void __syncthreads() { shim::wait(shim::block->barrier, blockDim.x, true); }

inline int __syncthreads_or(int vote) {
  shim::block->votes[threadIdx.x] = vote;
  __syncthreads();
  int any = 0;
  for (int other : shim::block->votes) any |= other;
  __syncthreads();
  return any;
}

inline void __syncwarp() { shim::wait(shim::block->warps[threadIdx.x / shim::kWarp], shim::kWarp, true); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::shuffle(value, threadIdx.x % shim::kWarp ^ mask);
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
