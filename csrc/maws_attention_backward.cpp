// Gradient of maws_attention's out with respect to q, k and v.
//
// What: dq, dk, dv, written in place whatever their strides (three parts of one packed gradient, say).
// How: a head's keys in blocks, and for each block all tiles of 64 queries. Logits and their gradients are recomputed
//   from row_max and lse, transposed (keys down, queries across) as in the forward, so that five products need no
//   transposed copy of a tile: keys x queries, values x grad_out, then p grad_out -> dv, dlogits q -> dk and kT dlogits
//   -> dqT. The products of q and k have the forward's bits, so that none exceeds row_max; delta, the sum of out times
//   grad_out, is rounded as the products of v and grad_out are, so that a row that is one value exactly gives no
//   gradient.
// Memory: per thread, or per head where there are fewer, one head of q, k, v and grad_out in the layouts of the
//   products; per thread dqT of the head in fp32, two tiles, and the sums of two blocks. Where heads are split, dqT of
//   every part.
// Parallel: over heads, and over parts of their keys where threads would be idle; parts of dq are added in one order,
//   so the result depends on the number of threads but not on their timing.
// Limits: as maws_attention.
// Source: FlashAttention-2 (Dao, arXiv 2307.08691), backward.

#include <limits>

#include "heads.h"
#include "kernels.h"

namespace ffvt {
namespace {

struct Sizes {
  int64_t tokens, head_dim;
  float scale;
  int64_t tiles() const { return (tokens + kTile - 1) / kTile; }
  int64_t query_sums() const { return tiles() * head_dim * kTile; }  // elements of dqT
};

template <typename scalar_t>
struct Inputs {
  Rows<const scalar_t> grad_out, q, k, v, out;
  const float *lse, *row_max;
};

int64_t lanes_of(int64_t rows) { return rows > kTile / 2 ? kTile : kTile / 2; }

// What a head's products read, in their layouts, and the statistics of its queries. Lanes past the last query repeat
// it, so that they are finite wherever it is; their lse makes them weigh nothing.
template <typename operand_t>
struct Operands {
  explicit Operands(Sizes sizes)
      : n(sizes.tokens),
        d(sizes.head_dim),
        depth(depth_of<operand_t>(d)),
        width(round_up(depth, 16)),
        ld_keys(stride_of(n)),
        key_rows(round_up(n, kRowStep) * depth),
        value_rows(round_up(n, kRowStep) * depth),
        keys_transposed(depth * ld_keys),
        queries(sizes.tiles() * kTile * depth),
        grads(sizes.tiles() * kTile * depth),
        query_panels(sizes.tiles() * kTile * width),
        grad_panels(sizes.tiles() * kTile * width),
        log_sum(sizes.tiles() * kTile),
        row_max(sizes.tiles() * kTile),
        delta(sizes.tiles() * kTile) {}

  // Writes the tiles [begin, end) of tokens.
  template <typename scalar_t>
  void pack_tiles(const Inputs<scalar_t>& head, int64_t begin, int64_t end) {
    const Buffer<operand_t> rows(kTile * width);
    const Buffer<float> scratch(kPair<operand_t> == 2 ? kTile * depth / 2 : 0);
    for (int64_t first = begin * kTile; first < std::min(n, end * kTile); first += kTile) {
      const int64_t count = std::min(kTile, n - first), lanes = lanes_of(count);
      operand_t* const keys = key_rows + first * depth;
      copy_rows(head.k.from(first), count, d, keys, depth, round_up(count, kRowStep));
      copy_rows(head.v.from(first), count, d, value_rows + first * depth, depth, round_up(count, kRowStep));
      transpose<operand_t>(keys, depth, count, depth, keys_transposed + first, ld_keys, scratch);
      pack_queries(head.q.from(first), count, lanes, rows, queries + first * depth, query_panels + first * width);
      pack_queries(head.grad_out.from(first), count, lanes, rows, grads + first * depth, grad_panels + first * width);
      for (int64_t i = 0; i < lanes; ++i) {  // past the end: a power of -inf, zero
        log_sum[first + i] = i < count ? head.lse[first + i] * kLog2E : std::numeric_limits<float>::infinity();
        row_max[first + i] = i < count ? head.row_max[first + i] : 0.0f;
      }
      write_delta(head.out.from(first), count, lanes, rows, grads + first * depth, delta + first);
      if (first + count == n) {
        clear_columns<operand_t>(keys_transposed, ld_keys, depth, n);
      }
    }
  }

