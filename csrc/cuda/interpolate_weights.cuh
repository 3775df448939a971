// A row's weight, as forward and backward read it.
#pragma once

#include "cuda/row.cuh"

namespace memdec::cuda {

// What a row's weight says: which models count, and their log weights.
struct Weights {
  float lmbda;
  float log_base;
  float log_memory;
  bool valid;  // lmbda lies in [0, 1]
  bool use_base;
  bool use_memory;
};

template <typename Args>
__device__ inline Weights row_weights(const Args& args, int64_t row) {
  const float lmbda = args.lmbda_rows ? args.lmbda_rows[row * args.lmbda_stride] : args.lmbda;
  Weights weights;
  weights.lmbda = lmbda;
  weights.valid = lmbda >= 0.f && lmbda <= 1.f;
  weights.use_base = lmbda < 1.f;
  weights.use_memory = lmbda > 0.f;
  weights.log_base = log1pf(-lmbda);
  weights.log_memory = logf(lmbda);
  return weights;
}

}  // namespace memdec::cuda
