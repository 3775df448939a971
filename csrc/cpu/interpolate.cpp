// log((1 - lmbda) softmax(base) + lmbda softmax(memory / temperature)) and its gradients.
#include "common/kernels.h"
#include "cpu/row_stats.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {
namespace {

// The log of a weighted probability, log(weight) + log-softmax, is (x - max) * inv_temperature +
// offset. Where the weight is 0 the model is not read and counts as -inf everywhere.
struct Model {
  bool used = false;
  float max = 0.f;
  float inv_temperature = 1.f;
  float offset = 0.f;
  float log_norm = 0.f;
};

inline Model make_model(bool used, const RowStats& stats, float inv_temperature,
                        double log_weight) {
  if (!used) return {};
  const double offset = log_weight - static_cast<double>(stats.log_norm);
  return {used, stats.max, inv_temperature, static_cast<float>(offset), stats.log_norm};
}

MEMDEC_INLINE Vec weighted_log_prob(const Model& model, Vec x) {
  return (x - model.max) * model.inv_temperature + model.offset;
}

template <class Args>
inline float row_lmbda(const Args& args, int64_t row) {
  return args.lmbda_rows != nullptr ? args.lmbda_rows[row * args.lmbda_stride] : args.lmbda;
}

// Columns of the memory that take part.
template <class Args>
inline int64_t memory_limit(const Args& args) {
  return smaller(args.vocab, args.memory.cols);
}

// The first column of the chunk from `begin` that holds the row's maximum.
inline int64_t find_max(const RowsView& view, int64_t row, int64_t begin, int64_t limit,
                        float max) {
  ChunkBuffer buffer;
  const int64_t end = smaller(limit, begin + kChunk);
  const float* x = read_chunk(view, row, begin, end, limit, buffer);
  int64_t i = 0;
  while (begin + i + 1 < end && x[i] != max) ++i;
  return begin + i;
}

struct Forward {
  const InterpolateArgs& args;

  struct Row {
    int64_t row;
    float lmbda;
    bool valid;  // the result is not NaN
    Model base, memory;
    ExpSum base_sum, memory_sum;
  };
  struct Partial {
    ExpSum base, memory;
  };

  Row begin(int64_t row) const {
    Row state = {};
    state.row = row;
    state.lmbda = row_lmbda(args, row);
    state.valid = state.lmbda >= 0.f && state.lmbda <= 1.f;
    state.base.used = state.valid && state.lmbda < 1.f;
    state.memory.used = state.valid && state.lmbda > 0.f;
    return state;
  }

  // The exponentials of the base's columns, then of the memory's.
  int64_t kept_floats() const { return 2; }

  Partial measure(const Row& state, int64_t begin, int64_t end, float* kept) const {
    Partial partial;
    const bool keep = state.base.used && state.memory.used;
    const int64_t base_end = smaller(end, args.vocab);
    if (state.base.used && begin < base_end) {
      partial.base =
          measure_exp_sum(args.base, state.row, begin, base_end, 1.f, keep ? kept : nullptr);
    }
    kept += larger<int64_t>(0, base_end - begin);
    const int64_t memory_end = smaller(end, memory_limit(args));
    if (state.memory.used && begin < memory_end) {
      partial.memory = measure_exp_sum(args.memory, state.row, begin, memory_end,
                                       args.inv_temperature, keep ? kept : nullptr);
    }
    // What the memory lacks.
    for (int64_t column = larger(begin, memory_end); keep && column < base_end; ++column) {
      kept[column - begin] = 0.f;
    }
    return partial;
  }

  void fold(Row& state, const Partial& partial) const {
    fold_exp_sum(state.base_sum, partial.base, 1.f);
    fold_exp_sum(state.memory_sum, partial.memory, args.inv_temperature);
  }

  void measured(Row& state) const {
    const RowStats base = state.base.used ? row_stats(state.base_sum) : kNoStats;
    const RowStats memory = state.memory.used ? row_stats(state.memory_sum) : kNoStats;
    const double lmbda = state.lmbda;
    state.valid = state.valid && !(state.base.used && is_nan(base.log_norm)) &&
                  !(state.memory.used && is_nan(memory.log_norm));
    state.base = make_model(state.base.used, base, 1.f, ::log1p(-lmbda));
    state.memory = make_model(state.memory.used, memory, args.inv_temperature, ::log(lmbda));
    if (args.stats != nullptr) {
      args.stats[2 * state.row] = base;
      args.stats[2 * state.row + 1] = memory;
    }
  }

