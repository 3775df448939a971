// KL from a sparse target plus cross-entropy, and the gradient.
#include "common/kernels.h"
#include "cpu/softmax_gradient.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {
namespace {

// Entries of one row's target.
struct Entries {
  int64_t begin, end;
};

// Never outside the arrays, whatever indptr holds; a decreasing pair is an empty row.
inline Entries row_entries(const SparseRows& targets, int64_t row) {
  const auto clamp = [&](int64_t slot) { return larger<int64_t>(0, smaller(slot, targets.slots)); };
  const int64_t begin = clamp(targets.indptr[row]);
  return {begin, larger(begin, clamp(targets.indptr[row + 1]))};
}

template <class Args>
inline bool row_counts(const Args& args, int64_t row) {
  if (args.labels != nullptr) return args.labels[row] != args.ignore_index;
  const Entries entries = row_entries(args.targets, row);
  return entries.begin < entries.end;
}

// Whether the label and every token id are columns.
template <class Args>
inline bool ids_are_valid(const Args& args, int64_t row) {
  if (args.labels != nullptr && (args.labels[row] < 0 || args.labels[row] >= args.vocab)) {
    return false;
  }
  const Entries entries = row_entries(args.targets, row);
  for (int64_t i = entries.begin; i < entries.end; ++i) {
    const int32_t id = args.targets.token_ids[i];
    if (id < 0 || id >= args.vocab) return false;
  }
  return true;
}

// Weights of KL and cross-entropy in the loss. A term of weight 0 is left out, not multiplied: it
// may be infinite.
struct Weights {
  double kl, ce;
};

template <class Args>
inline Weights weights(const Args& args) {
  if (args.labels == nullptr) return {1., 0.};
  const double alpha = args.alpha;
  return {alpha, 1. - alpha};
}

// One row of gradients: a multiple of the softmax but for the target's entries and the label.
struct GradientRow {
  SoftmaxGradient dense;
  bool label_is_entry = false;  // then the label's gradient is with the entries
};

// Makes the gradients at the entries and the label, which go to `sparse` [slots + rows]: entry i to
// i, row r's label to slots + r. Nothing of the row is written yet, since grad_logits may be the
// logits.
template <class Args>
GradientRow begin_gradient(const Args& args, int64_t row, const RowStats& stats, double upstream,
                           float* sparse) {
  GradientRow result;
  result.dense.row = row;
  if (!row_counts(args, row)) return result;
  if (is_nan(stats.log_norm) || !ids_are_valid(args, row)) {
    result.dense.kind = SoftmaxGradient::kAllNaN;
    return result;
  }

  const Weights weight = weights(args);
  const Entries entries = row_entries(args.targets, row);
  double mass = 0;
  for (int64_t i = entries.begin; i < entries.end && weight.kl != 0; ++i) {
    mass += static_cast<double>(args.targets.probs[i]);
  }
  const int64_t label = args.labels != nullptr ? args.labels[row] : -1;
  const auto gradient = [&](int64_t id, double p) {
    const double log_q = log_prob(read_one(args.logits, row, id), stats);
    const double q = ::exp(log_q);
    double value = 0;
    if (weight.kl != 0) value += weight.kl * (mass * q - p);
    if (weight.ce != 0) value += weight.ce * (id == label ? ::expm1(log_q) : q);
    return static_cast<float>(upstream * value);
  };
  for (int64_t i = entries.begin; i < entries.end; ++i) {
    const int64_t id = args.targets.token_ids[i];
    sparse[i] = gradient(id, static_cast<double>(args.targets.probs[i]));
    if (id == label) result.label_is_entry = true;
  }
  if (label >= 0 && !result.label_is_entry) sparse[args.targets.slots + row] = gradient(label, 0.);

  result.dense.kind = SoftmaxGradient::kScaled;
  result.dense.stats = stats;
  result.dense.factor = static_cast<float>(upstream * (weight.kl * mass + weight.ce));
  return result;
}

template <class Args>
void finish_gradient(const Args& args, const GradientRow& gradient, const float* sparse) {
  if (gradient.dense.kind != SoftmaxGradient::kScaled) return;
  const int64_t row = gradient.dense.row;
  const Entries entries = row_entries(args.targets, row);
  for (int64_t i = entries.begin; i < entries.end; ++i) {
    write_one(args.grad_logits, row, args.targets.token_ids[i], sparse[i]);
  }
  if (args.labels != nullptr && !gradient.label_is_entry) {
    write_one(args.grad_logits, row, args.labels[row], sparse[args.targets.slots + row]);
  }
}

// d loss / d row_loss; 0 where no row counts.
double loss_scale(const SparseKLArgs& args) {
  int64_t counted = 0;
  for (int64_t row = 0; row < args.rows; ++row) counted += row_counts(args, row);
  if (counted == 0) return 0.;
  if (args.reduction != Reduction::kMean) return 1.;
  return 1. / (args.normalizer != nullptr ? static_cast<double>(*args.normalizer)
                                          : static_cast<double>(counted));
}

// The values of the rows, and where grad_logits is given the gradient while the row is in the
// cache.
struct Forward {
  const SparseKLArgs& args;
  double scale;
  float* sparse;

