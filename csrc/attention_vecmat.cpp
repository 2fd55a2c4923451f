// A row vector of weights times the softmax map of every head, without the map.
//
// What: y_j = sum over i of w_i exp(scale q_i k_j - lse_i).
// How: logits of a block of queries (down) by 64 keys (across), so that y stands in vectors and what belongs to a query
//   is one scalar for all lanes; a tile is weighed as soon as it is made. Where lse is not given, the tiles of all keys
//   of a block are made first and stay in L2: they give lse, and are then weighed, so that products are made once.
// Memory: per thread, or per head where there are fewer, one head of k in the type of the products; per thread the
//   tiles of one block; per head up to kGroups lines of N.
// Parallel: over (image, head, group of queries). The split and the order in which the groups are added depend on N
//   alone, so the result does not depend on the number of threads.
// Limits: as maws_attention.
// Source: the part selection of TransFG (He et al., arXiv 2103.07976), which multiplies whole maps instead.

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "heads.h"
#include "kernels.h"

namespace ffvt {
namespace {

constexpr int64_t kRows = 128;           // most queries of a block
constexpr int64_t kGroups = 8;           // most groups of a head
constexpr int64_t kGroupTiles = 4;       // tiles of queries of a group, while there are no more groups than that
constexpr int64_t kLogits = 128 * 1024;  // elements of a block's logits that leave L2 room for the keys

struct Sizes {
  int64_t tokens, head_dim;
  float scale;
  bool whole_rows;  // the logits of all keys of a block are kept, as they must be where lse is not given
  int64_t width() const { return round_up(tokens, 16); }  // of a line of y
  int64_t tiles() const { return (tokens + kTile - 1) / kTile; }
  int64_t groups() const { return std::min(kGroups, (tiles() + kGroupTiles - 1) / kGroupTiles); }
};

// A head's keys, transposed, in panels of kPanel.
template <typename operand_t>
class Operands {
 public:
  explicit Operands(Sizes sizes)
      : n_(sizes.tokens), d_(sizes.head_dim), depth_(depth_of<operand_t>(d_)), keys_(sizes.tiles() * kPanel * depth_) {}

  // Writes the tiles [begin, end) of tokens.
  template <typename scalar_t>
  void pack_tiles(Rows<const scalar_t> k, int64_t begin, int64_t end) {
    const Buffer<operand_t> key_rows(kPanel * depth_);
    for (int64_t key = begin * kPanel; key < std::min(n_, end * kPanel); key += kPanel) {
      const int64_t rows = std::min(kPanel, n_ - key), lanes = round_up(rows, 16);
      copy_rows(k.from(key), rows, d_, static_cast<operand_t*>(key_rows), depth_, lanes);
      pack_transposed<operand_t>(key_rows, depth_, lanes, depth_, keys_ + key * depth_);
    }
  }

  const operand_t* key(int64_t token) const { return keys_ + token * depth_; }

 private:
  const int64_t n_, d_, depth_;
  Buffer<operand_t> keys_;
};

template <typename scalar_t, typename operand_t>
class Vecmat {
 public:
  explicit Vecmat(Sizes sizes)
      : n_(sizes.tokens),
        d_(sizes.head_dim),
        width_(sizes.width()),
        depth_(depth_of<operand_t>(d_)),
        rows_(sizes.whole_rows ? std::clamp<int64_t>(kLogits / width_ / 16 * 16, 16, kRows) : kRows),
        whole_rows_(sizes.whole_rows),
        factor_(sizes.scale * kLog2E),
        queries_(rows_ * depth_),
        logits_(rows_ * (whole_rows_ ? round_up(n_, kPanel) : kPanel)) {}

  // y of the queries [begin, end). Without weights only the products are made.
  void group(const Operands<operand_t>& head, Rows<const scalar_t> q, const float* weights, const float* lse,
             int64_t begin, int64_t end, float* y) {
    std::fill_n(y, width_, 0.0f);
    for (int64_t first = begin; first < end; first += rows_) {
      const int64_t rows = std::min(rows_, end - first);
      copy_rows(q.from(first), rows, d_, static_cast<operand_t*>(queries_), depth_, round_up(rows, kRowStep));
      if (whole_rows_) {
        block_of_rows(head, rows, weights + first, y);
      } else {
        block_of_tiles(head, rows, weights ? weights + first : nullptr, lse ? lse + first : nullptr, y);
      }
    }
  }

