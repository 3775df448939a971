// interpolate_sample: a token drawn from the mixture of two softmaxes, which is never written.
//
// On Hopper rows go through the pipeline of sample_job.cuh, which leaves a few numbers for each
// group of columns, and a block a row then reads again the groups that matter: the one that the
// draw falls into, or those that may hold one of the greatest tokens. What that cannot answer (a
// nucleus of very many tokens, top-k above 512, tensors whose rows lie differently, other GPUs) is
// done by a block a row that reads it as often as it takes.
#include "common/kernels.h"
#include "common/sampling.h"
#include "cuda/choose_token.cuh"
#include "cuda/launch.h"
#include "cuda/sample_job.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 256;     // of the block that ends a row
constexpr int kEndingBlocks = 4;  // of them on a multiprocessor: they wait for memory
constexpr int kEach = 8;          // groups that each of them looks at
constexpr int kMaxGroups = kThreads * kEach;
constexpr int kWideThreads = 512;  // of the block that does all of a row
constexpr int kMaxCandidates = 2048;
constexpr int kMaxTopK = 512;
// Of a nucleus without top-k so many of the greatest tokens are looked at first, then kMaxTopK.
constexpr int kFirstTopK = 64;
// What the bounds of a group's probabilities may be off, on either side.
constexpr float kBoundSlack = 0x1p-18f;

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
    const auto level = [&](int i) { return mixture.level(base_x(i), memory_x(i)); };
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

