// How a team of threads chooses one of n weighted tokens. Weights are whole numbers of 64 bits, so
// that sums are exact: whatever adds them in whatever order finds the same token, be the team one
// block or sixteen. Every thread of a team calls these functions, and gets the same result.
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

constexpr int kBins = 1024;            // of weights, by their logarithm
constexpr float kBinsAnOctave = 32.f;  // so that a bin holds few of many tokens
constexpr int kMaxCandidates = 2048;

// Shared memory of the functions below; free again when one returns, but for the candidates. What
// other blocks of the team write here they write before a sync() and after the one that ends the
// use before.
struct ChoiceScratch {
  uint64_t bins[kBins];
  uint64_t candidates[kMaxCandidates];  // orders (Ordering) of some tokens
  int count;                            // of candidates: more than there is room for are not kept
  uint64_t values[kMaxWarps][kCuts];
  uint64_t shares[kMaxClusterBlocks][kCuts];  // what each block of the team found
  int counts[2][kMaxWarps];
  Picked result;
  uint64_t last;
};

// A weight in (0, 1] as a whole number: below 2^-44 of the greatest token nothing is drawn.
__device__ inline uint64_t whole_weight(float weight) {
  return static_cast<uint64_t>(weight * 0x1p44f);
}

__device__ inline uint64_t greater_of(uint64_t a, uint64_t b) { return a < b ? b : a; }

// Puts numbers that all threads of this block have into shares[rank] of every block. A sync() has
// to end their use.
template <int kCount>
__device__ inline void share(const Team& team, const uint64_t (&numbers)[kCount],
                             ChoiceScratch& scratch) {
  const int block = static_cast<int>(threadIdx.x);
  if (block < team.blocks) {
    ChoiceScratch& there = team.at(scratch, block);
#pragma unroll
    for (int i = 0; i < kCount; ++i) there.shares[team.rank][i] = numbers[i];
  }
  team.sync();
}

// The greatest of every thread's values.
__device__ inline uint64_t team_max(const Team& team, uint64_t value, ChoiceScratch& scratch) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = greater_of(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (threadIdx.x % kWarpSize == 0) scratch.values[threadIdx.x / kWarpSize][0] = value;
  __syncthreads();
  uint64_t result[1] = {0};
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
    result[0] = greater_of(result[0], scratch.values[warp][0]);
  }
  __syncthreads();
  if (team.blocks > 1) {
    share(team, result, scratch);
    for (int block = 0; block < team.blocks; ++block) {
      result[0] = greater_of(result[0], scratch.shares[block][0]);
    }
    team.sync();
  }
  return result[0];
}

// Sums over the team.
template <int kCount>
__device__ inline void team_sums(const Team& team, uint64_t (&sums)[kCount],
                                 ChoiceScratch& scratch) {
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
  if (team.blocks > 1) {
    share(team, sums, scratch);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[i] = 0;
      for (int block = 0; block < team.blocks; ++block) sums[i] += scratch.shares[block][i];
    }
    team.sync();
  }
}

// The sum over the threads before this one; `total` gets that over all.
__device__ inline uint64_t team_scan(const Team& team, uint64_t value, uint64_t* total,
                                     ChoiceScratch& scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint64_t through = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint64_t before = __shfl_up_sync(0xffffffffu, through, offset);
    if (lane >= offset) through += before;
  }
  if (lane == kWarpSize - 1) scratch.values[warp][0] = through;
  __syncthreads();
  uint64_t before = through - value, sum[1] = {0};
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) {
    if (w < warp) before += scratch.values[w][0];
    sum[0] += scratch.values[w][0];
  }
  __syncthreads();
  if (team.blocks > 1) {
    share(team, sum, scratch);
    sum[0] = 0;
    for (int block = 0; block < team.blocks; ++block) {
      if (block < team.rank) before += scratch.shares[block][0];
      sum[0] += scratch.shares[block][0];
    }
    team.sync();
  }
  *total = sum[0];
  return before;
}

