// The choice between products of bf16 and of fp32 operands, by their results and by their time.
//
// CPUs differ in both: Zen 4 multiplies bf16 at twice its rate of fp32, AMX at more, and Xeons whose AMX a virtual
// machine hides at less. PyTorch has no stable way to ask, and what oneDNN does for a shape depends on the CPU.

#include "products.h"

#include <ATen/Context.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <vector>

#include "matmul.h"

namespace ffvt {
namespace {

enum class Operands { kAuto, kBf16, kFp32 };
std::atomic<Operands> forced = Operands::kAuto;

#if defined(__AVX512BF16__)
// Whether small products of integers come out exact, for shapes and strides of each kind that the kernels use.
bool bf16_is_right() {
  using at::BFloat16;
  struct Try {
    int64_t m, n, k, ldb;
  };
  constexpr int64_t kMost = 96, ldc = kMost;
  std::vector<BFloat16> a(kMost * kMost), b(kMost * kPanel);
  std::vector<float> c(kMost * ldc);
  const MatmulScope<BFloat16> scope;
  for (const auto [m, n, k, ldb] :
       {Try{64, 64, 64, 64}, Try{17, 32, 80, 64}, Try{80, 16, 32, 16}, Try{1, 48, 34, 48}, Try{16, 16, 64, 64}}) {
    const int64_t lda = k + 16;
    for (int64_t i = 0; i < m * k; ++i) {
      a[i / k * lda + i % k] = static_cast<float>(i % 7 - 3);
    }
    for (int64_t i = 0; i < k * n; ++i) {
      b[(i / n / 2 * ldb + i % n) * 2 + i / n % 2] = static_cast<float>(i % 5 - 2);
    }
    try {
      matmul<BFloat16>(m, n, k, a.data(), lda, b.data(), ldb, c.data(), ldc, false);
      matmul<BFloat16>(m, n, k, a.data(), lda, b.data(), ldb, c.data(), ldc, true);
    } catch (const std::exception&) {
      return false;
    }
    for (int64_t i = 0; i < m * n; ++i) {
      int64_t expected = 0;
      for (int64_t j = 0; j < k; ++j) {
        expected += 2 * ((i / n * k + j) % 7 - 3) * ((j * n + i % n) % 5 - 2);
      }
      if (c[i / n * ldc + i % n] != static_cast<float>(expected)) {
        return false;
      }
    }
  }
  return true;
}
#endif

constexpr int64_t kKeys = 256, kQueries = kPanel, kHeadDim = 64;  // of the attention's two products
constexpr int kTiles = 6;                                         // of a timing
constexpr int kTimings = 5;                                       // the best of which counts

// Seconds that the attention's two products of a few tiles take.
template <typename operand_t>
double time_of(const std::vector<operand_t>& a, const std::vector<operand_t>& b, std::vector<float>& c) {
  const MatmulScope<operand_t> scope;
  const auto begin = std::chrono::steady_clock::now();
  for (int tile = 0; tile < kTiles; ++tile) {
    matmul<operand_t>(kKeys, kQueries, kHeadDim, a.data(), kHeadDim, b.data(), kPanel, c.data(), kQueries, false);
    matmul<operand_t>(kHeadDim, kQueries, kKeys, a.data(), kKeys, b.data(), kPanel, c.data(), kQueries, tile > 0);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

ProductRates measure() {
  const std::vector<float> a(kKeys * kHeadDim, 1.0f), b(kKeys * kQueries, 1.0f);
  std::vector<float> c(kKeys * kQueries);
  double fp32 = time_of(a, b, c), bf16 = 0;  // the first makes oneDNN's code
#if defined(__AVX512BF16__)
  const std::vector<at::BFloat16> narrow_a(a.begin(), a.end()), narrow_b(b.begin(), b.end());
  const bool right = bf16_is_right();
  if (right) {
    bf16 = time_of(narrow_a, narrow_b, c);
  }
#endif
  for (int timing = 0; timing < kTimings; ++timing) {
    fp32 = std::min(fp32, time_of(a, b, c));
#if defined(__AVX512BF16__)
    if (right) {
      bf16 = std::min(bf16, time_of(narrow_a, narrow_b, c));
    }
#endif
  }
  constexpr double kOperations = kTiles * 4.0 * kKeys * kQueries * kHeadDim * 1e-9;
  return {bf16 > 0 ? kOperations / bf16 : 0.0, kOperations / fp32};
}

}  // namespace

ProductRates product_rates() {
  if (!at::globalContext().userEnabledMkldnn()) {
    return {0.0, 0.0};
  }
  static const ProductRates rates = measure();
  return rates;
}

bool bf16_products() {
  if (!at::globalContext().userEnabledMkldnn()) {
    return false;
  }
  switch (forced) {
    case Operands::kBf16:
      return true;
    case Operands::kFp32:
      return false;
    case Operands::kAuto:
      return product_rates().bf16 >= product_rates().fp32;
  }
  return false;
}

void force_products(const std::string& operands) {
  if (operands == "auto") {
    forced = Operands::kAuto;
  } else if (operands == "fp32") {
    forced = Operands::kFp32;
  } else {
    TORCH_CHECK_VALUE(operands == "bf16", "products must be bf16, fp32 or auto; got ", operands);
    TORCH_CHECK_VALUE(product_rates().bf16 > 0, "products must be fp32 or auto, as this CPU or this build does not ",
                      "multiply bf16, or oneDNN is switched off (torch.backends.mkldnn); got ", operands);
    forced = Operands::kBf16;
  }
}

}  // namespace ffvt
