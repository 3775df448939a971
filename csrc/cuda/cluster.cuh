// A row held by a cluster of blocks (Hopper and newer): every logit is read from memory once, kept
// in registers, and used twice. The blocks exchange what they found through distributed shared
// memory. Older GPUs, and rows too wide for a cluster, take the kernels that read a row twice.
#pragma once

#include <cooperative_groups.h>

#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace memdec::cuda {

constexpr int kClusterThreads = 256;
constexpr int kClusterWarps = kClusterThreads / kWarpSize;
constexpr int kMaxClusterBlocks = 16;  // more than 8 is legal on Hopper, but must be asked for
// Groups of logits that a thread holds of each row.
constexpr int kHeldGroups = 5;
constexpr int64_t kHeldColumns = int64_t{kClusterThreads} * kHeldGroups * kGroup;

// kGroup logits as they came, so that they take half the registers while a thread waits.
template <typename T>
struct HeldGroup {
  static constexpr int kWords = sizeof(T) * kGroup / sizeof(uint4);
  uint4 words[kWords];

  // Columns [start, start + kGroup) of a row, -inf from `limit` on.
  __device__ void load(const T* row, int start, int limit) {
    const T* p = row + start;
    if (start + kGroup <= limit && is_aligned(p)) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = __ldcs(reinterpret_cast<const uint4*>(p) + i);
    } else {
      T* values = reinterpret_cast<T*>(words);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        values[i] = start + i < limit ? p[i] : from_float<T>(-INFINITY);
      }
    }
  }

  __device__ float operator[](int i) const {
    return to_float(reinterpret_cast<const T*>(words)[i]);
  }
};

// Which columns of [0, n) this thread of the cluster holds. Groups are counted from the first
// aligned column; the fewer than 2 * kGroup columns on both sides of them go to single threads.
struct HeldColumns {
  int head;    // columns before the first group
  int first;   // this thread's first group
  int stride;  // groups from one of its groups to the next
  int count;   // how many it has
  int edge;    // its single column, or -1

  __device__ HeldColumns(int n, int head, int rank, int blocks) : head(head) {
    const int groups = (n - head) / kGroup;
    first = rank * kClusterThreads + static_cast<int>(threadIdx.x);
    stride = blocks * kClusterThreads;
    count = first < groups ? (groups - first + stride - 1) / stride : 0;
    const int tail = head + groups * kGroup;
    const int single = static_cast<int>(threadIdx.x);
    edge = -1;
    if (rank == blocks - 1) {  // the block with the fewest groups
      if (single < head) edge = single;
      if (single >= head && single - head < n - tail) edge = tail + single - head;
    }
  }

  __device__ int start(int g) const { return head + (first + g * stride) * kGroup; }
};

// The part of a row that this thread holds.
template <typename T>
struct HeldRow {
  HeldGroup<T> groups[kHeldGroups];
  float edge;

  // All loads are issued before the first value is needed.
  __device__ void load(const T* row, const HeldColumns& columns, int limit) {
#pragma unroll
    for (int g = 0; g < kHeldGroups; ++g) {
      if (g < columns.count) groups[g].load(row, columns.start(g), limit);
    }
    const bool held = columns.edge >= 0 && columns.edge < limit;
    edge = held ? to_float(row[columns.edge]) : -INFINITY;
  }

  __device__ SoftmaxSum softmax_sum(const HeldColumns& columns, float scale) const {
    SoftmaxSum sum;
    sum.max = edge;
#pragma unroll
    for (int g = 0; g < kHeldGroups; ++g) {
      if (g < columns.count) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sum.max = fmaxf(sum.max, groups[g][i]);
      }
    }
    if (columns.edge >= 0) sum.add_below(edge, scale);
#pragma unroll
    for (int g = 0; g < kHeldGroups; ++g) {
      if (g < columns.count) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sum.add_below(groups[g][i], scale);
      }
    }
    return sum;
  }
};

