// The threads that work on a row together: those of a block, or of a cluster of blocks (Hopper and
// newer), which read and write each other's shared memory.
#pragma once

#include "cuda/hopper.cuh"

namespace memdec::cuda {

constexpr int kMaxClusterBlocks = 16;  // more than 8 is legal on Hopper, but must be asked for

struct Team {
  int rank = 0;  // of this block
  int blocks = 1;

  __device__ int thread() const {
    return rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  __device__ int threads() const { return blocks * static_cast<int>(blockDim.x); }

  // Waits for every thread of the team; what they wrote, in whichever block, is visible then.
  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      __syncwarp();  // the cluster's barrier takes whole warps
      hopper::cluster_arrive();
      hopper::cluster_wait();
      return;
    }
#endif
    __syncthreads();
  }

  // What is `x` here, in the shared memory of another block. That block must have begun and must
  // not end: a sync() comes before the first such access and after the last.
  template <typename T>
  __device__ T& at(T& x, int block) const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) return *hopper::in_block(&x, block);
#endif
    return x;
  }
};

}  // namespace memdec::cuda
