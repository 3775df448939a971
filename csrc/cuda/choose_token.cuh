// How a block chooses one of n weighted tokens. Weights are whole numbers of 64 bits, so that sums
// are exact: whatever adds them in whatever order finds the same token.
#pragma once

#include "cuda/softmax_sum.cuh"

namespace memdec::cuda {

// What temperature, top_k, top_p and min_p leave of a distribution.
struct Filters {
  float inv_temperature;  // 0: the greatest token
  int top_k;
  float top_p;
  float min_p;

  __device__ bool none(int n) const { return top_k >= n && top_p >= 1.f && min_p <= 0.f; }
};

constexpr int kCuts = 7;  // thresholds that a search tries at once

// Shared memory of the functions below; free again when one returns.
struct ChoiceScratch {
  uint64_t values[kMaxWarps][kCuts];
  uint64_t result[2];
};

// A weight in (0, 1] as a whole number: below 2^-44 of the greatest token nothing is drawn.
__device__ inline uint64_t whole_weight(float weight) {
  return static_cast<uint64_t>(weight * 0x1p44f);
}

__device__ inline uint64_t greater_of(uint64_t a, uint64_t b) { return a < b ? b : a; }

// The greatest of every thread's values, in every thread.
__device__ inline uint64_t block_max(uint64_t value, ChoiceScratch& scratch) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = greater_of(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (threadIdx.x % kWarpSize == 0) scratch.values[threadIdx.x / kWarpSize][0] = value;
  __syncthreads();
  uint64_t result = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
    result = greater_of(result, scratch.values[warp][0]);
  }
  __syncthreads();
  return result;
}

// Sums over the block, in every thread.
template <int kCount>
__device__ inline void block_sums(uint64_t (&sums)[kCount], ChoiceScratch& scratch) {
  static_assert(kCount <= kCuts, "there is room for no more");
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (threadIdx.x % kWarpSize == 0) scratch.values[threadIdx.x / kWarpSize][i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i] = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
      sums[i] += scratch.values[warp][i];
    }
  }
  __syncthreads();
}

// The sum over the threads before this one; `total` gets that over all.
__device__ inline uint64_t block_scan(uint64_t value, uint64_t* total, ChoiceScratch& scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint64_t through = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint64_t before = __shfl_up_sync(0xffffffffu, through, offset);
    if (lane >= offset) through += before;
  }
  if (lane == kWarpSize - 1) scratch.values[warp][0] = through;
  __syncthreads();
  uint64_t before = through - value;
  *total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) {
    if (w < warp) before += scratch.values[w][0];
    *total += scratch.values[w][0];
  }
  __syncthreads();
  return before;
}

// One of n things, and where in its weight the draw fell, from 0 to below it.
struct Picked {
  int index;
  uint64_t rest;
};

// The thing in whose weight `target` falls, when weights are laid side by side; target lies below
// their sum.
template <typename Weight>
__device__ inline Picked pick_at(int n, uint64_t target, ChoiceScratch& scratch, Weight&& weight) {
  const int threads = static_cast<int>(blockDim.x);
  const int each = (n + threads - 1) / threads;
  const int first = min(n, static_cast<int>(threadIdx.x) * each), end = min(n, first + each);
  uint64_t sum = 0, total;
  for (int i = first; i < end; ++i) sum += weight(i);
  uint64_t before = block_scan(sum, &total, scratch);
  if (before <= target && target < before + sum) {  // in one thread
    int i = first;
    for (; i < end - 1; ++i) {
      const uint64_t after = before + weight(i);
      if (target < after) break;
      before = after;
    }
    scratch.result[0] = i;
    scratch.result[1] = target - before;
  }
  __syncthreads();
  const Picked picked{static_cast<int>(scratch.result[0]), scratch.result[1]};
  __syncthreads();
  return picked;
}

// The sum of n weights.
template <typename Weight>
__device__ inline uint64_t sum_of(int n, ChoiceScratch& scratch, Weight&& weight) {
  uint64_t sums[1] = {0};
  for (int i = threadIdx.x; i < n; i += blockDim.x) sums[0] += weight(i);
  block_sums(sums, scratch);
  return sums[0];
}

