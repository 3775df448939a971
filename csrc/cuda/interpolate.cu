// fused_interpolate: the log of the mixture of two softmaxes.
//
// On Hopper a cluster takes a row and reads it once. Elsewhere a block takes it: both rows are read
// once for their statistics and once more, partly out of L2, for the result.
#include "common/kernels.h"
#include "cuda/cluster.cuh"
#include "cuda/interpolate_weights.cuh"
#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 1024;

// Log of the mixture in float64, for a probability above a half: the log is small there, and made
// from 1 - p, so that 1 - p is right. At most one token of a row comes here.
__device__ __noinline__ float mix_sure(float base_log_prob, float memory_log_prob, double lmbda) {
  return static_cast<float>(log1p((1.0 - lmbda) * expm1(static_cast<double>(base_log_prob)) +
                                  lmbda * expm1(static_cast<double>(memory_log_prob))));
}

// log(exp(a) + exp(b)) of the weighted log-probabilities of one token.
__device__ float mix(float base_log_prob, float memory_log_prob, const Weights& weights) {
  const float a = weights.log_base + base_log_prob;
  const float b = weights.log_memory + memory_log_prob;
  const float high = fmaxf(a, b);
  if (high == -INFINITY) return a + b;  // both have no mass; NaN stays NaN
  const float result = high + log2f(1.f + exp2f(-fabsf(a - b) * kLog2E)) * kLn2;
  return result > -kLn2 ? mix_sure(base_log_prob, memory_log_prob, weights.lmbda) : result;
}

// The result for column i, given the logits; memory_x is -inf where the memory has no column.
struct Mixture {
  Weights weights;
  RowStats base;
  RowStats memory;
  float inv_temperature;

  __device__ float operator()(float base_x, float memory_x) const {
    if (!weights.use_memory) return log_softmax(base_x, base, 1.f);
    if (!weights.use_base) return log_softmax(memory_x, memory, inv_temperature);
    return mix(log_softmax(base_x, base, 1.f), log_softmax(memory_x, memory, inv_temperature),
               weights);
  }
};

template <typename Base, typename Memory>
__global__ void __launch_bounds__(kThreads) interpolate_kernel(InterpolateArgs args) {
  const int64_t row = blockIdx.x;
  const Base* base = row_of<const Base>(args.base, row);
  const Memory* memory = row_of<const Memory>(args.memory, row);
  const AnyRow out(args.out, row);
  const int width = static_cast<int>(args.base.cols);
  const int vocab = static_cast<int>(args.vocab);
  const int shared_vocab = real_columns(args.memory.cols, vocab);

  Mixture mixture;
  mixture.weights = row_weights(args, row);
  mixture.inv_temperature = args.inv_temperature;
  const bool use_base = mixture.weights.valid && mixture.weights.use_base;
  const bool use_memory = mixture.weights.valid && mixture.weights.use_memory;
  mixture.base = mixture.memory = {0.f, NAN};
  if (use_base) mixture.base = row_stats(base, vocab, 1.f);
  if (use_memory) mixture.memory = row_stats(memory, shared_vocab, args.inv_temperature);
  if (args.stats && threadIdx.x == 0) {
    args.stats[2 * row] = mixture.base;
    args.stats[2 * row + 1] = mixture.memory;
  }
  if (!mixture.weights.valid) {
    for (int i = threadIdx.x; i < width; i += kThreads) out.set(i, NAN);
    return;
  }

  // Groups start where the base's row is aligned; the memory and the result mostly agree.
  const int head = use_base ? elements_to_alignment(base, shared_vocab)
                            : elements_to_alignment(memory, shared_vocab);
  const bool base_aligned = use_base && is_aligned(base + head);
  const bool memory_aligned = use_memory && is_aligned(memory + head);
  for_each_group(
      shared_vocab, head,
      [&](int start) {
        Group base_x, memory_x, result;
        if (base_aligned) {
          base_x.load(base + start);
        } else if (use_base) {
          base_x.load_unaligned(base + start);
        }
        if (memory_aligned) {
          memory_x.load(memory + start);
        } else if (use_memory) {
          memory_x.load_unaligned(memory + start);
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) result.x[i] = mixture(base_x.x[i], memory_x.x[i]);
        out.store(result, start);
      },
      [&](int i) {
        const float base_x = use_base ? to_float(base[i]) : 0.f;
        const float memory_x = use_memory ? to_float(memory[i]) : 0.f;
        out.set(i, mixture(base_x, memory_x));
      });
  for (int i = shared_vocab + threadIdx.x; i < vocab; i += kThreads) {
    out.set(i, mixture(use_base ? to_float(base[i]) : 0.f, -INFINITY));
  }
  for (int i = vocab + threadIdx.x; i < width; i += kThreads) out.set(i, -INFINITY);
}

