// Copies of heads in the layouts that `matmul` reads. All pad with zeros.

#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "matmul.h"
#include "vector.h"

namespace ffvt {

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Scratch memory, 64-byte aligned. Debug builds fill it with NaN, so that what is read unwritten shows.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(c10::GetCPUAllocator()->allocate(count * sizeof(T))) {
#ifndef NDEBUG
    if (count > 0) {
      std::memset(memory_.get(), 0xff, count * sizeof(T));
    }
#endif
  }
  operator T*() const { return static_cast<T*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

// One head of a (B, N, H, D) tensor: D contiguous elements a row.
template <typename scalar_t>
struct Rows {
  scalar_t* data;
  int64_t stride;
  scalar_t* operator[](int64_t row) const { return data + row * stride; }
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// A tensor (B, N, H, D) with unit last stride.
template <typename scalar_t>
struct Heads {
  scalar_t* data;
  int64_t batch_stride, token_stride, head_stride, heads;
  // Head number `pair` of B * H.
  Rows<scalar_t> head(int64_t pair) const {
    return {data + pair / heads * batch_stride + pair % heads * head_stride, token_stride};
  }
};

// rows x columns -> padded_rows x ld, row-major.
template <typename scalar_t, typename operand_t>
inline void copy_rows(Rows<const scalar_t> from, int64_t rows, int64_t columns, operand_t* to, int64_t ld,
                      int64_t padded_rows) {
  for (int64_t i = 0; i < rows; ++i, to += ld) {
    if constexpr (std::is_same_v<scalar_t, operand_t>) {
      std::memcpy(to, from[i], columns * sizeof(operand_t));
    } else {
      convert(from[i], to, columns);
    }
    if (ld > columns) {
      std::memset(static_cast<void*>(to + columns), 0, (ld - columns) * sizeof(operand_t));
    }
  }
  std::memset(static_cast<void*>(to), 0, (padded_rows - rows) * ld * sizeof(operand_t));
}

// rows x columns -> columns x rows, of 32-bit units.
inline void transpose_units(const float* from, int64_t ld_from, float* to, int64_t ld_to, int64_t rows,
                            int64_t columns) {
  constexpr int64_t kSide = 16;
  for (int64_t i = 0; i < rows; i += kSide) {
    for (int64_t j = 0; j < columns; j += kSide) {
      const int64_t height = std::min(kSide, rows - i), width = std::min(kSide, columns - j);
      if (height == kSide && width == kSide) {
        at::vec::transpose_mxn<float, kSide, kSide>(from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to);
        continue;
      }
      for (int64_t y = i; y < i + height; ++y) {
        for (int64_t x = j; x < j + width; ++x) {
          std::memcpy(to + x * ld_to + y, from + y * ld_from + x, sizeof(float));
        }
      }
    }
  }
}

// rows x columns, row-major with `ld` -> its transpose as a B operand, columns x kPanel.
template <typename operand_t>
inline void pack_transposed(const operand_t* from, int64_t ld, int64_t rows, int64_t columns, operand_t* to) {
  transpose_units(reinterpret_cast<const float*>(from), ld / kPair<operand_t>, reinterpret_cast<float*>(to), kPanel,
                  rows, columns / kPair<operand_t>);
}

// rows x columns, row-major with `ld`, as B operands of up to kPanel columns each, one behind the other. Both are
// padded: rows to an even number, columns to a multiple of 16.
template <typename operand_t>
inline void pack(const operand_t* from, int64_t ld, int64_t rows, int64_t columns, operand_t* to) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t width = std::min(kPanel, columns - first);
    for (int64_t i = 0; i < rows; i += kPair<operand_t>, to += width * kPair<operand_t>) {
      const operand_t* row = from + i * ld + first;
      if constexpr (kPair<operand_t> == 1) {
        std::memcpy(to, row, width * sizeof(operand_t));
      } else {
#if defined(CPU_CAPABILITY_AVX512)
        for (int64_t j = 0; j < width; j += 16) {
          const auto even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + j)));
          const auto odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + ld + j)));
          _mm512_storeu_si512(to + 2 * j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
#else
        for (int64_t j = 0; j < width; ++j) {
          to[2 * j] = row[j];
          to[2 * j + 1] = row[ld + j];
        }
#endif
      }
    }
  }
}

// rows x columns, row-major with `ld` -> columns x rows, row-major with `ld_to`: an A operand. `scratch` holds
// columns / 2 x rows elements of 32 bits, for 16-bit operand_t.
template <typename operand_t>
inline void transpose(const operand_t* from, int64_t ld, int64_t rows, int64_t columns, operand_t* to, int64_t ld_to,
                      float* scratch) {
  if constexpr (kPair<operand_t> == 1) {
    transpose_units(from, ld, to, ld_to, rows, columns);
  } else {
    transpose_units(reinterpret_cast<const float*>(from), ld / 2, scratch, rows, rows, columns / 2);
    for (int64_t j = 0; j < columns; j += 2) {
      const operand_t* units = reinterpret_cast<const operand_t*>(scratch + j / 2 * rows);
      operand_t *even = to + j * ld_to, *odd = even + ld_to;
      int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
      for (; i + 16 <= rows; i += 16) {
        const auto both = _mm512_loadu_si512(units + 2 * i);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + i), _mm512_cvtepi32_epi16(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
      }
#endif
      for (; i < rows; ++i) {
        even[i] = units[2 * i];
        odd[i] = units[2 * i + 1];
      }
    }
  }
}

// Zeros in the columns from `first` on of rows x ld.
template <typename operand_t>
inline void clear_columns(operand_t* to, int64_t ld, int64_t rows, int64_t first) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memset(static_cast<void*>(to + i * ld + first), 0, (ld - first) * sizeof(operand_t));
  }
}

// Zeros in the rows [first, end) of a matrix whose rows have ld elements.
template <typename operand_t>
inline void clear_rows(operand_t* to, int64_t ld, int64_t first, int64_t end) {
  std::memset(static_cast<void*>(to + first * ld), 0, (end - first) * ld * sizeof(operand_t));
}

// The depth of a product over a head's dimensions: padded for the pairs of 16-bit operand_t, and for AMX.
template <typename operand_t>
inline int64_t depth_of(int64_t head_dim) {
  return kPair<operand_t> == 2 ? std::max<int64_t>(32, round_up(head_dim, 2)) : head_dim;
}

// A row stride for the transpose of a head's rows, so that its rows do not all fall into the same few sets of a cache.
inline int64_t stride_of(int64_t tokens) {
  const int64_t columns = round_up(tokens, 32);
  return columns % 256 == 0 ? columns + 32 : columns;
}

}  // namespace ffvt
