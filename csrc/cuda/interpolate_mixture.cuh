// The mixture of two softmaxes: the log-probability of a token, given both logits.
#pragma once

#include <cfloat>

#include "cuda/interpolate_weights.cuh"
#include "cuda/row.cuh"

namespace memdec::cuda {

// Log of the mixture in float64, for a probability above a half: the log is small there, and made
// from 1 - p, so that 1 - p is right. At most one token of a row comes here.
static __device__ __noinline__ float mix_sure(float base_log_prob, float memory_log_prob,
                                              double lmbda) {
  return static_cast<float>(log1p((1.0 - lmbda) * expm1(static_cast<double>(base_log_prob)) +
                                  lmbda * expm1(static_cast<double>(memory_log_prob))));
}

// log(exp(a) + exp(b)) of the weighted log-probabilities of one token.
__device__ inline float mix(float base_log_prob, float memory_log_prob, const Weights& weights) {
  const float a = weights.log_base + base_log_prob;
  const float b = weights.log_memory + memory_log_prob;
  const float high = fmaxf(a, b);
  if (high == -INFINITY) return a + b;  // both have no mass; NaN stays NaN
  const float result = high + fast_log2(1.f + fast_exp2(-fabsf(a - b) * kLog2E)) * kLn2;
  return result > -kLn2 ? mix_sure(base_log_prob, memory_log_prob, weights.lmbda) : result;
}

// The results of a row, given its logits; a logit is -inf where its model has no column.
struct Mixture {
  Weights weights;
  RowStats base;
  RowStats memory;
  float inv_temperature;
  // For groups, in units of log 2: (x - origin) * scale + shift.
  struct Line {
    float origin = 0.f;
    float scale = 0.f;
    float shift = -INFINITY;  // a model without weight is -inf at every finite x

    Line() = default;
    __device__ Line(RowStats stats, float log_weight, float inv_temperature)
        : origin(stats.max),
          scale(inv_temperature * kLog2E),
          shift((log_weight - stats.log_norm) * kLog2E) {}
    __device__ float operator()(float x) const { return fmaf(x - origin, scale, shift); }
  };
  Line base_line;
  Line memory_line;

  Mixture() = default;
  __device__ Mixture(const Weights& weights, RowStats base, RowStats memory, float inv_temperature)
      : weights(weights), base(base), memory(memory), inv_temperature(inv_temperature) {
    if (weights.use_base) base_line = Line(base, weights.log_base, 1.f);
    if (weights.use_memory) memory_line = Line(memory, weights.log_memory, inv_temperature);
    if (!weights.valid) base_line.shift = NAN;
  }

  __device__ float operator()(float base_x, float memory_x) const {
    if (!weights.valid) return NAN;
    if (!weights.use_memory) return log_softmax(base_x, base, 1.f);
    if (!weights.use_base) return log_softmax(memory_x, memory, inv_temperature);
    return mix(log_softmax(base_x, base, 1.f), log_softmax(memory_x, memory, inv_temperature),
               weights);
  }

  // Whether the row is a distribution.
  __device__ bool exists() const {
    return weights.valid && !(weights.use_base && isnan(base.log_norm)) &&
           !(weights.use_memory && isnan(memory.log_norm));
  }

  __device__ bool both() const { return weights.use_base && weights.use_memory; }

  // Of a row that exists: a token's probability, to 2^-21; 0 below 2^-126. kBoth: both models
  // count.
  template <bool kBoth = false>
  __device__ float probability(float base_x, float memory_x) const {
    const float a = fast_exp2(base_line(base_x)), b = fast_exp2(memory_line(memory_x));
    return (kBoth || weights.use_base ? a : 0.f) + (kBoth || weights.use_memory ? b : 0.f);
  }

  // The same as log2; -FLT_MAX where there is no mass.
  template <bool kBoth = false>
  __device__ float level(float base_x, float memory_x) const {
    const float a = kBoth || weights.use_base ? base_line(base_x) : -INFINITY;
    // A finite number takes the place of -inf: two of them have no difference.
    const float b =
        fmaxf(kBoth || weights.use_memory ? memory_line(memory_x) : -INFINITY, -FLT_MAX);
    return fmaxf(a, b) + fast_log2(1.f + fast_exp2(-fabsf(a - b)));
  }

  // The same for a group, if its results are finite and below log(1/2), as nearly all are: then a
  // few instructions do. False when they are not: then each column wants the operator above. Of a
  // model without weight any finite logits will do.
  template <int kCount>
  __device__ bool group(const Values<kCount>& base_x, const Values<kCount>& memory_x,
                        Values<kCount>* result) const {
    bool usual = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float a = base_line(base_x[i]), b = memory_line(memory_x[i]);
      const float ratio = fast_exp2(-fabsf(a - b));
      result->x[i] = (fmaxf(a, b) + fast_log2(1.f + ratio)) * kLn2;
      usual = usual && result->x[i] <= -kLn2;  // false for NaN
    }
    return usual;
  }
};

}  // namespace memdec::cuda
