// What the losses share: sums over a row of logits, and a row of gradients that is a multiple of
// the softmax but for a few entries.
#pragma once

#include "cpu/row_stats.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {

// Columns of [begin, end) below vocab; their exponentials go to `kept` unless it is null.
inline ExpSum measure_logits(const RowsView& logits, int64_t vocab, int64_t row, int64_t begin,
                             int64_t end, float* kept = nullptr) {
  end = smaller(end, vocab);
  if (begin >= end) return {};
  return measure_exp_sum(logits, row, begin, end, 1.f, kept);
}

// factor * softmax, or one value, in the columns below vocab; 0 above.
struct SoftmaxGradient {
  enum Kind { kAllZero, kAllNaN, kScaled };

  int64_t row = 0;
  Kind kind = kAllZero;
  RowStats stats = kNoStats;
  float factor = 0.f;
};

// Writes columns [begin, end) where the gradient is one value below vocab; returns whether it is.
inline bool write_constant_gradient(const SoftmaxGradient& gradient, int64_t vocab,
                                    const RowsView& grad, int64_t begin, int64_t end) {
  if (gradient.kind == SoftmaxGradient::kScaled) return false;
  const int64_t stop = larger(begin, smaller(end, vocab));
  const float value = gradient.kind == SoftmaxGradient::kAllZero ? 0.f : kNaN;
  fill_chunk(grad, gradient.row, begin, stop, value);
  fill_chunk(grad, gradient.row, stop, end, 0.f);
  return true;
}

// Columns [begin, end) from the logits. `grad` may be the logits themselves.
inline void write_softmax_gradient(const SoftmaxGradient& gradient, const RowsView& logits,
                                   int64_t vocab, const RowsView& grad, int64_t begin,
                                   int64_t end) {
  if (write_constant_gradient(gradient, vocab, grad, begin, end)) return;
  const int64_t stop = larger(begin, smaller(end, vocab));
  const char* x = row_address(logits, gradient.row) + begin * element_size(logits.dtype);
  char* to = row_address(grad, gradient.row) + begin * element_size(grad.dtype);
  with_dtype(logits.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::kType;
    for_each_vector(stop - begin, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      const Vec log_q =
          (load_as<kType>(x, i, lanes) - gradient.stats.max) - gradient.stats.log_norm;
      store_as<kType>(to, i, gradient.factor * vec_exp(log_q), lanes);
    });
  });
  fill_chunk(grad, gradient.row, stop, end, 0.f);
}

// The same from the exponentials that measure_logits kept.
inline void write_kept_gradient(const SoftmaxGradient& gradient, const ExpSum& sum,
                                const float* kept, int64_t vocab, const RowsView& grad,
                                int64_t begin, int64_t end) {
  if (write_constant_gradient(gradient, vocab, grad, begin, end)) return;
  const int64_t stop = larger(begin, smaller(end, vocab));
  const double factor = gradient.factor * ::exp(log_prob(sum.max, gradient.stats));
  const float scale = static_cast<float>(factor);
  char* to = row_address(grad, gradient.row) + begin * element_size(grad.dtype);
  with_dtype(grad.dtype, [&](auto type) {
    for_each_vector(stop - begin, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      store_as<decltype(type)::kType>(to, i, load(kept + i, lanes) * scale, lanes);
    });
  });
  fill_chunk(grad, gradient.row, stop, end, 0.f);
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
