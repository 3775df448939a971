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

// The maximum; numbers that are not float32 go to `wide` as such.
template <DType kType>
inline float block_max(const char* x, int64_t n, float* wide) {
  Vec max[4] = {splat(-kLargest), splat(-kLargest), splat(-kLargest), splat(-kLargest)};
  const auto join = [&](Vec& joined, int64_t i, int lanes) MEMDEC_VECTOR_BODY {
    const Vec value = load_as<kType>(x, i, lanes, -kInfinity);
    if constexpr (kType != DType::kFloat32) store(wide + i, value, lanes);
    joined = vec_max(value, joined);  // NaN is lost here and found by the sum
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) join(max[j], i + j * kLanes, kLanes);
  }
  for (; i < n; i += kLanes) join(max[0], i, static_cast<int>(smaller<int64_t>(kLanes, n - i)));
  return horizontal_max(vec_max(vec_max(max[0], max[1]), vec_max(max[2], max[3])));
}

// `kept` gets the exponentials where kKeep, and may be x; inv_temperature counts where kScaled.
// `upcoming` is fetched into the cache, kBytes a column.
template <int kBytes, bool kScaled, bool kKeep, bool kHasMax>
inline void add_block(const float* x, int64_t n, float max, float inv_temperature,
                      const char* upcoming, float* kept, ExpSum& sum) {
  Vec tail = {};
  IntVec max_lanes = {};
  for_each_vector(n, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
    __builtin_prefetch(upcoming + i * kBytes);
    const Vec value = load(x + i, lanes, -kInfinity);
    const Vec term = vec_exp(kScaled ? (value - max) * inv_temperature : value - max);
    if constexpr (kKeep) store(kept + i, term, lanes);
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

template <DType kType, bool kScaled, bool kKeep>
inline ExpSum measure_columns(const char* x, int64_t n, float inv_temperature, float* kept) {
  constexpr int kBytes = kElementSize<kType>;
  ExpSum sum;
  ChunkBuffer buffer;
  float* const wide = kKeep ? kept : buffer.values;
  float maxima[kChunk / kBlock];
  for (int64_t from = 0; from < n; from += kBlock) {
    const float max = block_max<kType>(x + from * kBytes, smaller(kBlock, n - from), wide + from);
    maxima[from / kBlock] = max;
    sum.max = larger(sum.max, max);
  }
  const float* values = kType == DType::kFloat32 ? reinterpret_cast<const float*>(x) : wide;
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t count = smaller(kBlock, n - from);
    // Finding the maximum waits for memory, the sum does not and can fetch the next chunk. That may
    // lie beyond the row: it is never read.
    const char* upcoming = x + (from + kChunk) * kBytes;
    const auto add = maxima[from / kBlock] == sum.max ? add_block<kBytes, kScaled, kKeep, true>
                                                      : add_block<kBytes, kScaled, kKeep, false>;
    add(values + from, count, sum.max, inv_temperature, upcoming, kKeep ? kept + from : nullptr,
        sum);
  }
  return sum;
}

// Columns [begin, end) of a row, at most kChunk and none beyond its width. Where `kept` is not
// null it gets exp((x - max) * inv_temperature) of each, with the maximum of these columns.
inline ExpSum measure_exp_sum(const RowsView& view, int64_t row, int64_t begin, int64_t end,
                              float inv_temperature, float* kept = nullptr) {
  const char* x = row_address(view, row) + begin * element_size(view.dtype);
  ExpSum sum = with_dtype(view.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::kType;
    const auto plain = kept != nullptr ? measure_columns<kType, false, true>
                                       : measure_columns<kType, false, false>;
    const auto scaled =
        kept != nullptr ? measure_columns<kType, true, true> : measure_columns<kType, true, false>;
    const auto measure = inv_temperature == 1.f ? plain : scaled;
    return measure(x, end - begin, inv_temperature, kept);
  });
  sum.max_chunk = begin;
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