// Puts `picked` into the result of every block; by one thread.
__device__ inline void put_result(const Team& team, const Picked& picked, ChoiceScratch& scratch) {
  for (int block = 0; block < team.blocks; ++block) team.at(scratch.result, block) = picked;
}

// The thing in whose weight `target_of(sum of all weights)`, a number below that sum, falls when
// weights are laid side by side. Each thread brings the next kEach of them.
template <int kEach, typename Target>
__device__ inline Picked pick(const Team& team, const uint64_t (&weights)[kEach],
                              ChoiceScratch& scratch, Target&& target_of) {
  uint64_t sum = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += weights[i];
  uint64_t before = team_scan(team, sum, &total, scratch);
  if (total == 0) return {-1, 0, 0};
  const uint64_t target = target_of(total);
  if (before <= target && target < before + sum) {  // in one thread
    bool found = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!found && target < before + weights[i]) {
        put_result(team, {team.thread() * kEach + i, target - before, weights[i]}, scratch);
        found = true;
      }
      before += weights[i];
    }
  }
  team.sync();
  const Picked picked = scratch.result;
  team.sync();
  return picked;
}

// The same for n weights that the threads look up.
template <typename Weight, typename Target>
__device__ inline Picked pick_of(const Team& team, int n, ChoiceScratch& scratch, Weight&& weight,
                                 Target&& target_of) {
  const int each = (n + team.threads() - 1) / team.threads();
  const int first = min(n, team.thread() * each), end = min(n, first + each);
  uint64_t sums[1] = {0};
  for (int i = first; i < end; ++i) sums[0] += weight(i);
  const Picked share = pick(team, sums, scratch, target_of);  // the thread's
  if (share.index < 0) return share;
  if (team.thread() == share.index) {
    uint64_t before = 0;
    for (int i = first; i < end; ++i) {
      const uint64_t of_thing = weight(i);
      if (share.rest < before + of_thing) {
        put_result(team, {i, share.rest - before, of_thing}, scratch);
        break;
      }
      before += of_thing;
    }
  }
  team.sync();
  const Picked picked = scratch.result;
  team.sync();
  return picked;
}

// The sum of n weights.
template <typename Weight>
__device__ inline uint64_t sum_of(const Team& team, int n, ChoiceScratch& scratch,
                                  Weight&& weight) {
  uint64_t sums[1] = {0};
  for (int i = team.thread(); i < n; i += team.threads()) sums[0] += weight(i);
  team_sums(team, sums, scratch);
  return sums[0];
}