  void write(const Row& state, int64_t begin, int64_t end, const Partial& partial,
             const float* kept) const {
    const int64_t stop = larger(begin, smaller(end, args.vocab));
    if (!state.valid) {
      fill_chunk(args.out, state.row, begin, stop, kNaN);
      return fill_chunk(args.out, state.row, stop, end, -kInfinity);
    }
    ChunkBuffer buffer;
    float* out = chunk_target(args.out, state.row, begin, buffer);
    if (state.base.used && state.memory.used) {
      mix(state, partial, kept, begin, stop, out);
    } else {
      const Model& model = state.base.used ? state.base : state.memory;
      const float* x =
          state.base.used
              ? read_chunk(args.base, state.row, begin, stop, args.vocab, buffer)
              : read_chunk(args.memory, state.row, begin, stop, memory_limit(args), buffer);
      for_each_vector(stop - begin, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
        store(out + i, weighted_log_prob(model, load(x + i, lanes)), lanes);
      });
    }
    write_chunk(args.out, state.row, begin, stop, out);
    fill_chunk(args.out, state.row, stop, end, -kInfinity);
  }

  // Columns whose results are made again from the logits where one of them is too small.
  static constexpr int64_t kMixed = 512;
  // Below this, exponentials that were flushed to 0 may matter. Far above the smallest float32.
  static constexpr float kLeastProb = 1e-30f;

  void mix(const Row& state, const Partial& partial, const float* kept, int64_t begin, int64_t stop,
           float* out) const {
    const float base_scale = chunk_scale(state.base, partial.base);
    const float memory_scale = chunk_scale(state.memory, partial.memory);
    const float* const base = kept;
    const float* const memory = kept + (stop - begin);
    for (int64_t from = 0; from < stop - begin; from += kMixed) {
      const int64_t count = smaller(kMixed, stop - begin - from);
      Vec least = splat(1.f);
      for_each_vector(count, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
        const Vec prob = load(base + from + i, lanes, 1.f) * base_scale +
                         load(memory + from + i, lanes, 1.f) * memory_scale;
        least = vec_min(least, prob);
        store(out + from + i, vec_log(prob), lanes);
      });
      if (any(least < kLeastProb)) {
        mix_logs(state, begin + from, begin + from + count, out + from);
      }
    }
  }

  // What turns a chunk's exponentials into weighted probabilities.
  static float chunk_scale(const Model& model, const ExpSum& sum) {
    const double gap = static_cast<double>(sum.max) - static_cast<double>(model.max);
    return static_cast<float>(::exp(gap * model.inv_temperature + model.offset));
  }

  // From the logits, by the logs of the probabilities, which any of them has.
  void mix_logs(const Row& state, int64_t begin, int64_t end, float* out) const {
    ChunkBuffer base_buffer, memory_buffer;
    const float* base = read_chunk(args.base, state.row, begin, end, args.vocab, base_buffer);
    const float* memory =
        read_chunk(args.memory, state.row, begin, end, memory_limit(args), memory_buffer);
    for_each_vector(end - begin, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      const Vec b = weighted_log_prob(state.base, load(base + i, lanes));
      const Vec m = weighted_log_prob(state.memory, load(memory + i, lanes));
      const Vec high = vec_max(b, m);
      // -inf twice: the gap is -inf, not NaN, and the result -inf.
      const Vec gap = vec_min(b, m) - vec_max(splat(-kLargest), high);
      store(out + i, high + vec_log(1.f + vec_exp(gap)), lanes);
    });
  }

  // A token more probable than 1/2 in the mixture is so in one of the models, thus a maximum. Its
  // log is computed again from 1 - p, which the float32 sum of two logs rounds away.
  void finish(const Row& state) const {
    if (!state.valid || !state.base.used || !state.memory.used) return;
    const double lmbda = state.lmbda;
    const double bound = (1. - lmbda) * ::exp(-static_cast<double>(state.base.log_norm)) +
                         lmbda * ::exp(-static_cast<double>(state.memory.log_norm));
    if (bound < 0.5) return;
    write_exactly(state, find_max(args.base, state.row, state.base_sum.max_chunk, args.vocab,
                                  state.base.max));
    write_exactly(state, find_max(args.memory, state.row, state.memory_sum.max_chunk,
                                  memory_limit(args), state.memory.max));
  }

  void write_exactly(const Row& state, int64_t column) const {
    const RowStats base_stats = {state.base.max, state.base.log_norm};
    const RowStats memory_stats = {state.memory.max, state.memory.log_norm};
    const float x = read_one(args.base, state.row, column);
    double others = (1. - static_cast<double>(state.lmbda)) * -::expm1(log_prob(x, base_stats));
    if (column < memory_limit(args)) {
      const float y = read_one(args.memory, state.row, column);
      others += static_cast<double>(state.lmbda) *
                -::expm1(log_prob(y, memory_stats, args.inv_temperature));
    } else {
      others += static_cast<double>(state.lmbda);
    }
    if (others < 0.5) {
      write_one(args.out, state.row, column, static_cast<float>(::log1p(-others)));
    }
  }
};