// Merges the sums and adds the values of the first `lanes` lanes (a power of two) into each of
// them.
template <int N, int M>
__device__ inline void merge_lanes(SoftmaxSum (&sums)[N], const float (&scales)[N],
                                   double (&values)[M], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      SoftmaxSum other;
      other.max = __shfl_xor_sync(0xffffffffu, sums[n].max, offset);
      other.tail = __shfl_xor_sync(0xffffffffu, sums[n].tail, offset);
      other.ties = __shfl_xor_sync(0xffffffffu, sums[n].ties, offset);
      sums[n].merge(other, scales[n]);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) values[m] += __shfl_xor_sync(0xffffffffu, values[m], offset);
  }
}

// Exchanges what the blocks of a cluster found: merges the softmax sums of N rows and adds up M
// further values, over block and cluster, in a fixed order that is the same in every block. Ends
// without a barrier: shared memory that other blocks read must outlive this, so the kernel ends
// with a cluster barrier.
template <int N, int M>
__device__ inline void cluster_merge(SoftmaxSum (&sums)[N], const float (&scales)[N],
                                     double (&values)[M]) {
#if __CUDA_ARCH__ >= 900
  __shared__ float warp_sums[kClusterWarps][N][3];
  __shared__ double warp_values[kClusterWarps][M];
  __shared__ float block_sums[N][3];
  __shared__ double block_values[M];
  const auto cluster = cooperative_groups::this_cluster();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  merge_lanes(sums, scales, values, kWarpSize);
  if (lane == 0) {
    for (int n = 0; n < N; ++n) sums[n].put(warp_sums[warp][n]);
    for (int m = 0; m < M; ++m) warp_values[warp][m] = values[m];
  }
  __syncthreads();  // every warp's part is written before the first warp reads it
  if (warp == 0) {
    for (int n = 0; n < N; ++n) {
      sums[n] = lane < kClusterWarps ? SoftmaxSum::get(warp_sums[lane][n]) : SoftmaxSum{};
    }
    for (int m = 0; m < M; ++m) values[m] = lane < kClusterWarps ? warp_values[lane][m] : 0.0;
    merge_lanes(sums, scales, values, kClusterWarps);
    if (lane == 0) {
      for (int n = 0; n < N; ++n) sums[n].put(block_sums[n]);
      for (int m = 0; m < M; ++m) block_values[m] = values[m];
    }
  }
  cluster.sync();  // every block's part is written before any block reads it
  // A lane reads a block's part and the lanes merge: one remote access deep instead of a chain.
  const bool reads = lane < static_cast<int>(cluster.num_blocks());
  for (int n = 0; n < N; ++n) {
    sums[n] = reads ? SoftmaxSum::get(cluster.map_shared_rank(block_sums[n], lane)) : SoftmaxSum{};
  }
  for (int m = 0; m < M; ++m) {
    values[m] = reads ? *cluster.map_shared_rank(&block_values[m], lane) : 0.0;
  }
  merge_lanes(sums, scales, values, kMaxClusterBlocks);
  for (int n = 0; n < N; ++n) {
    sums[n].max = __shfl_sync(0xffffffffu, sums[n].max, 0);
    sums[n].tail = __shfl_sync(0xffffffffu, sums[n].tail, 0);
    sums[n].ties = __shfl_sync(0xffffffffu, sums[n].ties, 0);
  }
  for (int m = 0; m < M; ++m) values[m] = __shfl_sync(0xffffffffu, values[m], 0);
#endif
}

// How many blocks share a row of `columns` on this device; 0: no cluster holds it.
inline int cluster_blocks(int64_t columns, int64_t rows, int device) {
  int major = 0, processors = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (major < 9 || columns > kHeldColumns * kMaxClusterBlocks) return 0;
  int blocks = 1;
  while (kHeldColumns * blocks < columns) blocks *= 2;
  // With few rows there are processors to spare: split further while a thread keeps a group.
  while (blocks < kMaxClusterBlocks && rows * blocks * 2 <= processors &&
         columns > int64_t{blocks} * kClusterThreads * kGroup) {
    blocks *= 2;
  }
  return blocks;
}

// Launches a kernel with one cluster of `blocks` blocks for each row.
template <typename Args>
inline cudaError_t launch_clusters(void (*kernel)(Args), const Args& args, int blocks,
                                   cudaStream_t stream) {
  if (blocks > 8) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.rows * blocks));
  config.blockDim = dim3(kClusterThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace memdec::cuda
