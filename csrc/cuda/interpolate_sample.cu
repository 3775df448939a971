// interpolate_sample: a token drawn from the mixture of two softmaxes, which is never written.
//
// On Hopper rows go through the pipeline of sample_job.cuh, which leaves a number for each group of
// columns, and a block a row then reads again the few groups that matter: the one with the greatest
// probability, the one that the draw falls into, or those that can hold one of the top k. What does
// not fit there (top-p or min-p without a small top-k, tensors whose rows lie differently, other
// GPUs) is done by a block a row that reads it as often as it takes.
#include "common/kernels.h"
#include "common/sampling.h"
#include "cuda/choose_token.cuh"
#include "cuda/launch.h"
#include "cuda/sample_job.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 256;      // of the block that ends a row
constexpr int kWideThreads = 512;  // of the block that does all of a row
constexpr int kMaxCandidates = 2048;
constexpr int kMaxTopK = 512;

// Below this temperature a group's sum of powers may be too small for float32.
constexpr float kLowTemperature = 0.05f;

__device__ inline Filters filters_of(const InterpolateSampleArgs& args) {
  return {args.temperature > 0.f ? 1.f / args.temperature : 0.f, static_cast<int>(args.top_k),
          args.top_p, args.min_p};
}

// A row whose sums are known.
template <typename Base, typename Memory>
struct SampledRow {
  const InterpolateSampleArgs& args;
  int64_t row;
  const Base* base;
  const Memory* memory;
  int vocab;
  int shared_vocab;  // columns that the memory has

  __device__ SampledRow(const InterpolateSampleArgs& args, int64_t row)
      : args(args),
        row(row),
        base(row_of<const Base>(args.base, row)),
        memory(row_of<const Memory>(args.memory, row)),
        vocab(static_cast<int>(args.vocab)),
        shared_vocab(real_columns(args.memory.cols, args.vocab)) {}

  __device__ float base_x(int i) const { return to_float(base[i]); }
  __device__ float memory_x(int i) const {
    return i < shared_vocab ? to_float(memory[i]) : -INFINITY;
  }
  __device__ uint64_t bits() const { return args.seeds ? random_bits(args.seeds[row]) : 0; }

  // A row that is no distribution has no token: 0, whose log-probability is NaN.
  __device__ void put_nothing() const {
    if (threadIdx.x > 0) return;
    args.tokens[row] = 0;
    args.log_probs[row] = NAN;
  }

  __device__ void put(const Mixture& mixture, int token) const {
    if (threadIdx.x > 0) return;
    args.tokens[row] = token;
    args.log_probs[row] = mixture(base_x(token), memory_x(token));
  }

  __device__ void choose_slowly(const Mixture& mixture, ChoiceScratch& scratch) const {
    const auto level = [&](int i) { return mixture.log2_probability(base_x(i), memory_x(i)); };
    put(mixture, choose(vocab, filters_of(args), bits(), scratch, level));
  }
};

template <typename Base, typename Memory>
__global__ void __launch_bounds__(kWideThreads) sample_kernel(InterpolateSampleArgs args) {
  __shared__ ChoiceScratch scratch;
  const SampledRow<Base, Memory> sampled(args, blockIdx.x);
  const Weights weights = row_weights(args, sampled.row);
  RowStats base_stats{0.f, NAN}, memory_stats{0.f, NAN};
  if (weights.valid && weights.use_base) base_stats = row_stats(sampled.base, sampled.vocab, 1.f);
  if (weights.valid && weights.use_memory) {
    memory_stats = row_stats(sampled.memory, sampled.shared_vocab, args.inv_temperature);
  }
  const Mixture mixture(weights, base_stats, memory_stats, args.inv_temperature);
  if (!mixture.exists()) return sampled.put_nothing();
  sampled.choose_slowly(mixture, scratch);
}

// The tokens that top-k may keep, of groups whose greatest probability reaches that of the k-th
// greatest group; more of them than there is room for are counted, not kept.
struct Candidates {
  int count;
  uint64_t orders[kMaxCandidates];
};

