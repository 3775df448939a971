// knn_scatter: k neighbours of each row to one sparse distribution of each row.
//
// A block takes a row, some neighbours a thread: sort by (token, neighbour), add up equal tokens
// with a segmented scan in a fixed order, sort what is left by (probability, token). The sorts are
// bitonic networks of 32-bit keys where that is enough: within a thread's registers, then by
// shuffles, and through shared memory only where threads of different warps meet. Rows are then
// packed: a prefix sum of their lengths, and a copy that also fills the unused slots.
#include "common/kernels.h"
#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace memdec::cuda {
namespace {

constexpr int kMaxNeighbors = 4096;
constexpr int kScanThreads = 1024;
constexpr int kPackThreads = 128;
constexpr int kWord = 4;            // values that the copy fills at a time
constexpr int64_t kFewRows = 2048;  // whose lengths every block of the copy adds up itself
constexpr int kScanItems = 8;       // of a thread
// Neighbours a thread: few where a row has few, since then it is latency that counts.
constexpr int kFewItems = 2, kManyItems = 4;
constexpr int kFewNeighbors = 256;
template <int kItems>
constexpr int kMinSize = kItems * kWarpSize;  // of a sort: whole warps
constexpr uint64_t kNoKey = ~0ull;

// Puts two keys in order.
template <typename Key>
__device__ void order(Key& a, Key& b, bool ascending) {
  const bool swap = (a > b) == ascending;
  const Key low = swap ? b : a;
  b = swap ? a : b;
  a = low;
}

// The last steps of a merge, between keys of one thread: half of them apart, then closer.
template <int kItems, typename Key>
__device__ void merge_items(Key (&keys)[kItems], bool ascending) {
#pragma unroll
  for (int stride = kItems / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!(i & stride)) order(keys[i], keys[i + stride], ascending);
    }
  }
}

// The last steps of a merge, within a warp: between keys kDistance threads apart, then closer.
template <int kDistance, int kItems, typename Key>
__device__ void merge_warp(Key (&keys)[kItems], bool ascending) {
#pragma unroll
  for (int distance = kDistance; distance > 0; distance /= 2) {
    const bool keep_low = !(threadIdx.x & distance) == ascending;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Key key = __shfl_xor_sync(0xffffffffu, keys[i], distance);
      if ((key < keys[i]) == keep_low) keys[i] = key;
    }
  }
  merge_items(keys, ascending);
}

// Ascending bitonic sort of `size` different keys, a power of two and at least kMinSize, by the
// whole block: each thread holds the next kItems keys. Warps behind hold none and only wait.
// `exchange` has room for `size` keys.
template <int kItems, typename Key>
__device__ void sort_keys(Key (&keys)[kItems], int size, Key* exchange) {
  const int thread = threadIdx.x, first = thread * kItems;
  const int threads = size / kItems;
  const bool holds_keys = thread < threads;
  if (holds_keys) {
#pragma unroll
    for (int span = 2; span <= kItems; span *= 2) {
#pragma unroll
      for (int stride = span / 2; stride > 0; stride /= 2) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (!(i & stride)) order(keys[i], keys[i + stride], !((first + i) & span));
        }
      }
    }
    merge_warp<1>(keys, !(first & 2 * kItems));
    merge_warp<2>(keys, !(first & 4 * kItems));
    merge_warp<4>(keys, !(first & 8 * kItems));
    merge_warp<8>(keys, !(first & 16 * kItems));
    merge_warp<16>(keys, !(first & 32 * kItems));
  }
#pragma unroll 1
  for (int span = 2 * kMinSize<kItems>; span <= size; span *= 2) {
    const bool ascending = !(first & span);
#pragma unroll 1
    for (int stride = span / 2; stride >= kMinSize<kItems>; stride /= 2) {
      const int other = thread ^ (stride / kItems);
      const bool keep_low = (thread < other) == ascending;
      __syncthreads();  // `exchange` was read
      if (holds_keys) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) exchange[i * threads + thread] = keys[i];
      }
      __syncthreads();  // every key of the step is written
      if (holds_keys) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const Key key = exchange[i * threads + other];
          if ((key < keys[i]) == keep_low) keys[i] = key;
        }
      }
    }
    if (holds_keys) merge_warp<16>(keys, ascending);
  }
  __syncthreads();  // `exchange` was read
}

// A sum over neighbours of one token; `begins`: none of the row's earlier ones are of that token.
struct Segment {
  bool begins;
  float sum;

  // This one followed by `next`.
  __device__ Segment then(const Segment& next) const {
    return {begins || next.begins, next.begins ? next.sum : sum + next.sum};
  }
};

