// sparse_kl_loss: KL from a sparse target plus cross-entropy, and their gradient.
//
// On Hopper, both at once where the gradient is wanted for an upstream gradient of 1: see
// sparse_kl_job.cuh. Else in two kernels. Loss: a block takes a row, reads its logits once and
// visits its targets; one more block adds up the rows. Gradient: one read, one write. The few
// columns with a target or a label are made first and marked in a bitmap that keeps the sweep over
// all columns off them: every column is stored once, and the gradient may take the logits' place.
#include "common/kernels.h"
#include "cuda/launch.h"
#include "cuda/row.cuh"
#include "cuda/sparse_kl_job.cuh"
#include "cuda/sparse_kl_row.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kReduceThreads = 1024;

template <typename T>
__global__ void __launch_bounds__(kThreads) sparse_kl_kernel(SparseKLArgs args) {
  __shared__ double shared[kMaxWarps];
  const int64_t row = blockIdx.x;
  const Entries entries = entries_of(args.targets, row);
  if (!row_counts(args, row, entries)) {
    if (threadIdx.x == 0) write_row(args, row, false, {}, 0.f, 0.f);
    return;
  }
  const T* logits = row_of<const T>(args.logits, row);
  const RowStats stats = row_stats(logits, static_cast<int>(args.vocab), 1.f);

  double kl = 0.0;
  for (int64_t e = entries.begin + threadIdx.x; e < entries.end; e += kThreads) {
    const int32_t id = args.targets.token_ids[e];
    const float p = args.targets.probs[e];
    if (id < 0 || id >= args.vocab) {
      kl = NAN;
    } else if (p != 0.f) {
      kl += static_cast<double>(p) * (logf(p) - log_softmax(to_float(logits[id]), stats, 1.f));
    }
  }
  kl = block_sum(kl, shared);
  if (threadIdx.x != 0) return;
  const int64_t label = args.labels ? args.labels[row] : 0;
  const bool label_in_range = label >= 0 && label < args.vocab;
  const float ce = label_in_range ? -log_softmax(to_float(logits[label]), stats, 1.f) : NAN;
  write_row(args, row, true, stats, static_cast<float>(kl), ce);
}

// What a row's gradient is multiplied by: 1 over the divisor, 0 when no row counts. By one block.
__global__ void __launch_bounds__(kReduceThreads) sparse_kl_scale_kernel(SparseKLArgs args) {
  __shared__ double shared[kMaxWarps];
  const double counted = block_sum(counted_rows(args), shared);
  if (threadIdx.x == 0) *args.scale = static_cast<float>(reduction_scale(args, counted));
}

// One block adds up the rows in a fixed order. `scale` is known where a gradient was made with it.
__global__ void __launch_bounds__(kReduceThreads)
    sparse_kl_reduce_kernel(SparseKLArgs args, bool scale_is_known) {
  __shared__ double shared[kMaxWarps];
  double counted = 0.0;
  if (!scale_is_known) counted = block_sum(counted_rows(args), shared);
  double loss = 0.0, kl = 0.0, ce = 0.0;
  for (int64_t row = threadIdx.x; row < args.rows; row += kReduceThreads) {
    loss += args.row_loss[row];
    kl += args.row_kl[row];
    ce += args.row_ce[row];
  }
  loss = block_sum(loss, shared);
  kl = block_sum(kl, shared);
  ce = block_sum(ce, shared);
  if (threadIdx.x != 0) return;
  if (!scale_is_known) *args.scale = static_cast<float>(reduction_scale(args, counted));
  const double scale = *args.scale;
  *args.loss = static_cast<float>(loss * scale);
  *args.kl = static_cast<float>(kl * scale);
  *args.ce = static_cast<float>(ce * scale);
}

// Which columns of a row are stored already, a bit each.
struct Bitmap {
  uint32_t* words;

