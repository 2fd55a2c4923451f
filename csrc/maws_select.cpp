// The picks: from the class token's lines of logits, or from q and k.
//
// What: score = mean_h softmax(row_h) * mean_h softmax(column_h) and the K largest, best first, for every image.
// How: both lines' softmaxes in place, one head a task; then, one image a task, head-means in the order of the heads,
//   the product, and a partial sort of unique keys (score bits above, inverted index below).
// Memory: two lines (B, H, N) fp32.
// Limits: as maws_attention.
// Source: FFVT section 3.2.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "heads.h"
#include "kernels.h"

namespace ffvt {
namespace {

void softmax(float* line, int64_t count) {
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    top = std::max(top, line[i]);
  }
  Vec total(0.0f);
  const Vec above(top);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec power = (Vec::loadu(line + i) - above).exp();
    total = total + power;
    power.store(line + i);
  }
  float sum = sum_of(total);
  if (i < count) {
    (Vec::loadu(line + i, count - i) - above).exp().store(line + i, count - i);
    for (; i < count; ++i) {
      sum += line[i];
    }
  }
  for (i = 0; i < count; ++i) {
    line[i] /= sum;
  }
}

// Larger for larger scores, for equal ones larger for the lower index; NaN below every score.
int64_t sort_key(float score, int64_t index) {
  const int64_t bits = score == score ? std::bit_cast<int32_t>(score) : -1;
  return (bits << 32) | (0xffffffff - index);
}

}  // namespace

void softmax_lines(const at::Tensor& row, const at::Tensor& column) {
  const int64_t heads = row.size(0) * row.size(1), tokens = row.size(2);
  float *rows = row.mutable_data_ptr<float>(), *columns = column.mutable_data_ptr<float>();
  at::parallel_for(0, 2 * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      softmax((task % 2 == 0 ? rows : columns) + task / 2 * tokens, tokens);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> select_from_lines(const at::Tensor& row, const at::Tensor& column,
                                                     int64_t num_select, int64_t first_candidate) {
  softmax_lines(row, column);
  const int64_t batch = row.size(0), heads = row.size(1), tokens = row.size(2);
  const float *rows = row.const_data_ptr<float>(), *columns = column.const_data_ptr<float>();
  at::Tensor index = at::empty({batch, num_select}, row.options().dtype(at::kLong));
  at::Tensor score = at::empty({batch, tokens}, row.options());
  auto* picks = index.mutable_data_ptr<int64_t>();
  auto* scores = score.mutable_data_ptr<float>();
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> attention(tokens), contribution(tokens);
    std::vector<int64_t> keys(tokens - first_candidate);
    for (int64_t image = begin; image < end; ++image) {
      std::fill(attention.begin(), attention.end(), 0.0f);
      std::fill(contribution.begin(), contribution.end(), 0.0f);
      for (int64_t head = image * heads; head < (image + 1) * heads; ++head) {
        for (int64_t i = 0; i < tokens; ++i) {
          attention[i] += rows[head * tokens + i];
          contribution[i] += columns[head * tokens + i];
        }
      }
      const auto count = static_cast<float>(heads);
      for (int64_t i = 0; i < tokens; ++i) {
        scores[image * tokens + i] = (attention[i] / count) * (contribution[i] / count);
      }
      for (int64_t i = first_candidate; i < tokens; ++i) {
        keys[i - first_candidate] = sort_key(scores[image * tokens + i], i);
      }
      std::partial_sort(keys.begin(), keys.begin() + num_select, keys.end(), std::greater<>());
      for (int64_t i = 0; i < num_select; ++i) {
        picks[image * num_select + i] = 0xffffffff - (keys[i] & 0xffffffff);
      }
    }
  });
  return {index, score};
}

std::tuple<at::Tensor, at::Tensor> maws_select_forward(const at::Tensor& q, const at::Tensor& k, int64_t num_select,
                                                       double scale, int64_t first_candidate) {
  check_heads("q", q, q);
  check_heads("k", k, q);
  check_selection(q, num_select, scale, first_candidate);
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const auto fp32 = q.options().dtype(at::kFloat);
  at::Tensor row = at::empty({batch, heads, tokens}, fp32), column = at::empty({batch, heads, tokens}, fp32);
  with_types(q.scalar_type(), [&]<typename scalar_t, typename operand_t>() {
    const auto queries = heads_of<const scalar_t>(q), keys = heads_of<const scalar_t>(k);
    float *rows = row.mutable_data_ptr<float>(), *columns = column.mutable_data_ptr<float>();
    at::parallel_for(0, 2 * batch * heads, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> fixed(head_dim);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / 2;
        const auto q_head = queries.head(head), k_head = keys.head(head);
        const bool is_row = task % 2 == 0;
        convert(is_row ? q_head[0] : k_head[0], fixed, head_dim);
        const auto walked = is_row ? k_head : q_head;
        float* line = (is_row ? rows : columns) + head * tokens;
        for (int64_t i = 0; i < tokens; ++i) {
          line[i] = static_cast<float>(scale) * dot(static_cast<float*>(fixed), walked[i], head_dim);
        }
      }
    });
  });
  return select_from_lines(row, column, num_select, first_candidate);
}

}  // namespace ffvt
