// Rows that take turns in persistent clusters of blocks (Hopper and newer), so that every logit is
// read from memory once.
//
// A row is cut into one slice a block, a slice into chunks. In each block one warp loads chunks by
// bulk copies into a ring, `kWorkers` threads work on them, and one warp exchanges what the blocks
// found through distributed shared memory. The work on a row has two halves: a sum, up to what a
// block must know of the others, and a sweep, which needs it, writes the result and frees the
// chunks. Single columns that want another result are patched in the chunks before the sweep.
// Workers sum row i + 1 before they sweep row i, so that an exchange costs no time.
//
// What a kernel does is a Job: see interpolate_job.cuh and sparse_kl_job.cuh.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/row.cuh"
#include "cuda/softmax_sum.cuh"
#include "cuda/team.cuh"

namespace memdec::cuda {

constexpr int kWorkers = 512;
constexpr int kWorkerWarps = kWorkers / kWarpSize;
constexpr int kPipelineThreads = kWorkers + 2 * kWarpSize;
constexpr int kStripeBytes = kWorkers * sizeof(uint4);  // a pack a worker
constexpr int kMaxChunks = 32;                          // of a ring
constexpr int kUnit = 8;                                // columns: a slice begins at a multiple

// Columns in a stripe. A chunk has Job::kStripes stripes, of one matrix or of several, and
// Job::kColumns columns.
template <typename T>
constexpr int kStripe = kStripeBytes / sizeof(T);

// How rows are spread; clusters == 0: not at all.
struct PipelinePlan {
  int clusters = 0;
  int blocks = 0;  // of a cluster
  int slots = 0;   // columns of a slice, whole units
  int chunks = 0;  // of a slice
  int ring = 0;    // chunks that a block holds
};

// The part of a row that one block holds: slot s holds column first + s, for s in [begin, end).
// Slot 0 lies at a whole unit of the row's memory, so the first block may have slots before the
// row's first column.
struct Slice {
  int first;
  int begin;
  int end;

  // Columns [0, columns) of a row whose first column lies `phase` after a whole unit.
  __device__ Slice(int phase, int columns, int slots, int rank) {
    first = rank * slots - phase;
    begin = max(0, -first);
    end = max(begin, min(slots, columns - first));
  }

  __device__ bool holds(int64_t column) const {
    return column >= first + begin && column < first + end;
  }

  // Whether this pack of slots is all of the row.
  template <int kCount>
  __device__ bool whole(int s) const {
    return s >= begin && s + kCount <= end;
  }
};

// Columns between a row's first column and the whole unit before it.
template <typename T>
__device__ inline int phase_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kUnit);
}

// The slots in [begin, begin + count) that a bulk copy brings: whole units, at both ends of the
// slice a few neighbours of the row.
__device__ inline int copied_slots(const Slice& slice, int begin, int count) {
  const int end = slice.end > slice.begin ? (slice.end + kUnit - 1) / kUnit * kUnit : 0;
  return max(0, min(count, end - begin));
}

// Copies such slots of a row's slice; by one thread.
template <typename T>
__device__ inline void copy_slots(uint32_t to, const T* row, const Slice& slice, int begin,
                                  int count, hopper::Barrier done) {
  const int copied = copied_slots(slice, begin, count);
  if (copied > 0) hopper::copy_bulk(to, row + slice.first + begin, copied * sizeof(T), done);
}

// Neighbouring logits in shared memory.
template <typename T, int kCount>
__device__ inline Values<kCount> load_values(uint32_t address) {
  using Word = typename Values<kCount>::template Word<T>;
  static_assert(sizeof(Word) == kCount * sizeof(T), "one access");
  return unpack<T>(hopper::load_shared<Word>(address));
}

// A single one of them.
template <typename T>
__device__ inline T& value_at(uint32_t chunk, int i) {
  return static_cast<T*>(__cvta_shared_to_generic(chunk))[i];
}

// Puts -inf where a pack, at slot s, is not of the slice's row.
template <typename T>
__device__ inline void mask(Pack<T>* pack, const Slice& slice, int s) {
  pack->mask(slice.begin - s, slice.end - s);
}

// Waits for all workers of the block.
__device__ inline void sync_workers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory");
}