// With r = (1 - lmbda) b / p and w = lmbda m / p, the shares of the two models in a column:
//   d/d base_j   = r_j g_j - b_j sum(r g)
//   d/d memory_j = (w_j g_j - m_j sum(w g)) / temperature
//   d/d lmbda    = sum(g (m - b) / p) = sum(w g) / lmbda - sum(r g) / (1 - lmbda)
struct Backward {
  const InterpolateBackwardArgs& args;

  // sum of share * g over a row. The terms at the model's maximum are apart: where its probability
  // is near 1 the gradient there is top * (1 - b) - b * rest, in which nothing cancels.
  struct ShareSum {
    double rest = 0;
    double top = 0;
    int64_t top_chunk = -1;  // first column of the chunk with the maximum
  };

  struct Row {
    int64_t row;
    float lmbda;
    bool lmbda_valid;
    bool base_valid, memory_valid;  // that model's gradient is not NaN
    Model base, memory;
    RowStats base_stats, memory_stats;
    ShareSum base_sum, memory_sum;
    double slope;  // d/d lmbda where lmbda is 0 or 1
  };
  struct Partial {
    ShareSum base, memory;
    double slope = 0;
  };

  bool at_end(const Row& state) const { return state.lmbda == 0.f || state.lmbda == 1.f; }

  RowStats measure_row(const RowsView& view, int64_t row, int64_t limit,
                       float inv_temperature) const {
    ExpSum sum;
    for (int64_t begin = 0; begin < limit; begin += kChunk) {
      const int64_t end = smaller(limit, begin + kChunk);
      const ExpSum next = measure_exp_sum(view, row, begin, end, inv_temperature);
      fold_exp_sum(sum, next, inv_temperature);
    }
    return row_stats(sum);
  }

  Row begin(int64_t row) const {
    Row state = {};
    state.row = row;
    const float l = state.lmbda = row_lmbda(args, row);
    state.lmbda_valid = l >= 0.f && l <= 1.f;
    state.base_stats = args.stats[2 * row];
    state.memory_stats = args.stats[2 * row + 1];
    // At lmbda 0 and 1 only the slope needs the model that forward did not read.
    if (args.grad_lmbda != nullptr && l == 1.f) {
      state.base_stats = measure_row(args.base, row, args.vocab, 1.f);
    }
    if (args.grad_lmbda != nullptr && l == 0.f) {
      state.memory_stats = measure_row(args.memory, row, memory_limit(args), args.inv_temperature);
    }
    const double lmbda = l;
    state.base = make_model(l < 1.f, state.base_stats, 1.f, ::log1p(-lmbda));
    state.memory = make_model(l > 0.f, state.memory_stats, args.inv_temperature, ::log(lmbda));
    const bool result_valid = state.lmbda_valid &&
                              !(state.base.used && is_nan(state.base_stats.log_norm)) &&
                              !(state.memory.used && is_nan(state.memory_stats.log_norm));
    state.base_valid = result_valid || (state.lmbda_valid && !state.base.used);
    state.memory_valid = result_valid || (state.lmbda_valid && !state.memory.used);
    return state;
  }

  // Float32 columns [begin, end) of both models and of grad_out; a model of weight 0 is -inf.
  struct Columns {
    Columns(const InterpolateBackwardArgs& args, const Row& state, int64_t begin, int64_t end)
        : base(read_chunk(args.base, state.row, begin, end, state.base.used ? args.vocab : 0,
                          buffers[0])),
          memory(read_chunk(args.memory, state.row, begin, end,
                            state.memory.used ? memory_limit(args) : 0, buffers[1])),
          grad(read_chunk(args.grad_out, state.row, begin, end, args.vocab, buffers[2])) {}
    ChunkBuffer buffers[3];
    const float* base;
    const float* memory;
    const float* grad;
  };

  struct Shares {
    Vec base, memory;  // r and w
    Vec x, y, grad;    // logits and grad_out, 0 where the mixture has no mass
  };

