// Attention with the class token's row and column of logits, and what is made of them: a selection, or statistics.
//
// What: out = softmax(scale q kT) v and lse, with index and score for every image, or with both lines' probabilities.
// How: FlashAttention's forward, on transposed tiles: logits of a block of keys (down) by 64 queries (across), so that
//   maximum, sum and rescaling go lane by lane without a reduction, the keys stay rows, and each tile and block costs
//   two large products. Row and column are what a tile holds of key 0 and query 0.
// Memory: per thread, or per head where there are fewer, one head of k and of vT in the type of the products; per
//   thread one tile; two lines (B, H, N) fp32.
// Parallel: over (image, head, tile of queries), in one order.
// Limits: fp16, bf16, fp32; unit last stride.
// Source: FFVT section 3.2; FlashAttention-2 (Dao, arXiv 2307.08691).

#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "heads.h"
#include "kernels.h"

namespace ffvt {
namespace {

struct Sizes {
  int64_t tokens, head_dim;
  float scale;
  int64_t tiles() const { return (tokens + kTile - 1) / kTile; }
};

// Where a head's results go. row and column may be null.
template <typename scalar_t>
struct Results {
  Rows<scalar_t> out;
  float *lse, *row_max, *row, *column;
};

// A head's keys, and its values transposed, as the products read them.
template <typename operand_t>
class Operands {
 public:
  explicit Operands(Sizes sizes)
      : n_(sizes.tokens),
        d_(sizes.head_dim),
        depth_(depth_of<operand_t>(d_)),
        ld_values_(stride_of(n_)),
        keys_(round_up(n_, kRowStep) * depth_),
        values_(depth_ * ld_values_) {}

  // Writes the tiles [begin, end) of tokens.
  template <typename scalar_t>
  void pack_tiles(Rows<const scalar_t> k, Rows<const scalar_t> v, int64_t begin, int64_t end) {
    const Buffer<operand_t> rows(kTile * depth_);
    const Buffer<float> scratch(kPair<operand_t> == 2 ? kTile * depth_ / 2 : 0);
    for (int64_t first = begin * kTile; first < std::min(n_, end * kTile); first += kTile) {
      const int64_t count = std::min(kTile, n_ - first);
      copy_rows(k.from(first), count, d_, keys_ + first * depth_, depth_, round_up(count, kRowStep));
      copy_rows(v.from(first), count, d_, static_cast<operand_t*>(rows), depth_, count);
      transpose<operand_t>(rows, depth_, count, depth_, values_ + first, ld_values_, scratch);
      if (first + count == n_) {
        clear_columns<operand_t>(values_, ld_values_, depth_, n_);
      }
    }
  }

  const operand_t* key(int64_t token) const { return keys_ + token * depth_; }
  const operand_t* value(int64_t token) const { return values_ + token; }
  int64_t ld_values() const { return ld_values_; }

 private:
  const int64_t n_, d_, depth_, ld_values_;
  Buffer<operand_t> keys_, values_;
};

template <typename scalar_t, typename operand_t>
class Forward {
 public:
  explicit Forward(Sizes sizes)
      : n_(sizes.tokens),
        d_(sizes.head_dim),
        scale_(sizes.scale),
        depth_(depth_of<operand_t>(d_)),
        query_rows_(kTile * depth_),
        queries_(kTile * depth_),
        logits_(round_up(std::min(n_, kBlock), 32) * kTile),
        sums_(depth_ * kTile),
        transposed_(kTile * round_up(depth_, 16)) {}

  void tile(const Operands<operand_t>& head, Rows<const scalar_t> q, int64_t first, const Results<scalar_t>& results) {
    const int64_t rows = std::min(kTile, n_ - first);
    if (rows > kTile / 2) {
      tile_of<kTile>(head, q, first, rows, results);
    } else {
      tile_of<kTile / 2>(head, q, first, rows, results);
    }
  }

