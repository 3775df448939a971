// keep_nearest: the k smallest of many distances, read once.
//
// A block takes a query. What is nearer than its k-th nearest so far goes into a buffer in shared
// memory that begins with the k nearest; when the buffer is full it is sorted, and all but the k
// smallest are forgotten. That bound falls fast: of n distances in any usual order some k ln(n / k)
// get as far as the buffer. What the others cost is being read.
#include "cuda/launch.h"
#include "search/keep_nearest.h"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;  // of 16 bytes, that a thread has under way
constexpr int kTile = kThreads * kLoads * 4;
constexpr int kLeastBuffer = 2048;
constexpr uint64_t kNoKey = ~0ull;

// Ascending bitonic sort of `size` keys, a power of two, by the whole block.
__device__ void sort_keys(uint64_t* keys, int size) {
  for (int span = 2; span <= size; span *= 2) {
    for (int stride = span / 2; stride > 0; stride /= 2) {
      __syncthreads();  // the keys of the step before are written
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == !(low & span)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 4)
    keep_nearest_kernel(const __grid_constant__ KeepNearestArgs args, int buffer_size) {
  extern __shared__ uint64_t buffer[];
  __shared__ int count;
  const int thread = static_cast<int>(threadIdx.x);
  const int k = static_cast<int>(args.k), columns = static_cast<int>(args.columns);
  uint64_t* nearest = args.nearest + blockIdx.x * args.k;
  const float* distances = args.distances + blockIdx.x * args.columns;
  for (int i = thread; i < k; i += kThreads) buffer[i] = nearest[i];
  if (thread == 0) count = k;
  __syncthreads();
  uint64_t farthest = buffer[k - 1];  // of those that are kept; nothing beyond it comes in

  for (int start = 0; start < columns; start += kTile) {
    float4 loaded[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int column = start + 4 * (j * kThreads + thread);
      loaded[j] = column < columns ? *reinterpret_cast<const float4*>(distances + column)
                                   : float4{INFINITY, INFINITY, INFINITY, INFINITY};
    }
    const float bound = __uint_as_float(static_cast<uint32_t>(farthest >> 32));
    uint32_t waiting = 0;  // a bit for each distance that may come in; never for NaN
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const float x[4] = {loaded[j].x, loaded[j].y, loaded[j].z, loaded[j].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (x[i] * args.unit <= bound) waiting |= 1u << (4 * j + i);
      }
    }
    while (__syncthreads_or(waiting != 0)) {
      if (waiting) {
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          const float x[4] = {loaded[j].x, loaded[j].y, loaded[j].z, loaded[j].w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t bit = 1u << (4 * j + i);
            if (!(waiting & bit)) continue;
            const int column = start + 4 * (j * kThreads + thread) + i;
            const uint32_t value = __float_as_uint(fmaxf(x[i], 0.f) * args.unit);
            const uint64_t key =
                static_cast<uint64_t>(value) << 32 | static_cast<uint64_t>(args.first_id + column);
            if (key < farthest) {
              const int place = atomicAdd(&count, 1);
              if (place >= buffer_size) continue;  // waits until there is room
              buffer[place] = key;
            }
            waiting &= ~bit;
          }
        }
      }
      __syncthreads();
      if (count <= buffer_size) break;  // all found room
      __syncthreads();                  // `count` was read
      sort_keys(buffer, buffer_size);
      farthest = buffer[k - 1];
      if (thread == 0) count = k;
    }
  }
  __syncthreads();
  const int found = count;
  if (found > k) {
    for (int i = found + thread; i < buffer_size; i += kThreads) buffer[i] = kNoKey;
    sort_keys(buffer, buffer_size);
  }
  for (int i = thread; i < k; i += kThreads) nearest[i] = buffer[i];
}

}  // namespace

Status keep_nearest(const KeepNearestArgs& args, int device, void* stream) {
  if (args.rows == 0 || args.columns == 0 || args.k == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  int buffer_size = kLeastBuffer;
  while (buffer_size < 2 * args.k) buffer_size *= 2;
  const int bytes = buffer_size * static_cast<int>(sizeof(uint64_t));
  const cudaError_t error =
      cudaFuncSetAttribute(keep_nearest_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return status_of(error);
  keep_nearest_kernel<<<args.rows, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(
      args, buffer_size);
  return status_of(cudaGetLastError());
}

}  // namespace memdec::cuda
