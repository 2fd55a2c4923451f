// Colour jitter and normalisation of uint8 images.
//
// What: per image three blends in an order of its own, each clamped to [0, 255]: with black (brightness), with the mean
//   grey (contrast), with the grey (saturation). Then x * scale + shift per channel.
// How: one pass over the pixels, all blends in registers. The mean grey is that after the blends before it, so a pass
//   that only adds goes first. The loops are compiled for each of the six orders.
// Memory: a block of pixels per thread, on the stack.
// Limits: uint8 (B, 3, H, W) to fp32, both contiguous.
// Source: torchvision's ColorJitter (adjust_brightness, adjust_contrast, adjust_saturation on fp32).

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>

#include "kernels.h"

namespace ffvt {
namespace {

constexpr int64_t kNumOrders = 6;

void check(const at::Tensor& images, const at::Tensor& jitter, const at::Tensor& scale, const at::Tensor& shift,
           const at::Tensor& out) {
  for (const at::Tensor* t : {&images, &jitter, &scale, &shift, &out}) {
    TORCH_CHECK_VALUE(t->device().is_cpu() && t->is_contiguous(),
                      "augment: tensors must be on the CPU and contiguous; got ", t->device(), ", strides ",
                      t->strides());
    TORCH_CHECK_TYPE(t->scalar_type() == (t == &images ? at::kByte : at::kFloat),
                     "augment: images must be uint8, all else fp32; got ", t->scalar_type());
  }
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == 3 && out.sizes() == images.sizes(),
                    "augment: images and out must be (B, 3, H, W); got ", images.sizes(), " and ", out.sizes());
  TORCH_CHECK_VALUE(scale.numel() == 3 && shift.numel() == 3, "augment: scale and shift must be (3,); got ",
                    scale.sizes(), " and ", shift.sizes());
  if (jitter.numel() > 0) {
    TORCH_CHECK_VALUE(jitter.dim() == 2 && jitter.size(0) == images.size(0) && jitter.size(1) == 4,
                      "augment: jitter must be (B, 4); got ", jitter.sizes(), " for images ", images.sizes());
    for (int64_t image = 0; image < jitter.size(0); ++image) {
      const float order = jitter.const_data_ptr<float>()[4 * image + 3];
      TORCH_CHECK_VALUE(order >= 0 && order < kNumOrders, "augment: orders must be 0 to 5; got ", order);
    }
  }
}

#pragma GCC optimize("finite-math-only", "no-signed-zeros")  // clamp is then two instructions, not four

constexpr float kRed = 0.2989f, kGreen = 0.587f, kBlue = 0.114f;  // ITU-R 601, as torchvision has them
constexpr int64_t kBlock = 512;                                   // pixels that are widened to fp32 at a time

enum Blend { kBrightness, kContrast, kSaturation, kNone };

struct Image {
  const uint8_t* from;  // three planes
  float* to;
  int64_t pixels;
  const float* factors;  // of brightness, contrast, saturation
  const float *scale, *shift;
};

inline float clamp(float x) {  // std::min and std::max would be calls: they have other options
  x = x > 0.0f ? x : 0.0f;
  return x < 255.0f ? x : 255.0f;
}
inline float grey(float r, float g, float b) { return kRed * r + kGreen * g + kBlue * b; }

template <Blend blend>
inline void apply(float& r, float& g, float& b, const float* factors, float mean) {
  if constexpr (blend != kNone) {
    const float factor = factors[blend];
    const float other = blend == kBrightness ? 0.0f : (1.0f - factor) * (blend == kContrast ? mean : grey(r, g, b));
    r = clamp(factor * r + other);
    g = clamp(factor * g + other);
    b = clamp(factor * b + other);
  }
}

// Some pixels as fp32, widened in a loop of their own, so that the loop of the blends is over fp32 alone.
struct Block {
  alignas(64) float r[kBlock], g[kBlock], b[kBlock];
  void read(const Image& p, int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; ++i) r[i] = p.from[start + i];
    for (int64_t i = 0; i < count; ++i) g[i] = p.from[start + i + p.pixels];
    for (int64_t i = 0; i < count; ++i) b[i] = p.from[start + i + 2 * p.pixels];
  }
};

