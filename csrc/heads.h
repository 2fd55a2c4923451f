// Tensors (B, N, H, D) as the kernels see them, and the choice of the types they compute in.

#pragma once

#include <ATen/core/Tensor.h>

#include "pack.h"

namespace ffvt {

template <typename scalar_t>
inline Heads<scalar_t> heads_of(const at::Tensor& t) {
  scalar_t* data;
  if constexpr (std::is_const_v<scalar_t>) {
    data = t.const_data_ptr<std::remove_const_t<scalar_t>>();
  } else {
    data = t.mutable_data_ptr<scalar_t>();
  }
  return {data, t.stride(0), t.stride(1), t.stride(2), t.size(2)};
}

// Calls kernel.template operator()<scalar_t, T>(): the dtype of the tensors, and that of the products' operands, which
// is fp32 wherever there are no instructions for the other.
template <typename Kernel>
inline void with_types(at::ScalarType dtype, const Kernel& kernel) {
  switch (dtype) {
    case at::kFloat:
      return kernel.template operator()<float, float>();
    case at::kHalf:
      return kernel.template operator()<at::Half, float>();
    case at::kBFloat16:
#if defined(__AVX512BF16__)
      if (bf16_products()) {
        return kernel.template operator()<at::BFloat16, at::BFloat16>();
      }
#endif
      return kernel.template operator()<at::BFloat16, float>();
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "ffvt: dtype must be fp16, bf16 or fp32; got ", dtype);
  }
}

constexpr int64_t kTile = kPanel;  // queries of a tile
constexpr int64_t kBlock = 256;    // keys of a block

// Degree of the polynomial of 2^r, for results of this dtype.
template <typename scalar_t>
constexpr int kExpDegree = sizeof(scalar_t) == 4 ? 6 : 4;

constexpr float kLog2E = 1.44269504088896341f;

}  // namespace ffvt