 private:
  template <int64_t lanes>
  void tile_of(const Operands<operand_t>& head, Rows<const scalar_t> q, int64_t first, int64_t rows,
               const Results<scalar_t>& results) {
    copy_rows(q.from(first), rows, d_, static_cast<operand_t*>(query_rows_), depth_, lanes);
    pack_transposed<operand_t>(query_rows_, depth_, lanes, depth_, queries_);
    alignas(64) float row_max[lanes], sum[lanes];
    std::fill_n(row_max, lanes, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, lanes, 0.0f);
    const Keys<operand_t> keys{0, n_};
    for (int64_t number = 0; number < keys.blocks(); ++number) {
      const auto [key, end] = keys.block(number);
      const int64_t block = end - key;
      matmul<operand_t>(round_up(block, kRowStep), lanes, depth_, head.key(key), depth_, queries_, kPanel, logits_,
                        kTile, false);
      if (first == 0 && results.row) {
        for (int64_t i = 0; i < block; ++i) {
          results.row[key + i] = scale_ * logits_[i * kTile];
        }
      }
      if (key == 0 && results.column) {
        for (int64_t i = 0; i < rows; ++i) {
          results.column[first + i] = scale_ * logits_[i];
        }
      }
      softmax<lanes>(block, key > 0, row_max, sum);
      matmul<operand_t>(d_, lanes, round_up(block, kDepthStep<operand_t>), head.value(key), head.ld_values(), powers_,
                        kPanel, sums_, kTile, key > 0);
    }
    write<lanes>(first, rows, row_max, sum, results);
  }

