// fused_interpolate: the log of the mixture of two softmaxes.
//
// On Hopper rows go through the pipeline of interpolate_job.cuh. What does not fit there goes
// through the kernel here: a block takes a row and reads it twice, for the statistics and for the
// result.
#include "common/kernels.h"
#include "cuda/interpolate_job.cuh"
#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 512;

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
        Group base_x{}, memory_x{};
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
        if (!use_base) base_x = memory_x;
        if (!use_memory) memory_x = base_x;
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

}  // namespace

Status interpolate(const InterpolateArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  cudaError_t error = cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool one_dtype = args.base.dtype == args.memory.dtype;
  with_dtype(args.base.dtype, [&](auto base) {
    using Base = decltype(base);
    using Job = InterpolateJob<Base>;
    PipelinePlan plan;
    if (one_dtype && rows_agree(args.base, args.memory)) {
      plan = plan_pipeline<Job>(args.rows, args.vocab, device);
    }
    if (plan.clusters > 0) {
      error = launch_row_pipeline<Job>(args, plan, cuda_stream);
      return;
    }
    with_dtype(args.memory.dtype, [&](auto memory) {
      interpolate_kernel<Base, decltype(memory)><<<args.rows, kThreads, 0, cuda_stream>>>(args);
    });
  });
  return status_of(error == cudaSuccess ? cudaGetLastError() : error);
}

}  // namespace memdec::cuda
