// Picks tokens, and gives their gradient back.
//
// What: row index[b, i] of image b; backward, (B, N, C) with the gradients at the picked rows and zero elsewhere.
// How: copies of rows. The backward writes every row once, the sums of repeated picks too, in the order of the picks.
// Memory: backward, a list of the picks of every token of the images at work, per thread.
// Limits: fp16, bf16, fp32.
// Source: FFVT section 3.2.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "heads.h"
#include "kernels.h"

namespace ffvt {
namespace {

constexpr int64_t kRows = 64;  // rows of one task of the backward

// The picks of every token of one image, in order: first[token], then next[pick], -1 at the end.
struct Picks {
  std::vector<int64_t> first, next;
  void read(const int64_t* index, int64_t stride, int64_t count, int64_t tokens) {
    first.assign(tokens, -1);
    next.assign(count, -1);
    for (int64_t pick = count - 1; pick >= 0; --pick) {
      const int64_t token = index[pick * stride];
      next[pick] = first[token];
      first[token] = pick;
    }
  }
};

void check_gather(const char* name, const at::Tensor& x, const at::Tensor& index, int64_t tokens) {
  TORCH_CHECK_VALUE(x.dim() == 3 && index.dim() == 2 && x.size(0) == index.size(0), name,
                    " must be (B, ., C) and index (B, K); got ", x.sizes(), " and ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index must be int64; got ", index.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu() && index.device().is_cpu(), name, " and index must be on the CPU; got ",
                    x.device(), " and ", index.device());
  const auto* places = index.const_data_ptr<int64_t>();
  for (int64_t image = 0; image < index.size(0); ++image) {
    for (int64_t pick = 0; pick < index.size(1); ++pick) {
      const int64_t token = places[image * index.stride(0) + pick * index.stride(1)];
      TORCH_CHECK_INDEX(token >= 0 && token < tokens, "gather_tokens: index must be in [0, N=", tokens,
                        "); got index=", token);
    }
  }
}

}  // namespace

at::Tensor gather_tokens_forward(const at::Tensor& x, const at::Tensor& index) {
  check_gather("x", x, index, x.dim() == 3 ? x.size(1) : 0);
  const int64_t batch = x.size(0), channels = x.size(2), picks = index.size(1);
  at::Tensor tokens = at::empty({batch, picks, channels}, x.options());
  with_types(x.scalar_type(), [&]<typename scalar_t, typename>() {
    const auto* from = x.const_data_ptr<scalar_t>();
    const auto* places = index.const_data_ptr<int64_t>();
    auto* to = tokens.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch * picks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / picks, pick = task % picks;
        const int64_t token = places[image * index.stride(0) + pick * index.stride(1)];
        const scalar_t* row = from + image * x.stride(0) + token * x.stride(1);
        if (x.stride(2) == 1) {
          std::memcpy(to + task * channels, row, channels * sizeof(scalar_t));
        } else {
          for (int64_t i = 0; i < channels; ++i) {
            to[task * channels + i] = row[i * x.stride(2)];
          }
        }
      }
    });
  });
  return tokens;
}

at::Tensor gather_tokens_backward(const at::Tensor& grad, const at::Tensor& index, int64_t num_tokens) {
  check_gather("grad", grad, index, num_tokens);
  TORCH_CHECK_VALUE(grad.size(1) == index.size(1), "grad must have a row for each pick; got ", grad.sizes(),
                    " for index ", index.sizes());
  const at::Tensor rows = grad.contiguous();
  const int64_t batch = rows.size(0), count = rows.size(1), channels = rows.size(2);
  at::Tensor result = at::empty({batch, num_tokens, channels}, rows.options());
  with_types(rows.scalar_type(), [&]<typename scalar_t, typename>() {
    const auto* from = rows.const_data_ptr<scalar_t>();
    const auto* places = index.const_data_ptr<int64_t>();
    auto* to = result.mutable_data_ptr<scalar_t>();
    const int64_t parts = (num_tokens + kRows - 1) / kRows;
    at::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
      Picks picks;
      std::vector<float> sums(channels);
      for (int64_t task = begin, read = -1; task < end; ++task) {
        const int64_t image = task / parts, start = task % parts * kRows;
        if (image != read) {
          picks.read(places + image * index.stride(0), index.stride(1), count, num_tokens);
          read = image;
        }
        for (int64_t token = start; token < std::min(start + kRows, num_tokens); ++token) {
          scalar_t* row = to + (image * num_tokens + token) * channels;
          int64_t pick = picks.first[token];
          if (pick < 0) {
            std::memset(static_cast<void*>(row), 0, channels * sizeof(scalar_t));
          } else if (picks.next[pick] < 0) {
            std::memcpy(row, from + (image * count + pick) * channels, channels * sizeof(scalar_t));
          } else {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (; pick >= 0; pick = picks.next[pick]) {
              for (int64_t i = 0; i < channels; ++i) {
                sums[i] += static_cast<float>(from[(image * count + pick) * channels + i]);
              }
            }
            std::copy(sums.begin(), sums.end(), row);
          }
        }
      }
    });
  });
  return result;
}

}  // namespace ffvt
