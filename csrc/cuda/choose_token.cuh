// How a block chooses one of n weighted tokens. Weights are whole numbers of 64 bits, so that sums
// are exact: whatever adds them in whatever order finds the same token.
#pragma once

#include <cfloat>

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

// One of many things, and where in its weight the draw fell.
struct Picked {
  int index;  // -1: they have no weight
  uint64_t rest;
  uint64_t weight;
};

// Shared memory of the functions below; free again when one returns.
struct ChoiceScratch {
  uint64_t values[kMaxWarps][kCuts];
  int counts[2][kMaxWarps];
  Picked result;
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

// The thing in whose weight `target_of(sum of all weights)`, a number below that sum, falls when
// weights are laid side by side. Each thread brings the next kEach of them.
template <int kEach, typename Target>
__device__ inline Picked pick(const uint64_t (&weights)[kEach], ChoiceScratch& scratch,
                              Target&& target_of) {
  uint64_t sum = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += weights[i];
  uint64_t before = block_scan(sum, &total, scratch);
  if (total == 0) return {-1, 0, 0};
  const uint64_t target = target_of(total);
  if (before <= target && target < before + sum) {  // in one thread
    bool found = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!found && target < before + weights[i]) {
        scratch.result = {static_cast<int>(threadIdx.x) * kEach + i, target - before, weights[i]};
        found = true;
      }
      before += weights[i];
    }
  }
  __syncthreads();
  const Picked picked = scratch.result;
  __syncthreads();
  return picked;
}

// The same for n weights that the threads look up.
template <typename Weight, typename Target>
__device__ inline int pick_of(int n, ChoiceScratch& scratch, Weight&& weight, Target&& target_of) {
  const int threads = static_cast<int>(blockDim.x);
  const int each = (n + threads - 1) / threads;
  const int first = min(n, static_cast<int>(threadIdx.x) * each), end = min(n, first + each);
  uint64_t sums[1] = {0};
  for (int i = first; i < end; ++i) sums[0] += weight(i);
  const Picked picked = pick(sums, scratch, target_of);
  if (static_cast<int>(threadIdx.x) == picked.index) {
    uint64_t before = 0;
    int i = first;
    for (; i < end - 1; ++i) {
      before += weight(i);
      if (picked.rest < before) break;
    }
    scratch.result.index = i;
  }
  __syncthreads();
  const int index = picked.index < 0 ? -1 : scratch.result.index;
  __syncthreads();
  return index;
}

// The sum of n weights.
template <typename Weight>
__device__ inline uint64_t sum_of(int n, ChoiceScratch& scratch, Weight&& weight) {
  uint64_t sums[1] = {0};
  for (int i = threadIdx.x; i < n; i += blockDim.x) sums[0] += weight(i);
  block_sums(sums, scratch);
  return sums[0];
}

// The k-th greatest of all threads' numbers, none below 0, or somewhat less if no more of them
// reach that; 0 if there are fewer.
template <int kEach>
__device__ inline float floor_of_top(const float (&values)[kEach], int k, ChoiceScratch& scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  uint32_t floor = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t next = floor | 1u << bit;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) count += __float_as_uint(values[i]) >= next;
    count = __reduce_add_sync(0xffffffffu, count);
    int* const counts = scratch.counts[bit & 1];  // the other one may still be read
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    count = __reduce_add_sync(0xffffffffu, lane < warps ? counts[lane] : 0);
    if (count >= k) floor = next;
    if (count == k) break;
  }
  __syncthreads();
  return __uint_as_float(floor);
}

// Calls f(i, level(i)) for the things of this thread; several levels are looked up at a time.
template <typename Level, typename F>
__device__ inline void for_each_level(int n, const Level& level, F&& f) {
  constexpr int kTogether = 8;
  const int threads = static_cast<int>(blockDim.x);
  for (int first = threadIdx.x; first < n; first += kTogether * threads) {
    float levels[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) levels[t] = level(min(first + t * threads, n - 1));
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      if (first + t * threads < n) f(first + t * threads, levels[t]);
    }
  }
}

// Where a thing stands when things are ordered, and its weight.
struct Placed {
  uint64_t order;
  uint64_t weight;
};