// The segments of all threads before this one, added up in a fixed order.
__device__ float sum_before(Segment segment, Segment* warps) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const Segment before{static_cast<bool>(__shfl_up_sync(0xffffffffu, segment.begins, step)),
                         __shfl_up_sync(0xffffffffu, segment.sum, step)};
    if (lane >= step) segment = before.then(segment);
  }
  if (lane == kWarpSize - 1) warps[warp] = segment;
  __syncthreads();  // every warp's segment is written before any is read
  Segment before{true, 0.f};
  for (int i = 0; i < warp; ++i) before = before.then(warps[i]);
  const Segment own{static_cast<bool>(__shfl_up_sync(0xffffffffu, segment.begins, 1)),
                    __shfl_up_sync(0xffffffffu, segment.sum, 1)};
  return lane == 0 ? before.sum : before.then(own).sum;
}

// The counts of all threads before this one; `total` gets that of all.
__device__ int count_before(int count, int* warps, int* total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int sum = count;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarpSize - 1) warps[warp] = sum;
  __syncthreads();  // every warp's sum is written before any is read
  int before = 0;
  *total = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarpSize; ++i) {
    if (i < warp) before += warps[i];
    *total += warps[i];
  }
  return before + sum - count;
}

// The smallest size of a sort that takes n keys.
template <int kItems>
__host__ __device__ inline int sort_size(int n) {
  int size = kMinSize<kItems>;
  while (size < n) size *= 2;
  return size;
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

// Sorts a row's neighbours by token. In: this thread's neighbours are those `threads` apart, their
// tokens -1 where they are not valid. Out: `tokens` and `neighbors` of its places in the order,
// again -1 at the end.
template <typename Key, int kItems>
__device__ void sort_neighbors(int32_t (&tokens)[kItems], int (&neighbors)[kItems], int size,
                               int index_bits, uint64_t* storage) {
  constexpr Key kNone = static_cast<Key>(kNoKey);
  Key keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Key index = static_cast<Key>(i * blockDim.x + threadIdx.x);
    keys[i] = tokens[i] < 0 ? kNone : static_cast<Key>(tokens[i]) << index_bits | index;
  }
  sort_keys(keys, size, reinterpret_cast<Key*>(storage));
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    tokens[i] = keys[i] == kNone ? -1 : static_cast<int32_t>(keys[i] >> index_bits);
    neighbors[i] = static_cast<int>(keys[i] & ((Key{1} << index_bits) - 1));
  }
}

// Sorts `count` entries, ~probability above token, which are in the order of their tokens. By the
// leading bits of the probability and the place: that leaves wrong only what differs in the bits
// that did not fit, which is rare and found out. `exchange` has room for as many numbers.
template <int kItems>
__device__ void sort_entries(uint64_t* entries, int count, int index_bits, uint32_t* exchange) {
  constexpr int kProbBits = 30;  // of a float32 up to 1
  constexpr uint32_t kNone = static_cast<uint32_t>(kNoKey);
  const int size = sort_size<kItems>(count), first = threadIdx.x * kItems;
  const uint32_t places = (1u << index_bits) - 1;
  uint32_t keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    keys[i] = kNone;
    if (first + i < count) {
      const uint32_t falling = static_cast<uint32_t>(entries[first + i] >> 32) << (32 - kProbBits);
      keys[i] = (falling & ~places) | (first + i);
    }
  }
  sort_keys(keys, size, exchange);
  uint64_t sorted[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    sorted[i] = first + i < count ? entries[keys[i] & places] : kNoKey;
  }
  __syncthreads();  // every entry was read
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (first + i < count) entries[first + i] = sorted[i];
  }
  __syncthreads();  // every entry is in its place
  bool wrong = false;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    wrong = wrong || (first + i + 1 < count && entries[first + i] > entries[first + i + 1]);
  }
  if (!__syncthreads_or(wrong)) return;
  sort_keys(sorted, size, entries);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (first + i < count) entries[first + i] = sorted[i];
  }
  __syncthreads();  // the sorted entries are visible to all
}

