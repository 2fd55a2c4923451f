// The operators as functions of tensors. What they mean: ffvt/kernels/backends.py. They raise ValueError for a shape, a
// stride or a value that does not hold, TypeError for a dtype, IndexError for an index, NotImplementedError for fp64.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace ffvt {

// q, k, v (B, N, H, D) of fp16, bf16 or fp32, unit last stride -> out (B, N, H, D), index (B, K) int64, score (B, N)
// fp32, lse and row_max (B, H, N) fp32: the largest of a query's products q kT, and the logarithm of the sum of
// exp(scale * (q kT - row_max)). Together they give every probability to fp32's accuracy, however large the products.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> maws_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t num_select, double scale,
    int64_t first_candidate);

// Writes the gradients dq, dk, dv (B, N, H, D), any strides with unit last stride. lse and row_max are those of the
// forward.
void maws_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const at::Tensor& row_max, double scale,
                             const std::tuple<at::Tensor, at::Tensor, at::Tensor>& grads);

std::tuple<at::Tensor, at::Tensor> maws_select_forward(const at::Tensor& q, const at::Tensor& k, int64_t num_select,
                                                       double scale, int64_t first_candidate);

// The picks of the class token's lines of logits, row and column (B, H, N) fp32, which are overwritten.
std::tuple<at::Tensor, at::Tensor> select_from_lines(const at::Tensor& row, const at::Tensor& column,
                                                     int64_t num_select, int64_t first_candidate);

// x (B, N, C), index (B, K) int64 -> (B, K, C).
at::Tensor gather_tokens_forward(const at::Tensor& x, const at::Tensor& index);

// grad (B, K, C), index (B, K) -> (B, N, C); a token picked twice receives the sum.
at::Tensor gather_tokens_backward(const at::Tensor& grad, const at::Tensor& index, int64_t num_tokens);

// images (B, 3, H, W) uint8 -> out (B, 3, H, W) fp32, both contiguous. jitter (B, 4) fp32: factors of brightness,
// contrast and saturation, and the number 0 to 5 of their order; empty for none. scale, shift (3,) fp32.
void augment(const at::Tensor& images, const at::Tensor& jitter, const at::Tensor& scale, const at::Tensor& shift,
             const at::Tensor& out);

// Whether matrix products take bf16 operands on this CPU, in this build.
bool multiplies_bf16();

}  // namespace ffvt