  struct Row {
    int64_t row;
    bool counts;
    ExpSum sum;
    GradientRow gradient;
  };
  using Partial = ExpSum;

  Row begin(int64_t row) const {
    Row state = {};
    state.row = row;
    state.counts = row_counts(args, row);
    return state;
  }

  int64_t kept_floats() const { return sparse != nullptr ? 1 : 0; }

  Partial measure(const Row& state, int64_t begin, int64_t end, float* kept) const {
    if (!state.counts) return {};
    return measure_logits(args.logits, args.vocab, state.row, begin, end,
                          sparse != nullptr ? kept : nullptr);
  }

  void fold(Row& state, const Partial& partial) const { fold_exp_sum(state.sum, partial, 1.f); }

  void measured(Row& state) const {
    const int64_t row = state.row;
    const RowStats stats = state.counts ? row_stats(state.sum) : kNoStats;
    double loss = 0, kl = 0, ce = 0;
    if (state.counts && (is_nan(stats.log_norm) || !ids_are_valid(args, row))) {
      kl = ids_are_valid(args, row) ? divergence(row, stats) : kNaN;  // 0 of a target of no mass
      ce = args.labels != nullptr ? kNaN : 0.;
      loss = kl + ce;
    } else if (state.counts) {
      kl = divergence(row, stats);
      if (args.labels != nullptr) {
        ce = -log_prob(read_one(args.logits, row, args.labels[row]), stats);
      }
      const Weights weight = weights(args);
      loss = (weight.kl != 0 ? weight.kl * kl : 0.) + (weight.ce != 0 ? weight.ce * ce : 0.);
    }
    args.stats[row] = stats;
    args.row_loss[row] = static_cast<float>(loss);
    args.row_kl[row] = static_cast<float>(kl);
    args.row_ce[row] = static_cast<float>(ce);
    if (sparse != nullptr) {
      // Rounded as backward gets it, so that both make the same gradient.
      const double upstream = static_cast<float>(scale);
      state.gradient = begin_gradient(args, row, stats, upstream, sparse);
    }
  }

  double divergence(int64_t row, const RowStats& stats) const {
    double sum = 0;
    const Entries entries = row_entries(args.targets, row);
    for (int64_t i = entries.begin; i < entries.end; ++i) {
      const double p = args.targets.probs[i];
      if (p == 0) continue;
      const float x = read_one(args.logits, row, args.targets.token_ids[i]);
      sum += p * (::log(p) - log_prob(x, stats));
    }
    return sum;
  }

  void write(const Row& state, int64_t begin, int64_t end, const Partial& sum,
             const float* kept) const {
    if (sparse == nullptr) return;
    write_kept_gradient(state.gradient.dense, sum, kept, args.vocab, args.grad_logits, begin, end);
  }

