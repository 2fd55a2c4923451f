// Matrix products of tiles, C (+)= A B, through PyTorch's brgemm (oneDNN): AMX, AVX-512 or AVX2 as the CPU has them.
// The one place that knows how PyTorch spells it (2.10 to 2.14 alike).
//
// A is M x K row-major and C is M x N fp32 row-major. B is K x N row-major in fp32; in bf16 its rows stand in pairs
// (VNNI): element (k, n) at B[((k / 2) * ldb + n) * 2 + k % 2]. AMX asks for ldb of 16, 32, 48 or 64 and for an even
// K; K below 32 is not relied on.

#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstdint>

namespace ffvt {

constexpr int64_t kPanel = 64;  // most columns of one B operand

// Rows of B that stand together.
template <typename operand_t>
constexpr int64_t kPair = sizeof(operand_t) == 2 ? 2 : 1;

// What the rows of A are padded to, and the rows of B with zeros. oneDNN keeps the code of every shape that it has
// seen: this bounds how many there are, whatever numbers of tokens come.
constexpr int64_t kRowStep = 8;
template <typename operand_t>
constexpr int64_t kDepthStep = sizeof(operand_t) == 2 ? 32 : kRowStep;

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

}  // namespace ffvt