// The same with a cluster for each row: every logit is read once.
template <typename Base, typename Memory>
__global__ void __launch_bounds__(kClusterThreads)
    interpolate_cluster_kernel(InterpolateArgs args) {
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
  const int64_t row = blockIdx.x / blocks;
  const Base* base = row_of<const Base>(args.base, row);
  const Memory* memory = row_of<const Memory>(args.memory, row);
  const AnyRow out(args.out, row);
  const int width = static_cast<int>(args.base.cols);
  const int vocab = static_cast<int>(args.vocab);
  const int shared_vocab = real_columns(args.memory.cols, vocab);

  Mixture mixture;
  mixture.weights = row_weights(args, row);
  mixture.inv_temperature = args.inv_temperature;
  const bool valid = mixture.weights.valid;
  const bool use_base = valid && mixture.weights.use_base;
  const bool use_memory = valid && mixture.weights.use_memory;

  const int head = use_memory && !use_base ? elements_to_alignment(memory, vocab)
                                           : elements_to_alignment(base, vocab);
  const HeldColumns columns(vocab, head, rank, blocks);
  HeldRow<Base> base_row;
  HeldRow<Memory> memory_row;
  if (use_base) base_row.load(base, columns, vocab);
  if (use_memory) memory_row.load(memory, columns, shared_vocab);
  const float scales[2] = {kLog2E, args.inv_temperature * kLog2E};
  SoftmaxSum sums[2];
  if (use_base) sums[0] = base_row.softmax_sum(columns, scales[0]);
  if (use_memory) sums[1] = memory_row.softmax_sum(columns, scales[1]);
  double nothing[1] = {};
  cluster_merge(sums, scales, nothing);
  mixture.base = use_base ? sums[0].stats() : RowStats{0.f, NAN};
  mixture.memory = use_memory ? sums[1].stats() : RowStats{0.f, NAN};
  if (args.stats && rank == 0 && threadIdx.x == 0) {
    args.stats[2 * row] = mixture.base;
    args.stats[2 * row + 1] = mixture.memory;
  }

  const auto result = [&](float base_x, float memory_x) {
    return valid ? mixture(base_x, memory_x) : NAN;
  };
#pragma unroll
  for (int g = 0; g < kHeldGroups; ++g) {
    if (g >= columns.count) break;
    Group values;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      values.x[i] = result(base_row.groups[g][i], memory_row.groups[g][i]);
    }
    out.store(values, columns.start(g));
  }
  if (columns.edge >= 0) out.set(columns.edge, result(base_row.edge, memory_row.edge));
  const int thread = rank * kClusterThreads + static_cast<int>(threadIdx.x);
  for (int i = vocab + thread; i < width; i += blocks * kClusterThreads) {
    out.set(i, valid ? -INFINITY : NAN);
  }
  cluster.sync();  // a block's shared memory stays until every block has read it
#endif
}

}  // namespace

Status interpolate(const InterpolateArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const int blocks = cluster_blocks(args.vocab, args.rows, device);
  cudaError_t error = cudaSuccess;
  with_dtype(args.base.dtype, [&](auto base) {
    with_dtype(args.memory.dtype, [&](auto memory) {
      using Base = decltype(base);
      using Memory = decltype(memory);
      const auto cuda_stream = static_cast<cudaStream_t>(stream);
      if (blocks > 0) {
        error =
            launch_clusters(interpolate_cluster_kernel<Base, Memory>, args, blocks, cuda_stream);
      } else {
        interpolate_kernel<Base, Memory><<<args.rows, kThreads, 0, cuda_stream>>>(args);
      }
    });
  });
  return status_of(error == cudaSuccess ? cudaGetLastError() : error);
}

}  // namespace memdec::cuda
