// The maximum of a row and the sum of its exponentials, exact enough for 1 - q.
#pragma once

#include "cpu/rows.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {

// Columns whose exponentials are summed in float32 lanes before they join a double.
constexpr int64_t kBlock = 1024;

// Sums over some columns. The terms that equal the maximum are counted, not added: each is 1 and
// would swallow the others in float32.
struct ExpSum {
  float max = -kLargest;  // not -inf: x - max must not be NaN for x = -inf
  int64_t max_count = 0;
  int64_t max_chunk = 0;  // first column of the chunk that holds the first maximum
  double tail = 0;        // sum of exp((x - max) * inv_temperature) where x < max; NaN if any x is
};

template <bool kHasMax>
inline void add_block(const float* x, int64_t n, float max, float inv_temperature,
                      const Upcoming& next, int64_t next_column, ExpSum& sum) {
  Vec tail = {};
  IntVec max_lanes = {};
  for_each_vector(n, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
    next.prefetch(next_column + i);
    const Vec value = load(x + i, lanes, -kInfinity);
    const Vec term = vec_exp((value - max) * inv_temperature);
    if constexpr (kHasMax) {
      const IntVec is_max = value == max;
      max_lanes -= is_max;
      tail += where(~is_max, term);
    } else {
      tail += term;
    }
  });
  sum.tail += horizontal_sum(tail);
  if constexpr (kHasMax) {
    for (int i = 0; i < kLanes; ++i) sum.max_count += max_lanes[i];
  }
}

// n <= kChunk columns; `begin` is the first one's number and `next` what will be read after them:
// finding the maximum waits for memory, the sum does not and can fetch ahead.
inline ExpSum measure_exp_sum(const float* x, int64_t n, int64_t begin, float inv_temperature,
                              const Upcoming& next) {
  ExpSum sum;
  sum.max_chunk = begin;
  float block_max[kChunk / kBlock];
  for (int64_t block = 0; block * kBlock < n; ++block) {
    const float* from = x + block * kBlock;
    Vec max[4] = {splat(-kLargest), splat(-kLargest), splat(-kLargest), splat(-kLargest)};
    const int64_t count = smaller(kBlock, n - block * kBlock);
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) {
        // NaN is lost here and found by the sum.
        max[j] = vec_max(load(from + i + j * kLanes, kLanes), max[j]);
      }
    }
    for_each_vector(count - i, [&](int64_t rest, int lanes) MEMDEC_VECTOR_BODY {
      max[0] = vec_max(load(from + i + rest, lanes, -kInfinity), max[0]);
    });
    block_max[block] = horizontal_max(vec_max(vec_max(max[0], max[1]), vec_max(max[2], max[3])));
    sum.max = larger(sum.max, block_max[block]);
  }
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t count = smaller(kBlock, n - from);
    const auto add = block_max[from / kBlock] == sum.max ? add_block<true> : add_block<false>;
    add(x + from, count, sum.max, inv_temperature, next, from, sum);
  }
  return sum;
}

// Adds the columns of `next`, which follow those of `sum`.
inline void fold_exp_sum(ExpSum& sum, const ExpSum& next, float inv_temperature) {
  const ExpSum& high = next.max > sum.max ? next : sum;
  const ExpSum& low = next.max > sum.max ? sum : next;
  ExpSum joined = high;
  if (low.max == high.max) {
    joined.max_count += low.max_count;
    joined.tail += low.tail;
  } else {
    const double gap = static_cast<double>(low.max) - static_cast<double>(high.max);
    joined.tail += (low.tail + static_cast<double>(low.max_count)) * ::exp(gap * inv_temperature);
  }
  sum = joined;
}

// RowStats of a row that was not read, or that has no log-softmax.
constexpr RowStats kNoStats = {0.f, kNaN};

inline RowStats row_stats(const ExpSum& sum) {
  if (sum.max_count == 0 || sum.max == kInfinity || is_nan(sum.tail)) return kNoStats;
  const double others = sum.tail + static_cast<double>(sum.max_count - 1);
  return {sum.max, static_cast<float>(::log1p(others))};
}

// log-softmax of one logit.
inline double log_prob(float x, const RowStats& stats, float inv_temperature = 1.f) {
  const double gap = static_cast<double>(x) - static_cast<double>(stats.max);
  return gap * inv_temperature - static_cast<double>(stats.log_norm);
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