// The k-th greatest of the numbers of a block's threads, none below 0, or somewhat less if no more
// of them reach that; 0 if there are fewer.
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
__device__ inline void for_each_level(const Team& team, int n, const Level& level, F&& f) {
  constexpr int kTogether = 8;
  const int threads = team.threads();
  for (int first = team.thread(); first < n; first += kTogether * threads) {
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
__device__ inline uint64_t find_cut(const Team& team, int n, uint64_t low, uint64_t top,
                                    uint64_t wanted, ChoiceScratch& scratch, const Level& level,
                                    PlaceOf&& place_of) {
  uint64_t high = top + 1;
  while (high - low > 1) {
    const uint64_t step = greater_of(1, (high - low) / (kCuts + 1));
    uint64_t reached[kCuts] = {};
    for_each_level(team, n, level, [&](int i, float x) {
      const Placed thing = place_of(i, x);
#pragma unroll
      for (int cut = 0; cut < kCuts; ++cut) {
        if (thing.order >= low + (cut + 1) * step) reached[cut] += thing.weight;
      }
    });
    team_sums(team, reached, scratch);
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

// Sorts the candidates, falling; by the whole block, which has put them there.
__device__ inline void sort_candidates(ChoiceScratch& scratch) {
  uint64_t* orders = scratch.candidates;
  int size = 2;
  while (size < scratch.count) size *= 2;
  for (int i = scratch.count + threadIdx.x; i < size; i += blockDim.x) orders[i] = 0;
  __syncthreads();
  for (int width = 2; width <= size; width *= 2) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (distance - 1)), high = low + distance;
        const uint64_t a = orders[low], b = orders[high];
        const bool falling = (low & width) == 0;
        if ((a < b) == falling) {
          orders[low] = b;
          orders[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Adds to a number in shared memory, in two halves: of 64 bits the atomic addition is a loop.
__device__ inline void add_weight(uint64_t& sum, uint64_t weight) {
  auto* halves = reinterpret_cast<uint32_t*>(&sum);
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&halves[0], low);
  const uint32_t carry = before + low < low ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high > 0) atomicAdd(&halves[1], high);
}

// Adds up the bins of all blocks, in every block. The same thread reads a bin everywhere and then
// writes it everywhere.
__device__ inline void merge_bins(const Team& team, ChoiceScratch& scratch) {
  team.sync();  // every weight is in its bin
  if (team.blocks == 1) return;
  const int each = kBins / team.blocks;
  for (int i = threadIdx.x; i < each; i += static_cast<int>(blockDim.x)) {
    uint64_t& bin = scratch.bins[team.rank * each + i];
    uint64_t sum = 0;
#pragma unroll 4
    for (int block = 0; block < team.blocks; ++block) sum += team.at(bin, block);
    for (int block = 0; block < team.blocks; ++block) team.at(bin, block) = sum;
  }
  team.sync();  // every bin is written before any is read
}

__device__ inline void add_candidate(ChoiceScratch& scratch, uint64_t order) {
  const int place = atomicAdd(&scratch.count, 1);
  if (place < kMaxCandidates) scratch.candidates[place] = order;
}

// Appends the other blocks' candidates, shares[block][0] of each, to those of the first block,
// which calls this.
__device__ inline void gather_candidates(const Team& team, ChoiceScratch& scratch) {
  int count = scratch.count;
  for (int block = 1; block < team.blocks; ++block) {
    const uint64_t* theirs = team.at(scratch, block).candidates;
    const int more = static_cast<int>(scratch.shares[block][0]);
    for (int i = threadIdx.x; i < more; i += static_cast<int>(blockDim.x)) {
      scratch.candidates[count + i] = theirs[i];
    }
    count += more;
  }
  __syncthreads();  // every thread has read the count
  if (threadIdx.x == 0) scratch.count = count;
  __syncthreads();
}

// The order of the last thing that is kept when things are kept in falling order until their
// weights reach `wanted`, which all of them together do. place_of(i, level) says where a thing
// stands; equal levels have equal weights, or 0.
template <typename Level, typename PlaceOf>
__device__ inline uint64_t last_kept(const Team& team, const Ordering& ordering, uint64_t top,
                                     uint64_t wanted, float inv_temperature, ChoiceScratch& scratch,
                                     const Level& level, const PlaceOf& place_of) {
  const int n = ordering.n;
  const float top_level = ordering.level(top);
  const auto bin_of = [&](float x) {
    const float octaves = (top_level - x) * inv_temperature;
    return static_cast<int>(fminf(octaves * kBinsAnOctave, kBins - 1.f));
  };
  for (int bin = threadIdx.x; bin < kBins; bin += static_cast<int>(blockDim.x)) {
    scratch.bins[bin] = 0;
  }
  if (threadIdx.x == 0) scratch.count = 0;
  __syncthreads();  // the bins are empty before anything is added
  for_each_level(team, n, level, [&](int i, float x) {
    const uint64_t weight = place_of(i, x).weight;
    if (weight > 0) add_weight(scratch.bins[bin_of(x)], weight);
  });
  merge_bins(team, scratch);
  const Team block;  // each block finds the bin, the first one sorts what is in it
  const Picked bin = pick_of(
      block, kBins, scratch, [&](int b) { return scratch.bins[b]; },
      [&](uint64_t) { return wanted - 1; });
  for_each_level(team, n, level, [&](int i, float x) {
    const Placed thing = place_of(i, x);
    if (thing.weight > 0 && bin_of(x) == bin.index) add_candidate(scratch, thing.order);
  });
  __syncthreads();  // all candidates are counted
  const uint64_t counted[1] = {static_cast<uint64_t>(scratch.count)};
  share(team, counted, scratch);
  uint64_t count = 0;
  for (int other = 0; other < team.blocks; ++other) count += scratch.shares[other][0];
  if (count <= kMaxCandidates) {
    if (team.rank == 0) {
      gather_candidates(team, scratch);
      sort_candidates(scratch);
      const auto weight = [&](int c) {
        const uint64_t order = scratch.candidates[c];
        return place_of(ordering.index(order), ordering.level(order)).weight;
      };
      const Picked last =
          pick_of(block, scratch.count, scratch, weight, [&](uint64_t) { return bin.rest; });
      const int other = static_cast<int>(threadIdx.x);
      if (other < team.blocks) team.at(scratch.last, other) = scratch.candidates[last.index];
    }
    team.sync();  // the others wait here for the first block
    return scratch.last;
  }
  team.sync();  // the counts are read before other shares come
  // Very many tokens of about the same probability.
  const uint64_t cut = find_cut(team, n, 0, top, wanted, scratch, level, place_of);
  uint64_t lowest = 0;
  for_each_level(team, n, level, [&](int i, float x) {
    const Placed thing = place_of(i, x);
    if (thing.order >= cut && thing.weight > 0) lowest = greater_of(lowest, ~thing.order);
  });
  return ~team_max(team, lowest, scratch);
}

// Chooses one of n tokens by reading them as often as it takes; level(i) is log2 of a probability,
// -FLT_MAX for none. Without filters tokens are laid side by side as they come, else by falling
// probability.
template <typename Level>
__device__ __noinline__ int choose(Team team, int n, const Filters& filters, uint64_t bits,
                                   ChoiceScratch& scratch, const Level& level) {
  const Ordering ordering(n);
  uint64_t top = 0, some[1] = {0};
  for_each_level(team, n, level, [&](int i, float x) {
    const uint64_t order = ordering(x, i);
    top = greater_of(top, order);
    some[0] += order > 0;
  });
  top = team_max(team, top, scratch);
  if (filters.inv_temperature == 0.f) return ordering.index(top);
  const float top_level = ordering.level(top), inv_temperature = filters.inv_temperature;
  uint64_t cut = 1;
  const auto place_of = [&](int i, float x) -> Placed {
    const uint64_t order = ordering(x, i);
    const float weight = fast_exp2((x - top_level) * inv_temperature);
    return {order, order >= cut ? whole_weight(weight) : 0};
  };
  const auto sum = [&](const auto& place_of) {
    uint64_t sums[1] = {0};
    for_each_level(team, n, level, [&](int i, float x) { sums[0] += place_of(i, x).weight; });
    team_sums(team, sums, scratch);
    return sums[0];
  };
  team_sums(team, some, scratch);
  if (filters.top_k < some[0]) {
    const auto one = [&](int i, float x) -> Placed {
      const uint64_t order = ordering(x, i);
      return {order, order > 0};
    };
    cut = last_kept(team, ordering, top, filters.top_k, inv_temperature, scratch, level, one);
  }
  if (filters.top_p < 1.f) {
    const double nucleus = ceil(static_cast<double>(filters.top_p) * sum(place_of));
    const uint64_t wanted = greater_of(1, static_cast<uint64_t>(nucleus));
    cut = last_kept(team, ordering, top, wanted, inv_temperature, scratch, level, place_of);
  }
  const auto least = static_cast<uint64_t>(filters.min_p * 0x1p44f);
  const auto kept = [&](int i, float x) -> Placed {
    const Placed thing = place_of(i, x);
    return {thing.order, thing.weight >= least ? thing.weight : 0};
  };
  const auto target_of = [&](uint64_t total) { return __umul64hi(bits, total); };
  if (filters.none(n)) {
    return pick_of(
               team, n, scratch, [&](int i) { return kept(i, level(i)).weight; }, target_of)
        .index;
  }
  const uint64_t target = target_of(sum(kept));
  return ordering.index(
      last_kept(team, ordering, top, target + 1, inv_temperature, scratch, level, kept));
}

}  // namespace memdec::cuda