// Sorts the first `size` orders, a power of two, falling; by the whole block.
__device__ inline void sort_falling(uint64_t* orders, int size) {
  for (int width = 2; width <= size; width *= 2) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (distance - 1)), high = low + distance;
        const uint64_t a = orders[low], b = orders[high];
        const bool falling = (low & width) == 0;
        if ((a < b) == falling) {
          orders[low] = b;
          orders[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Chooses among candidates that hold the k greatest.
__device__ inline int choose_candidate(Candidates& candidates, const Ordering& ordering,
                                       const Filters& filters, uint64_t bits,
                                       ChoiceScratch& scratch) {
  int size = 2;
  while (size < candidates.count) size *= 2;
  for (int i = candidates.count + threadIdx.x; i < size; i += blockDim.x) candidates.orders[i] = 0;
  __syncthreads();
  sort_falling(candidates.orders, size);
  const float top_level = ordering.level(candidates.orders[0]);
  const auto softened = [&](int i) {
    const float level = ordering.level(candidates.orders[i]);
    return fast_exp2((level - top_level) * filters.inv_temperature);
  };
  int n = min(candidates.count, filters.top_k);
  if (filters.top_p < 1.f) {
    const auto weight = [&](int i) { return whole_weight(softened(i)); };
    const double total = static_cast<double>(sum_of(n, scratch, weight));
    const auto wanted = static_cast<uint64_t>(ceil(filters.top_p * total));
    n = pick_at(n, greater_of(wanted, 1) - 1, scratch, weight).index + 1;
  }
  const auto weight = [&](int i) {
    const float w = softened(i);
    return w >= filters.min_p ? whole_weight(w) : 0;
  };
  const uint64_t target = __umul64hi(bits, sum_of(n, scratch, weight));
  return ordering.index(candidates.orders[pick_at(n, target, scratch, weight).index]);
}

template <typename T, GroupOf kOf>
__global__ void __launch_bounds__(kThreads)
    end_sample_kernel(const __grid_constant__ InterpolateSampleArgs args,
                      const __grid_constant__ PipelinePlan plan) {
  __shared__ ChoiceScratch scratch;
  __shared__ Candidates candidates;
  wait_for_earlier_kernels();
  const SampledRow<T, T> sampled(args, blockIdx.x);
  const Mixture mixture(row_weights(args, sampled.row), args.stats[2 * sampled.row],
                        args.stats[2 * sampled.row + 1], args.inv_temperature);
  if (!mixture.exists()) return sampled.put_nothing();
  const int n = group_count(plan);
  const float* groups = args.groups + sampled.row * n;
  const auto range = [&](int group) {
    return GroupRange<T>(plan, sampled.base, sampled.vocab, group);
  };
  const auto probability = [&](int i) {
    return mixture.probability(sampled.base_x(i), sampled.memory_x(i));
  };

  if constexpr (kOf !=
                GroupOf::kMax) {  // the group, then the token in it, that the draw falls into
    const auto weight_of = [&](int group) { return whole_weight(groups[group]); };
    const uint64_t total = sum_of(n, scratch, weight_of);
    if (total == 0) return sampled.choose_slowly(mixture, scratch);
    const Picked group = pick_at(n, __umul64hi(sampled.bits(), total), scratch, weight_of);
    const auto columns = range(group.index);
    const int width = columns.end - columns.begin;
    const DrawWeight draw(mixture, args.temperature);
    const auto weight = [&](int i) {
      const int column = columns.begin + i;
      return whole_weight(
          draw.template of<kOf>(mixture, sampled.base_x(column), sampled.memory_x(column)));
    };
    // Its columns' sum, rounded otherwise, is not quite the group's: the draw is stretched to it.
    const uint64_t sum = sum_of(width, scratch, weight);
    if (sum == 0) return sampled.choose_slowly(mixture, scratch);
    const double place = static_cast<double>(group.rest) / weight_of(group.index);
    const auto target = min(static_cast<uint64_t>(place * sum), sum - 1);
    return sampled.put(mixture, columns.begin + pick_at(width, target, scratch, weight).index);
  }

  const Ordering group_order(n);
  const auto order_of = [&](int group) { return group_order(groups[group], group); };
  uint64_t top = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) top = greater_of(top, order_of(i));
  top = block_max(top, scratch);

  const Ordering ordering(sampled.vocab);
  if (args.temperature == 0.f) {
    const auto columns = range(group_order.index(top));
    uint64_t best = 0;
    for (int i = columns.begin + threadIdx.x; i < columns.end; i += kThreads) {
      best = greater_of(best, ordering(probability(i), i));
    }
    return sampled.put(mixture, ordering.index(block_max(best, scratch)));
  }

  // Top-k: as many groups reach the floor as tokens are wanted, and so do at least as many tokens.
  const uint64_t cut = find_cut(n, 1, top, args.top_k, scratch, order_of, [](int) { return 1; });
  const float floor = fmaxf(group_order.level(cut), FLT_MIN);
  if (threadIdx.x == 0) candidates.count = 0;
  __syncthreads();
  for (int group = threadIdx.x / kWarpSize; group < n; group += kThreads / kWarpSize) {
    if (groups[group] < floor) continue;
    const auto columns = range(group);
    for (int i = columns.begin + threadIdx.x % kWarpSize; i < columns.end; i += kWarpSize) {
      const float p = probability(i);
      if (p < floor) continue;
      const int place = atomicAdd(&candidates.count, 1);
      if (place < kMaxCandidates) candidates.orders[place] = ordering(fast_log2(p), i);
    }
  }
  __syncthreads();
  const int found = candidates.count;
  if (found < args.top_k || found > kMaxCandidates) {
    return sampled.choose_slowly(mixture, scratch);
  }
  const int token =
      choose_candidate(candidates, ordering, filters_of(args), sampled.bits(), scratch);
  sampled.put(mixture, token);
}

// How groups serve these filters; nothing where they do not.
bool serves(const InterpolateSampleArgs& args, GroupOf* of) {
  const bool cut = args.top_p < 1.f || args.min_p > 0.f;
  if (args.temperature == 0.f || (args.top_k <= kMaxTopK && args.top_k < args.vocab)) {
    *of = GroupOf::kMax;
    return true;
  }
  *of = args.temperature == 1.f ? GroupOf::kSum : GroupOf::kPower;
  return !cut && args.top_k >= args.vocab && args.temperature >= kLowTemperature;
}

template <typename T, GroupOf kOf>
cudaError_t sample_by_groups(const InterpolateSampleArgs& args, int device, cudaStream_t stream,
                             bool* done) {
  using Job = SampleJob<T, kOf>;
  const PipelinePlan plan = plan_pipeline<Job>(args.rows, args.vocab, device);
  *done = plan.clusters > 0 && group_count(plan) <= sample_groups(args.vocab);
  if (!*done) return cudaSuccess;
  const cudaError_t error = launch_row_pipeline<Job>(args, plan, stream);
  if (error != cudaSuccess) return error;
  return launch_overlapping(end_sample_kernel<T, kOf>, args.rows, kThreads, 0, device, stream, args,
                            plan);
}

}  // namespace

