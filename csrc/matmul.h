// Matrix products of tiles, C (+)= A B, through PyTorch's brgemm (oneDNN): AMX, AVX-512 or AVX2 as the CPU has them.
// The one place that knows how PyTorch spells it (2.10 to 2.14 alike).
//
// A is M x K row-major and C is M x N fp32 row-major. B is K x N row-major in fp32; in bf16 its rows stand in pairs
// (VNNI): element (k, n) at B[((k / 2) * ldb + n) * 2 + k % 2]. AMX asks for ldb of 16, 32, 48 or 64 and for an even
// K; K below 32 is not relied on.

#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <array>
#include <cstdint>
#include <exception>
#include <vector>

namespace ffvt {

constexpr int64_t kPanel = 64;  // most columns of one B operand

// Rows of B that stand together.
template <typename operand_t>
constexpr int64_t kPair = sizeof(operand_t) == 2 ? 2 : 1;

// What the number of rows of B is padded to with zeros.
template <typename operand_t>
constexpr int64_t kDepthStep = sizeof(operand_t) == 2 ? 32 : 1;

template <typename operand_t>
inline void matmul(int64_t m, int64_t n, int64_t k, const operand_t* a, int64_t lda, const operand_t* b, int64_t ldb,
                   float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/kPair<operand_t> == 2);
}

// Gives the matrix unit back at its end (AMX keeps a state per thread): one around a thread's products of operand_t.
template <typename operand_t>
struct MatmulScope {
  MatmulScope() = default;
  MatmulScope(const MatmulScope&) = delete;
  ~MatmulScope() { at::native::cpublas::brgemm_release(/*is_vnni=*/kPair<operand_t> == 2); }
};

// Whether small products of bf16 integers come out exact. PyTorch has no stable way to ask, and what oneDNN does for a
// shape depends on the CPU, so shapes and strides of each kind that the kernels use are tried, once.
inline bool try_bf16() {
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

inline bool bf16_products() {
  if (!at::globalContext().userEnabledMkldnn()) {
    return false;
  }
  static const bool works = try_bf16();
  return works;
}

}  // namespace ffvt