// What a block keeps beside the ring.
template <typename Job>
struct PipelineControl {
  uint64_t full[kMaxChunks];   // barrier: a chunk is loaded
  uint64_t empty[kMaxChunks];  // barrier: every worker warp is done with it
  uint64_t summed[2];          // barrier: every worker warp has put its part
  uint64_t exchanged[2];       // barrier: every block's part has arrived
  uint64_t published[2];       // barrier: what the sweep needs is there
  typename Job::Part warp_parts[2][kWorkerWarps];
  typename Job::Part block_parts[2][kMaxClusterBlocks];
  typename Job::Shared shared[2];
};

constexpr int kRingAlignment = 128;

template <typename Job>
__host__ __device__ constexpr int control_bytes() {
  return (sizeof(PipelineControl<Job>) + kRingAlignment - 1) / kRingAlignment * kRingAlignment;
}

template <typename Job>
__host__ __device__ constexpr int mark_bytes(int chunks) {
  return Job::kPatches ? chunks * kWorkers : 0;
}

// A place in the ring, and the parity of the phase in which its chunk becomes full.
struct RingCursor {
  int chunk = 0;
  uint32_t parity = 0;

  __device__ void advance(int ring) {
    if (++chunk == ring) {
      chunk = 0;
      parity ^= 1;
    }
  }
};

