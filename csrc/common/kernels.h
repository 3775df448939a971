// The kernels, one declaration for each backend. All are asynchronous on CUDA and run on `stream`.
#pragma once

#include "common/args.h"
#include "common/status.h"

namespace memdec {

// One entry for each kernel, in the order of the files in csrc/cpu and csrc/cuda.
#define MEMDEC_FOR_EACH_KERNEL(X)                        \
  X(interpolate, InterpolateArgs)                        \
  X(interpolate_backward, InterpolateBackwardArgs)       \
  X(interpolate_sample, InterpolateSampleArgs)           \
  X(token_log_probs, TokenLogProbsArgs)                  \
  X(token_log_probs_backward, TokenLogProbsBackwardArgs) \
  X(sparse_kl, SparseKLArgs)                             \
  X(sparse_kl_backward, SparseKLBackwardArgs)            \
  X(sparse_kl_rescale, SparseKLRescaleArgs)              \
  X(knn_scatter, KnnScatterArgs)

namespace cpu {
#define MEMDEC_DECLARE(name, Args) Status name(const Args& args, int threads);
MEMDEC_FOR_EACH_KERNEL(MEMDEC_DECLARE)
#undef MEMDEC_DECLARE

// SIMD levels built in and runnable here, lowest first, for example {"baseline", "avx2"}.
int simd_level_count();
const char* simd_level_name(int index);
// The level in use: the highest that runs here unless another was chosen.
const char* simd_level();
// Chooses a level by name; false when it is not built in or does not run here.
bool set_simd_level(const char* name);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t of `device`. Both are plain numbers so that nothing here needs CUDA's
// headers.
#define MEMDEC_DECLARE(name, Args) Status name(const Args& args, int device, void* stream);
MEMDEC_FOR_EACH_KERNEL(MEMDEC_DECLARE)
#undef MEMDEC_DECLARE

// Values of InterpolateSampleArgs' groups that a row may need.
int64_t sample_groups(int64_t vocab);

// Null when kernels can run here, else why not (no driver, driver too old, no device).
const char* unavailable_reason();
}  // namespace cuda

}  // namespace memdec
