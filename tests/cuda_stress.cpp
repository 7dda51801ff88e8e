// The CUDA kernels on the host under ThreadSanitizer, which ends the process with an error where two threads of a block
// meet in memory without a barrier between them. What they compute is for test_cuda_host.py.
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/cuda/jacobi.cu"

namespace {

template <typename T, typename Svd>
bool converges(Svd svd, int r, bool singular) {
  constexpr int kMatrices = 2;
  std::mt19937 generator(r);
  std::normal_distribution<T> normal;
  std::vector<T> x(kMatrices * r * r), u(x), vh(x), s(kMatrices * r);
  std::vector<int> status(kMatrices, -1);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = singular && i % 3 == 0 ? 0 : normal(generator);
  if (singular) std::fill(x.begin(), x.begin() + r, T(0));
  if (svd(x.data(), u.data(), s.data(), vh.data(), status.data(), kMatrices, r, nullptr) != 0) return false;
  return status[0] == 0 && status[1] == 0;
}

}  // namespace

int main() {
  for (int r : {1, 2, 3, 4, 5, 7, 8, 9, 13, 16}) {
    for (bool singular : {false, true}) {
      if (!converges<float>(spectral_fast_svd_float, r, singular) ||
          !converges<double>(spectral_fast_svd_double, r, singular)) {
        std::printf("r = %d failed\n", r);
        return 1;
      }
    }
  }
}