template <int kItems, typename Distance, typename Token>
__global__ void knn_scatter_kernel(KnnScatterArgs args, int size) {
  extern __shared__ uint64_t keys[];                             // [size]
  float* row_distances = reinterpret_cast<float*>(keys + size);  // [size] by neighbour
  __shared__ float shared[kMaxWarps];
  __shared__ int warp_counts[kMaxWarps];
  __shared__ Segment warp_segments[kMaxWarps];
  __shared__ int32_t first_tokens[kMaxWarps + 1];
  wait_for_earlier_kernels();
  const int64_t row = blockIdx.x;
  const int k = static_cast<int>(args.k);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Distance* distances =
      static_cast<const Distance*>(args.distances) + row * args.distance_stride;

  const int index_bits = 31 - __clz(size);
  int32_t tokens[kItems];
  float nearest = INFINITY;
  bool wide = false;  // a token and a neighbour do not fit into 32 bits
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int n = i * blockDim.x + threadIdx.x;
    const float distance = n < k ? to_float(distances[n]) : INFINITY;
    tokens[i] = n < k ? load_token<Token>(args.tokens, row * args.token_stride + n) : -1;
    if (!(distance < INFINITY)) tokens[i] = -1;  // NaN too
    row_distances[n] = distance;
    if (tokens[i] >= 0) nearest = fminf(nearest, distance);
    wide = wide || (tokens[i] >= 0 && tokens[i] >> (32 - index_bits - 1) != 0);
  }
  nearest = block_min(nearest, shared);
  int neighbors[kItems];
  if (__syncthreads_or(wide)) {
    sort_neighbors<uint64_t>(tokens, neighbors, size, index_bits, keys);
  } else {
    sort_neighbors<uint32_t>(tokens, neighbors, size, index_bits, keys);
  }

  // From distances to weights, in the order of the sorted tokens.
  float weights[kItems];
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    weights[i] = 0.f;
    if (tokens[i] >= 0) {
      const float distance = row_distances[neighbors[i]];
      // Neighbours at -inf share the mass; the difference would be NaN.
      weights[i] = distance == nearest ? 1.f : expf((nearest - distance) / args.temperature);
    }
    total += weights[i];
  }
  const float scale = 1.f / block_sum(total, shared);

  // The tokens on both sides of this thread's.
  if (lane == 0) first_tokens[warp] = tokens[0];
  if (threadIdx.x == 0) first_tokens[blockDim.x / kWarpSize] = -1;
  if (lane == kWarpSize - 1) warp_counts[warp] = tokens[kItems - 1];
  __syncthreads();  // written before they are read
  int32_t before = __shfl_up_sync(0xffffffffu, tokens[kItems - 1], 1);
  int32_t after = __shfl_down_sync(0xffffffffu, tokens[0], 1);
  if (lane == 0) before = warp == 0 ? -1 : warp_counts[warp - 1];
  if (lane == kWarpSize - 1) after = first_tokens[warp + 1];

  // Running sums of each token; at its last place all of it.
  Segment running{tokens[0] != before, weights[0]};
#pragma unroll
  for (int i = 1; i < kItems; ++i) {
    running = running.then({tokens[i] != tokens[i - 1], weights[i]});
  }
  float sum = sum_before(running, warp_segments);
  float probs[kItems];
  int entries = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool begins = tokens[i] != (i == 0 ? before : tokens[i - 1]);
    const bool ends = tokens[i] != (i + 1 == kItems ? after : tokens[i + 1]);
    sum = begins ? weights[i] : sum + weights[i];
    probs[i] = ends && tokens[i] >= 0 ? sum * scale : 0.f;
    entries += probs[i] > 0.f ? 1 : 0;
  }

  // The entries as keys, without gaps: falling probability, then token.
  int count;
  __syncthreads();  // the tokens in `warp_counts` were read
  int place = count_before(entries, warp_counts, &count);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (probs[i] > 0.f) {
      keys[place++] = static_cast<uint64_t>(~__float_as_uint(probs[i])) << 32 |
                      static_cast<uint32_t>(tokens[i]);
    }
  }
  __syncthreads();  // every entry is written
  sort_entries<kItems>(keys, count, index_bits, reinterpret_cast<uint32_t*>(row_distances));

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

// indptr from the rows' lengths, by one block: 8 rows a thread at a time.
__global__ void __launch_bounds__(kScanThreads) knn_scatter_scan_kernel(KnnScatterArgs args) {
  __shared__ int64_t warp_sums[kMaxWarps];
  wait_for_earlier_kernels();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int64_t offset = 0;
  if (threadIdx.x == 0) args.indptr[0] = 0;
  for (int64_t first = 0; first < args.rows; first += kScanItems * kScanThreads) {
    const int64_t row = first + kScanItems * threadIdx.x;
    int64_t ends[kScanItems];
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      ends[i] = row + i < args.rows ? args.scratch_counts[row + i] : 0;
    }
#pragma unroll
    for (int i = 1; i < kScanItems; ++i) ends[i] += ends[i - 1];
    int64_t sum = ends[kScanItems - 1];
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();  // every warp's sum is written before any is read
    int64_t before = offset + sum - ends[kScanItems - 1];
    for (int i = 0; i < kMaxWarps; ++i) {
      if (i < warp) before += warp_sums[i];
      offset += warp_sums[i];
    }
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      if (row + i < args.rows) args.indptr[row + i + 1] = before + ends[i];
    }
    __syncthreads();  // the sums were read before the next chunk overwrites them
  }
}