template <typename Job>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    row_pipeline_kernel(const __grid_constant__ typename Job::Args args,
                        const __grid_constant__ PipelinePlan plan) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(typename Job::Part) % sizeof(uint4) == 0, "a part is sent as whole uint4");
  using Control = PipelineControl<Job>;
  extern __shared__ __align__(kRingAlignment) char storage[];
  auto& control = *reinterpret_cast<Control*>(storage);
  const uint32_t address = hopper::kept_address(storage);
  const auto barrier = [&](size_t first, int i) {
    return hopper::Barrier{address + static_cast<uint32_t>(first + i * sizeof(uint64_t))};
  };
  const auto full = [&](int chunk) { return barrier(offsetof(Control, full), chunk); };
  const auto empty = [&](int chunk) { return barrier(offsetof(Control, empty), chunk); };
  const auto summed = [&](int slot) { return barrier(offsetof(Control, summed), slot); };
  const auto exchanged = [&](int slot) { return barrier(offsetof(Control, exchanged), slot); };
  const auto published = [&](int slot) { return barrier(offsetof(Control, published), slot); };
  // A byte a worker and chunk of a slice, for Jobs that patch; 0 at first.
  uint8_t* marks = reinterpret_cast<uint8_t*>(storage + control_bytes<Job>());
  const uint32_t ring_address = address + control_bytes<Job>() + mark_bytes<Job>(plan.chunks);
  const auto chunk_at = [&](int chunk) {
    return ring_address + chunk * (Job::kStripes * kStripeBytes);
  };
  // The chunks of a slice whose first is chunk `first` of the ring.
  const auto chunks_from = [&](int first) {
    return
        [=](int c) { return chunk_at(first + c < plan.ring ? first + c : first + c - plan.ring); };
  };

  const int rank = static_cast<int>(blockIdx.x) % plan.blocks;
  const int64_t first_row = blockIdx.x / plan.blocks;
  const int64_t clusters = gridDim.x / plan.blocks;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.ring; ++i) {
      full(i).init(1);
      empty(i).init(kWorkerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      summed(i).init(kWorkerWarps);
      exchanged(i).init(1);
      published(i).init(1);
    }
    hopper::fence_barrier_init();
  }
  for (int i = threadIdx.x; i < mark_bytes<Job>(plan.chunks); i += kPipelineThreads) marks[i] = 0;
  __syncthreads();
  hopper::cluster_arrive();
  wait_for_earlier_kernels();

  Job job(args, plan, rank);
  if (warp < kWorkerWarps) {
    const int worker = threadIdx.x;
    typename Job::Carry carry;  // of the row that is summed
    RingCursor summing, sweeping;
    int first_chunk = 0;
    const auto sum = [&](int64_t row) {
      first_chunk = summing.chunk;
      job.begin_sum(row, &carry, worker);
      if (row + clusters < args.rows) job.prefetch(row + clusters, &carry);
      for (int c = 0; c < plan.chunks; c += Job::kTogether) {
        uint32_t at[Job::kTogether];
#pragma unroll
        for (int t = 0; t < Job::kTogether; ++t) {
          if (t > 0 && c + t >= plan.chunks) break;
          full(summing.chunk).wait(summing.parity);
          at[t] = chunk_at(summing.chunk);
          summing.advance(plan.ring);
        }
        job.add(&carry, c, at, worker);
      }
    };
    const auto put_part = [&](int i, int64_t row) {
      const auto part = job.end_sum(row, &carry, worker, chunks_from(first_chunk));
      if (lane == 0) {
        control.warp_parts[i & 1][warp] = part;
        summed(i & 1).arrive();
      }
    };
    int i = 0;
    int64_t row = first_row;
    job.prefetch(row, &carry);
    sum(row);
    put_part(0, row);
    for (; row < args.rows; row += clusters, ++i) {
      const typename Job::Carry summed_carry = carry;
      const bool more = row + clusters < args.rows;
      if (more) sum(row + clusters);
      published(i & 1).wait(i >> 1 & 1);
      const auto& shared = control.shared[i & 1];
      if constexpr (Job::kPatches) {
        const auto chunk_of = chunks_from(sweeping.chunk);
        job.patch(row, shared, summed_carry, worker, chunk_of, marks);
        sync_workers();
      }
      const auto write = job.writer(row, shared, summed_carry, worker, marks);
      for (int c = 0; c < plan.chunks; c += Job::kTogether) {
        uint32_t at[Job::kTogether];
        RingCursor next = sweeping;
#pragma unroll
        for (int t = 0; t < Job::kTogether; ++t) {
          at[t] = chunk_at(next.chunk);
          next.advance(plan.ring);
        }
        write(c, at);
        __syncwarp();
#pragma unroll
        for (int t = 0; t < Job::kTogether; ++t) {
          if (t > 0 && c + t >= plan.chunks) break;
          if (lane == 0) empty(sweeping.chunk).arrive();
          sweeping.advance(plan.ring);
        }
      }
      if (more) put_part(i + 1, row + clusters);
    }
  } else if (warp == kWorkerWarps) {
    if (lane == 0) {
      RingCursor loading;
      bool reused = false;
      for (int64_t row = first_row; row < args.rows; row += clusters) {
        const auto load = job.loader(row);
        for (int c = 0; c < plan.chunks; ++c) {
          if (reused) empty(loading.chunk).wait(loading.parity ^ 1);
          load(c, chunk_at(loading.chunk), full(loading.chunk));
          loading.advance(plan.ring);
          reused = reused || loading.chunk == 0;
        }
      }
    }
  } else {
    hopper::cluster_wait();  // every block's barriers exist before this one sends
    int i = 0;
    for (int64_t row = first_row; row < args.rows; row += clusters, ++i) {
      const int slot = i & 1, parity = i >> 1 & 1;
      typename Job::Part part;
      summed(slot).wait(parity);
      if (lane < kWorkerWarps) part = control.warp_parts[slot][lane];
      part = job.merge(part);
      if (plan.blocks > 1) {
        if (lane == 0) exchanged(slot).arrive_expect(plan.blocks * sizeof(part));
        if (lane < plan.blocks) {
          const uint4* words = reinterpret_cast<const uint4*>(&part);
          uint4* place = reinterpret_cast<uint4*>(&control.block_parts[slot][rank]);
#pragma unroll
          for (int w = 0; w < static_cast<int>(sizeof(part) / sizeof(uint4)); ++w) {
            hopper::send(words[w], place + w, exchanged(slot), lane);
          }
        }
        exchanged(slot).template wait<true>(parity);
        part = {};
        if (lane < plan.blocks) part = control.block_parts[slot][lane];
        part = job.merge(part);
      }
      if (lane == 0) {
        control.shared[slot] = job.publish(row, part);
        published(slot).arrive();
      }
      __syncwarp();
    }
  }
  // No block waits for the others at the end: what is sent to it has come before it publishes.
#endif
}

