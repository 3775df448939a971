// The sum of exponentials of a row of logits, without branches: by threads, warps and blocks.
#pragma once

#include "cuda/row.cuh"
#include "cuda/team.cuh"

namespace memdec::cuda {

// Values in a pack of 16 bytes.
template <typename T>
constexpr int kPack = sizeof(uint4) / sizeof(T);

// The sum of exponentials of some logits without one instance of their maximum: in float32 that
// term, 1, would swallow the tail. NaN ends in `tail`.
struct TailSum {
  float max = -INFINITY;
  float tail = 0.f;

  __device__ RowStats stats() const { return {max, isfinite(max) ? log1pf(tail) : NAN}; }
};

// The maximum over a warp, none of them NaN.
__device__ inline float warp_max(float x) {
  int bits = __float_as_int(x);  // as an integer that orders like the float
  bits ^= (bits >> 31) & 0x7fffffff;
  bits = __reduce_max_sync(0xffffffffu, bits);
  bits ^= (bits >> 31) & 0x7fffffff;
  return __int_as_float(bits);
}

template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// Whether this is the one lane, of those whose maximum is the warp's, that leaves its instance out.
__device__ inline bool holds_max(float max, float warp_top) {
  const unsigned holders = __ballot_sync(0xffffffffu, max == warp_top);
  return static_cast<int>(threadIdx.x % kWarpSize) == __ffs(holders) - 1;
}

// Merges the sums of a warp's lanes, in a fixed order.
__device__ inline TailSum merge_lanes(const TailSum& sum, float scale) {
  const float top = warp_max(sum.max);
  const float weight = sum.max == top ? 1.f : fast_exp2((sum.max - top) * scale);
  const bool holder = holds_max(sum.max, top);
  return {top, warp_sum(holder ? sum.tail : (sum.tail + 1.f) * weight)};
}

// Two neighbouring logits in one register, or one logit of 4 bytes.
template <typename T>
using Pair =
    std::conditional_t<std::is_same_v<T, float>, float,
                       std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>>;

__device__ inline float2 to_floats(__half2 pair) { return __half22float2(pair); }
__device__ inline float2 to_floats(__nv_bfloat162 pair) {
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(&pair);
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

// The greater and the lesser; NaN if one of them is.
__device__ inline float greater(float a, float b) {
  float x;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
__device__ inline float lesser(float a, float b) {
  float x;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}
template <typename P>
__device__ inline P greater(P a, P b) {
  return __hmax2_nan(a, b);
}
template <typename P>
__device__ inline P lesser(P a, P b) {
  return __hmin2_nan(a, b);
}

// The values of T in a word.
template <typename T, typename Word>
__device__ inline auto unpack(const Word& word) {
  constexpr int kCount = sizeof(Word) / sizeof(T);
  const auto* pairs = reinterpret_cast<const Pair<T>*>(&word);
  Values<kCount> values;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      values.x[i] = pairs[i];
    } else {
      const float2 two = to_floats(pairs[i / 2]);
      values.x[i] = i % 2 == 0 ? two.x : two.y;
    }
  }
  return values;
}

// A pack of logits, as it lies in memory.
template <typename T>
struct Pack {
  uint4 words;

  // Puts -inf in the place of values outside [begin, end).
  __device__ void mask(int begin, int end) {
    T* x = reinterpret_cast<T*>(&words);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (i < begin || i >= end) x[i] = from_float<T>(-INFINITY);
    }
  }

  // Takes over the values whose bits are set.
  __device__ void take(const Pack& other, uint32_t bits) {
    T* x = reinterpret_cast<T*>(&words);
    const T* y = reinterpret_cast<const T*>(&other.words);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (bits >> i & 1u) x[i] = y[i];
    }
  }

  // The greatest logit, and all the others.
  __device__ float split(float (&others)[kPack<T> - 1]) const {
    const auto* x = reinterpret_cast<const Pair<T>*>(&words);
    const auto high01 = greater(x[0], x[1]), low01 = lesser(x[0], x[1]);
    const auto high23 = greater(x[2], x[3]), low23 = lesser(x[2], x[3]);
    const auto high = greater(high01, high23), low = lesser(high01, high23);
    if constexpr (std::is_same_v<T, float>) {
      others[0] = low01;
      others[1] = low23;
      others[2] = low;
      return high;
    } else {
      const float2 lows[3] = {to_floats(low01), to_floats(low23), to_floats(low)};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        others[2 * i] = lows[i].x;
        others[2 * i + 1] = lows[i].y;
      }
      const float2 last = to_floats(high);
      others[6] = lesser(last.x, last.y);
      return greater(last.x, last.y);
    }
  }
};

