// knn_scatter: k neighbours of each row to one sparse distribution of each row.
//
// A block takes a row in shared memory: sort by (token, neighbour), add up equal tokens with a
// segmented scan in a fixed order, sort what is left by (probability, token). Rows are then packed:
// a prefix sum of their lengths, and a copy that also fills the unused slots.
#include "common/kernels.h"
#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace memdec::cuda {
namespace {

constexpr int kMaxNeighbors = 4096;
constexpr int kScanThreads = 1024;
constexpr int kPackThreads = 128;
constexpr uint64_t kNoKey = ~0ull;

// Ascending bitonic sort of `size` (a power of two) keys in shared memory by the whole block.
__device__ void sort_keys(uint64_t* keys, int size) {
  for (int span = 2; span <= size; span *= 2) {
    for (int stride = span / 2; stride > 0; stride /= 2) {
      __syncthreads();  // the keys of the step before are written
      for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int low = 2 * pair - (pair & (stride - 1));
        const int high = low + stride;
        const bool ascending = (low & span) == 0;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();  // the sorted keys are visible to all
}

template <typename Token>
__device__ int32_t load_token(const void* tokens, int64_t index) {
  const Token token = static_cast<const Token*>(tokens)[index];
  if constexpr (sizeof(Token) > sizeof(int32_t)) {
    // Kept as an id that no vocabulary has, so that whoever uses the row sees NaN.
    if (token > INT32_MAX) return INT32_MAX;
    if (token < 0) return -1;
  }
  return static_cast<int32_t>(token);
}

// The smallest valid distance of the block's row, in every thread.
__device__ float block_min(float value, float* shared) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fminf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  __syncthreads();  // an earlier reduction may still be read from `shared`
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();  // every warp's minimum is written before any is read
  float result = INFINITY;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarpSize; ++i) {
    result = fminf(result, shared[i]);
  }
  return result;
}

template <typename Distance, typename Token>
__global__ void knn_scatter_kernel(KnnScatterArgs args, int size) {
  extern __shared__ uint64_t keys[];                       // [size]
  float* weights = reinterpret_cast<float*>(keys + size);  // [size] by neighbour
  float* sums = weights + size;                            // [size] in order of the sorted tokens
  __shared__ float shared[kMaxWarps];
  const int64_t row = blockIdx.x;
  const int k = static_cast<int>(args.k);
  const Distance* distances =
      static_cast<const Distance*>(args.distances) + row * args.distance_stride;

  float nearest = INFINITY;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const float distance = i < k ? to_float(distances[i]) : INFINITY;
    const int32_t token = i < k ? load_token<Token>(args.tokens, row * args.token_stride + i) : -1;
    const bool valid = token >= 0 && distance < INFINITY;  // false for NaN
    keys[i] = valid ? static_cast<uint64_t>(token) << 32 | static_cast<uint32_t>(i) : kNoKey;
    weights[i] = distance;
    if (valid) nearest = fminf(nearest, distance);
  }
  nearest = block_min(nearest, shared);
  sort_keys(keys, size);

  // From distances to weights, in the order of the sorted tokens.
  float total = 0.f;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    float weight = 0.f;
    if (keys[i] != kNoKey) {
      const float distance = weights[static_cast<uint32_t>(keys[i])];
      // Neighbours at -inf share the mass; the difference would be NaN.
      weight = distance == nearest ? 1.f : expf((nearest - distance) / args.temperature);
    }
    sums[i] = weight;
    total += weight;
  }
  total = block_sum(total, shared);
  __syncthreads();  // the distances were read: `weights` may be written; `sums` is complete

  // Segmented scan: after the step of `offset`, sums[i] covers its token's last 2 * offset places.
  for (int offset = 1; offset < size; offset *= 2) {
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const bool same = i >= offset && keys[i] >> 32 == keys[i - offset] >> 32;
      weights[i] = sums[i] + (same ? sums[i - offset] : 0.f);
    }
    float* const written = weights;
    weights = sums;
    sums = written;
    __syncthreads();  // the step is written before the next reads it
  }

  // The last place of each token holds its sum: that becomes an entry, the rest no key. The
  // entries go to the buffer that the scan left free, as keys: falling probability, then token.
  int entries = 0;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const uint32_t token = static_cast<uint32_t>(keys[i] >> 32);
    const bool last = keys[i] != kNoKey && (i + 1 == size || keys[i + 1] >> 32 != token);
    const float p = last ? sums[i] / total : 0.f;
    weights[i] = p;
    entries += p > 0.f ? 1 : 0;
  }
  const int count = static_cast<int>(block_sum(static_cast<float>(entries), shared));
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const float p = weights[i];
    keys[i] = p > 0.f ? static_cast<uint64_t>(~__float_as_uint(p)) << 32 | keys[i] >> 32 : kNoKey;
  }
  sort_keys(keys, size);

  const auto prob_of = [&](int i) {
    return __uint_as_float(~static_cast<uint32_t>(keys[i] >> 32));
  };
  const int kept = count < args.row_slots ? count : static_cast<int>(args.row_slots);
  float kept_mass = 1.f, dropped_mass = 0.f;
  if (kept < count) {
    float kept_sum = 0.f, dropped_sum = 0.f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      (i < kept ? kept_sum : dropped_sum) += prob_of(i);
    }
    kept_mass = block_sum(kept_sum, shared);
    dropped_mass = block_sum(dropped_sum, shared);
  }
  for (int i = threadIdx.x; i < kept; i += blockDim.x) {
    args.scratch_ids[row * args.row_slots + i] =
        static_cast<int32_t>(static_cast<uint32_t>(keys[i]));
    args.scratch_probs[row * args.row_slots + i] = prob_of(i) / kept_mass;
  }
  if (threadIdx.x == 0) {
    args.scratch_counts[row] = kept;
    if (args.dropped_mass) args.dropped_mass[row] = dropped_mass;
  }
}

