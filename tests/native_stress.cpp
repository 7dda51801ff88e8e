// Every kernel of every instruction set on every shape that has an edge, in memory of exactly the size it may touch,
// from several threads at once: for `make sanitize`. Results are checked elsewhere; here only that they are finite, and
// the same for any number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/kernels.h"

using namespace spectral_fast;

namespace {

// Values from -2 to 2.
std::vector<char> random_values(DType dtype, std::size_t count, std::mt19937& generator) {
  std::vector<char> data(count * size_of(dtype));
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
    std::memcpy(data.data() + i * size_of(dtype), from, size_of(dtype));
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
    for (const std::size_t r : {0, 1, 2, 5, 7, 8, 9, 16, 17, 33, 64, 67, 130})
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
    outputs.emplace_back(new double[c.r]);
    tasks.push_back({task.b, task.a, outputs.back().get(), nullptr, nullptr, 0, 0, SvdStatus::converged});
  }
  lowrank_svd(tasks, threads);
  std::vector<double> results;
  std::vector<RecomposeTask> products;
  for (const SvdTask& task : tasks) {
    if (task.status != SvdStatus::converged) fail("an SVD of finite values did not converge");
    results.insert(results.end(), task.s, task.s + task.b.r);
    // Singular values alone, or a rank-deficient module, whose transforms are not used.
    if (task.t_b == nullptr || !(task.loss < 1e-3)) continue;
    for (const bool wide : {false, true}) {
      products.push_back(
          {task.b, task.t_b, task.s, task.b.r, const_cast<void*>(task.b.data), task.b.dtype, wide, false});
      products.push_back(
          {task.a, task.t_a, task.s, task.a.r, const_cast<void*>(task.a.data), task.a.dtype, wide, false});
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
  // To other places, ranks and types.
  for (const Shape shape : {Shape::tall, Shape::flat})
    for (const DType from : {DType::bfloat16, DType::float32, DType::float64})
      for (const DType to : {DType::bfloat16, DType::float16, DType::float64})
        for (const std::size_t rank : {1, 6, 16, 35}) {
          const auto basis = random_values(from, 131 * 9, generator);
          const auto words = random_values(DType::float64, 9 * rank, generator);
          std::vector<double> transform(9 * rank);
          std::memcpy(transform.data(), words.data(), words.size());
          std::vector<char> out(131 * rank * size_of(to));
          std::vector<RecomposeTask> one{{{basis.data(), from, shape, 131, 9},
                                          transform.data(),
                                          transform.data(),
                                          rank,
                                          out.data(),
                                          to,
                                          rank > 6,
                                          false}};
          recompose(one, threads);
          if (!one[0].finite) fail("a product of finite values is not finite");
        }
  for (const std::size_t r : {1, 7, 16, 67}) {
    const auto words = random_values(DType::float64, 3 * r * r, generator);
    std::vector<double> m(3 * r * r), wt(3 * r * r), s(3 * r), vt(3 * r * r);
    std::memcpy(m.data(), words.data(), words.size());
    std::fill(m.begin(), m.begin() + static_cast<std::ptrdiff_t>(r * r), 0.0);
    m.back() = std::nan("");
    SvdStatus status[3];
    jacobi_svd(m.data(), wt.data(), s.data(), vt.data(), status, 3, r, threads);
    if (status[0] != SvdStatus::converged || status[1] != SvdStatus::converged || status[2] != SvdStatus::b_not_finite)
      fail("a zero matrix, a plain one and one with a NaN");
    results.insert(results.end(), s.begin(), s.begin() + static_cast<std::ptrdiff_t>(2 * r));
    results.insert(results.end(), vt.begin(), vt.begin() + static_cast<std::ptrdiff_t>(2 * r * r));
  }
  for (const std::size_t k : {1, 5, 8, 17})
    for (const std::size_t m : {17, 24, 131}) {
      const auto words = random_values(DType::float64, 2 * m, generator);
      std::vector<double> z(2 * m), basis(k * m), squares(k), out(k * m), out_squares(k);
      std::memcpy(z.data(), words.data(), words.size());
      for (std::size_t i = 0; i < 3 * k; ++i) {
        // One that is new, one that was there, and nothing.
        std::vector<double> vector(z.begin() + static_cast<std::ptrdiff_t>(i % 2 * i % m), z.end());
        vector.resize(m);
        if (i % 5 == 4) std::fill(vector.begin(), vector.end(), 0.0);
        const double removed = kernels().frequent_directions(
            {basis.data(), squares.data(), vector.data(), k, m, out.data(), out_squares.data()});
        if (!(removed >= 0)) fail("less than nothing was taken off");
        std::swap(basis, out);
        std::swap(squares, out_squares);
      }
      results.insert(results.end(), basis.begin(), basis.end());
      results.insert(results.end(), squares.begin(), squares.end());
    }
  for (const DType dtype : {DType::bfloat16, DType::float16, DType::float32})
    for (const std::size_t r : {1, 7, 16, 64, 67, 130}) {
      const std::vector<std::int64_t> starts{0, 0, 1, 64, 65, 301};
      const auto p = random_values(dtype, 301 * r, generator), q = random_values(dtype, 301 * r, generator);
      std::vector<float> g(5 * r);
      segment_products({p.data(), q.data(), dtype, r, starts.data(), g.data()}, 5, threads);
      results.insert(results.end(), g.begin(), g.end());
    }
  for (const DType dtype : {DType::bfloat16, DType::float16, DType::float32})
    for (const std::size_t vocabulary : {1, 15, 64, 65, 200, 5000})
      for (const std::size_t features : {1, 67}) {
        // Runs of 32 tokens, of which the second is not whole; more buckets than a strip, and fewer.
        constexpr std::size_t kTokens = 37;
        const std::size_t top = std::min<std::size_t>(vocabulary, 17), m = features == 1 ? 3 : 131;
        const auto logits = random_values(dtype, kTokens * vocabulary, generator);
        const auto hidden = random_values(dtype, kTokens * features, generator);
        std::vector<std::int64_t> labels(kTokens), ids(kTokens * top);
        for (std::size_t t = 0; t < kTokens; ++t) labels[t] = static_cast<std::int64_t>(7 * t % vocabulary);
        labels[3] = kIgnored;
        std::vector<float> lse(kTokens), gold(kTokens), values(kTokens * top), z(m);
        top_logits(
            {logits.data(), dtype, vocabulary, top, labels.data(), lse.data(), gold.data(), values.data(), ids.data()},
            kTokens, threads);
        std::vector<std::int32_t> bucket_h(features), bucket_e(vocabulary);
        for (std::size_t i = 0; i < features; ++i) bucket_h[i] = static_cast<std::int32_t>(i * i % m);
        for (std::size_t j = 0; j < vocabulary; ++j) bucket_e[j] = static_cast<std::int32_t>((m - 1 + j) % m);
        const std::vector<float> sign_h(features, -1.0f), sign_e(vocabulary, 1.0f);
        tensor_sketch(
            {hidden.data(), dtype, kTokens, features, top, m, lse.data(), gold.data(), values.data(), ids.data(),
             labels.data(), bucket_h.data(), bucket_e.data(), sign_h.data(), sign_e.data(), nullptr},
            z.data(), threads);
        results.insert(results.end(), lse.begin(), lse.end());
        results.insert(results.end(), values.begin(), values.end());
        results.insert(results.end(), z.begin(), z.end());
      }
  const DType kinds[] = {DType::bfloat16, DType::float16, DType::float32};
  for (const std::size_t count : {0, 1, 16, 513, 33001})
    for (const std::size_t knots : {2, 5, 17, 70})
      for (std::size_t way = 0; way < 8; ++way) {
        const DType x_dtype = kinds[way % 3], y_dtype = kinds[(way + count) % 3];
        const auto x = random_values(x_dtype, count, generator), y = random_values(y_dtype, count, generator);
        std::vector<char> out(count * size_of(y_dtype)), dx(count * size_of(x_dtype));
        std::vector<double> values(knots), sums(knots + 1);
        for (std::size_t i = 0; i < knots; ++i) values[i] = std::sin(static_cast<double>(i));
        SplineTask task{x.data(),
                        way < 4 ? y.data() : nullptr,
                        out.data(),
                        x_dtype,
                        y_dtype,
                        count,
                        values.data(),
                        knots,
                        -1.5,
                        0.5,
                        -1,
                        1,
                        0.37,
                        way % 2 == 0,
                        way % 4 == 1,
                        way % 4 > 1};
        spline(task, threads);
        task.y = y.data();
        task.out = dx.data();
        spline_backward(task, sums.data(), threads);
        results.insert(results.end(), sums.begin(), sums.end());
        for (const std::vector<char>* bytes : {&out, &dx}) results.insert(results.end(), bytes->begin(), bytes->end());
      }
  for (const double x : results)
    if (!std::isfinite(x)) fail("a result is not finite");
  return results;
}

void check_choice() {
  const Kernels none{"none", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                     nullptr};
  const Kernels some{"some", [] { return true; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                     nullptr};
  const Kernels* const list[] = {&none, &some};
  if (&choose(list, 2, nullptr) != &some || &choose(list, 2, "") != &some || &choose(list, 2, "some") != &some)
    fail("the best supported, or the forced instruction set must be chosen");
  for (const char* forced : {"none", "unknown"}) {
    const std::string wanted = std::strcmp(forced, "none") == 0 ? "does not have" : "is no instruction set";
    try {
      choose(list, 2, forced);
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()).find(wanted) != std::string::npos) continue;
    }
    fail("a forced instruction set that cannot be used must be an error that says so");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--isas") == 0) {
    for (std::size_t i = 0; i < kImplementationCount; ++i)
      if (kImplementations[i]->supported()) std::printf("%s\n", kImplementations[i]->isa);
    return 0;
  }
  check_choice();
  const std::vector<double> alone = run(1);
  std::vector<double> other;
  std::thread concurrent([&] { other = run(3); });
  const std::vector<double> beside = run(4);
  concurrent.join();
  if (alone != beside || alone != other) fail("the number of threads changed a result");
  std::printf("native_stress: %s, %zu results\n", kernels().isa, alone.size());
}
