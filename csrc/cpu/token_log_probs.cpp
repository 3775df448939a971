// Log-softmax at one label a row, and its gradient.
#include "common/kernels.h"
#include "cpu/softmax_gradient.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {
namespace {

struct Forward {
  const TokenLogProbsArgs& args;

  struct Row {
    int64_t row;
    bool read;
    ExpSum sum;
  };
  using Partial = ExpSum;

  Row begin(int64_t row) const {
    Row state = {};
    state.row = row;
    state.read = args.labels[row] != args.ignore_index;
    return state;
  }

  int64_t kept_floats() const { return 0; }

  Partial measure(const Row& state, int64_t begin, int64_t end, float*) const {
    if (!state.read) return {};
    return measure_logits(args.logits, args.vocab, state.row, begin, end);
  }

  void fold(Row& state, const Partial& partial) const { fold_exp_sum(state.sum, partial, 1.f); }

  void measured(Row& state) const {
    const RowStats stats = state.read ? row_stats(state.sum) : kNoStats;
    const int64_t label = args.labels[state.row];
    double result = 0;
    if (state.read) {
      result = label >= 0 && label < args.vocab
                   ? log_prob(read_one(args.logits, state.row, label), stats)
                   : kNaN;
    }
    args.out[state.row] = static_cast<float>(result);
    if (args.stats != nullptr) args.stats[state.row] = stats;
  }

  void write(const Row&, int64_t, int64_t, const Partial&, const float*) const {}
  void finish(const Row&) const {}
};

struct Backward {
  const TokenLogProbsBackwardArgs& args;

  struct Row {
    SoftmaxGradient dense;
    float at_label;
  };
  struct Partial {};

  Row begin(int64_t row) const {
    const int64_t label = args.labels[row];
    const double grad = args.grad_out[row];
    Row state = {};
    state.dense.row = row;
    if (label == args.ignore_index) return state;
    if (label < 0 || label >= args.vocab || is_nan(args.stats[row].log_norm)) {
      state.dense.kind = SoftmaxGradient::kAllNaN;
      return state;
    }
    state.dense.kind = SoftmaxGradient::kScaled;
    state.dense.stats = args.stats[row];
    state.dense.factor = static_cast<float>(-grad);
    const double log_q = log_prob(read_one(args.logits, row, label), args.stats[row]);
    state.at_label = static_cast<float>(grad * -::expm1(log_q));
    return state;
  }

  int64_t kept_floats() const { return 0; }
  Partial measure(const Row&, int64_t, int64_t, float*) const { return {}; }
  void fold(Row&, const Partial&) const {}
  void measured(Row&) const {}

  void write(const Row& state, int64_t begin, int64_t end, const Partial&, const float*) const {
    write_softmax_gradient(state.dense, args.logits, args.vocab, args.grad_logits, begin, end);
  }

  void finish(const Row& state) const {
    if (state.dense.kind != SoftmaxGradient::kScaled) return;
    write_one(args.grad_logits, state.dense.row, args.labels[state.dense.row], state.at_label);
  }
};

}  // namespace

Status token_log_probs(const TokenLogProbsArgs& args, int threads) {
  return run_rows(Forward{args}, args.rows, args.vocab, threads);
}

Status token_log_probs_backward(const TokenLogProbsBackwardArgs& args, int threads) {
  return run_rows(Backward{args}, args.rows, args.logits.cols, threads);
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