 private:
  static constexpr int kDegree = kExpDegree<scalar_t>;
  static constexpr int kVectors = 4;  // of a tile that are weighed side by side

  // The lanes of a tile that begins with this key, those past the end included.
  int64_t lanes_of(int64_t key) const { return std::min(kPanel, width_ - key); }

  void multiply(const Operands<operand_t>& head, int64_t rows, int64_t key, float* tile) {
    matmul<operand_t>(round_up(rows, kRowStep), lanes_of(key), depth_, queries_, depth_, head.key(key), kPanel, tile,
                      kPanel, false);
  }

  void block_of_tiles(const Operands<operand_t>& head, int64_t rows, const float* weights, const float* lse, float* y) {
    if (lse) {
      for (int64_t i = 0; i < rows; ++i) {
        log_sum_[i] = lse[i] * kLog2E;
      }
    }
    for (int64_t key = 0; key < n_; key += kPanel) {
      multiply(head, rows, key, logits_);
      if (weights) {
        weigh</*powers=*/false>(rows, weights, key, logits_, y + key);
      }
    }
  }

  void block_of_rows(const Operands<operand_t>& head, int64_t rows, const float* weights, float* y) {
    for (int64_t key = 0; key < n_; key += kPanel) {
      multiply(head, rows, key, logits_ + key * rows);
    }
    float* last = logits_ + n_ / kPanel * kPanel * rows;
    for (int64_t i = 0; i < rows; ++i) {
      std::fill_n(last + i * kPanel + n_ % kPanel, width_ - n_, -std::numeric_limits<float>::infinity());
      weights_[i] = weights[i] / make_powers(rows, i);
    }
    for (int64_t key = 0; key < n_; key += kPanel) {
      weigh</*powers=*/true>(rows, weights_, key, logits_ + key * rows, y + key);
    }
  }

  // Calls function(place of a vector) along the products of query i of a block of whole rows.
  template <typename Function>
  void along_row(int64_t rows, int64_t i, const Function& function) {
    for (int64_t key = 0; key < n_; key += kPanel) {
      float* row = logits_ + key * rows + i * kPanel;
      for (int64_t lane = 0; lane < lanes_of(key); lane += kWidth) {
        function(row + lane);
      }
    }
  }

  // Products -> softmax's powers, in place, and their sum. Beside an infinite product, whose power is NaN, as inf less
  // inf is, the others have no weight: their powers are zero, and the sum counts as one.
  float make_powers(int64_t rows, int64_t i) {
    Vec most(-std::numeric_limits<float>::infinity()), sum(0.0f);
    along_row(rows, i, [&](float* place) { most = at::vec::clamp_min(Vec::loadu(place), most); });
    const float top = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, most);
    bool has_nan = false;  // which `most` may have passed over; asked only where the sum does not tell
    if (std::isinf(top)) {
      along_row(rows, i,
                [&](float* place) { has_nan |= std::any_of(place, place + kWidth, [](float x) { return x != x; }); });
    }
    const Vec factor(factor_), above(top);
    along_row(rows, i, [&](float* place) {
      const Vec power = exp2_of_negative<kDegree>(factor * (Vec::loadu(place) - above));
      sum = sum + power;
      power.store(place);
    });
    return std::isinf(top) && !has_nan ? 1.0f : sum_of(sum);
  }

  // Adds to y what the tile of the keys from `key` on gives. powers: it holds powers, else products.
  template <bool powers>
  void weigh(int64_t rows, const float* weights, int64_t key, const float* tile, float* y) {
    const int64_t lanes = lanes_of(key);
    int64_t lane = 0;
    for (; lane + kVectors * kWidth <= lanes; lane += kVectors * kWidth) {
      weigh_lanes<powers, kVectors>(rows, weights, tile + lane, y + lane);
    }
    for (; lane < lanes; lane += kWidth) {
      weigh_lanes<powers, 1>(rows, weights, tile + lane, y + lane);
    }
  }