  __device__ void set(int column) { atomicOr(&words[column / 32], 1u << (column % 32)); }
  __device__ bool get(int column) const { return words[column / 32] >> (column % 32) & 1u; }
  // The bits of kGroup columns. The word after the last one exists.
  __device__ uint32_t group(int column) const {
    const int word = column / 32;
    return __funnelshift_r(words[word], words[word + 1], column % 32) & ((1u << kGroup) - 1);
  }
};

__host__ __device__ size_t bitmap_words(int64_t vocab) {
  return static_cast<size_t>(vocab / 32 + 2);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sparse_kl_backward_kernel(SparseKLBackwardArgs args) {
  extern __shared__ uint32_t bitmap_storage[];
  __shared__ double shared[kMaxWarps];
  const int64_t row = blockIdx.x;
  const Entries entries = entries_of(args.targets, row);
  const int width = static_cast<int>(args.logits.cols);
  const int vocab = static_cast<int>(args.vocab);
  const T* logits = row_of<const T>(args.logits, row);
  T* grad_logits = row_of<T>(args.grad_logits, row);
  if (!row_counts(args, row, entries)) {
    for (int i = threadIdx.x; i < width; i += kThreads) grad_logits[i] = from_float<T>(0.f);
    return;
  }

  const bool labelled = args.labels != nullptr;
  const int64_t label = labelled ? args.labels[row] : -1;
  const double alpha = labelled ? args.alpha : 1.0;
  const RowStats stats = args.stats[row];
  const double upstream =
      (args.grad_loss ? static_cast<double>(args.grad_loss[row * args.grad_stride]) : 1.0) *
      (args.scale ? *args.scale : 1.f);

  Bitmap stored{bitmap_storage};
  for (int i = threadIdx.x; i < static_cast<int>(bitmap_words(vocab)); i += kThreads) {
    stored.words[i] = 0;
  }
  double target_sum = 0.0;
  bool bad_index = labelled && (label < 0 || label >= vocab);
  for (int64_t e = entries.begin + threadIdx.x; e < entries.end; e += kThreads) {
    const int32_t id = args.targets.token_ids[e];
    bad_index = bad_index || id < 0 || id >= vocab;
    target_sum += args.targets.probs[e];
  }
  target_sum = block_sum(target_sum, shared);
  if (__syncthreads_or(bad_index)) {
    for (int i = threadIdx.x; i < width; i += kThreads) {
      grad_logits[i] = from_float<T>(i < vocab ? NAN : 0.f);
    }
    return;
  }
  // The block sum's barriers also order the cleared bitmap before the bits set below.

  const LogitGradient gradient(stats, upstream, target_sum, alpha, labelled);
  for (int64_t e = entries.begin + threadIdx.x; e < entries.end; e += kThreads) {
    const int32_t id = args.targets.token_ids[e];
    const double hit = gradient.hit(args.targets.probs[e], id == label);
    grad_logits[id] = from_float<T>(gradient.precise(to_float(logits[id]), hit));
    stored.set(id);
  }
  __syncthreads();  // the label's bit is final before it is asked for
  if (threadIdx.x == 0 && labelled && !stored.get(static_cast<int>(label))) {
    const double hit = gradient.hit(0.f, true);
    grad_logits[label] = from_float<T>(gradient.precise(to_float(logits[label]), hit));
    stored.set(static_cast<int>(label));
  }
  __syncthreads();  // every bit is set before the sweep reads them

  const auto dense = [&](float x) { return gradient.factor == 0.f ? 0.f : gradient.dense(x); };
  const int head = elements_to_alignment(logits, vocab);
  const bool grad_aligned = is_aligned(grad_logits + head);
  for_each_group(
      vocab, head,
      [&](int start) {
        Group group;
        group.load(logits + start);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group.x[i] = dense(group.x[i]);
        const uint32_t skip = stored.group(start);
        if (skip == 0 && grad_aligned) {
          group.store(grad_logits + start);
        } else {
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            if (!(skip >> i & 1u)) grad_logits[start + i] = from_float<T>(group.x[i]);
          }
        }
      },
      [&](int i) {
        if (!stored.get(i)) grad_logits[i] = from_float<T>(dense(to_float(logits[i])));
      });
  for (int i = vocab + threadIdx.x; i < width; i += kThreads) grad_logits[i] = from_float<T>(0.f);
}