// A worker's TailSum in progress. `tail` is relative to 2^pivot, where pivot is max * scale as it
// was rounded; no branch depends on the logits.
struct WorkerSum {
  float max = -INFINITY;
  float pivot = -INFINITY;
  float tail = 0.f;

  template <typename T, int kPacks>
  __device__ void add(const Pack<T> (&packs)[kPacks], float scale) {
    constexpr int kOthers = kPack<T> - 1;
    float others[kPacks][kOthers], passed[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const float top = packs[p].split(others[p]);
      passed[p] = lesser(max, top);  // the maximum, `greater`, is left out
      max = greater(max, top);
    }
    const float new_pivot = max * scale;
    const float origin = max == -INFINITY ? 0.f : new_pivot;
    const auto term = [&](float x) { return fast_exp2(fmaf(x, scale, -origin)); };
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      sums[0] += term(passed[p]);
#pragma unroll
      for (int i = 0; i < kOthers; ++i) sums[(i + 1) % 2] += term(others[p][i]);
    }
    tail = fmaf(tail, fast_exp2(pivot - origin), sums[0] + sums[1]);
    pivot = new_pivot;
  }

  __device__ TailSum total(float scale) const {
    if (max == -INFINITY) return {max, tail};
    return {max, tail * fast_exp2(fmaf(-max, scale, pivot))};
  }
};

// The first n logits of a row, as whole packs: at both ends they hold a few neighbours of the row.
template <typename T>
struct RowPacks {
  const uint4* packs;
  int phase;  // of the first logit in the first pack
  int n;
  int count;

  __device__ RowPacks(const T* row, int n)
      : phase(static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(uint4) / sizeof(T))),
        n(n),
        count((phase + n + kPack<T> - 1) / kPack<T>) {
    packs = reinterpret_cast<const uint4*>(row - phase);
  }

  __device__ Pack<T> operator[](int i) const {
    Pack<T> pack{packs[i]};
    const int begin = phase - i * kPack<T>, end = begin + n;
    if (begin > 0 || end < kPack<T>) pack.mask(begin, end);
    return pack;
  }
};

// The sum over packs [begin, end) of a row, in every thread of the block.
template <typename T>
__device__ inline TailSum sum_packs(const RowPacks<T>& row, int begin, int end, float scale) {
  constexpr int kTogether = 4;  // packs of a thread that are read before the first is added
  __shared__ TailSum parts[kMaxWarps];
  const int threads = static_cast<int>(blockDim.x);
  WorkerSum sum;
  int i = begin + static_cast<int>(threadIdx.x);
  for (; i + (kTogether - 1) * threads < end; i += kTogether * threads) {
    Pack<T> loaded[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) loaded[j] = row[i + j * threads];
    sum.add(loaded, scale);
  }
  for (; i < end; i += threads) {
    const Pack<T> loaded[1] = {row[i]};
    sum.add(loaded, scale);
  }
  TailSum part = merge_lanes(sum.total(scale), scale);
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();  // the parts of an earlier sum may still be read
  if (lane == 0) parts[threadIdx.x / kWarpSize] = part;
  __syncthreads();  // every warp's part is written before any is read
  part = lane < threads / kWarpSize ? parts[lane] : TailSum{};
  return merge_lanes(part, scale);
}

// The statistics of the first n logits of a row, in every thread of the block.
template <typename T>
__device__ inline RowStats row_stats(const T* row, int n, float inv_temperature) {
  const RowPacks<T> packs(row, n);
  return sum_packs(packs, 0, packs.count, inv_temperature * kLog2E).stats();
}

// The same in every thread of a team, and the same bits whatever its size, a power of 2: a row has
// as many parts as a team has blocks at most.
template <typename T>
__device__ inline RowStats row_stats(const Team& team, const T* row, int n, float inv_temperature) {
  __shared__ TailSum parts[kMaxClusterBlocks];
  const float scale = inv_temperature * kLog2E;
  const RowPacks<T> packs(row, n);
  const int length = (packs.count + kMaxClusterBlocks - 1) / kMaxClusterBlocks;
  const int share = kMaxClusterBlocks / team.blocks;
  team.sync();  // the parts of an earlier row may still be read
  for (int part = team.rank * share; part < (team.rank + 1) * share; ++part) {
    const int begin = part * length;
    const TailSum sum = sum_packs(packs, begin, min(packs.count, begin + length), scale);
    const int block = static_cast<int>(threadIdx.x);
    if (block < team.blocks) team.at(parts[part], block) = sum;
  }
  team.sync();  // every part is in every block before any is read
  const int lane = threadIdx.x % kWarpSize;
  return merge_lanes(lane < kMaxClusterBlocks ? parts[lane] : TailSum{}, scale).stats();
}

}  // namespace memdec::cuda