// The mean grey after two blends, which may be none.
template <Blend first, Blend second>
float mean_grey(const Image& p) {
  const std::array<float, 3> factors = {p.factors[0], p.factors[1], p.factors[2]};
  Block block;
  double total = 0;
  for (int64_t start = 0; start < p.pixels; start += kBlock) {
    const int64_t count = std::min(kBlock, p.pixels - start);
    block.read(p, start, count);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      float r = block.r[i], g = block.g[i], b = block.b[i];
      apply<first>(r, g, b, factors.data(), 0);
      apply<second>(r, g, b, factors.data(), 0);
      sum += grey(r, g, b);
    }
    total += sum;
  }
  return static_cast<float>(total / p.pixels);
}

template <Blend first, Blend second, Blend third>
void augment_image(const Image& p) {
  float mean = 0;
  if constexpr (first == kContrast) {
    mean = mean_grey<kNone, kNone>(p);
  } else if constexpr (second == kContrast) {
    mean = mean_grey<first, kNone>(p);
  } else if constexpr (third == kContrast) {
    mean = mean_grey<first, second>(p);
  }
  const std::array<float, 3> factors = {p.factors[0], p.factors[1], p.factors[2]};
  const std::array<float, 3> scale = {p.scale[0], p.scale[1], p.scale[2]};
  const std::array<float, 3> shift = {p.shift[0], p.shift[1], p.shift[2]};
  Block block;
  for (int64_t start = 0; start < p.pixels; start += kBlock) {
    const int64_t count = std::min(kBlock, p.pixels - start);
    block.read(p, start, count);
    float *red = p.to + start, *green = red + p.pixels, *blue = green + p.pixels;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      float r = block.r[i], g = block.g[i], b = block.b[i];
      apply<first>(r, g, b, factors.data(), mean);
      apply<second>(r, g, b, factors.data(), mean);
      apply<third>(r, g, b, factors.data(), mean);
      red[i] = r * scale[0] + shift[0];
      green[i] = g * scale[1] + shift[1];
      blue[i] = b * scale[2] + shift[2];
    }
  }
}

using Function = void (*)(const Image&);
// In the order of Python's itertools.permutations.
constexpr std::array<Function, kNumOrders> kOrders = {
    augment_image<kBrightness, kContrast, kSaturation>, augment_image<kBrightness, kSaturation, kContrast>,
    augment_image<kContrast, kBrightness, kSaturation>, augment_image<kContrast, kSaturation, kBrightness>,
    augment_image<kSaturation, kBrightness, kContrast>, augment_image<kSaturation, kContrast, kBrightness>,
};

}  // namespace

void augment(const at::Tensor& images, const at::Tensor& jitter, const at::Tensor& scale, const at::Tensor& shift,
             const at::Tensor& out) {
  check(images, jitter, scale, shift, out);
  const int64_t count = images.size(0), pixels = images.size(2) * images.size(3);
  const bool jittered = jitter.numel() > 0;
  const auto* from = images.const_data_ptr<uint8_t>();
  const auto* rows = jittered ? jitter.const_data_ptr<float>() : nullptr;
  const auto *scales = scale.const_data_ptr<float>(), *shifts = shift.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<float>();
  constexpr std::array<float, 3> kUnchanged = {1, 1, 1};
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const float* row = jittered ? rows + 4 * image : kUnchanged.data();
      const Image one{from + 3 * pixels * image, to + 3 * pixels * image, pixels, row, scales, shifts};
      const Function function = jittered ? kOrders[static_cast<int>(row[3])] : augment_image<kNone, kNone, kNone>;
      function(one);
    }
  });
}

}  // namespace ffvt