// A block takes a row of the gradient; nothing is touched when the upstream gradient is exactly 1.
template <typename T>
__global__ void __launch_bounds__(kThreads) sparse_kl_rescale_kernel(SparseKLRescaleArgs args) {
  const float factor = *args.grad_loss;
  if (factor == 1.f) return;
  T* row = row_of<T>(args.grad_logits, blockIdx.x);
  const int width = static_cast<int>(args.grad_logits.cols);
  for_each_group(
      width, elements_to_alignment(row, width),
      [&](int start) {
        Group group;
        group.load(row + start);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group.x[i] *= factor;
        group.store(row + start);
      },
      [&](int i) { row[i] = from_float<T>(to_float(row[i]) * factor); });
}

// Launches the kernel that makes the gradient by itself.
template <typename T>
cudaError_t launch_backward(const SparseKLBackwardArgs& args, cudaStream_t stream) {
  const size_t bytes = bitmap_words(args.vocab) * sizeof(uint32_t);
  const auto kernel = sparse_kl_backward_kernel<T>;
  if (bytes > 32 * 1024) {  // more than a launch gets without asking, static part included
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<args.rows, kThreads, bytes, stream>>>(args);
  return cudaSuccess;
}

// The backward kernel's arguments for an upstream gradient of 1.
SparseKLBackwardArgs backward_of(const SparseKLArgs& args) {
  SparseKLBackwardArgs backward;
  backward.rows = args.rows;
  backward.logits = args.logits;
  backward.vocab = args.vocab;
  backward.targets = args.targets;
  backward.labels = args.labels;
  backward.alpha = args.alpha;
  backward.ignore_index = args.ignore_index;
  backward.stats = args.stats;
  backward.scale = args.scale;
  backward.grad_logits = args.grad_logits;
  return backward;
}

}  // namespace

Status sparse_kl(const SparseKLArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  with_dtype(args.logits.dtype, [&](auto value) {
    using T = decltype(value);
    const bool reduced = args.reduction != Reduction::kNone;
    const bool with_gradient = args.rows > 0 && args.grad_logits.data;
    if (with_gradient) sparse_kl_scale_kernel<<<1, kReduceThreads, 0, cuda_stream>>>(args);
    PipelinePlan plan;
    if (with_gradient) plan = plan_pipeline<SparseKLJob<T>>(args.rows, args.vocab, device);
    if (plan.clusters > 0) {
      error = launch_row_pipeline<SparseKLJob<T>>(args, plan, cuda_stream);
    } else if (args.rows > 0) {
      sparse_kl_kernel<T><<<args.rows, kThreads, 0, cuda_stream>>>(args);
      if (with_gradient) error = launch_backward<T>(backward_of(args), cuda_stream);
    }
    if (reduced) {
      sparse_kl_reduce_kernel<<<1, kReduceThreads, 0, cuda_stream>>>(args, with_gradient);
    }
  });
  return status_of(error == cudaSuccess ? cudaGetLastError() : error);
}

Status sparse_kl_backward(const SparseKLBackwardArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  cudaError_t error = cudaSuccess;
  with_dtype(args.logits.dtype, [&](auto value) {
    error = launch_backward<decltype(value)>(args, static_cast<cudaStream_t>(stream));
  });
  return status_of(error == cudaSuccess ? cudaGetLastError() : error);
}

Status sparse_kl_rescale(const SparseKLRescaleArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  with_dtype(args.grad_logits.dtype, [&](auto value) {
    sparse_kl_rescale_kernel<decltype(value)>
        <<<args.rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  });
  return status_of(cudaGetLastError());
}

}  // namespace memdec::cuda