  // Products q k of one block -> softmax's powers, in place, as a B operand of operand_t. Of the products so far: their
  // maximum, the sum of the powers, and sums_, which are rescaled.
  template <int64_t lanes>
  void softmax(int64_t block, bool rescale, float* row_max, float* sum) {
    constexpr int kVectors = lanes / kWidth, kDegree = kExpDegree<scalar_t>;
    constexpr float kLargest = std::numeric_limits<float>::max();
    const Vec factor(scale_ * kLog2E);
    Vec top[kVectors], total[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      top[v] = Vec::loadu(row_max + v * kWidth);
    }
    for (int64_t i = 0; i < block; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        top[v] = at::vec::clamp_min(Vec::loadu(logits_ + i * kTile + v * kWidth), top[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Vec before = Vec::loadu(row_max + v * kWidth);
      top[v].store(row_max + v * kWidth);
      top[v] = at::vec::clamp(top[v], Vec(-kLargest), Vec(kLargest));  // inf minus inf is NaN
      total[v] = Vec::loadu(sum + v * kWidth);
      if (rescale) {
        const Vec shrink = exp2_of_negative<kDegree>(factor * (before - top[v]));
        total[v] = total[v] * shrink;
        for (int64_t j = 0; j < d_; ++j) {
          float* place = sums_ + j * kTile + v * kWidth;
          (Vec::loadu(place) * shrink).store(place);
        }
      }
    }
    powers<lanes>(block, factor, top, total);
    for (int v = 0; v < kVectors; ++v) {
      total[v].store(sum + v * kWidth);
    }
    clear_rows(powers_, kPanel, round_up(block, kPair<operand_t>), round_up(block, kDepthStep<operand_t>));
  }

  template <int64_t lanes>
  void powers(int64_t block, Vec factor, const Vec* top, Vec* total) {
    constexpr int kVectors = lanes / kWidth, kDegree = kExpDegree<scalar_t>;
    if constexpr (kPair<operand_t> == 1) {
      for (int64_t i = 0; i < block; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          float* place = logits_ + i * kTile + v * kWidth;
          const Vec power = exp2_of_negative<kDegree>(factor * (Vec::loadu(place) - top[v]));
          total[v] = total[v] + power;
          power.store(place);
        }
      }
    } else {
#if defined(__AVX512BF16__)
      for (int64_t i = 0; i < block; i += 2) {
        for (int v = 0; v < kVectors; ++v) {
          const float* place = logits_ + i * kTile + v * kWidth;
          const Vec even = exp2_of_negative<kDegree>(factor * (Vec::loadu(place) - top[v]));
          Vec odd(0.0f);
          if (i + 1 < block) {
            odd = exp2_of_negative<kDegree>(factor * (Vec::loadu(place + kTile) - top[v]));
          }
          total[v] = total[v] + even + odd;
          store_pairs(even, odd, powers_ + i * kPanel + 2 * v * kWidth);
        }
      }
#endif
    }
  }

  // A row without a finite maximum is NaN: inf less inf is.
  template <int64_t lanes>
  void write(int64_t first, int64_t rows, const float* row_max, const float* sum, const Results<scalar_t>& results) {
    for (int v = 0; v < lanes / kWidth; ++v) {
      const Vec top = Vec::loadu(row_max + v * kWidth);
      const Vec inverse = Vec(1.0f) / Vec::loadu(sum + v * kWidth) + (top - top);
      for (int64_t j = 0; j < d_; ++j) {
        float* place = sums_ + j * kTile + v * kWidth;
        (Vec::loadu(place) * inverse).store(place);
      }
    }
    const int64_t ld = round_up(depth_, 16);
    transpose_units(sums_, kTile, transposed_, ld, d_, lanes);
    for (int64_t i = 0; i < rows; ++i) {
      convert_back(transposed_ + i * ld, results.out[first + i], d_);
      results.row_max[first + i] = row_max[i];
      results.lse[first + i] = std::log(sum[i]) + (row_max[i] - row_max[i]);
    }
  }

  const int64_t n_, d_;
  const float scale_;
  const int64_t depth_;
  Buffer<operand_t> query_rows_, queries_;
  Buffer<float> logits_, sums_, transposed_;
  operand_t* const powers_ = reinterpret_cast<operand_t*>(static_cast<float*>(logits_));
};

// row and column are logits, undefined where they are not wanted.
struct Attention {
  at::Tensor out, lse, row_max, row, column;
};

Attention attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, bool with_lines) {
  check_heads("q", q, q);
  check_heads("k", k, q);
  check_heads("v", v, q);
  check_scale(scale);
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const auto statistic = [&] { return at::empty({batch, heads, tokens}, q.options().dtype(at::kFloat)); };
  Attention made{at::empty({batch, tokens, heads, head_dim}, q.options()), statistic(), statistic(), {}, {}};
  if (with_lines) {
    made.row = statistic();
    made.column = statistic();
  }
  with_types(q.scalar_type(), [&]<typename scalar_t, typename operand_t>() {
    const auto queries = heads_of<const scalar_t>(q), keys = heads_of<const scalar_t>(k),
               values = heads_of<const scalar_t>(v);
    const auto outs = heads_of<scalar_t>(made.out);
    const auto line_of = [&](const at::Tensor& t, int64_t head) {
      return t.defined() ? t.mutable_data_ptr<float>() + head * tokens : nullptr;
    };
    const Sizes sizes{tokens, head_dim, static_cast<float>(scale)};
    run_on_heads<operand_t, Forward<scalar_t, operand_t>, Operands<operand_t>>(
        batch * heads, sizes.tiles(), sizes,
        [&](Operands<operand_t>& operands, int64_t head, int64_t begin, int64_t end) {
          operands.pack_tiles(keys.head(head), values.head(head), begin, end);
        },
        [&](Forward<scalar_t, operand_t>& forward, const Operands<operand_t>& operands, int64_t head, int64_t tile) {
          forward.tile(operands, queries.head(head), tile * kTile,
                       {outs.head(head), line_of(made.lse, head), line_of(made.row_max, head), line_of(made.row, head),
                        line_of(made.column, head)});
        });
  });
  return made;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const at::Tensor& k,
                                                                 const at::Tensor& v, double scale) {
  const auto [out, lse, row_max, row, column] = attend(q, k, v, scale, /*with_lines=*/false);
  return {out, lse, row_max};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_stats_forward(const at::Tensor& q,
                                                                                               const at::Tensor& k,
                                                                                               const at::Tensor& v,
                                                                                               double scale) {
  const auto [out, lse, row_max, row, column] = attend(q, k, v, scale, /*with_lines=*/true);
  softmax_lines(row, column);
  return {out, row, column, lse, row_max};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> maws_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t num_select, double scale,
    int64_t first_candidate) {
  check_heads("q", q, q);
  check_selection(q, num_select, scale, first_candidate);
  const auto [out, lse, row_max, row, column] = attend(q, k, v, scale, /*with_lines=*/true);
  const auto [index, score] = select_from_lines(row, column, num_select, first_candidate);
  return {out, index, score, lse, row_max};
}

}  // namespace ffvt
