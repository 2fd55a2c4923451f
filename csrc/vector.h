// Vectors of fp32 and what the kernels do with them, by at::vec for the instructions that this file is compiled for.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ffvt {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kWidth = Vec::size();

// Coefficients of 2^r on [-1/2, 1/2], lowest first: minimax in the relative error, which is 2.6e-6 and 1.9e-9.
template <int degree>
constexpr std::array<float, degree + 1> kExp2Coefficients = {};
template <>
inline constexpr std::array<float, 5> kExp2Coefficients<4> = {0.9999992614f, 0.6931218147f, 0.2402474483f,
                                                              0.05591786032f, 0.009570101908f};
template <>
inline constexpr std::array<float, 7> kExp2Coefficients<6> = {
    1.000000001f, 0.6931472057f, 0.2402264689f, 0.05550328777f, 0.009618488957f, 0.001339993122f, 0.00015345812f};

// 2^y for y <= 0, -inf included; zero for y < -127, and with AVX-512 where that is no normal number. NaN stays NaN.
template <int degree>
inline Vec exp2_of_negative(Vec y) {
  constexpr auto& coefficients = kExp2Coefficients<degree>;
#if !defined(CPU_CAPABILITY_AVX512)
  y = at::vec::clamp_min(y, Vec(-127.0f));
#endif
  const Vec whole = y.round(), r = y - whole;
  Vec power = Vec(coefficients[degree]);
  for (int i = degree - 1; i >= 0; --i) {
    power = at::vec::fmadd(power, r, Vec(coefficients[i]));
  }
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 normal = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return Vec(_mm512_maskz_scalef_ps(normal, power, whole));
#else
  using Int = at::vec::Vectorized<int32_t>;
  const Int exponent = (at::vec::convert_to_int_of_same_size<float>(whole) + Int(127)) << Int(23);
  return power * at::vec::cast<float>(exponent);
#endif
}

// 2^y for any y but +inf; infinite where it overflows.
template <int degree>
inline Vec exp2_of(Vec y) {
#if !defined(CPU_CAPABILITY_AVX512)
  y = at::vec::clamp_max(y, Vec(128.0f));
#endif
  return exp2_of_negative<degree>(y);
}

#if defined(__AVX512BF16__)
inline void store_bf16(Vec v, void* to) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(v));
}

// Two rows of fp32 as bf16, in pairs: even[0], odd[0], even[1], ...
inline void store_pairs(Vec even, Vec odd, void* to) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // even below, odd above
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}
#endif

inline float sum_of(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
}

template <typename scalar_t>
inline Vec load_wide(const scalar_t* from) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return Vec::loadu(from);
  } else {
    Vec wide;
    at::vec::load_to_float<scalar_t>(from, wide);
    return wide;
  }
}

// fp32 <-> scalar_t, element by element.
template <typename scalar_t>
inline void convert(const scalar_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    load_wide(from + i).store(to + i);
  }
  for (; i < count; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

template <typename scalar_t>
inline void convert_back(const float* from, scalar_t* to, int64_t count) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
    int64_t i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
      at::vec::convert_from_float<scalar_t>(Vec::loadu(from + i), Vec::loadu(from + i + kWidth)).store(to + i);
    }
    for (; i < count; ++i) {
      to[i] = static_cast<scalar_t>(from[i]);
    }
  }
}

template <typename scalar_a, typename scalar_b>
inline float dot(const scalar_a* a, const scalar_b* b, int64_t count) {
  Vec total(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    total = at::vec::fmadd(load_wide(a + i), load_wide(b + i), total);
  }
  float sum = sum_of(total);
  for (; i < count; ++i) {
    sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  }
  return sum;
}

}  // namespace ffvt