  static MEMDEC_INLINE Shares shares(const Row& state, const Columns& columns, int64_t i,
                                     int lanes) {
    Shares result;
    result.x = load(columns.base + i, lanes, -kInfinity);
    result.y = load(columns.memory + i, lanes, -kInfinity);
    const Vec b = weighted_log_prob(state.base, result.x);
    const Vec m = weighted_log_prob(state.memory, result.y);
    const Vec high = vec_max(b, m);
    const Vec ratio = vec_exp(vec_min(b, m) - vec_max(splat(-kLargest), high));
    const IntVec alive = high > -kInfinity;
    const Vec large = where(alive, 1.f / (1.f + ratio));
    const Vec small = ratio * large;
    result.base = b >= m ? large : small;
    result.memory = b >= m ? small : large;
    result.grad = where(alive, load(columns.grad + i, lanes));
    return result;
  }

  int64_t kept_floats() const { return 0; }

  Partial measure(const Row& state, int64_t begin, int64_t end, float*) const {
    Partial partial;
    end = smaller(end, args.vocab);
    if (begin >= end) return partial;
    if (state.base_valid && state.memory_valid) {
      const Columns columns(args, state, begin, end);
      for (int64_t block = 0; block < end - begin; block += kBlock) {
        Vec base_rest = {}, base_top = {}, memory_rest = {}, memory_top = {};
        IntVec has_base_max = {}, has_memory_max = {};
        for_each_vector(smaller(kBlock, end - begin - block),
                        [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
                          const Shares s = shares(state, columns, block + i, lanes);
                          const Vec base_term = s.base * s.grad;
                          const Vec memory_term = s.memory * s.grad;
                          const IntVec base_max = s.x == state.base.max;
                          const IntVec memory_max = s.y == state.memory.max;
                          base_rest += where(~base_max, base_term);
                          base_top += where(base_max, base_term);
                          memory_rest += where(~memory_max, memory_term);
                          memory_top += where(memory_max, memory_term);
                          has_base_max |= base_max;
                          has_memory_max |= memory_max;
                        });
        partial.base.rest += horizontal_sum(base_rest);
        partial.base.top += horizontal_sum(base_top);
        partial.memory.rest += horizontal_sum(memory_rest);
        partial.memory.top += horizontal_sum(memory_top);
        if (any(has_base_max)) partial.base.top_chunk = begin;
        if (any(has_memory_max)) partial.memory.top_chunk = begin;
      }
    }
    if (args.grad_lmbda != nullptr && at_end(state)) partial.slope = slope(state, begin, end);
    return partial;
  }

  // sum of g (m - b) / p where p is one of the two.
  double slope(const Row& state, int64_t begin, int64_t end) const {
    ChunkBuffer buffers[3];
    const float* x = read_chunk(args.base, state.row, begin, end, args.vocab, buffers[0]);
    const float* y = read_chunk(args.memory, state.row, begin, end, memory_limit(args), buffers[1]);
    const float* g = read_chunk(args.grad_out, state.row, begin, end, args.vocab, buffers[2]);
    double sum = 0;
    for (int64_t i = 0; i < end - begin; ++i) {
      const double b = log_prob(x[i], state.base_stats);
      const double m = log_prob(y[i], state.memory_stats, args.inv_temperature);
      const double log_p = state.lmbda == 0.f ? b : m;
      if (log_p == -HUGE_VAL) continue;
      sum += static_cast<double>(g[i]) * (state.lmbda == 0.f ? ::expm1(m - b) : -::expm1(b - m));
    }
    return sum;
  }

  static void fold_share(ShareSum& sum, const ShareSum& next) {
    sum.rest += next.rest;
    sum.top += next.top;
    if (next.top_chunk >= 0) sum.top_chunk = next.top_chunk;
  }

  void fold(Row& state, const Partial& partial) const {
    fold_share(state.base_sum, partial.base);
    fold_share(state.memory_sum, partial.memory);
    state.slope += partial.slope;
  }

  void measured(Row& state) const {
    if (args.grad_lmbda == nullptr) return;
    const double lmbda = state.lmbda;
    double result = state.slope;
    if (!state.base_valid || !state.memory_valid) {
      result = kNaN;
    } else if (!at_end(state)) {
      result = (state.memory_sum.rest + state.memory_sum.top) / lmbda -
               (state.base_sum.rest + state.base_sum.top) / (1. - lmbda);
    }
    args.grad_lmbda[state.row] = static_cast<float>(result);
  }

