// What the kernels of sparse_kl_loss share: a row's entries, its loss, the gradient of a logit.
#pragma once

#include "cuda/row.cuh"

namespace memdec::cuda {

struct Entries {
  int64_t begin;
  int64_t end;
};

// The entries of a target row, kept inside the buffers whatever indptr holds.
__device__ inline Entries entries_between(const SparseRows& targets, int64_t begin, int64_t end) {
  const auto clamp = [&](int64_t i) { return i < 0 ? 0 : (i < targets.slots ? i : targets.slots); };
  return {clamp(begin), clamp(end > begin ? end : begin)};
}
__device__ inline Entries entries_of(const SparseRows& targets, int64_t row) {
  return entries_between(targets, targets.indptr[row], targets.indptr[row + 1]);
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

// Writes what is known of a row: its loss and parts, 0 where it does not count.
__device__ inline void write_row(const SparseKLArgs& args, int64_t row, bool counted,
                                 RowStats stats, float kl, float ce) {
  // A term without weight has no influence, infinite or not; a bad index makes the row NaN anyway.
  float loss = kl;
  if (args.labels) {
    loss = 0.f;
    if (args.alpha != 0.f || isnan(kl)) loss += args.alpha * kl;
    if (args.alpha != 1.f || isnan(ce)) loss += (1.f - args.alpha) * ce;
  } else {
    ce = 0.f;
  }
  args.row_loss[row] = counted ? loss : 0.f;
  args.row_kl[row] = counted ? kl : 0.f;
  args.row_ce[row] = counted ? ce : 0.f;
  args.stats[row] = counted ? stats : RowStats{0.f, 0.f};
}

// upstream * (mass * q - hit): q the model's probability of the column, hit the weight on it.
struct LogitGradient {
  RowStats stats;
  double upstream;
  double alpha;
  double label_weight;
  double mass;
  float factor;
  float shift;

  LogitGradient() = default;
  __device__ LogitGradient(RowStats stats, double upstream, double target_sum, double alpha,
                           bool labelled)
      : stats(stats),
        upstream(upstream),
        alpha(alpha),
        label_weight(labelled ? 1.0 - alpha : 0.0),
        mass(alpha * target_sum + label_weight),
        factor(static_cast<float>(upstream * mass)),
        shift(-stats.log_norm * kLog2E) {}

  __device__ double hit(float target, bool is_label) const {
    return alpha * target + (is_label ? label_weight : 0.0);
  }

  // For a column with a target or the label: of q or q - 1 the one that float32 holds well, and
  // what it nearly cancels with in float64.
  __device__ float precise(float x, double hit) const {
    const float log_q = log_softmax(x, stats, 1.f);
    const double gap =
        log_q < -kLn2 ? mass * expf(log_q) - hit : mass * expm1f(log_q) + (mass - hit);
    return static_cast<float>(upstream * gap);
  }

  // For any other column; `factor` is not 0.
  __device__ float dense(float x) const {
    return factor * fast_exp2(fmaf(x - stats.max, kLog2E, shift));
  }
};

}  // namespace memdec::cuda