// Tokens that are more probable than all that are not here, in any order; more of them than there
// is room for are counted, not kept.
struct Candidates {
  int groups;  // how many of `group` are in use
  uint16_t group[kMaxGroups];
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

// Chooses among the candidates; -1 if that takes tokens which are not among them. `total` is the
// weight of all tokens, in units of the greatest one's, where top_k keeps all, and `floor` the
// weight that no other token exceeds.
__device__ inline int choose_candidate(Candidates& candidates, const Ordering& ordering,
                                       const Filters& filters, double total, float floor,
                                       uint64_t bits, ChoiceScratch& scratch) {
  int size = 2;
  while (size < candidates.count) size *= 2;
  for (int i = candidates.count + threadIdx.x; i < size; i += blockDim.x) candidates.orders[i] = 0;
  __syncthreads();
  sort_falling(candidates.orders, size);
  const float top_level = ordering.level(candidates.orders[0]);
  const auto weight_at = [&](int i) {
    const float level = ordering.level(candidates.orders[i]);
    return whole_weight(fast_exp2((level - top_level) * filters.inv_temperature));
  };
  const bool cut_by_k = filters.top_k < ordering.n;
  int n = cut_by_k ? min(candidates.count, filters.top_k) : candidates.count;
  if (filters.top_p < 1.f) {
    const auto found = static_cast<double>(sum_of(n, scratch, weight_at));
    const double nucleus = ceil(filters.top_p * (cut_by_k ? found : total * 0x1p44));
    if (found >= nucleus) {
      const auto last = greater_of(static_cast<uint64_t>(nucleus), 1) - 1;
      n = pick_of(n, scratch, weight_at, [&](uint64_t) { return last; }) + 1;
    } else if (!(floor < filters.min_p)) {
      return -1;
    }
  } else if (!cut_by_k && !(floor < filters.min_p)) {
    return -1;
  }
  const auto least = static_cast<uint64_t>(filters.min_p * 0x1p44f);
  const auto weight = [&](int i) {
    const uint64_t of_token = weight_at(i);
    return of_token >= least ? of_token : 0;
  };
  const auto target_of = [&](uint64_t sum) { return __umul64hi(bits, sum); };
  return ordering.index(candidates.orders[pick_of(n, scratch, weight, target_of)]);
}

// Ends a row whose groups' sums are known: the group, then the token in it, that the draw falls
// into.
template <typename T, GroupSum kSum>
__global__ void __launch_bounds__(kThreads, kEndingBlocks)
    draw_from_sums_kernel(const __grid_constant__ InterpolateSampleArgs args,
                          const __grid_constant__ PipelinePlan plan) {
  static_assert(kGroupColumns<T> <= kThreads, "a thread takes a column of the group");
  __shared__ ChoiceScratch scratch;
  wait_for_earlier_kernels();
  const SampledRow<T, T> sampled(args, blockIdx.x);
  const int n = group_count(plan);
  const float* sums = RowGroups(args, sampled.row, n).sums;
  uint64_t weights[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int group = threadIdx.x * kEach + i;
    weights[i] = group < n ? whole_weight(sums[group]) : 0;
  }
  const Mixture mixture(row_weights(args, sampled.row), args.stats[2 * sampled.row],
                        args.stats[2 * sampled.row + 1], args.inv_temperature);
  if (!mixture.exists()) return sampled.put_nothing();
  const uint64_t bits = sampled.bits();
  const Picked group =
      pick(weights, scratch, [&](uint64_t total) { return __umul64hi(bits, total); });
  if (group.index < 0) return sampled.choose_slowly(mixture, scratch);

  const GroupRange<T> columns(plan, sampled.base, sampled.vocab, group.index);
  const int column = columns.begin + threadIdx.x;
  float base_x = -INFINITY, memory_x = -INFINITY;
  uint64_t weight[1] = {0};
  if (column < columns.end) {
    base_x = sampled.base_x(column);
    memory_x = sampled.memory_x(column);
    const DrawWeight draw(mixture, args.temperature);
    weight[0] = whole_weight(draw.template of<kSum>(mixture, base_x, memory_x));
  }
  // Its columns' sum, rounded otherwise, is not quite the group's: the draw is stretched to it.
  const double place = static_cast<double>(group.rest) / group.weight;
  const Picked token = pick(weight, scratch, [&](uint64_t sum) {
    return min(static_cast<uint64_t>(place * sum), sum - 1);
  });
  if (token.index < 0) return sampled.choose_slowly(mixture, scratch);
  if (static_cast<int>(threadIdx.x) == token.index) {
    args.tokens[sampled.row] = column;
    args.log_probs[sampled.row] = mixture(base_x, memory_x);
  }
}

// Ends a row whose groups' bounds are known, where the greatest tokens decide: all groups are read
// again that may hold one of the k greatest.
template <typename T, GroupSum kSum>
__global__ void __launch_bounds__(kThreads, kEndingBlocks)
    choose_from_bounds_kernel(const __grid_constant__ InterpolateSampleArgs args,
                              const __grid_constant__ PipelinePlan plan) {
  __shared__ ChoiceScratch scratch;
  __shared__ Candidates candidates;
  wait_for_earlier_kernels();
  const SampledRow<T, T> sampled(args, blockIdx.x);
  const int n = group_count(plan);
  const RowGroups groups(args, sampled.row, n);
  float low[kEach], high[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int group = threadIdx.x * kEach + i;
    const float2 bounds = group < n ? groups.bounds[group] : float2{0.f, 0.f};
    low[i] = bounds.x;
    high[i] = bounds.y;
  }
  const Mixture mixture(row_weights(args, sampled.row), args.stats[2 * sampled.row],
                        args.stats[2 * sampled.row + 1], args.inv_temperature);
  if (!mixture.exists()) return sampled.put_nothing();
  const Filters filters = filters_of(args);
  const bool greedy = filters.inv_temperature == 0.f;
  const bool cut_by_k = filters.top_k < sampled.vocab;
  const Ordering ordering(sampled.vocab);
  const uint64_t bits = sampled.bits();
  double total = 0;  // of all groups, in the units of their sums
  if constexpr (kSum == GroupSum::kPower) {
    total = static_cast<double>(
                sum_of(n, scratch, [&](int i) { return whole_weight(groups.sums[i]); })) *
            0x1p-44;
  }

  for (int k = greedy ? 1 : cut_by_k ? filters.top_k : kFirstTopK;; k = kMaxTopK) {
    // As many groups hold a token of this probability as tokens are wanted.
    const float floor = fmaxf(floor_of_top(low, k, scratch) * (1.f - kBoundSlack), FLT_MIN);
    if (threadIdx.x == 0) candidates.count = candidates.groups = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (high[i] * (1.f + kBoundSlack) < floor) continue;
      const int place = atomicAdd(&candidates.groups, 1);
      candidates.group[place] = static_cast<uint16_t>(threadIdx.x * kEach + i);
    }
    __syncthreads();
    uint64_t best = 0;
    for (int g = threadIdx.x / kWarpSize; g < candidates.groups; g += kThreads / kWarpSize) {
      const GroupRange<T> columns(plan, sampled.base, sampled.vocab, candidates.group[g]);
      float base_x[kPack<T>], memory_x[kPack<T>];
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const int column = columns.begin + threadIdx.x % kWarpSize + i * kWarpSize;
        base_x[i] = column < columns.end ? sampled.base_x(column) : -INFINITY;
        memory_x[i] = column < columns.end ? sampled.memory_x(column) : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const float p = mixture.probability(base_x[i], memory_x[i]);
        if (!(p >= floor)) continue;
        const int column = columns.begin + threadIdx.x % kWarpSize + i * kWarpSize;
        const uint64_t order = ordering(mixture.level(base_x[i], memory_x[i]), column);
        best = greater_of(best, order);
        if (greedy) continue;
        const int place = atomicAdd(&candidates.count, 1);
        if (place < kMaxCandidates) candidates.orders[place] = order;
      }
    }
    best = block_max(best, scratch);
    if (greedy) return sampled.put(mixture, ordering.index(best));
    const int found = candidates.count;
    if (found < k || found > kMaxCandidates) break;
    const float top_level = ordering.level(best);
    double all = 0;  // in units of the greatest token's weight
    if (kSum == GroupSum::kPower) {
      all = total / DrawWeight(mixture, args.temperature)(top_level);
    } else {
      all = fast_exp2(-top_level);
    }
    const float floor_weight = fast_exp2((fast_log2(floor) - top_level) * filters.inv_temperature);
    const int token =
        choose_candidate(candidates, ordering, filters, all, floor_weight, bits, scratch);
    if (token >= 0) return sampled.put(mixture, token);
    if (cut_by_k || k == kMaxTopK) break;
  }
  sampled.choose_slowly(mixture, scratch);
}

