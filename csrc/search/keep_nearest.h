// What exact search keeps of the distances that it has computed; CUDA only.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace memdec {

// Merges the distances to some keys into each query's k nearest so far. A neighbour is
// (bits of the float32 distance, at least 0) << 32 | id, which orders by distance, then id.
struct KeepNearestArgs {
  int64_t rows = 0;
  int64_t columns = 0;               // a multiple of 4
  const float* distances = nullptr;  // [rows, columns], 16-byte aligned; infinite: no key
  float unit = 1.f;                  // a distance of 1 here is so much: a power of two
  int64_t first_id = 0;              // of column 0; ids are below 2^32
  int64_t k = 0;                     // at most kMaxNearest
  uint64_t* nearest = nullptr;       // [rows, k], ascending, in and out; infinite: none yet
};

inline constexpr int64_t kMaxNearest = 4096;

namespace cuda {
Status keep_nearest(const KeepNearestArgs& args, int device, void* stream);
}  // namespace cuda

}  // namespace memdec