  const int64_t n, d, depth, width, ld_keys;
  Buffer<operand_t> key_rows, value_rows, keys_transposed, queries, grads, query_panels, grad_panels;
  Buffer<float> log_sum, row_max, delta;

 private:
  template <typename scalar_t>
  void pack_queries(Rows<const scalar_t> from, int64_t count, int64_t lanes, operand_t* rows, operand_t* transposed,
                    operand_t* panels) const {
    copy_rows(from, count, d, rows, width, count);
    for (int64_t i = count; i < lanes; ++i) {
      std::memcpy(static_cast<void*>(rows + i * width), rows + (count - 1) * width, width * sizeof(operand_t));
    }
    pack_transposed<operand_t>(rows, width, lanes, depth, transposed);
    pack<operand_t>(rows, width, lanes, width, panels);
  }

  // delta, the diagonal of out grad_outT: by the product that d_probs come from, in squares, as rounding must be alike.
  template <typename scalar_t>
  void write_delta(Rows<const scalar_t> out, int64_t count, int64_t lanes, operand_t* rows, const operand_t* grads,
                   float* delta) const {
    constexpr int64_t kSquare = 16;
    copy_rows(out, count, d, rows, width, lanes);
    alignas(64) float square[kSquare * kSquare];
    for (int64_t i = 0; i < lanes; i += kSquare) {
      matmul<operand_t>(kSquare, kSquare, depth, rows + i * width, width, grads + i * kPair<operand_t>, kPanel, square,
                        kSquare, false);
      for (int64_t j = 0; j < kSquare; ++j) {
        delta[i + j] = square[j * kSquare + j];
      }
    }
  }
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
        probs_(kPair<operand_t> == 2 ? kBlock * kTile : 0),
        d_logits_(kPair<operand_t> == 2 ? kBlock * kTile : 0),
        logits_(kBlock * kTile),
        d_probs_(kBlock * kTile),
        key_sums_(kBlock * width_),
        value_sums_(kBlock * width_),
        query_sums_(sizes.query_sums()) {}

  float* query_sums() const { return query_sums_; }

  // What these keys give: dk and dv of their rows, and their part of dqT (tiles x D x kTile).
  void part(const Operands<operand_t>& head, Keys<operand_t> keys, Rows<scalar_t> dk, Rows<scalar_t> dv,
            float* query_sums) {
    for (int64_t block = 0; block < keys.blocks(); ++block) {
      const auto [key, end] = keys.block(block);
      const int64_t count = end - key;
      for (int64_t first = 0; first < n_; first += kTile) {
        if (lanes_of(n_ - first) == kTile) {
          tile<kTile>(head, key, count, first, query_sums + first * d_, block > 0);
        } else {
          tile<kTile / 2>(head, key, count, first, query_sums + first * d_, block > 0);
        }
      }
      write(key_sums_, scale_, count, dk.from(key));
      write(value_sums_, 1.0f, count, dv.from(key));
    }
  }

 private:
  template <int64_t lanes>
  void tile(const Operands<operand_t>& head, int64_t key, int64_t count, int64_t first, float* query_sums,
            bool add_to_query_sums) {
    const int64_t rows = round_up(count, kRowStep);
    matmul<operand_t>(rows, lanes, depth_, head.key_rows + key * depth_, depth_, head.queries + first * depth_, kPanel,
                      logits_, kTile, false);
    matmul<operand_t>(rows, lanes, depth_, head.value_rows + key * depth_, depth_, head.grads + first * depth_, kPanel,
                      d_probs_, kTile, false);
    logit_gradients<lanes>(head, count, first);
    const operand_t* probs = kPair<operand_t> == 2 ? static_cast<operand_t*>(probs_)
                                                   : reinterpret_cast<operand_t*>(static_cast<float*>(logits_));
    const operand_t* d_logits = kPair<operand_t> == 2 ? static_cast<operand_t*>(d_logits_) : pairs_;
    for (int64_t column = 0; column < width_; column += kPanel) {
      const int64_t width = std::min(kPanel, width_ - column), panel = first * width_ + column * lanes;
      matmul<operand_t>(rows, width, lanes, probs, kTile, head.grad_panels + panel, width, value_sums_ + column, width_,
                        first > 0);
      matmul<operand_t>(rows, width, lanes, d_logits, kTile, head.query_panels + panel, width, key_sums_ + column,
                        width_, first > 0);
    }
    matmul<operand_t>(d_, lanes, round_up(count, kDepthStep<operand_t>), head.keys_transposed + key, head.ld_keys,
                      pairs_, kPanel, query_sums, kTile, add_to_query_sums);
  }