// Runs a Job over all rows and then the kernel that ends a row. False: it does not serve.
template <typename Job, typename Ending>
bool run_by_groups(const InterpolateSampleArgs& args, Ending ending, int device,
                   cudaStream_t stream, cudaError_t* error) {
  const PipelinePlan plan = plan_pipeline<Job>(args.rows, args.vocab, device);
  const int groups = group_count(plan);
  if (plan.clusters == 0 || groups > kMaxGroups ||
      groups * kGroupFloats > sample_groups(args.vocab)) {
    return false;
  }
  *error = launch_row_pipeline<Job>(args, plan, stream);
  if (*error != cudaSuccess) return true;
  *error = launch_overlapping(ending, args.rows, kThreads, 0, device, stream, args, plan);
  return true;
}

template <typename T>
bool sample_by_groups(const InterpolateSampleArgs& args, int device, cudaStream_t stream,
                      cudaError_t* error) {
  constexpr auto kNone = GroupSum::kNone, kPlain = GroupSum::kPlain, kPower = GroupSum::kPower;
  const bool few = args.temperature == 0.f || args.top_k <= kMaxTopK;
  const bool all = args.top_k >= args.vocab;
  if (!few && !all) return false;
  if (few || args.temperature == 1.f) {
    if (few || args.top_p < 1.f || args.min_p > 0.f) {
      return run_by_groups<SampleJob<T, true, kNone>>(args, choose_from_bounds_kernel<T, kNone>,
                                                      device, stream, error);
    }
    return run_by_groups<SampleJob<T, false, kPlain>>(args, draw_from_sums_kernel<T, kPlain>,
                                                      device, stream, error);
  }
  if (args.temperature < kLowTemperature) return false;
  if (args.top_p < 1.f || args.min_p > 0.f) {
    return run_by_groups<SampleJob<T, true, kPower>>(args, choose_from_bounds_kernel<T, kPower>,
                                                     device, stream, error);
  }
  return run_by_groups<SampleJob<T, false, kPower>>(args, draw_from_sums_kernel<T, kPower>, device,
                                                    stream, error);
}

}  // namespace

int64_t sample_groups(int64_t vocab) {
  // In the worst case, float32 and 16 blocks whose last chunk is almost empty.
  const int64_t chunks = (vocab + 2 * kUnit) / kStripe<float> + 2 * kMaxClusterBlocks;
  return chunks * kWorkerWarps * kGroupFloats;
}

Status interpolate_sample(const InterpolateSampleArgs& args, int device, void* stream) {
  if (args.rows == 0) return {};
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  cudaError_t error = cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool agree = args.base.dtype == args.memory.dtype && rows_agree(args.base, args.memory);
  with_dtype(args.base.dtype, [&](auto base) {
    using Base = decltype(base);
    if (agree && sample_by_groups<Base>(args, device, cuda_stream, &error)) return;
    with_dtype(args.memory.dtype, [&](auto memory) {
      sample_kernel<Base, decltype(memory)><<<args.rows, kWideThreads, 0, cuda_stream>>>(args);
    });
  });
  return status_of(error == cudaSuccess ? cudaGetLastError() : error);
}

}  // namespace memdec::cuda
