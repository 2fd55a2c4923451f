// Dropout that keeps no mask: whether an element stays is a function of a seed and of the element's place, so that the
// backward, which is the same function of the gradient, makes the mask again.
//
// What: out_i = x_i / (1 - p) where hash(seed, i) >= p, else x_i times zero; hash is uniform in [0, 1) in steps of
// 2^-32. How: 32-bit integers of a chunk, hashed twice with a half of the seed each, in a loop that the compiler makes
// vectors
//   of; they become factors, which multiply the chunk in fp32.
// Memory: two chunks on the stack.
// Parallel: over chunks; each element knows its place, so the result does not depend on the number of threads.
// Limits: fp16, bf16, fp32; contiguous; 2^64 elements.
// Source: Srivastava et al., JMLR 2014; the hash is lowbias32 of C. Wellons' hash prospector.

#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "heads.h"
#include "kernels.h"

namespace ffvt {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kGrain = 64;  // chunks of a task, at least

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

// The factors of the elements [first, first + kChunk), zero or `scale`.
void write_factors(uint64_t seed, int64_t first, uint32_t threshold, float scale, float* factors) {
  const uint32_t low = static_cast<uint32_t>(seed) + mix(static_cast<uint32_t>(first >> 32)),
                 high = static_cast<uint32_t>(seed >> 32), start = static_cast<uint32_t>(first);
  for (uint32_t i = 0; i < kChunk; ++i) {
    factors[i] = mix(mix((start + i) ^ low) + high) >= threshold ? scale : 0.0f;
  }
}

}  // namespace

at::Tensor dropout(const at::Tensor& x, const at::Tensor& seed, double p) {
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "p must be in [0, 1); got p=", p);
  TORCH_CHECK_VALUE(x.is_contiguous() && x.device().is_cpu(), "x must be contiguous, on the CPU");
  TORCH_CHECK_VALUE(seed.dim() == 0 && seed.scalar_type() == at::kLong && seed.device().is_cpu(),
                    "seed must be one int64 on the CPU; got ", seed.sizes(), ", ", seed.scalar_type());
  at::Tensor out = at::empty_like(x);
  const auto number = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const auto threshold = static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0));
  const auto scale = static_cast<float>(1 / (1 - p));
  const int64_t count = x.numel();
  with_types(x.scalar_type(), [&]<typename scalar_t, typename operand_t>() {
    const auto* from = x.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, (count + kChunk - 1) / kChunk, kGrain, [&](int64_t begin, int64_t end) {
      alignas(64) float values[kChunk], factors[kChunk];
      for (int64_t first = begin * kChunk; first < std::min(count, end * kChunk); first += kChunk) {
        const int64_t chunk = std::min(kChunk, count - first);
        convert(from + first, values, chunk);
        write_factors(number, first, threshold, scale, factors);
        for (int64_t i = 0; i < chunk; ++i) {
          values[i] *= factors[i];
        }
        convert_back(values, to + first, chunk);
      }
    });
  });
  return out;
}

}  // namespace ffvt
