// From a row's seed to its draw, for the CPU and CUDA alike (memdec/ops/interpolate_sample.py has
// the same in PyTorch).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MEMDEC_HOST_DEVICE __host__ __device__
#else
#define MEMDEC_HOST_DEVICE
#endif

namespace memdec {

// 64 random bits: the finalizer of SplitMix64 (Steele et al. 2014), so that neighbouring seeds give
// unrelated draws. bits / 2^64 is the uniform number in [0, 1) of a row.
MEMDEC_HOST_DEVICE inline uint64_t random_bits(int64_t seed) {
  uint64_t x = static_cast<uint64_t>(seed) + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace memdec
