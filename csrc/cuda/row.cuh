// One row of logits: how it is read, its softmax, sums over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/args.h"

namespace memdec::cuda {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 2^x and log2(x) as the hardware has them: relative error near 2^-22, results below 2^-126 are 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Elements from a view's data to a row. Of the usual view, all rows are inner ones.
__device__ inline int64_t row_offset(const RowsView& view, int64_t row) {
  if (row < view.inner_rows) return row * view.inner_stride;
  const int64_t outer = row / view.inner_rows;
  return outer * view.outer_stride + (row - outer * view.inner_rows) * view.inner_stride;
}

template <typename T>
__device__ inline T* row_of(const RowsView& view, int64_t row) {
  return static_cast<T*>(view.data) + row_offset(view, row);
}

template <typename T>
__device__ inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

// Whether kCount values at p can be stored in accesses of up to 16 bytes.
template <int kCount, typename T>
__device__ inline bool is_aligned_to(const T* p) {
  constexpr size_t kBytes = kCount * sizeof(T) < sizeof(uint4) ? kCount * sizeof(T) : sizeof(uint4);
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

// Neighbouring columns that one thread takes together.
template <int kCount>
struct Values {
  float x[kCount];

  __device__ float operator[](int i) const { return x[i]; }

  // What one access moves of a row's T.
  template <typename T>
  using Word = std::conditional_t<sizeof(T) * kCount % sizeof(uint4) == 0, uint4, uint2>;

  // `p` must be aligned to the values' size, at most 16 bytes.
  template <typename T>
  __device__ void load(const T* p) {
    constexpr int kWords = sizeof(T) * kCount / sizeof(Word<T>);
    Word<T> words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word<T>*>(p)[i];
    const T* values = reinterpret_cast<const T*>(words);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(values[i]);
  }

  template <typename T>
  __device__ void load_unaligned(const T* p) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(p[i]);
  }

  template <typename T>
  __device__ void store(T* p) const {
    constexpr int kWords = sizeof(T) * kCount / sizeof(Word<T>);
    Word<T> words[kWords];
    T* values = reinterpret_cast<T*>(words);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = from_float<T>(x[i]);
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word<T>*>(p)[i] = words[i];
  }

  template <typename T>
  __device__ void store_unaligned(T* p) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) p[i] = from_float<T>(x[i]);
  }
};

// 8 columns are one 16-byte access for 2-byte types and two for float32.
constexpr int kGroup = 8;
using Group = Values<kGroup>;

// A row whose dtype is known at run time only, for the side that would double the kernels.
struct AnyRow {
  void* data;
  DType dtype;

  __device__ AnyRow(const RowsView& view, int64_t row) : dtype(view.dtype) {
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    data = static_cast<char*>(view.data) + row_offset(view, row) * bytes;
  }

  template <typename F>
  __device__ void visit(F&& f) const {
    if (dtype == DType::kFloat32) return f(static_cast<float*>(data));
    if (dtype == DType::kFloat16) return f(static_cast<__half*>(data));
    f(static_cast<__nv_bfloat16*>(data));
  }

  __device__ float operator[](int i) const {
    float x;
    visit([&](auto* p) { x = to_float(p[i]); });
    return x;
  }

  __device__ void store(const Group& group, int start) const {
    visit([&](auto* p) { group.store(p + start); });
  }

  __device__ void store_unaligned(const Group& group, int start) const {
    visit([&](auto* p) { group.store_unaligned(p + start); });
  }

  __device__ bool aligned(int start) const {
    bool result;
    visit([&](auto* p) { result = is_aligned(p + start); });
    return result;
  }

  __device__ void set(int i, float x) const {
    visit([&](auto* p) { p[i] = from_float<std::remove_pointer_t<decltype(p)>>(x); });
  }
};

// Elements before the first 16-byte boundary at or after p, at most n.
template <typename T>
__device__ inline int elements_to_alignment(const T* p, int n) {
  const int head = static_cast<int>((-reinterpret_cast<uintptr_t>(p)) % sizeof(uint4) / sizeof(T));
  return head < n ? head : n;
}

// Splits [0, n) over the block: `group(start)` for whole groups counted from `head`, `single(i)`
// for what is left on both sides.
template <typename GroupBody, typename SingleBody>
__device__ inline void for_each_group(int n, int head, GroupBody&& group, SingleBody&& single) {
  const int groups = (n - head) / kGroup;
  for (int i = threadIdx.x; i < head; i += blockDim.x) single(i);
#pragma unroll 4
  for (int g = threadIdx.x; g < groups; g += blockDim.x) group(head + g * kGroup);
  for (int i = head + groups * kGroup + threadIdx.x; i < n; i += blockDim.x) single(i);
}

// Adds a value of every thread in a fixed order; every thread gets the sum. `shared` holds one
// value a warp and may be used again after the call.
template <typename T>
__device__ inline T block_sum(T value, T* shared) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  const int warps = blockDim.x / kWarpSize;
  __syncthreads();  // an earlier sum may still be read from `shared`
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();  // every warp's sum is written before any is read
  T sum = 0;
  for (int i = 0; i < warps; ++i) sum += shared[i];
  return sum;
}

__device__ inline float log_softmax(float x, RowStats stats, float inv_temperature) {
  return (x - stats.max) * inv_temperature - stats.log_norm;
}

// Columns that count in a row of the given width.
__host__ __device__ inline int real_columns(int64_t width, int64_t vocab) {
  return static_cast<int>(width < vocab ? width : vocab);
}

}  // namespace memdec::cuda
