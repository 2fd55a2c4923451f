// Gradient of maws_attention's out with respect to q, k and v.
//
// What: dq, dk, dv, written in place whatever their strides (three parts of one packed gradient, say).
// How: a head's keys in blocks, and for each block all tiles of 64 queries. Logits and their gradients are recomputed
//   from row_max and lse, transposed (keys down, queries across) as in the forward, so that five products need no
//   transposed copy of a tile: keys x queries, values x grad_out, then p grad_out -> dv, dlogits q -> dk and kT dlogits
//   -> dqT. The products of q and k have the forward's bits, so that none exceeds row_max; delta, the sum of out times
//   grad_out, is rounded as the products of v and grad_out are, so that a row that is one value exactly gives no
//   gradient.
// Memory: per thread one head of q, k, v and grad_out in the layouts of the products, dqT of the head in fp32, two
//   tiles, and the sums of two blocks. Where heads are split, dqT of every part.
// Parallel: over heads, and over parts of their blocks where threads would be idle; parts of dq are added in one order,
//   so the result depends on the number of threads but not on their timing.
// Limits: as maws_attention.
// Source: FlashAttention-2 (Dao, arXiv 2307.08691), backward.

#include <ATen/Parallel.h>

#include <limits>

#include "heads.h"
#include "kernels.h"

namespace ffvt {
namespace {

struct Sizes {
  int64_t tokens, head_dim;
  float scale;
  int64_t tiles() const { return (tokens + kTile - 1) / kTile; }
  int64_t blocks() const { return (tokens + kBlock - 1) / kBlock; }
  int64_t query_sums() const { return tiles() * head_dim * kTile; }  // elements of dqT
};

template <typename scalar_t>
struct Inputs {
  Rows<const scalar_t> grad_out, q, k, v, out;
  const float *lse, *row_max;
};

template <typename scalar_t, typename operand_t>
class Backward {
 public:
  explicit Backward(Sizes sizes)
      : n_(sizes.tokens),
        d_(sizes.head_dim),
        scale_(sizes.scale),
        depth_(depth_of<operand_t>(d_)),
        width_(round_up(depth_, 16)),
        ld_keys_(stride_of(n_)),
        key_rows_(n_ * depth_),
        value_rows_(n_ * depth_),
        keys_transposed_(depth_ * ld_keys_),
        rows_(kTile * width_),
        queries_(sizes.tiles() * kTile * depth_),
        grads_(sizes.tiles() * kTile * depth_),
        query_panels_(sizes.tiles() * kTile * width_),
        grad_panels_(sizes.tiles() * kTile * width_),
        probs_(kPair<operand_t> == 2 ? kBlock * kTile : 0),
        d_logits_(kPair<operand_t> == 2 ? kBlock * kTile : 0),
        log_sum_(sizes.tiles() * kTile),
        row_max_(sizes.tiles() * kTile),
        delta_(sizes.tiles() * kTile),
        logits_(kBlock * kTile),
        d_probs_(kBlock * kTile),
        key_sums_(kBlock * width_),
        value_sums_(kBlock * width_),
        scratch_(kPair<operand_t> == 2 ? n_ * depth_ / 2 : 0) {}

  void pack_head(const Inputs<scalar_t>& head) {
    copy_rows(head.k, n_, d_, static_cast<operand_t*>(key_rows_), depth_, n_);
    copy_rows(head.v, n_, d_, static_cast<operand_t*>(value_rows_), depth_, n_);
    transpose<operand_t>(key_rows_, depth_, n_, depth_, keys_transposed_, ld_keys_, scratch_);
    for (int64_t first = 0; first < n_; first += kTile) {
      const int64_t rows = std::min(kTile, n_ - first), lanes = lanes_of(rows);
      pack_tile(head.q.from(first), rows, lanes, queries_ + first * depth_, query_panels_ + first * width_);
      pack_tile(head.grad_out.from(first), rows, lanes, grads_ + first * depth_, grad_panels_ + first * width_);
      for (int64_t i = 0; i < lanes; ++i) {  // past the end: a power of -inf, zero
        log_sum_[first + i] = i < rows ? head.lse[first + i] * kLog2E : std::numeric_limits<float>::infinity();
        row_max_[first + i] = i < rows ? head.row_max[first + i] : 0.0f;
      }
      write_delta(head.out.from(first), rows, lanes, grads_ + first * depth_, delta_ + first);
    }
  }