// The lowest number that is kept when things are kept in falling order until their weights reach
// `wanted`: the greatest number, from `low` to `top`, for which the weights of all things whose
// order is not below it reach `wanted`; `low` if none does.
template <typename Level, typename PlaceOf>
__device__ inline uint64_t find_cut(int n, uint64_t low, uint64_t top, uint64_t wanted,
                                    ChoiceScratch& scratch, const Level& level,
                                    PlaceOf&& place_of) {
  uint64_t high = top + 1;
  while (high - low > 1) {
    const uint64_t step = greater_of(1, (high - low) / (kCuts + 1));
    uint64_t reached[kCuts] = {};
    for_each_level(n, level, [&](int i, float x) {
      const Placed thing = place_of(i, x);
#pragma unroll
      for (int cut = 0; cut < kCuts; ++cut) {
        if (thing.order >= low + (cut + 1) * step) reached[cut] += thing.weight;
      }
    });
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

// Orders n things by their level, a float that is -FLT_MAX for none (then 0: never kept), ties by
// rising index.
struct Ordering {
  int n;
  int bits;

  __device__ explicit Ordering(int n) : n(n), bits(1) {
    while (n > 1 << bits) ++bits;
  }

  __device__ uint64_t operator()(float level, int index) const {
    if (level <= -FLT_MAX) return 0;
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

// Chooses one of n tokens by reading them as often as it takes; level(i) is log2 of a probability,
// -FLT_MAX for none. Without filters tokens are laid side by side as they come, else by falling
// probability.
template <typename Level>
__device__ __noinline__ int choose(int n, const Filters& filters, uint64_t bits,
                                   ChoiceScratch& scratch, const Level& level) {
  const Ordering ordering(n);
  uint64_t top = 0;
  for_each_level(n, level, [&](int i, float x) { top = greater_of(top, ordering(x, i)); });
  top = block_max(top, scratch);
  if (filters.inv_temperature == 0.f) return ordering.index(top);
  const float top_level = ordering.level(top);
  uint64_t cut = 1;
  const auto place_of = [&](int i, float x) -> Placed {
    const float weight = fast_exp2((x - top_level) * filters.inv_temperature);
    const uint64_t order = ordering(x, i);
    return {order, order >= cut ? whole_weight(weight) : 0};
  };
  const auto sum = [&](const auto& place_of) {
    uint64_t sums[1] = {0};
    for_each_level(n, level, [&](int i, float x) { sums[0] += place_of(i, x).weight; });
    block_sums(sums, scratch);
    return sums[0];
  };
  if (filters.top_k < n) {
    cut = find_cut(n, cut, top, filters.top_k, scratch, level,
                   [&](int i, float x) -> Placed { return {ordering(x, i), 1}; });
  }
  if (filters.top_p < 1.f) {
    const double nucleus = ceil(static_cast<double>(filters.top_p) * sum(place_of));
    const uint64_t wanted = greater_of(1, static_cast<uint64_t>(nucleus));
    cut = find_cut(n, cut, top, wanted, scratch, level, place_of);
  }
  const auto least = static_cast<uint64_t>(filters.min_p * 0x1p44f);
  const auto kept = [&](int i, float x) -> Placed {
    const Placed thing = place_of(i, x);
    return {thing.order, thing.weight >= least ? thing.weight : 0};
  };
  const auto target_of = [&](uint64_t total) { return __umul64hi(bits, total); };
  if (filters.none(n)) {
    return pick_of(n, scratch, [&](int i) { return kept(i, level(i)).weight; }, target_of);
  }
  const uint64_t target = target_of(sum(kept));
  const uint64_t drawn = find_cut(n, cut, top, target + 1, scratch, level, kept);
  // The last token that is needed to pass the target.
  uint64_t lowest = 0;
  for_each_level(n, level, [&](int i, float x) {
    const Placed thing = kept(i, x);
    if (thing.order >= drawn && thing.weight > 0) lowest = greater_of(lowest, ~thing.order);
  });
  return ordering.index(~block_max(lowest, scratch));
}

}  // namespace memdec::cuda
