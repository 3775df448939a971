// fused_interpolate: the log of the mixture of two softmaxes.
//
// A block takes a row: both logits rows are read for their statistics, then again, partly out of
// L2, for the result. With few rows a cluster of blocks takes one, and reads it once (cluster.cuh).
#include "common/kernels.h"
#include "cuda/cluster.cuh"
#include "cuda/interpolate_weights.cuh"
#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 512;

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
  const float result = high + fast_log2(1.f + fast_exp2(-fabsf(a - b) * kLog2E)) * kLn2;
  return result > -kLn2 ? mix_sure(base_log_prob, memory_log_prob, weights.lmbda) : result;
}

// The results of a row, given its logits; a logit is -inf where its model has no column.
struct Mixture {
  Weights weights;
  RowStats base;
  RowStats memory;
  float inv_temperature;
  // For whole groups, in units of log 2: a logit's distance to the maximum times scale plus shift.
  float memory_scale;
  float base_shift;
  float memory_shift;

  __device__ Mixture(const Weights& weights, RowStats base, RowStats memory, float inv_temperature)
      : weights(weights),
        base(base),
        memory(memory),
        inv_temperature(inv_temperature),
        memory_scale(inv_temperature * kLog2E),
        base_shift((weights.log_base - base.log_norm) * kLog2E),
        memory_shift((weights.log_memory - memory.log_norm) * kLog2E) {}

  __device__ float operator()(float base_x, float memory_x) const {
    if (!weights.valid) return NAN;
    if (!weights.use_memory) return log_softmax(base_x, base, 1.f);
    if (!weights.use_base) return log_softmax(memory_x, memory, inv_temperature);
    return mix(log_softmax(base_x, base, 1.f), log_softmax(memory_x, memory, inv_temperature),
               weights);
  }

  // The same for a group, if its results are finite and below log(1/2), as nearly all are: then a
  // few instructions do. False when they are not: then each column wants the operator above.
  template <typename BaseGroup, typename MemoryGroup>
  __device__ bool group(const BaseGroup& base_x, const MemoryGroup& memory_x, Group* result) const {
    bool usual = weights.use_base && weights.use_memory;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float a = fmaf(base_x[i] - base.max, kLog2E, base_shift);
      const float b = fmaf(memory_x[i] - memory.max, memory_scale, memory_shift);
      const float ratio = fast_exp2(-fabsf(a - b));
      result->x[i] = (fmaxf(a, b) + fast_log2(1.f + ratio)) * kLn2;
      usual = usual && result->x[i] <= -kLn2;  // false for NaN
    }
    return usual;
  }
};

// Writes single columns with the care that few of them need.
template <typename Base, typename Memory>
struct SingleColumns {
  const Base* base;
  const Memory* memory;
  int shared_vocab;  // columns that the memory has
  const Mixture& mixture;
  const AnyRow& out;

  __device__ void write(int i) const {
    const bool use_base = mixture.weights.use_base && mixture.weights.valid;
    const bool use_memory = mixture.weights.use_memory && mixture.weights.valid && i < shared_vocab;
    const float base_x = use_base ? to_float(base[i]) : -INFINITY;
    const float memory_x = use_memory ? to_float(memory[i]) : -INFINITY;
    out.set(i, mixture(base_x, memory_x));
  }

  __device__ void write_group(int start) const {
#pragma unroll 1
    for (int i = start; i < start + kGroup; ++i) write(i);
  }
};

