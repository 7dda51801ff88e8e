// Every kernel of every instruction set on every shape that has an edge, in memory of exactly the size it may touch,
// from several threads at once: for `make sanitize`. Results are checked elsewhere; here only that they are finite, and
// the same for any number of threads.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/kernels.h"

using namespace spectral_fast;

namespace {

std::size_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Values from -1 to 1: 0x3f80 is 1 in bfloat16, and 1.875 in float16.
std::vector<char> random_values(DType dtype, std::size_t count, std::mt19937& generator) {
  std::vector<char> data(count * bytes_of(dtype));
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (std::size_t i = 0; i < count; ++i) {
    const double wide = uniform(generator);
    const float narrow = static_cast<float>(wide);
    std::uint32_t word;
    std::memcpy(&word, &narrow, sizeof word);
    const auto half = static_cast<std::uint16_t>(dtype == DType::float16 ? (word >> 16 & 0xbbff) : word >> 16);
    const void* from = dtype == DType::float64   ? static_cast<const void*>(&wide)
                       : dtype == DType::float32 ? static_cast<const void*>(&narrow)
                                                 : static_cast<const void*>(&half);
    std::memcpy(data.data() + i * bytes_of(dtype), from, bytes_of(dtype));
  }
  return data;
}

struct Case {
  std::size_t m, r, n;
  DType dtype;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::bfloat16, DType::float16, DType::float32, DType::float64})
    for (const std::size_t r : {0, 1, 2, 5, 7, 8, 9, 16, 17, 33, 64, 67})
      for (const std::size_t length : {0, 1, 3, 31, 64, 127, 257, 1031})
        all.push_back({length, r, 1031 - length, dtype});
  return all;
}

void fail(const char* what) {
  std::fprintf(stderr, "native_stress: %s\n", what);
  std::exit(1);
}

std::vector<double> run(int threads) {
  std::mt19937 generator(0);
  std::vector<std::vector<char>> memory;
  std::vector<std::unique_ptr<double[]>> outputs;
  std::vector<SvdTask> tasks;
  for (const Case& c : cases()) {
    memory.push_back(random_values(c.dtype, c.m * c.r, generator));
    const void* b = memory.back().data();
    memory.push_back(random_values(c.dtype, c.r * c.n, generator));
    const void* a = memory.back().data();
    SvdTask task{};
    task.b = {b, c.dtype, Shape::tall, c.m, c.r};
    task.a = {a, c.dtype, Shape::flat, c.n, c.r};
    for (double** out : {&task.t_b, &task.t_a, &task.s}) {
      outputs.emplace_back(new double[out == &task.s ? c.r : c.r * c.r]);
      *out = outputs.back().get();
    }
    tasks.push_back(task);
  }
  lowrank_svd(tasks, threads);
  std::vector<double> results;
  std::vector<RecomposeTask> products;
  for (const SvdTask& task : tasks) {
    if (task.status != SvdStatus::converged) fail("an SVD of finite values did not converge");
    results.insert(results.end(), task.s, task.s + task.b.r);
    if (!(task.loss < 1e-3)) continue;  // a rank-deficient module: its transforms are not used
    for (const bool wide : {false, true}) {
      products.push_back({task.b, task.t_b, task.b.r, const_cast<void*>(task.b.data), task.b.dtype, wide, false});
      products.push_back({task.a, task.t_a, task.a.r, const_cast<void*>(task.a.data), task.a.dtype, wide, false});
    }
  }
  // In place, so one product of a factor after the other.
  std::vector<RecomposeTask> round;
  for (const bool wide : {false, true}) {
    round.clear();
    for (const RecomposeTask& product : products)
      if (product.wide == wide) round.push_back(product);
    recompose(round, threads);
    for (const RecomposeTask& product : round)
      if (!product.finite) fail("a product of finite values is not finite");
  }
  for (const DType dtype : {DType::bfloat16, DType::float16, DType::float32})
    for (const std::size_t r : {1, 7, 16, 64, 67, 130}) {
      const std::vector<std::int64_t> starts{0, 0, 1, 64, 65, 301};
      const auto p = random_values(dtype, 301 * r, generator), q = random_values(dtype, 301 * r, generator);
      std::vector<float> g(5 * r);
      segment_products({p.data(), q.data(), dtype, r, starts.data(), g.data()}, 5, threads);
      results.insert(results.end(), g.begin(), g.end());
    }
  for (const double x : results)
    if (!std::isfinite(x)) fail("a result is not finite");
  return results;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--isas") == 0) {
    for (std::size_t i = 0; i < kImplementationCount; ++i)
      if (kImplementations[i]->supported()) std::printf("%s\n", kImplementations[i]->isa);
    return 0;
  }
  const std::vector<double> alone = run(1);
  std::vector<double> other;
  std::thread concurrent([&] { other = run(3); });
  const std::vector<double> beside = run(4);
  concurrent.join();
  if (alone != beside || alone != other) fail("the number of threads changed a result");
  std::printf("native_stress: %s, %zu results\n", kernels().isa, alone.size());
}
