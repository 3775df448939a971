// What the losses share: sums over a row of logits, and a row of gradients that is a multiple of
// the softmax but for a few entries.
#pragma once

#include "cpu/row_stats.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {

// Columns of [begin, end) below vocab.
inline ExpSum measure_logits(const RowsView& logits, int64_t vocab, int64_t row, int64_t begin,
                             int64_t end) {
  end = smaller(end, vocab);
  if (begin >= end) return {};
  ChunkBuffer buffer;
  const float* x = read_chunk(logits, row, begin, end, logits.cols, buffer);
  return measure_exp_sum(x, end - begin, begin, 1.f, upcoming(logits, row, begin + kChunk));
}

// factor * softmax in the columns below vocab and 0 above; or one value in the whole row.
struct SoftmaxGradient {
  enum Kind { kAllZero, kAllNaN, kScaled };

  int64_t row = 0;
  Kind kind = kAllZero;
  RowStats stats = kNoStats;
  float factor = 0.f;
};

// Columns [begin, end). `grad` may be the logits themselves.
inline void write_softmax_gradient(const SoftmaxGradient& gradient, const RowsView& logits,
                                   int64_t vocab, const RowsView& grad, int64_t begin,
                                   int64_t end) {
  if (gradient.kind != SoftmaxGradient::kScaled) {
    const float value = gradient.kind == SoftmaxGradient::kAllZero ? 0.f : kNaN;
    return fill_chunk(grad, gradient.row, begin, end, value);
  }
  const int64_t stop = larger(begin, smaller(end, vocab));
  ChunkBuffer logits_buffer, grad_buffer;
  const float* x = read_chunk(logits, gradient.row, begin, stop, logits.cols, logits_buffer);
  float* to = chunk_target(grad, gradient.row, begin, grad_buffer);
  for_each_vector(stop - begin, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
    const Vec log_q = (load(x + i, lanes) - gradient.stats.max) - gradient.stats.log_norm;
    store(to + i, gradient.factor * vec_exp(log_q), lanes);
  });
  write_chunk(grad, gradient.row, begin, stop, to);
  fill_chunk(grad, gradient.row, stop, end, 0.f);
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