template <typename Base, typename Memory>
__global__ void __launch_bounds__(kThreads, 2) interpolate_kernel(InterpolateArgs args) {
  const int64_t row = blockIdx.x;
  const Base* base = row_of<const Base>(args.base, row);
  const Memory* memory = row_of<const Memory>(args.memory, row);
  const AnyRow out(args.out, row);
  const int width = static_cast<int>(args.base.cols);
  const int vocab = static_cast<int>(args.vocab);
  const int shared_vocab = real_columns(args.memory.cols, vocab);

  const Weights weights = row_weights(args, row);
  const bool use_base = weights.valid && weights.use_base;
  const bool use_memory = weights.valid && weights.use_memory;
  RowStats base_stats{0.f, NAN}, memory_stats{0.f, NAN};
  if (use_base) base_stats = row_stats(base, vocab, 1.f);
  if (use_memory) memory_stats = row_stats(memory, shared_vocab, args.inv_temperature);
  if (args.stats && threadIdx.x == 0) {
    args.stats[2 * row] = base_stats;
    args.stats[2 * row + 1] = memory_stats;
  }
  const Mixture mixture(weights, base_stats, memory_stats, args.inv_temperature);
  if (!weights.valid) {
    for (int i = threadIdx.x; i < width; i += kThreads) out.set(i, i < vocab ? NAN : -INFINITY);
    return;
  }

  const SingleColumns<Base, Memory> singles{base, memory, shared_vocab, mixture, out};

  // Groups start where the base's row is aligned; the memory and the result mostly agree.
  const int head = use_base ? elements_to_alignment(base, shared_vocab)
                            : elements_to_alignment(memory, shared_vocab);
  const bool base_aligned = use_base && is_aligned(base + head);
  const bool memory_aligned = use_memory && is_aligned(memory + head);
  const bool out_aligned = out.aligned(head);
  for_each_group(
      shared_vocab, head,
      [&](int start) {
        Group base_x, memory_x;
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
        Group result;
        if (!mixture.group(base_x, memory_x, &result)) {
          singles.write_group(start);
        } else if (out_aligned) {
          out.store(result, start);
        } else {
          out.store_unaligned(result, start);
        }
      },
      [&](int i) { singles.write(i); });
  for (int i = shared_vocab + threadIdx.x; i < vocab; i += kThreads) singles.write(i);
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

  const Weights weights = row_weights(args, row);
  const bool use_base = weights.valid && weights.use_base;
  const bool use_memory = weights.valid && weights.use_memory;

  const HeldColumns columns(shared_vocab, columns_to_group(base, shared_vocab), rank, blocks);
  HeldRow<Base> base_row;
  HeldRow<Memory> memory_row;
  if (use_base) base_row.load(base, columns);
  if (use_memory) memory_row.load(memory, columns);
  const float scales[2] = {kLog2E, args.inv_temperature * kLog2E};
  SoftmaxSum sums[2];
  if (use_base) sums[0] = base_row.softmax_sum(columns, scales[0]);
  if (use_memory) sums[1] = memory_row.softmax_sum(columns, scales[1]);
  const int thread = rank * kClusterThreads + static_cast<int>(threadIdx.x);
  const int threads = blocks * kClusterThreads;
  for (int i = shared_vocab + thread; use_base && i < vocab; i += threads) {
    sums[0].add(to_float(base[i]), scales[0]);  // columns that the memory lacks
  }
  cluster_merge(sums, scales);
  const RowStats base_stats = use_base ? sums[0].stats() : RowStats{0.f, NAN};
  const RowStats memory_stats = use_memory ? sums[1].stats() : RowStats{0.f, NAN};
  if (args.stats && rank == 0 && threadIdx.x == 0) {
    args.stats[2 * row] = base_stats;
    args.stats[2 * row + 1] = memory_stats;
  }

  const Mixture mixture(weights, base_stats, memory_stats, args.inv_temperature);
  unsigned unusual = 0;  // groups to be done again, a bit each
#pragma unroll
  for (int g = 0; g < kHeldGroups; ++g) {
    if (g >= columns.count) break;
    Group result;
    if (mixture.group(base_row.groups[g], memory_row.groups[g], &result)) {
      out.store(result, columns.start(g));
    } else {
      unusual |= 1u << g;
    }
  }
  const SingleColumns<Base, Memory> singles{base, memory, shared_vocab, mixture, out};
  for (int g = 0; unusual >> g; ++g) {
    if (unusual >> g & 1u) singles.write_group(columns.start(g));
  }
  if (columns.edge >= 0) singles.write(columns.edge);
  for (int i = shared_vocab + thread; i < vocab; i += threads) singles.write(i);
  for (int i = vocab + thread; i < width; i += threads) {
    out.set(i, -INFINITY);
  }
  cluster.sync();  // a block's shared memory stays until every block has read it
#endif
}

}  // namespace

Status interpolate(const InterpolateArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const bool agree = rows_agree({&args.base, &args.memory, &args.out});
  const int blocks = agree ? cluster_blocks(args.vocab, args.rows, device) : 0;
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