  template <bool powers, int vectors>
  void weigh_lanes(int64_t rows, const float* weights, const float* tile, float* y) {
    const Vec factor(factor_);
    Vec sum[vectors];
    for (int v = 0; v < vectors; ++v) {
      sum[v] = Vec::loadu(y + v * kWidth);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Vec weight(weights[i]), log_sum(powers ? 0.0f : log_sum_[i]);
      for (int v = 0; v < vectors; ++v) {
        Vec power = Vec::loadu(tile + i * kPanel + v * kWidth);
        if constexpr (!powers) {
          power = exp2_of<kDegree>(at::vec::fmsub(factor, power, log_sum));
        }
        sum[v] = at::vec::fmadd(weight, power, sum[v]);
      }
    }
    for (int v = 0; v < vectors; ++v) {
      sum[v].store(y + v * kWidth);
    }
  }

  const int64_t n_, d_, width_, depth_, rows_;
  const bool whole_rows_;
  const float factor_;
  float weights_[kRows], log_sum_[kRows];  // of a block's queries
  Buffer<operand_t> queries_;
  Buffer<float> logits_;
};

// Adds up each head's groups, in their order.
void add_groups(Sizes sizes, int64_t heads, const float* sums, float* y) {
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const float* lines = sums + head * sizes.groups() * sizes.width();
      float* to = y + head * sizes.tokens;
      std::copy_n(lines, sizes.tokens, to);
      for (int64_t group = 1; group < sizes.groups(); ++group) {
        for (int64_t i = 0; i < sizes.tokens; ++i) {
          to[i] += lines[group * sizes.width() + i];
        }
      }
    }
  });
}

// y of every head; or, where weights and y are null, the products alone.
void walk(const at::Tensor& q, const at::Tensor& k, float scale, const float* weights, const float* lse, float* y) {
  const Sizes sizes{q.size(1), q.size(3), scale, /*whole_rows=*/weights && !lse};
  const int64_t heads = q.size(0) * q.size(2), groups = sizes.groups(), tiles = sizes.tiles();
  with_types(q.scalar_type(), [&]<typename scalar_t, typename operand_t>() {
    const auto queries = heads_of<const scalar_t>(q), keys = heads_of<const scalar_t>(k);
    const Buffer<float> sums(heads * groups * sizes.width());
    run_on_heads<operand_t, Vecmat<scalar_t, operand_t>, Operands<operand_t>>(
        heads, groups, sizes,
        [&](Operands<operand_t>& operands, int64_t head, int64_t begin, int64_t end) {
          operands.pack_tiles(keys.head(head), begin, end);
        },
        [&](Vecmat<scalar_t, operand_t>& vecmat, const Operands<operand_t>& operands, int64_t head, int64_t group) {
          const int64_t line = head * sizes.tokens;
          vecmat.group(operands, queries.head(head), weights ? weights + line : nullptr, lse ? lse + line : nullptr,
                       group * tiles / groups * kTile, std::min(sizes.tokens, (group + 1) * tiles / groups * kTile),
                       sums + (head * groups + group) * sizes.width());
        });
    if (y) {
      add_groups(sizes, heads, sums, y);
    }
  });
}

}  // namespace

at::Tensor attention_vecmat_forward(const at::Tensor& weights, const at::Tensor& q, const at::Tensor& k,
                                    const std::optional<at::Tensor>& lse, double scale) {
  check_heads("q", q, q);
  check_heads("k", k, q);
  check_statistic("weights", weights, q);
  if (lse) {
    check_statistic("lse", *lse, q);
  }
  check_scale(scale);
  at::Tensor y = at::empty(weights.sizes(), weights.options());
  walk(q, k, static_cast<float>(scale), weights.const_data_ptr<float>(), lse ? lse->const_data_ptr<float>() : nullptr,
       y.mutable_data_ptr<float>());
  return y;
}

void attention_products(const at::Tensor& q, const at::Tensor& k) {
  check_heads("q", q, q);
  check_heads("k", k, q);
  walk(q, k, 1.0f, nullptr, nullptr, nullptr);
}

}  // namespace ffvt