// Whether the rows of two tensors of one dtype lie equally far from a whole unit.
inline bool rows_agree(const RowsView& a, const RowsView& b) {
  const auto phase = [](const RowsView& view) {
    return reinterpret_cast<uintptr_t>(view.data) / (view.dtype == DType::kFloat32 ? 4 : 2) % kUnit;
  };
  const auto differ = [](int64_t x, int64_t y) { return (x - y) % kUnit != 0; };
  if (phase(a) != phase(b)) return false;
  const bool whole = a.inner_stride % kUnit == 0 && a.outer_stride % kUnit == 0 &&
                     b.inner_stride % kUnit == 0 && b.outer_stride % kUnit == 0;
  return whole || (a.inner_rows == b.inner_rows && !differ(a.inner_stride, b.inner_stride) &&
                   !differ(a.outer_stride, b.outer_stride));
}

// How a Job's kernel is launched.
template <typename Job>
struct PipelineLaunch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  PipelineLaunch(const PipelinePlan& plan, int clusters, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
    attributes[1] = overlap_attribute();
    config.gridDim = dim3(static_cast<unsigned>(clusters * plan.blocks));
    config.blockDim = dim3(kPipelineThreads);
    config.dynamicSmemBytes = control_bytes<Job>() + mark_bytes<Job>(plan.chunks) +
                              plan.ring * Job::kStripes * kStripeBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  PipelineLaunch(const PipelineLaunch&) = delete;
  PipelineLaunch& operator=(const PipelineLaunch&) = delete;
};

// The clusters of a Job's kernel that run at once, a block on each multiprocessor; 0 where the
// device has no clusters of that size. The first time it also asks for what a launch does not get
// by itself.
template <typename Job>
inline int resident_clusters(const PipelinePlan& plan, int shared_bytes, int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kMaxClusterBlocks + 1];  // 1 more than the number
  int clusters = device < kDevices ? known[device][plan.blocks].load() - 1 : -1;
  if (clusters >= 0) return clusters;
  const PipelineLaunch<Job> launch(plan, 1, nullptr);
  const auto kernel = row_pipeline_kernel<Job>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  clusters = active_clusters(kernel, launch.config);
  if (device < kDevices) known[device][plan.blocks].store(clusters + 1);
  return clusters;
}

// The best plan for rows of `columns` columns: the one in which a block does least, waves times
// what a row costs it.
template <typename Job>
inline PipelinePlan plan_pipeline(int64_t rows, int64_t columns, int device) {
  int major = 0, shared_bytes = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (major < 9) return {};
  const int64_t units = (columns + 2 * kUnit - 2) / kUnit;  // in the worst phase
  int64_t best = INT64_MAX;
  PipelinePlan plan;
  for (int blocks = 1; blocks <= kMaxClusterBlocks; ++blocks) {
    const int64_t slots = (units + blocks - 1) / blocks * kUnit;
    const int64_t chunks = (slots + Job::kColumns - 1) / Job::kColumns;
    const int64_t room = (shared_bytes - control_bytes<Job>() - mark_bytes<Job>(chunks)) /
                         (Job::kStripes * kStripeBytes);
    if (chunks > room) continue;
    PipelinePlan candidate;
    candidate.blocks = blocks;
    candidate.slots = static_cast<int>(slots);
    candidate.chunks = static_cast<int>(chunks);
    candidate.ring = static_cast<int>(room < kMaxChunks ? room : kMaxChunks);
    const int clusters = resident_clusters<Job>(candidate, shared_bytes, device);
    const bool turns = rows > clusters;  // then a block holds two rows
    if (clusters == 0 || (turns && 2 * chunks > room)) continue;
    candidate.clusters = static_cast<int>(rows < clusters ? rows : clusters);
    const int64_t cost = (rows + clusters - 1) / clusters * (slots + Job::kRowCost);
    if (cost < best) {
      best = cost;
      plan = candidate;
    }
  }
  return plan;
}

// Launches a Job's kernel over all rows.
template <typename Job>
inline cudaError_t launch_row_pipeline(const typename Job::Args& args, const PipelinePlan& plan,
                                       cudaStream_t stream) {
  const PipelineLaunch<Job> launch(plan, plan.clusters, stream);
  return cudaLaunchKernelEx(&launch.config, row_pipeline_kernel<Job>, args, plan);
}

}  // namespace memdec::cuda