// indptr from the rows' lengths, by one block.
__global__ void __launch_bounds__(kScanThreads) knn_scatter_scan_kernel(KnnScatterArgs args) {
  __shared__ int64_t warp_sums[kMaxWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int64_t offset = 0;
  if (threadIdx.x == 0) args.indptr[0] = 0;
  for (int64_t first = 0; first < args.rows; first += kScanThreads) {
    const int64_t row = first + threadIdx.x;
    int64_t sum = row < args.rows ? args.scratch_counts[row] : 0;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();  // every warp's sum is written before any is read
    int64_t before = offset;
    for (int i = 0; i < kMaxWarps; ++i) {
      if (i < warp) before += warp_sums[i];
      offset += warp_sums[i];
    }
    if (row < args.rows) args.indptr[row + 1] = before + sum;
    __syncthreads();  // the sums were read before the next chunk overwrites them
  }
}

// Copies a row to its place, and fills as many of the slots behind the last row as it left unused.
__global__ void __launch_bounds__(kPackThreads) knn_scatter_pack_kernel(KnnScatterArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t begin = args.indptr[row];
  const int count = static_cast<int>(args.indptr[row + 1] - begin);
  const int64_t slots = args.row_slots;
  for (int i = threadIdx.x; i < count; i += kPackThreads) {
    args.token_ids[begin + i] = args.scratch_ids[row * slots + i];
    args.probs[begin + i] = args.scratch_probs[row * slots + i];
  }
  const int64_t unused = args.indptr[args.rows] + (row * slots - begin);
  for (int64_t i = threadIdx.x; i < slots - count; i += kPackThreads) {
    args.token_ids[unused + i] = -1;
    args.probs[unused + i] = 0.f;
  }
}

}  // namespace

Status knn_scatter(const KnnScatterArgs& args, int device, void* stream) {
  if (args.k > kMaxNeighbors) return {"more than 4096 neighbours a row"};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int size = kWarpSize;
  while (size < args.k) size *= 2;
  const int threads = size / 2 < kWarpSize ? kWarpSize : (size / 2 > 1024 ? 1024 : size / 2);
  const size_t bytes = size * (sizeof(uint64_t) + 2 * sizeof(float));
  cudaError_t error = cudaSuccess;
  const auto launch = [&](auto distance, auto token) {
    const auto kernel = knn_scatter_kernel<decltype(distance), decltype(token)>;
    if (bytes > 32 * 1024) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes));
    }
    if (error == cudaSuccess) kernel<<<args.rows, threads, bytes, cuda_stream>>>(args, size);
  };
  if (args.rows > 0) {
    with_dtype(args.distance_dtype, [&](auto distance) {
      if (args.tokens_are_int64) {
        launch(distance, int64_t{});
      } else {
        launch(distance, int32_t{});
      }
    });
    if (error != cudaSuccess) return status_of(error);
  }
  knn_scatter_scan_kernel<<<1, kScanThreads, 0, cuda_stream>>>(args);
  if (args.rows > 0) knn_scatter_pack_kernel<<<args.rows, kPackThreads, 0, cuda_stream>>>(args);
  return status_of(cudaGetLastError());
}

}  // namespace memdec::cuda
