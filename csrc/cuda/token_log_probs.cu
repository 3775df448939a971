// token_log_probs: log-softmax at one label a row, without a rows x vocabulary result.
#include "common/kernels.h"
#include "cuda/launch.h"
#include "cuda/softmax_sum.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 512;

template <typename T>
__global__ void __launch_bounds__(kThreads) token_log_probs_kernel(TokenLogProbsArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t label = args.labels[row];
  if (label == args.ignore_index) {
    if (threadIdx.x == 0) {
      args.out[row] = 0.f;
      if (args.stats) args.stats[row] = {0.f, 0.f};
    }
    return;
  }
  const T* logits = row_of<const T>(args.logits, row);
  const RowStats stats = row_stats(logits, static_cast<int>(args.vocab), 1.f);
  if (threadIdx.x == 0) {
    const bool in_range = label >= 0 && label < args.vocab;
    args.out[row] = in_range ? log_softmax(to_float(logits[label]), stats, 1.f) : NAN;
    if (args.stats) args.stats[row] = stats;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_log_probs_backward_kernel(TokenLogProbsBackwardArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t label = args.labels[row];
  const int width = static_cast<int>(args.logits.cols);
  const int vocab = static_cast<int>(args.vocab);
  const T* logits = row_of<const T>(args.logits, row);
  T* grad_logits = row_of<T>(args.grad_logits, row);
  const bool ignored = label == args.ignore_index;
  const bool in_range = label >= 0 && label < args.vocab;
  const RowStats stats = args.stats[row];
  const float grad = args.grad_out[row];
  for (int i = threadIdx.x; i < width; i += kThreads) {
    float value = 0.f;
    if (!ignored && i < vocab) {
      const float log_prob = in_range ? log_softmax(to_float(logits[i]), stats, 1.f) : NAN;
      value = -grad * (i == label ? expm1f(log_prob) : expf(log_prob));
    }
    grad_logits[i] = from_float<T>(value);
  }
}

}  // namespace

Status token_log_probs(const TokenLogProbsArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  with_dtype(args.logits.dtype, [&](auto value) {
    token_log_probs_kernel<decltype(value)>
        <<<args.rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  });
  return status_of(cudaGetLastError());
}

Status token_log_probs_backward(const TokenLogProbsBackwardArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  with_dtype(args.logits.dtype, [&](auto value) {
    token_log_probs_backward_kernel<decltype(value)>
        <<<args.rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  });
  return status_of(cudaGetLastError());
}

}  // namespace memdec::cuda