  void finish(const Row& state) const {
    if (sparse != nullptr) finish_gradient(args, state.gradient, sparse);
  }

  // The sums of the rows in their order, times the scale.
  void reduce() const {
    double loss = 0, kl = 0, ce = 0;
    for (int64_t row = 0; row < args.rows; ++row) {
      loss += static_cast<double>(args.row_loss[row]);
      kl += static_cast<double>(args.row_kl[row]);
      ce += static_cast<double>(args.row_ce[row]);
    }
    *args.loss = static_cast<float>(loss * scale);
    *args.kl = static_cast<float>(kl * scale);
    *args.ce = static_cast<float>(ce * scale);
    *args.scale = static_cast<float>(scale);
  }
};

struct Backward {
  const SparseKLBackwardArgs& args;
  float* sparse;

  using Row = GradientRow;
  struct Partial {};

  Row begin(int64_t row) const {
    double upstream = 1;
    if (args.grad_loss != nullptr) upstream = args.grad_loss[row * args.grad_stride];
    if (args.scale != nullptr) upstream *= static_cast<double>(*args.scale);
    return begin_gradient(args, row, args.stats[row], upstream, sparse);
  }

  int64_t kept_floats() const { return 0; }
  Partial measure(const Row&, int64_t, int64_t, float*) const { return {}; }
  void fold(Row&, const Partial&) const {}
  void measured(Row&) const {}

  void write(const Row& state, int64_t begin, int64_t end, const Partial&, const float*) const {
    write_softmax_gradient(state.dense, args.logits, args.vocab, args.grad_logits, begin, end);
  }

  void finish(const Row& state) const { finish_gradient(args, state, sparse); }
};

struct Rescale {
  const SparseKLRescaleArgs& args;

  using Row = int64_t;
  struct Partial {};

  Row begin(int64_t row) const { return row; }
  int64_t kept_floats() const { return 0; }
  Partial measure(Row, int64_t, int64_t, float*) const { return {}; }
  void fold(Row&, const Partial&) const {}
  void measured(Row&) const {}

  void write(Row row, int64_t begin, int64_t end, const Partial&, const float*) const {
    const float factor = *args.grad_loss;
    const RowsView& grad = args.grad_logits;
    char* const x = row_address(grad, row) + begin * element_size(grad.dtype);
    with_dtype(grad.dtype, [&](auto type) {
      constexpr DType kType = decltype(type)::kType;
      for_each_vector(end - begin, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
        store_as<kType>(x, i, load_as<kType>(x, i, lanes) * factor, lanes);
      });
    });
  }

  void finish(Row) const {}
};

constexpr Status kNoMemory = {"no memory for the gradients at the targets' tokens"};

}  // namespace

Status sparse_kl(const SparseKLArgs& args, int threads) {
  const bool with_gradient = args.grad_logits.data != nullptr;
  const Scratch<float> sparse(with_gradient ? args.targets.slots + args.rows : 0);
  if (sparse.data() == nullptr) return kNoMemory;
  const Forward job{args, loss_scale(args), with_gradient ? sparse.data() : nullptr};
  const int64_t cols = with_gradient ? args.logits.cols : args.vocab;
  const Status status = run_rows(job, args.rows, cols, threads);
  if (status.ok() && args.reduction != Reduction::kNone) job.reduce();
  return status;
}

Status sparse_kl_backward(const SparseKLBackwardArgs& args, int threads) {
  const Scratch<float> sparse(args.targets.slots + args.rows);
  if (sparse.data() == nullptr) return kNoMemory;
  return run_rows(Backward{args, sparse.data()}, args.rows, args.logits.cols, threads);
}

Status sparse_kl_rescale(const SparseKLRescaleArgs& args, int threads) {
  if (*args.grad_loss == 1.f) return {};
  return run_rows(Rescale{args}, args.rows, args.grad_logits.cols, threads);
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