  void write(const Row& state, int64_t begin, int64_t end, const Partial&, const float*) const {
    const int64_t base_stop = write_special(args.grad_base, state.row, begin, end, args.vocab,
                                            state.base.used, state.base_valid);
    const int64_t memory_stop =
        write_special(args.grad_memory, state.row, begin, end, memory_limit(args),
                      state.memory.used, state.memory_valid);
    const int64_t stop = larger(base_stop, memory_stop);
    if (stop <= begin) return;

    const Columns columns(args, state, begin, stop);
    ChunkBuffer base_buffer, memory_buffer;
    float* grad_base = base_stop > begin
                           ? chunk_target(args.grad_base, state.row, begin, base_buffer)
                           : base_buffer.values;
    float* grad_memory = memory_stop > begin
                             ? chunk_target(args.grad_memory, state.row, begin, memory_buffer)
                             : memory_buffer.values;
    const float base_total = static_cast<float>(state.base_sum.rest + state.base_sum.top);
    const float memory_total = static_cast<float>(state.memory_sum.rest + state.memory_sum.top);
    const auto base_gradient = [&](const Shares& s) MEMDEC_VECTOR_BODY {
      const Vec b = vec_exp((s.x - state.base.max) - state.base.log_norm);
      return s.base * s.grad - b * base_total;
    };
    const auto memory_gradient = [&](const Shares& s) MEMDEC_VECTOR_BODY {
      const Vec m =
          vec_exp((s.y - state.memory.max) * state.memory.inv_temperature - state.memory.log_norm);
      return (s.memory * s.grad - m * memory_total) * state.memory.inv_temperature;
    };
    const int64_t both = smaller(base_stop, memory_stop) - begin;
    for_each_vector(both, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      const Shares s = shares(state, columns, i, lanes);
      store(grad_base + i, base_gradient(s), lanes);
      store(grad_memory + i, memory_gradient(s), lanes);
    });
    for_each_vector(base_stop - begin - both, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      store(grad_base + both + i, base_gradient(shares(state, columns, both + i, lanes)), lanes);
    });
    for_each_vector(memory_stop - begin - both, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      const Shares s = shares(state, columns, both + i, lanes);
      store(grad_memory + both + i, memory_gradient(s), lanes);
    });
    if (base_stop > begin) write_chunk(args.grad_base, state.row, begin, base_stop, grad_base);
    if (memory_stop > begin) {
      write_chunk(args.grad_memory, state.row, begin, memory_stop, grad_memory);
    }
  }

  // Writes the columns of [begin, end) whose gradient is 0 or NaN; returns where the others, which
  // come first, end.
  static int64_t write_special(const RowsView& grad, int64_t row, int64_t begin, int64_t end,
                               int64_t limit, bool used, bool valid) {
    if (grad.data == nullptr) return begin;
    end = smaller(end, grad.cols);
    if (begin >= end) return begin;
    const int64_t real = larger(begin, smaller(end, limit));  // from there on is padding
    fill_chunk(grad, row, real, end, 0.f);
    if (used && valid) return real;
    fill_chunk(grad, row, begin, real, valid ? 0.f : kNaN);
    return begin;
  }

  void finish(const Row& state) const {
    if (!state.base_valid || !state.memory_valid) return;
    rewrite_top(args.grad_base, args.base, args.vocab, state.row, state.base, state.base_sum);
    rewrite_top(args.grad_memory, args.memory, memory_limit(args), state.row, state.memory,
                state.memory_sum);
  }

  static void rewrite_top(const RowsView& grad, const RowsView& logits, int64_t limit, int64_t row,
                          const Model& model, const ShareSum& sum) {
    const double log_q = -static_cast<double>(model.log_norm);
    if (grad.data == nullptr || !model.used || sum.top_chunk < 0 || ::exp(log_q) <= 0.5) return;
    const int64_t column = find_max(logits, row, sum.top_chunk, limit, model.max);
    const double value = sum.top * -::expm1(log_q) - sum.rest * ::exp(log_q);
    write_one(grad, row, column, static_cast<float>(value * model.inv_temperature));
  }
};

}  // namespace

Status interpolate(const InterpolateArgs& args, int threads) {
  return run_rows(Forward{args}, args.rows, args.base.cols, threads);
}

Status interpolate_backward(const InterpolateBackwardArgs& args, int threads) {
  return run_rows(Backward{args}, args.rows, larger(args.base.cols, args.memory.cols), threads);
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
