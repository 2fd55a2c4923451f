// Tensors (B, N, H, D) as the kernels see them, what they must hold, and the choice of the types they compute in.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "pack.h"
#include "products.h"

namespace ffvt {

constexpr int64_t kTile = 64;  // queries of a tile
static_assert(kTile == kPanel, "a tile of queries is one B operand");
constexpr int64_t kBlock = 256;  // most keys of a block

// Keys [begin, end), in as few blocks as kBlock allows. Blocks, and parts for several threads, begin at multiples of
// the step and differ by one step at most.
template <typename operand_t>
struct Keys {
  static constexpr int64_t kStep = kDepthStep<operand_t>;
  int64_t begin, end;
  int64_t blocks() const { return (end - begin + kBlock - 1) / kBlock; }
  Keys block(int64_t number) const { return part(number, blocks()); }
  Keys part(int64_t number, int64_t parts) const { return {edge(number, parts), edge(number + 1, parts)}; }

 private:
  int64_t edge(int64_t number, int64_t parts) const {
    const int64_t steps = (end - begin + kStep - 1) / kStep;
    return std::min(end, begin + number * steps / parts * kStep);
  }
};

// Calls function(begin, end) on ranges of the tasks, one for each thread, whose sizes differ by one at most; the
// shorter ones come first.
template <typename Function>
inline void in_parts(int64_t tasks, const Function& function) {
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, parts, 1,
                   [&](int64_t begin, int64_t end) { function(begin * tasks / parts, end * tasks / parts); });
}

// Degree of the polynomial of 2^r, for results of this dtype.
template <typename scalar_t>
constexpr int kExpDegree = sizeof(scalar_t) == 4 ? 6 : 4;

constexpr float kLog2E = 1.44269504088896341f;

// Refuses what the kernels would misread. The messages users see first are those of ffvt/kernels/checks.py.
inline void check_heads(const char* name, const at::Tensor& t, const at::Tensor& q) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.sizes() == q.sizes(), name, " must be (B, N, H, D) with the shape of q; got ",
                    t.sizes(), ", q is ", q.sizes());
  TORCH_CHECK_VALUE(t.size(1) > 0 && t.size(2) > 0 && t.size(3) > 0, name,
                    " must have no dimension of zero but B; got ", t.sizes());
  TORCH_CHECK_VALUE(t.numel() == 0 || t.size(3) == 1 || t.stride(3) == 1, name, " must have unit last stride; got ",
                    t.strides());
  TORCH_CHECK_TYPE(t.scalar_type() == q.scalar_type(), name, " must have the dtype of q; got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU; got ", t.device());
}

// A statistic of every query, (B, H, N).
inline void check_statistic(const char* name, const at::Tensor& t, const at::Tensor& q) {
  const auto shape = std::array{q.size(0), q.size(2), q.size(1)};
  TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(shape) && t.is_contiguous(), name,
                    " must be (B, H, N), contiguous; got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, " must be fp32; got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU; got ", t.device());
}

inline void check_scale(double scale) {
  TORCH_CHECK_VALUE(static_cast<float>(scale) > 0 && std::isfinite(static_cast<float>(scale) * kLog2E),
                    "scale must be finite and positive in fp32; got scale=", scale);
}

inline void check_selection(const at::Tensor& q, int64_t num_select, double scale, int64_t first_candidate) {
  TORCH_CHECK_VALUE(first_candidate >= 0 && first_candidate < q.size(1), "first_candidate must be in [0, N=", q.size(1),
                    "); got first_candidate=", first_candidate);
  TORCH_CHECK_VALUE(num_select >= 1 && num_select <= q.size(1) - first_candidate,
                    "num_select must be in [1, N - first_candidate = ", q.size(1) - first_candidate,
                    "]; got num_select=", num_select);
  check_scale(scale);
}

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

// Calls kernel.template operator()<scalar_t, operand_t>(): the dtype of the tensors, and that of the products'
// operands, which is fp32 wherever there are no instructions for the other.
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

// Runs `per_head` tasks of every head: run(worker, operands, head, task), on the operands that pack(operands, head,
// first tile, end tile) has written. Where there are fewer heads than threads they are shared; else a thread packs
// those of the heads that it comes to.
template <typename operand_t, typename Worker, typename Operands, typename Sizes, typename Pack, typename Run>
inline void run_on_heads(int64_t heads, int64_t per_head, const Sizes& sizes, const Pack& pack, const Run& run) {
  const int64_t tiles = sizes.tiles();
  std::vector<Operands> shared;
  if (heads < at::get_num_threads()) {
    for (int64_t head = 0; head < heads; ++head) {
      shared.emplace_back(sizes);
    }
    in_parts(heads * tiles, [&](int64_t begin, int64_t end) {
      const MatmulScope<operand_t> scope;
      for (int64_t task = begin; task < end; ++task) {
        pack(shared[task / tiles], task / tiles, task % tiles, task % tiles + 1);
      }
    });
  }
  in_parts(heads * per_head, [&](int64_t begin, int64_t end) {
    const MatmulScope<operand_t> scope;
    Worker worker(sizes);
    std::optional<Operands> own;
    if (shared.empty()) {
      own.emplace(sizes);
    }
    for (int64_t task = begin, packed = -1; task < end; ++task) {
      const int64_t head = task / per_head;
      if (own && head != packed) {
        pack(*own, head, 0, tiles);
        packed = head;
      }
      run(worker, own ? *own : shared[head], head, task % per_head);
    }
  });
}

}  // namespace ffvt
