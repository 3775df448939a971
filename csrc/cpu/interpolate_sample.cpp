// A token drawn from the mixture of two softmaxes: a row's log-probabilities stay in the cache of
// the thread that chooses from them.
#include "common/kernels.h"
#include "common/sampling.h"
#include "cpu/choose_token.h"
#include "cpu/rows.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {

Status interpolate(const InterpolateArgs& args, int threads);

namespace {

// What a thread needs for a row.
struct Workspace {
  Scratch<float> log_probs;
  Scratch<float> weights;
  Scratch<int32_t> ids;

  explicit Workspace(int64_t vocab) : log_probs(vocab), weights(vocab), ids(vocab) {}
  bool there() const {
    return log_probs.data() != nullptr && weights.data() != nullptr && ids.data() != nullptr;
  }
};

RowsView one_row(const RowsView& view, int64_t row) {
  RowsView one = view;
  one.data = row_address(view, row);
  return one;
}

float max_of(const float* x, int64_t n) {
  Vec max = splat(-kInfinity);
  for_each_vector(n, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
    max = vec_max(load(x + i, lanes, -kInfinity), max);
  });
  return horizontal_max(max);
}

int64_t first_of(const float* x, int64_t n, float value) {
  int64_t i = 0;
  while (i + 1 < n && x[i] != value) ++i;
  return i;
}

void sample_row(const InterpolateSampleArgs& args, int64_t row, const Workspace& space,
                int threads) {
  float* const log_probs = space.log_probs.data();
  const int64_t vocab = args.vocab;
  InterpolateArgs mixture;
  mixture.rows = 1;
  mixture.base = one_row(args.base, row);
  mixture.base.cols = vocab;
  mixture.memory = one_row(args.memory, row);
  mixture.vocab = vocab;
  mixture.lmbda =
      args.lmbda_rows != nullptr ? args.lmbda_rows[row * args.lmbda_stride] : args.lmbda;
  mixture.inv_temperature = args.inv_temperature;
  mixture.out = {log_probs, DType::kFloat32, vocab, 1, 0, 0};
  interpolate(mixture, threads);

  int64_t token = 0;  // also of a row that is no distribution: every value is NaN
  if (!is_nan(log_probs[0])) {
    const float max = max_of(log_probs, vocab);
    if (args.temperature == 0.f) {
      token = first_of(log_probs, vocab, max);
    } else {
      float* const weights = space.weights.data();
      for_each_vector(vocab, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
        const Vec gap = load(log_probs + i, lanes, -kInfinity) - max;
        store(weights + i, vec_exp(gap / args.temperature), lanes);
      });
      token = choose_token(log_probs, weights, vocab, args, random_bits(args.seeds[row]),
                           space.ids.data());
    }
  }
  args.tokens[row] = token;
  args.log_probs[row] = log_probs[token];
}

}  // namespace

Status interpolate_sample(const InterpolateSampleArgs& args, int threads) {
  bool there = true;
  if (args.rows < threads) {  // threads share each row
    const Workspace space(args.vocab);
    there = space.there();
    for (int64_t row = 0; there && row < args.rows; ++row) sample_row(args, row, space, threads);
  } else {
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : there)
    {
      const Workspace space(args.vocab);
      there = space.there();
#pragma omp for schedule(dynamic)
      for (int64_t row = 0; row < args.rows; ++row) {
        if (there) sample_row(args, row, space, 1);
      }
    }
  }
  return there ? Status{} : Status{"not enough memory for a row of the vocabulary"};
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