// The lowest number that is kept when things are kept in falling order until their weights reach
// `wanted`: the greatest number, from `low` to `top`, for which the weights of all things whose
// order is not below it reach `wanted`; `low` if none does.
template <typename Order, typename Weight>
__device__ inline uint64_t find_cut(int n, uint64_t low, uint64_t top, uint64_t wanted,
                                    ChoiceScratch& scratch, Order&& order, Weight&& weight) {
  uint64_t high = top + 1;
  while (high - low > 1) {
    const uint64_t step = greater_of(1, (high - low) / (kCuts + 1));
    uint64_t reached[kCuts] = {};
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const uint64_t place = order(i);
      if (place <= low) continue;
      const uint64_t amount = weight(i);
#pragma unroll
      for (int cut = 0; cut < kCuts; ++cut) {
        if (place >= low + (cut + 1) * step) reached[cut] += amount;
      }
    }
    block_sums(reached, scratch);
    // reached[] falls: the last that suffices is the new `low`, the next one the new `high`.
    const uint64_t from = low;
    bool exact = false;
#pragma unroll
    for (int cut = 0; cut < kCuts; ++cut) {
      const uint64_t place = from + (cut + 1) * step;
      if (place >= high) continue;
      if (reached[cut] >= wanted) {
        low = place;
        exact = reached[cut] == wanted;
      } else {
        high = place;
      }
    }
    if (exact) break;
  }
  return low;
}

// Orders n things by their level, a float that may be -inf (then 0: never kept), ties by rising
// index.
struct Ordering {
  int n;
  int bits;

  __device__ explicit Ordering(int n) : n(n), bits(1) {
    while (n > 1 << bits) ++bits;
  }

  __device__ uint64_t operator()(float level, int index) const {
    if (level == -INFINITY) return 0;
    uint32_t key = __float_as_uint(level);
    key = key & 0x80000000u ? ~key : key | 0x80000000u;
    return static_cast<uint64_t>(key) << bits | static_cast<uint64_t>(n - 1 - index);
  }
  __device__ int index(uint64_t order) const {
    return n - 1 - static_cast<int>(order & ((1u << bits) - 1));
  }
  __device__ float level(uint64_t order) const {
    const uint32_t key = static_cast<uint32_t>(order >> bits);
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
  }
};

// Chooses one of n tokens by reading them as often as it takes; level(i) is log2 of a probability.
// Without filters tokens are laid side by side as they come, else by falling probability.
template <typename Level>
__device__ inline int choose(int n, const Filters& filters, uint64_t bits, ChoiceScratch& scratch,
                             Level&& level) {
  const Ordering ordering(n);
  uint64_t top = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    top = greater_of(top, ordering(level(i), i));
  }
  top = block_max(top, scratch);
  if (filters.inv_temperature == 0.f) return ordering.index(top);
  const float top_level = ordering.level(top);
  const auto order = [&](int i) { return ordering(level(i), i); };
  const auto softened = [&](int i) {
    return fast_exp2((level(i) - top_level) * filters.inv_temperature);
  };
  uint64_t cut = 1;
  if (filters.top_k < n) {
    cut = find_cut(n, cut, top, filters.top_k, scratch, order, [](int) { return 1; });
  }
  if (filters.top_p < 1.f) {
    const auto weight = [&](int i) { return order(i) >= cut ? whole_weight(softened(i)) : 0; };
    const uint64_t total = sum_of(n, scratch, weight);
    const auto wanted = static_cast<uint64_t>(ceil(static_cast<double>(filters.top_p) * total));
    cut = find_cut(n, cut, top, greater_of(1, wanted), scratch, order, weight);
  }
  const auto weight = [&](int i) {
    const float w = softened(i);
    return order(i) >= cut && w >= filters.min_p ? whole_weight(w) : 0;
  };
  const uint64_t target = __umul64hi(bits, sum_of(n, scratch, weight));
  if (filters.none(n)) return pick_at(n, target, scratch, weight).index;
  const uint64_t drawn = find_cut(n, cut, top, target + 1, scratch, order, weight);
  // The last token that is needed to pass the target.
  uint64_t lowest = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (order(i) >= drawn && weight(i) > 0) lowest = greater_of(lowest, ~order(i));
  }
  return ordering.index(~block_max(lowest, scratch));
}

}  // namespace memdec::cuda