int64_t sample_groups(int64_t vocab) {
  // In the worst case, float32 and 16 blocks whose last chunk is almost empty.
  const int64_t chunks = (vocab + 2 * kUnit) / kStripe<float> + 2 * kMaxClusterBlocks;
  return chunks * kWorkerWarps;
}

Status interpolate_sample(const InterpolateSampleArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  cudaError_t error = cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  GroupOf of;
  const bool grouped = args.base.dtype == args.memory.dtype && rows_agree(args.base, args.memory) &&
                       serves(args, &of);
  with_dtype(args.base.dtype, [&](auto base) {
    using Base = decltype(base);
    bool done = false;
    if (grouped) {
      const auto run = of == GroupOf::kMax   ? sample_by_groups<Base, GroupOf::kMax>
                       : of == GroupOf::kSum ? sample_by_groups<Base, GroupOf::kSum>
                                             : sample_by_groups<Base, GroupOf::kPower>;
      error = run(args, device, cuda_stream, &done);
    }
    if (done || error != cudaSuccess) return;
    with_dtype(args.memory.dtype, [&](auto memory) {
      sample_kernel<Base, decltype(memory)><<<args.rows, kWideThreads, 0, cuda_stream>>>(args);
    });
  });
  return status_of(error == cudaSuccess ? cudaGetLastError() : error);
}

}  // namespace memdec::cuda