// Copies a row to its place, and fills a share of the slots behind the last row. Of few rows, it
// makes indptr itself.
__global__ void __launch_bounds__(kPackThreads) knn_scatter_pack_kernel(KnnScatterArgs args) {
  __shared__ int64_t shared[kMaxWarps];
  wait_for_earlier_kernels();
  const int64_t row = blockIdx.x;
  const int count = static_cast<int>(args.scratch_counts[row]);
  int64_t begin, total;
  if (args.rows > kFewRows) {
    begin = args.indptr[row];
    total = args.indptr[args.rows];
  } else {
    int64_t before = 0, all = 0;
    for (int64_t i = threadIdx.x; i < args.rows; i += kPackThreads) {
      const int64_t other = args.scratch_counts[i];
      if (i < row) before += other;
      all += other;
    }
    begin = block_sum(before, shared);
    total = block_sum(all, shared);
    if (threadIdx.x == 0) {
      if (row == 0) args.indptr[0] = 0;
      args.indptr[row + 1] = begin + count;
    }
  }
  const int64_t slots = args.row_slots;
  for (int i = threadIdx.x; i < count; i += kPackThreads) {
    args.token_ids[begin + i] = args.scratch_ids[row * slots + i];
    args.probs[begin + i] = args.scratch_probs[row * slots + i];
  }
  const int64_t all = args.rows * slots;
  const int64_t first_word = (total + kWord - 1) / kWord, end_word = all / kWord;
  const int64_t words = (end_word - first_word + args.rows - 1) / args.rows;  // of a block
  for (int64_t i = threadIdx.x; i < words; i += kPackThreads) {
    const int64_t word = first_word + row * words + i;
    if (word >= end_word) break;
    reinterpret_cast<int4*>(args.token_ids)[word] = {-1, -1, -1, -1};
    reinterpret_cast<float4*>(args.probs)[word] = {0.f, 0.f, 0.f, 0.f};
  }
  // What is left at both ends of the words.
  const auto fill = [&](int64_t from, int64_t to) {
    const int64_t i = from + threadIdx.x;
    if (i < to) {
      args.token_ids[i] = -1;
      args.probs[i] = 0.f;
    }
  };
  if (row == 0) {
    fill(total, min(first_word * kWord, all));
    fill(max(end_word * kWord, total), all);
  }
}

}  // namespace

Status knn_scatter(const KnnScatterArgs& args, int device, void* stream) {
  if (args.k > kMaxNeighbors) return {"more than 4096 neighbours a row"};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int k = static_cast<int>(args.k);
  cudaError_t error = cudaSuccess;
  const auto launch = [&](auto items, auto distance, auto token) {
    constexpr int kItems = decltype(items)::value;
    const auto kernel = knn_scatter_kernel<kItems, decltype(distance), decltype(token)>;
    const int size = sort_size<kItems>(k);
    const size_t bytes = size * (sizeof(uint64_t) + sizeof(float));
    if (bytes > 32 * 1024) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes));
    }
    if (error != cudaSuccess) return;
    error = launch_overlapping(kernel, args.rows, size / kItems, bytes, device, cuda_stream, args,
                               size);
  };
  const auto launch_of = [&](auto distance, auto token) {
    if (k <= kFewNeighbors) {
      launch(std::integral_constant<int, kFewItems>{}, distance, token);
    } else {
      launch(std::integral_constant<int, kManyItems>{}, distance, token);
    }
  };
  if (args.rows > 0) {
    with_dtype(args.distance_dtype, [&](auto distance) {
      if (args.tokens_are_int64) {
        launch_of(distance, int64_t{});
      } else {
        launch_of(distance, int32_t{});
      }
    });
    if (error != cudaSuccess) return status_of(error);
  }
  if (args.rows == 0 || args.rows > kFewRows) {
    error =
        launch_overlapping(knn_scatter_scan_kernel, 1, kScanThreads, 0, device, cuda_stream, args);
  }
  if (args.rows > 0 && error == cudaSuccess) {
    error = launch_overlapping(knn_scatter_pack_kernel, args.rows, kPackThreads, 0, device,
                               cuda_stream, args);
  }
  return status_of(error);
}

}  // namespace memdec::cuda
