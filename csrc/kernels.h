// The operators as functions of tensors. What they mean: ffvt/kernels/backends.py. They raise ValueError for a shape, a
// stride or a value that does not hold, TypeError for a dtype, IndexError for an index, NotImplementedError for fp64.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
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

// q, k, v as above -> out, row and column (B, H, N) fp32, the probabilities of the class token's row and column of
// logits, each of which sums to one, lse and row_max.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_stats_forward(const at::Tensor& q,
                                                                                               const at::Tensor& k,
                                                                                               const at::Tensor& v,
                                                                                               double scale);

// The same kernel without the two lines, to measure what they cost -> out, lse, row_max.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const at::Tensor& k,
                                                                 const at::Tensor& v, double scale);

// weights (B, H, N) fp32, q, k as above, lse (B, H, N) fp32, the logarithm of the sum of exp(scale q kT), or none: then
// it is computed -> (B, H, N) fp32, for every key the sum over the queries of weight times probability.
at::Tensor attention_vecmat_forward(const at::Tensor& weights, const at::Tensor& q, const at::Tensor& k,
                                    const std::optional<at::Tensor>& lse, double scale);

// The products q kT of attention_vecmat_forward, each tile dropped when it is made, to measure what is around them.
void attention_products(const at::Tensor& q, const at::Tensor& k);

std::tuple<at::Tensor, at::Tensor> maws_select_forward(const at::Tensor& q, const at::Tensor& k, int64_t num_select,
                                                       double scale, int64_t first_candidate);

// The class token's lines of logits, row and column (B, H, N) fp32, become their softmaxes, in place.
void softmax_lines(const at::Tensor& row, const at::Tensor& column);

// The picks of the class token's lines of logits, row and column (B, H, N) fp32, which are overwritten.
std::tuple<at::Tensor, at::Tensor> select_from_lines(const at::Tensor& row, const at::Tensor& column,
                                                     int64_t num_select, int64_t first_candidate);

// x (B, N, C), index (B, K) int64 -> (B, K, C).
at::Tensor gather_tokens_forward(const at::Tensor& x, const at::Tensor& index);

// grad (B, K, C), index (B, K) -> (B, N, C); a token picked twice receives the sum.
at::Tensor gather_tokens_backward(const at::Tensor& grad, const at::Tensor& index, int64_t num_tokens);

// x, contiguous, with each element zeroed with probability p, as the seed, one int64, says; the others over 1 - p.
at::Tensor dropout(const at::Tensor& x, const at::Tensor& seed, double p);

// images (B, 3, H, W) uint8 -> out (B, 3, H, W) fp32, both contiguous. jitter (B, 4) fp32: factors of brightness,
// contrast and saturation, and the number 0 to 5 of their order; empty for none. scale, shift (3,) fp32.
void augment(const at::Tensor& images, const at::Tensor& jitter, const at::Tensor& scale, const at::Tensor& shift,
             const at::Tensor& out);

}  // namespace ffvt
