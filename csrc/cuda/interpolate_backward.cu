// Gradients of fused_interpolate: the sums of a row first, then each column.
#include "common/kernels.h"
#include "cuda/interpolate_weights.cuh"
#include "cuda/launch.h"
#include "cuda/softmax_sum.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 512;

// The share of the mixture's probability that each model gave.
struct Shares {
  float base;
  float memory;
};

__device__ Shares shares_of(float base_log_prob, float memory_log_prob, const Weights& weights) {
  const float a = weights.use_base ? weights.log_base + base_log_prob : -INFINITY;
  const float b = weights.use_memory ? weights.log_memory + memory_log_prob : -INFINITY;
  Shares shares;
  const bool no_mass = a == -INFINITY && b == -INFINITY;
  shares.base = no_mass ? 0.f : 1.f / (1.f + expf(b - a));
  shares.memory = no_mass ? 0.f : 1.f / (1.f + expf(a - b));
  return shares;
}

// A token without mass sends nothing back, whatever comes in.
__device__ float weighted(float share, float grad) { return share == 0.f ? 0.f : share * grad; }

// share * grad - prob * sum: what one logit gets. Where the model is sure, share * grad and sum
// nearly cancel, so 1 - prob is made without rounding prob first.
__device__ float logit_grad(float share, float grad, float log_prob, float sum) {
  const float own = weighted(share, grad);
  if (log_prob > -kLn2) return (own - sum) - sum * expm1f(log_prob);
  return own - weighted(expf(log_prob), sum);
}

template <typename Base, typename Memory>
__global__ void __launch_bounds__(kThreads)
    interpolate_backward_kernel(InterpolateBackwardArgs args) {
  __shared__ float shared[kMaxWarps];
  const int64_t row = blockIdx.x;
  const Base* base = row_of<const Base>(args.base, row);
  const Memory* memory = row_of<const Memory>(args.memory, row);
  const AnyRow grad_out(args.grad_out, row);
  Base* grad_base = args.grad_base.data ? row_of<Base>(args.grad_base, row) : nullptr;
  Memory* grad_memory = args.grad_memory.data ? row_of<Memory>(args.grad_memory, row) : nullptr;
  const int width = static_cast<int>(args.base.cols);
  const int memory_width = static_cast<int>(args.memory.cols);
  const int vocab = static_cast<int>(args.vocab);
  const int shared_vocab = real_columns(memory_width, vocab);
  const Weights weights = row_weights(args, row);
  RowStats base_stats = args.stats[2 * row];
  RowStats memory_stats = args.stats[2 * row + 1];

  if (!weights.valid) {
    for (int i = threadIdx.x; grad_base && i < width; i += kThreads) {
      grad_base[i] = from_float<Base>(i < vocab ? NAN : 0.f);
    }
    for (int i = threadIdx.x; grad_memory && i < memory_width; i += kThreads) {
      grad_memory[i] = from_float<Memory>(i < shared_vocab ? NAN : 0.f);
    }
    if (args.grad_lmbda && threadIdx.x == 0) args.grad_lmbda[row] = NAN;
    return;
  }

  const auto base_log_prob = [&](int i) {
    return weights.use_base ? log_softmax(to_float(base[i]), base_stats, 1.f) : 0.f;
  };
  const auto memory_log_prob = [&](int i) {
    if (!weights.use_memory) return 0.f;
    return i < shared_vocab ? log_softmax(to_float(memory[i]), memory_stats, args.inv_temperature)
                            : -INFINITY;
  };

  float base_sum = 0.f, memory_sum = 0.f;
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    const Shares shares = shares_of(base_log_prob(i), memory_log_prob(i), weights);
    const float grad = grad_out[i];
    base_sum += weighted(shares.base, grad);
    memory_sum += weighted(shares.memory, grad);
  }
  base_sum = block_sum(base_sum, shared);
  memory_sum = block_sum(memory_sum, shared);

  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    const float from_base = base_log_prob(i);
    const float from_memory = memory_log_prob(i);
    const Shares shares = shares_of(from_base, from_memory, weights);
    const float grad = grad_out[i];
    if (grad_base) {
      const float value =
          weights.use_base ? logit_grad(shares.base, grad, from_base, base_sum) : 0.f;
      grad_base[i] = from_float<Base>(value);
    }
    if (grad_memory && i < shared_vocab) {
      const float value =
          weights.use_memory ? logit_grad(shares.memory, grad, from_memory, memory_sum) : 0.f;
      grad_memory[i] = from_float<Memory>(args.inv_temperature * value);
    }
  }
  for (int i = vocab + threadIdx.x; grad_base && i < width; i += kThreads) {
    grad_base[i] = from_float<Base>(0.f);
  }
  for (int i = shared_vocab + threadIdx.x; grad_memory && i < memory_width; i += kThreads) {
    grad_memory[i] = from_float<Memory>(0.f);
  }
  if (!args.grad_lmbda) return;

  // d log p / d lmbda = (memory - base) / p. Inside (0, 1) the shares give it; at an end the model
  // that the result did not read is read here.
  float grad_lmbda;
  if (weights.use_base && weights.use_memory) {
    grad_lmbda = memory_sum / weights.lmbda - base_sum / (1.f - weights.lmbda);
  } else {
    if (!weights.use_base) base_stats = row_stats(base, vocab, 1.f);
    if (!weights.use_memory) memory_stats = row_stats(memory, shared_vocab, args.inv_temperature);
    float ratio_sum = 0.f;
    for (int i = threadIdx.x; i < vocab; i += kThreads) {
      const float from_base = log_softmax(to_float(base[i]), base_stats, 1.f);
      const float from_memory =
          i < shared_vocab ? log_softmax(to_float(memory[i]), memory_stats, args.inv_temperature)
                           : -INFINITY;
      const float used = weights.use_base ? from_base : from_memory;
      const float other = weights.use_base ? from_memory : from_base;
      if (used > -INFINITY) ratio_sum += weighted(expf(other - used), grad_out[i]);
    }
    ratio_sum = block_sum(ratio_sum, shared);
    grad_lmbda = weights.use_base ? ratio_sum - base_sum : memory_sum - ratio_sum;
  }
  if (threadIdx.x == 0) args.grad_lmbda[row] = grad_lmbda;
}

}  // namespace

Status interpolate_backward(const InterpolateBackwardArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  with_dtype(args.base.dtype, [&](auto base) {
    with_dtype(args.memory.dtype, [&](auto memory) {
      interpolate_backward_kernel<decltype(base), decltype(memory)>
          <<<args.rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    });
  });
  return status_of(cudaGetLastError());
}

}  // namespace memdec::cuda
