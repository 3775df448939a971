// A row shared by a cluster of blocks (Hopper and newer), for fewer rows than there are
// multiprocessors: every logit is read once and kept in registers, and the blocks exchange what
// they found through distributed shared memory. With more rows a block a row is faster, although it
// reads a row twice: a cluster's blocks wait for each other (benchmarks/ladder.md).
#pragma once

#include <cooperative_groups.h>

#include <initializer_list>

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

  // `p` must be aligned. The row is read once: it need not stay in a cache.
  __device__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldcs(reinterpret_cast<const uint4*>(p) + i);
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
  __device__ void load(const T* row, const HeldColumns& columns) {
#pragma unroll
    for (int g = 0; g < kHeldGroups; ++g) {
      if (g < columns.count) groups[g].load(row + columns.start(g));
    }
    edge = columns.edge >= 0 ? to_float(row[columns.edge]) : -INFINITY;
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

// Merges the sums of the first `lanes` lanes (a power of two) into each of them. The maximum first:
// then each lane rescales once, and plain sums remain.
template <int N>
__device__ inline void merge_lanes(SoftmaxSum (&sums)[N], const float (&scales)[N], int lanes) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float top = sums[n].max;
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    }
    sums[n].raise(top, scales[n]);
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sums[n].tail += __shfl_xor_sync(0xffffffffu, sums[n].tail, offset);
      sums[n].ties += __shfl_xor_sync(0xffffffffu, sums[n].ties, offset);
    }
  }
}

// Merges the softmax sums of N rows over block and cluster, in a fixed order that is the same in
// every block. Ends without a barrier: shared memory that other blocks read must outlive this, so
// the kernel ends with a cluster barrier.
template <int N>
__device__ inline void cluster_merge(SoftmaxSum (&sums)[N], const float (&scales)[N]) {
#if __CUDA_ARCH__ >= 900
  __shared__ float warp_sums[kClusterWarps][N][3];
  __shared__ float block_sums[N][3];
  const auto cluster = cooperative_groups::this_cluster();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  merge_lanes(sums, scales, kWarpSize);
  if (lane == 0) {
    for (int n = 0; n < N; ++n) sums[n].put(warp_sums[warp][n]);
  }
  __syncthreads();  // every warp's part is written before the first warp reads it
  if (warp == 0) {
    for (int n = 0; n < N; ++n) {
      sums[n] = lane < kClusterWarps ? SoftmaxSum::get(warp_sums[lane][n]) : SoftmaxSum{};
    }
    merge_lanes(sums, scales, kClusterWarps);
    if (lane == 0) {
      for (int n = 0; n < N; ++n) sums[n].put(block_sums[n]);
    }
  }
  cluster.sync();  // every block's part is written before any block reads it
  // A lane reads a block's part and the lanes merge: one remote access deep instead of a chain.
  const bool reads = lane < static_cast<int>(cluster.num_blocks());
  for (int n = 0; n < N; ++n) {
    sums[n] = reads ? SoftmaxSum::get(cluster.map_shared_rank(block_sums[n], lane)) : SoftmaxSum{};
  }
  merge_lanes(sums, scales, kMaxClusterBlocks);
  for (int n = 0; n < N; ++n) {
    sums[n].max = __shfl_sync(0xffffffffu, sums[n].max, 0);
    sums[n].tail = __shfl_sync(0xffffffffu, sums[n].tail, 0);
    sums[n].ties = __shfl_sync(0xffffffffu, sums[n].ties, 0);
  }
#endif
}

// Columns before a row's first 16-byte boundary, counted in whole groups, at most n. Rows that
// agree (below) have it in common.
template <typename T>
__device__ inline int columns_to_group(const T* row, int n) {
  const int head = static_cast<int>(-(reinterpret_cast<uintptr_t>(row) / sizeof(T)) % kGroup);
  return head < n ? head : n;
}

// Whether every row of these tensors lies equally far from a whole group, so that groups which are
// aligned in one are aligned in all.
inline bool rows_agree(std::initializer_list<const RowsView*> views) {
  const auto size = [](const RowsView& view) { return view.dtype == DType::kFloat32 ? 4 : 2; };
  const RowsView& first = **views.begin();
  const auto phase = [&](const RowsView& view) {
    return reinterpret_cast<uintptr_t>(view.data) / size(view) % kGroup;
  };
  bool whole_strides = true, equal_strides = true;
  for (const RowsView* view : views) {
    if (reinterpret_cast<uintptr_t>(view->data) % size(*view) != 0) return false;
    if (phase(*view) != phase(first)) return false;
    const int64_t inner = view->inner_stride % kGroup, outer = view->outer_stride % kGroup;
    whole_strides = whole_strides && inner == 0 && outer == 0;
    equal_strides = equal_strides && view->inner_rows == first.inner_rows &&
                    inner == first.inner_stride % kGroup && outer == first.outer_stride % kGroup;
  }
  return whole_strides || equal_strides;
}

// How many blocks share a row of `columns` on this device; 0: a block a row is better.
inline int cluster_blocks(int64_t columns, int64_t rows, int device) {
  int major = 0, processors = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (major < 9 || rows >= processors || columns > kHeldColumns * kMaxClusterBlocks) return 0;
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
