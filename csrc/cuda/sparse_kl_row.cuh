// What the kernels of sparse_kl_loss share: a row's entries, its loss, the gradient of a logit.
#pragma once

#include "cuda/row.cuh"

namespace memdec::cuda {

struct Entries {
  int64_t begin;
  int64_t end;
};

// The entries of a target row, kept inside the buffers whatever indptr holds.
__device__ inline Entries entries_of(const SparseRows& targets, int64_t row) {
  const auto clamp = [&](int64_t i) { return i < 0 ? 0 : (i < targets.slots ? i : targets.slots); };
  const int64_t begin = clamp(targets.indptr[row]);
  const int64_t end = clamp(targets.indptr[row + 1]);
  return {begin, end > begin ? end : begin};
}

// Whether a row adds to the loss: its label is not ignored, or without labels it has a target.
template <typename Args>
__device__ inline bool row_counts(const Args& args, int64_t row, Entries entries) {
  return args.labels ? args.labels[row] != args.ignore_index : entries.end > entries.begin;
}

// The counted rows among those of this thread.
__device__ inline double counted_rows(const SparseKLArgs& args) {
  double counted = 0.0;
  for (int64_t row = threadIdx.x; row < args.rows; row += blockDim.x) {
    counted += row_counts(args, row, entries_of(args.targets, row)) ? 1.0 : 0.0;
  }
  return counted;
}

__device__ inline double reduction_scale(const SparseKLArgs& args, double counted) {
  if (counted == 0.0) return 0.0;
  if (args.reduction != Reduction::kMean) return 1.0;
  return 1.0 / (args.normalizer ? static_cast<double>(*args.normalizer) : counted);
}

// Writes the loss of a counted row, given its KL; by one thread.
template <typename T>
__device__ inline void write_row(const SparseKLArgs& args, int64_t row, const T* logits,
                                 RowStats stats, double kl) {
  float ce = 0.f;
  if (args.labels) {
    const int64_t label = args.labels[row];
    const bool in_range = label >= 0 && label < args.vocab;
    ce = in_range ? -log_softmax(to_float(logits[label]), stats, 1.f) : NAN;
  }
  // A term without weight has no influence, infinite or not; a bad index makes the row NaN anyway.
  const float row_kl = static_cast<float>(kl);
  float loss = row_kl;
  if (args.labels) {
    loss = 0.f;
    if (args.alpha != 0.f || isnan(row_kl)) loss += args.alpha * row_kl;
    if (args.alpha != 1.f || isnan(ce)) loss += (1.f - args.alpha) * ce;
  }
  args.row_loss[row] = loss;
  args.row_kl[row] = row_kl;
  args.row_ce[row] = ce;
  args.stats[row] = stats;
}

// upstream * (mass * q - hit): q the model's probability of the column, hit the weight on it.
struct LogitGradient {
  RowStats stats;
  double upstream;
  double alpha;
  double label_weight;
  double mass;
  float factor;

  __device__ LogitGradient(RowStats stats, double upstream, double target_sum, double alpha,
                           bool labelled)
      : stats(stats),
        upstream(upstream),
        alpha(alpha),
        label_weight(labelled ? 1.0 - alpha : 0.0),
        mass(alpha * target_sum + label_weight),
        factor(static_cast<float>(upstream * mass)) {}

  __device__ double hit(float target, bool is_label) const {
    return alpha * target + (is_label ? label_weight : 0.0);
  }

  // For a column with a target or the label: q - 1 is made without rounding q.
  __device__ float precise(float x, double hit) const {
    const double minus_one = expm1(static_cast<double>(x - stats.max) - stats.log_norm);
    return static_cast<float>(upstream * (mass * minus_one + (mass - hit)));
  }

  __device__ float dense(float x) const {
    return factor == 0.f ? 0.f : factor * fast_exp2(log_softmax(x, stats, 1.f) * kLog2E);
  }
};

}  // namespace memdec::cuda