  // The blocks [begin, end) of keys: dk and dv of their rows, and their part of dqT (tiles x D x kTile).
  void blocks(int64_t begin, int64_t end, Rows<scalar_t> dk, Rows<scalar_t> dv, float* query_sums) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t key = block * kBlock, count = std::min(kBlock, n_ - key);
      for (int64_t first = 0; first < n_; first += kTile) {
        if (lanes_of(n_ - first) == kTile) {
          tile<kTile>(key, count, first, query_sums + first * d_, block > begin);
        } else {
          tile<kTile / 2>(key, count, first, query_sums + first * d_, block > begin);
        }
      }
      write(key_sums_, scale_, count, dk.from(key));
      write(value_sums_, 1.0f, count, dv.from(key));
    }
  }

 private:
  static constexpr int64_t kSquare = 16;

  static int64_t lanes_of(int64_t rows) { return rows > kTile / 2 ? kTile : kTile / 2; }

  // Lanes past the end repeat the last row, so that they are finite wherever it is; their lse makes them weigh nothing.
  void pack_tile(Rows<const scalar_t> from, int64_t rows, int64_t lanes, operand_t* transposed, operand_t* panels) {
    copy_rows(from, rows, d_, static_cast<operand_t*>(rows_), width_, rows);
    for (int64_t i = rows; i < lanes; ++i) {
      std::memcpy(static_cast<void*>(rows_ + i * width_), rows_ + (rows - 1) * width_, width_ * sizeof(operand_t));
    }
    pack_transposed<operand_t>(rows_, width_, lanes, depth_, transposed);
    pack<operand_t>(rows_, width_, lanes, width_, panels);
  }

  // delta, the diagonal of out grad_outT: by the product that d_probs come from, in squares, as rounding must be alike.
  void write_delta(Rows<const scalar_t> out, int64_t rows, int64_t lanes, const operand_t* grads, float* delta) {
    copy_rows(out, rows, d_, static_cast<operand_t*>(rows_), width_, lanes);
    alignas(64) float square[kSquare * kSquare];
    for (int64_t i = 0; i < lanes; i += kSquare) {
      matmul<operand_t>(kSquare, kSquare, depth_, rows_ + i * width_, width_, grads + i * kPair<operand_t>, kPanel,
                        square, kSquare, false);
      for (int64_t j = 0; j < kSquare; ++j) {
        delta[i + j] = square[j * kSquare + j];
      }
    }
  }

  template <int64_t lanes>
  void tile(int64_t key, int64_t count, int64_t first, float* query_sums, bool add_to_query_sums) {
    matmul<operand_t>(count, lanes, depth_, key_rows_ + key * depth_, depth_, queries_ + first * depth_, kPanel,
                      logits_, kTile, false);
    matmul<operand_t>(count, lanes, depth_, value_rows_ + key * depth_, depth_, grads_ + first * depth_, kPanel,
                      d_probs_, kTile, false);
    logit_gradients<lanes>(count, first);
    const operand_t* probs = kPair<operand_t> == 2 ? static_cast<operand_t*>(probs_)
                                                   : reinterpret_cast<operand_t*>(static_cast<float*>(logits_));
    const operand_t* d_logits = kPair<operand_t> == 2 ? static_cast<operand_t*>(d_logits_)
                                                      : reinterpret_cast<operand_t*>(static_cast<float*>(d_probs_));
    for (int64_t column = 0; column < width_; column += kPanel) {
      const int64_t width = std::min(kPanel, width_ - column), panel = first * width_ + column * lanes;
      matmul<operand_t>(count, width, lanes, probs, kTile, grad_panels_ + panel, width, value_sums_ + column, width_,
                        first > 0);
      matmul<operand_t>(count, width, lanes, d_logits, kTile, query_panels_ + panel, width, key_sums_ + column, width_,
                        first > 0);
    }
    matmul<operand_t>(d_, lanes, round_up(count, kDepthStep<operand_t>), keys_transposed_ + key, ld_keys_,
                      reinterpret_cast<const operand_t*>(static_cast<float*>(d_probs_)), kPanel, query_sums, kTile,
                      add_to_query_sums);
  }