  // logits, d_probs -> probs and d_logits as A operands, d_logits (in the place of d_probs) also as B operand. What is
  // behind the rows of A stays: the products' rows that come of it are not read.
  template <int64_t lanes>
  void logit_gradients(const Operands<operand_t>& head, int64_t count, int64_t first) {
    constexpr int kVectors = lanes / kWidth, kDegree = kExpDegree<scalar_t>;
    const Vec factor(scale_ * kLog2E);
    Vec log_sum[kVectors], row_max[kVectors], delta[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      log_sum[v] = Vec::loadu(head.log_sum + first + v * kWidth);
      row_max[v] = Vec::loadu(head.row_max + first + v * kWidth);
      delta[v] = Vec::loadu(head.delta + first + v * kWidth);
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
          store_pairs(d_logit, next, pairs_ + i * kPanel + 2 * v * kWidth);
        }
      }
#endif
    }
    clear_rows(pairs_, kPanel, round_up(count, kPair<operand_t>), round_up(count, kDepthStep<operand_t>));
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
  const int64_t depth_, width_;
  Buffer<operand_t> probs_, d_logits_;
  Buffer<float> logits_, d_probs_, key_sums_, value_sums_, query_sums_;
  operand_t* const pairs_ = reinterpret_cast<operand_t*>(static_cast<float*>(d_probs_));
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

// Into how many parts the keys of a head are split: as few as keep the threads as busy as can be.
int64_t parts_of(int64_t heads, int64_t tokens) {
  const int64_t threads = at::get_num_threads();
  int64_t best = 1;
  double shortest = std::numeric_limits<double>::infinity();
  for (int64_t parts = 1; parts <= std::min(threads, (tokens + kTile - 1) / kTile); ++parts) {
    const int64_t rounds = (heads * parts + threads - 1) / threads;
    const double time = static_cast<double>(rounds) / static_cast<double>(parts);
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
  const int64_t heads = q.size(0) * q.size(2), parts = parts_of(heads, sizes.tokens);
  with_types(q.scalar_type(), [&]<typename scalar_t, typename operand_t>() {
    const auto d_outs = heads_of<const scalar_t>(grad_out), outs = heads_of<const scalar_t>(out);
    const auto queries = heads_of<const scalar_t>(q), keys = heads_of<const scalar_t>(k),
               values = heads_of<const scalar_t>(v);
    const auto d_queries = heads_of<scalar_t>(dq), d_keys = heads_of<scalar_t>(dk), d_values = heads_of<scalar_t>(dv);
    const auto write_tile = [&](int64_t head, int64_t tile, float* sums) {
      const Buffer<float> scratch(kTile * round_up(sizes.head_dim, 16));
      write_query_gradient(sizes, tile * kTile, sums, parts, d_queries.head(head), scratch);
    };
    const Buffer<float> shared(parts > 1 ? heads * parts * sizes.query_sums() : 0);
    run_on_heads<operand_t, Backward<scalar_t, operand_t>, Operands<operand_t>>(
        heads, parts, sizes,
        [&](Operands<operand_t>& operands, int64_t head, int64_t begin, int64_t end) {
          operands.pack_tiles(
              Inputs<scalar_t>{d_outs.head(head), queries.head(head), keys.head(head), values.head(head),
                               outs.head(head), lse.const_data_ptr<float>() + head * sizes.tokens,
                               row_max.const_data_ptr<float>() + head * sizes.tokens},
              begin, end);
        },
        [&](Backward<scalar_t, operand_t>& backward, const Operands<operand_t>& operands, int64_t head, int64_t part) {
          float* sums = parts > 1 ? shared + (head * parts + part) * sizes.query_sums() : backward.query_sums();
          backward.part(operands, Keys<operand_t>{0, sizes.tokens}.part(part, parts), d_keys.head(head),
                        d_values.head(head), sums);
          for (int64_t tile = 0; parts == 1 && tile < sizes.tiles(); ++tile) {
            write_tile(head, tile, sums);
          }
        });
    if (parts > 1) {
      in_parts(heads * sizes.tiles(), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t head = task / sizes.tiles();
          write_tile(head, task % sizes.tiles(), shared + head * parts * sizes.query_sums());
        }
      });
    }
  });
}

}  // namespace ffvt