  // logits, d_probs -> probs and d_logits as A operands, d_logits (in the place of d_probs) also as B operand.
  template <int64_t lanes>
  void logit_gradients(int64_t count, int64_t first) {
    constexpr int kVectors = lanes / kWidth, kDegree = kExpDegree<scalar_t>;
    const Vec factor(scale_ * kLog2E);
    Vec log_sum[kVectors], row_max[kVectors], delta[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      log_sum[v] = Vec::loadu(log_sum_ + first + v * kWidth);
      row_max[v] = Vec::loadu(row_max_ + first + v * kWidth);
      delta[v] = Vec::loadu(delta_ + first + v * kWidth);
    }
    const auto prob_at = [&](int64_t place, int v) {
      return exp2_of_negative<kDegree>(at::vec::fmsub(factor, Vec::loadu(logits_ + place) - row_max[v], log_sum[v]));
    };
    if constexpr (kPair<operand_t> == 1) {
      for (int64_t i = 0; i < count; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t place = i * kTile + v * kWidth;
          const Vec prob = prob_at(place, v);
          prob.store(logits_ + place);
          (prob * (Vec::loadu(d_probs_ + place) - delta[v])).store(d_probs_ + place);
        }
      }
    } else {
#if defined(__AVX512BF16__)
      operand_t* pairs = reinterpret_cast<operand_t*>(static_cast<float*>(d_probs_));
      for (int64_t i = 0; i < count; i += 2) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t place = i * kTile + v * kWidth;
          const Vec prob = prob_at(place, v);
          const Vec d_logit = prob * (Vec::loadu(d_probs_ + place) - delta[v]);
          store_bf16(prob, probs_ + place);
          store_bf16(d_logit, d_logits_ + place);
          Vec next(0.0f);
          if (i + 1 < count) {
            const Vec next_prob = prob_at(place + kTile, v);
            next = next_prob * (Vec::loadu(d_probs_ + place + kTile) - delta[v]);
            store_bf16(next_prob, probs_ + place + kTile);
            store_bf16(next, d_logits_ + place + kTile);
          }
          store_pairs(d_logit, next, pairs + i * kPanel + 2 * v * kWidth);
        }
      }
      const int64_t filled = round_up(count, 2);
      std::memset(static_cast<void*>(pairs + filled * kPanel), 0,
                  (round_up(count, kDepthStep<operand_t>) - filled) * kPanel * sizeof(operand_t));
#endif
    }
  }

  void write(float* sums, float factor, int64_t rows, Rows<scalar_t> to) {
    for (int64_t i = 0; i < rows; ++i) {
      float* row = sums + i * width_;
      for (int64_t j = 0; j < width_; j += kWidth) {
        (Vec(factor) * Vec::loadu(row + j)).store(row + j);
      }
      convert_back(row, to[i], d_);
    }
  }

  const int64_t n_, d_;
  const float scale_;
  const int64_t depth_, width_, ld_keys_;
  Buffer<operand_t> key_rows_, value_rows_, keys_transposed_, rows_, queries_, grads_, query_panels_, grad_panels_,
      probs_, d_logits_;
  Buffer<float> log_sum_, row_max_, delta_, logits_, d_probs_, key_sums_, value_sums_, scratch_;
};

// The sum of the parts of dqT, scaled, as rows of dq; for one tile of queries. Overwrites the first part.
template <typename scalar_t>
void write_query_gradient(Sizes sizes, int64_t first, float* parts, int64_t count, Rows<scalar_t> dq, float* scratch) {
  const int64_t d = sizes.head_dim, ld = round_up(d, 16);
  float* sums = parts + first * d;
  for (int64_t j = 0; j < d * kTile; j += kWidth) {
    Vec total = Vec::loadu(sums + j);
    for (int64_t part = 1; part < count; ++part) {
      total = total + Vec::loadu(sums + part * sizes.query_sums() + j);
    }
    (Vec(sizes.scale) * total).store(sums + j);
  }
  transpose_units(sums, kTile, scratch, ld, d, kTile);
  for (int64_t i = 0; i < std::min(kTile, sizes.tokens - first); ++i) {
    convert_back(scratch + i * ld, dq[first + i], d);
  }
}

// Into how many parts the blocks of a head are split: as few as keep the threads as busy as can be.
int64_t parts_of(int64_t heads, int64_t blocks) {
  const int64_t threads = at::get_num_threads();
  int64_t best = 1;
  double shortest = std::numeric_limits<double>::infinity();
  for (int64_t parts = 1; parts <= std::min(blocks, threads); ++parts) {
    const int64_t rounds = (heads * parts + threads - 1) / threads, longest = (blocks + parts - 1) / parts;
    const double time = static_cast<double>(rounds * longest);
    if (time < 0.95 * shortest) {
      shortest = time;
      best = parts;
    }
  }
  return best;
}

}  // namespace

void maws_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const at::Tensor& row_max, double scale,
                             const std::tuple<at::Tensor, at::Tensor, at::Tensor>& grads) {
  const auto& [dq, dk, dv] = grads;
  const std::pair<const char*, const at::Tensor*> named[] = {
      {"grad_out", &grad_out}, {"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}, {"dq", &dq}, {"dk", &dk}, {"dv", &dv}};
  for (const auto& [name, tensor] : named) {
    check_heads(name, *tensor, q);
  }
  check_statistic("lse", lse, q);
  check_statistic("row_max", row_max, q);
  const Sizes sizes{q.size(1), q.size(3), static_cast<float>(scale)};
  const int64_t heads = q.size(0) * q.size(2), blocks = sizes.blocks(), parts = parts_of(heads, blocks);
  with_types(q.scalar_type(), [&]<typename scalar_t, typename operand_t>() {
    const auto d_outs = heads_of<const scalar_t>(grad_out), outs = heads_of<const scalar_t>(out);
    const auto queries = heads_of<const scalar_t>(q), keys = heads_of<const scalar_t>(k),
               values = heads_of<const scalar_t>(v);
    const auto d_queries = heads_of<scalar_t>(dq), d_keys = heads_of<scalar_t>(dk), d_values = heads_of<scalar_t>(dv);
    const auto write_head = [&](int64_t head, int64_t first_tile, int64_t end_tile, float* sums) {
      Buffer<float> scratch(kTile * round_up(sizes.head_dim, 16));
      for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        write_query_gradient(sizes, tile * kTile, sums, parts, d_queries.head(head), scratch);
      }
    };
    Buffer<float> shared(parts > 1 ? heads * parts * sizes.query_sums() : 0);
    at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
      const MatmulScope<operand_t> scope;
      Backward<scalar_t, operand_t> backward(sizes);
      Buffer<float> own(parts > 1 ? 0 : sizes.query_sums());
      for (int64_t task = begin, packed = -1; task < end; ++task) {
        const int64_t head = task / parts, part = task % parts;
        if (head != packed) {
          backward.pack_head({d_outs.head(head), queries.head(head), keys.head(head), values.head(head),
                              outs.head(head), lse.const_data_ptr<float>() + head * sizes.tokens,
                              row_max.const_data_ptr<float>() + head * sizes.tokens});
          packed = head;
        }
        float* sums = parts > 1 ? shared + task * sizes.query_sums() : own;
        backward.blocks(part * blocks / parts, (part + 1) * blocks / parts, d_keys.head(head), d_values.head(head),
                        sums);
        if (parts == 1) {
          write_head(head, 0, sizes.tiles(), sums);
        }
      }
    });
    if (parts > 1) {
      at::parallel_for(0, heads * sizes.tiles(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t head = task / sizes.tiles(), tile = task % sizes.tiles();
          write_head(head, tile, tile + 1, shared + head * parts * sizes.query_sums());
        }
      });
    }
  });
}

}  // namespace ffvt
