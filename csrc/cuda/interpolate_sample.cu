// interpolate_sample: a token drawn from the mixture of two softmaxes, which is never written.
//
// A first kernel reads the logits once and leaves a few numbers for each group of neighbouring
// columns; a second one, a block a row, reads again the groups that matter: the one that the draw
// falls into, or those that may hold one of the greatest tokens. For a draw at a temperature other
// than 1 the first is the pipeline of sample_job.cuh, since weights are powers of the mixture; else
// it is the kernel here, which does not need to know the mixture yet. What groups cannot answer (a
// nucleus of very many tokens or at another temperature, top-k above 512, tensors whose rows lie
// differently) is done by a team of blocks that reads its row as often as it takes.
#include <atomic>

#include "common/kernels.h"
#include "common/sampling.h"
#include "cuda/choose_token.cuh"
#include "cuda/launch.h"
#include "cuda/sample_job.cuh"

namespace memdec::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kEach = 8;  // groups that each thread of a row's second block looks at
constexpr int kMaxGroups = kThreads * kEach;
constexpr int kBlocksAtOnce = 1024;  // of the first kernel, to fill a GPU
constexpr int kEndingBlocks = 4;     // of the second, on a multiprocessor: they wait for memory
constexpr int kTeamThreads = 512;    // of each block of a team that does all of a row
constexpr int kTeamCost = 1024;      // of a row for a block of a team, in columns, beside its share
constexpr int kLeft = -1;            // the token of a row that is left to a team
constexpr int kMaxTopK = 512;
// Of a nucleus without top-k so many of the greatest tokens are looked at first, then kMaxTopK.
constexpr int kFirstTopK = 64;
constexpr int kFewRows = 8;  // for which a team is faster than the second look
// What the bounds of a group's probabilities may be off, on either side.
constexpr float kBoundSlack = 0x1p-18f;
// Below this temperature a group's sum of powers may be too small for float32.
constexpr float kLowTemperature = 0.05f;

__device__ inline Filters filters_of(const InterpolateSampleArgs& args) {
  return {args.temperature > 0.f ? 1.f / args.temperature : 0.f, static_cast<int>(args.top_k),
          args.top_p, args.min_p};
}

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

  __device__ void choose_slowly(const Team& team, const Mixture& mixture,
                                ChoiceScratch& scratch) const {
    const auto level = [&](int i) { return mixture.level(base_x(i), memory_x(i)); };
    const int token = choose(team, vocab, filters_of(args), bits(), scratch, level);
    if (team.rank == 0) put(mixture, token);
  }
};

// ---- rows that are read as often as it takes ----

// A row for each team of `blocks` blocks: every row or, `only_left`, those whose token is kLeft and
// whose statistics are known.
template <typename Base, typename Memory>
__global__ void __launch_bounds__(kTeamThreads)
    choose_kernel(const __grid_constant__ InterpolateSampleArgs args, int blocks, bool only_left) {
  __shared__ ChoiceScratch scratch;
  wait_for_earlier_kernels();
  const Team team{static_cast<int>(blockIdx.x % blocks), blocks};
  const SampledRow<Base, Memory> sampled(args, blockIdx.x / blocks);
  if (only_left && args.tokens[sampled.row] != kLeft) return;
  // Every block has begun, and has read the token, before another one writes to it or the token.
  team.sync();
  const Weights weights = row_weights(args, sampled.row);
  RowStats base_stats{0.f, NAN}, memory_stats{0.f, NAN};
  if (only_left) {
    base_stats = args.stats[2 * sampled.row];
    memory_stats = args.stats[2 * sampled.row + 1];
  } else if (weights.valid) {
    if (weights.use_base) base_stats = row_stats(team, sampled.base, sampled.vocab, 1.f);
    if (weights.use_memory) {
      memory_stats = row_stats(team, sampled.memory, sampled.shared_vocab, args.inv_temperature);
    }
  }
  const Mixture mixture(weights, base_stats, memory_stats, args.inv_temperature);
  if (mixture.exists()) {
    sampled.choose_slowly(team, mixture, scratch);
  } else if (team.rank == 0) {
    sampled.put_nothing();
  }
  // No block waits for the others at the end: its memory was last theirs before the last sync().
}

// How choose_kernel is launched.
struct TeamLaunch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  TeamLaunch(int64_t rows, int blocks, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    attributes[1] = overlap_attribute();
    config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
    config.blockDim = dim3(kTeamThreads);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  TeamLaunch(const TeamLaunch&) = delete;
  TeamLaunch& operator=(const TeamLaunch&) = delete;
};

// The teams of choose_kernel that run at once.
template <typename Base, typename Memory>
int resident_teams(int blocks, int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kMaxClusterBlocks + 1];  // 1 more than the number
  int teams = device < kDevices ? known[device][blocks].load() - 1 : -1;
  if (teams >= 0) return teams;
  teams = active_clusters(choose_kernel<Base, Memory>, TeamLaunch(1, blocks, nullptr).config);
  if (device < kDevices) known[device][blocks].store(teams + 1);
  return teams;
}

// Launches choose_kernel with as many blocks to a team as let each of them do least: the waves of
// teams times what a row costs a block.
template <typename Base, typename Memory>
cudaError_t launch_teams(const InterpolateSampleArgs& args, bool only_left, int device,
                         cudaStream_t stream) {
  int major = 0, best_blocks = 1;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  int64_t best = INT64_MAX;
  for (int blocks = 1; major >= 9 && blocks <= kMaxClusterBlocks; blocks *= 2) {
    const int teams = resident_teams<Base, Memory>(blocks, device);
    if (teams == 0) continue;
    const int64_t cost = (args.rows + teams - 1) / teams * (args.vocab / blocks + kTeamCost);
    if (cost < best) {
      best = cost;
      best_blocks = blocks;
    }
  }
  TeamLaunch launch(args.rows, best_blocks, stream);
  if (major < 9) launch.config.numAttrs = 0;
  return cudaLaunchKernelEx(&launch.config, choose_kernel<Base, Memory>, args, best_blocks,
                            only_left);
}

// ---- groups that are measured before the mixture is known ----

// Both models' sums over a group: one load and store.
struct alignas(16) GroupSums {
  TailSum base;
  TailSum memory;
};

// How a row's groups, counted from the pack that holds its first column, are spread over blocks.
struct GroupPlan {
  int groups;     // of a row
  int blocks;     // of a row
  int per_block;  // groups
};

template <typename T>
GroupPlan plan_groups(const InterpolateSampleArgs& args) {
  const int64_t packs = (args.vocab + 2 * kPack<T> - 2) / kPack<T>;  // in the worst phase
  const int64_t groups = (packs + kWarpSize - 1) / kWarpSize;
  int64_t blocks = (kBlocksAtOnce + args.rows - 1) / args.rows;
  const int64_t most = (groups + kWarps - 1) / kWarps;
  if (blocks > most) blocks = most;
  const int64_t per_block = (groups + blocks - 1) / blocks;
  blocks = (groups + per_block - 1) / per_block;
  return {static_cast<int>(groups), static_cast<int>(blocks), static_cast<int>(per_block)};
}

// The first `columns` columns of a row, as packs that begin where memory is aligned.
template <typename T>
struct PackedRow {
  const uint4* packs;
  int phase;  // of the first column in the first pack
  int columns;

  __device__ PackedRow(const T* row, int columns)
      : phase(static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(uint4) / sizeof(T))),
        columns(columns) {
    packs = reinterpret_cast<const uint4*>(row - phase);
  }

  // What is not of the row is -inf; nothing is read beyond the pack that holds its last column.
  __device__ Pack<T> load(int pack) const {
    const int begin = phase - pack * kPack<T>, end = begin + columns;
    Pack<T> values{};
    if (end > 0) values.words = packs[pack];
    if (begin > 0 || end < kPack<T>) values.mask(begin, end);
    return values;
  }

  __device__ GroupRange group(int index) const {
    const int first = index * kGroupColumns<T> - phase;
    return {max(0, first), min(columns, first + kGroupColumns<T>)};
  }
};

// A warp's sum over a pack of each lane, all lanes' packs of one model; `tail` is still this
// lane's.
template <typename T>
__device__ inline TailSum measure_pack(const Pack<T>& pack, float scale) {
  constexpr int kOthers = kPack<T> - 1;
  float others[kOthers];
  const float own = pack.split(others);
  const float top = warp_max(own);
  const float origin = top == -INFINITY ? 0.f : top * scale;
  const auto term = [&](float x) { return fast_exp2(fmaf(x, scale, -origin)); };
  // One instance of the maximum is left out.
  float tail = holds_max(own, top) ? 0.f : term(own);
#pragma unroll
  for (int i = 0; i < kOthers; ++i) tail += term(others[i]);
  // The pivot is the maximum times the scale as it was rounded.
  return {top, top == -INFINITY ? tail : tail * fast_exp2(fmaf(-top, scale, origin))};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    measure_groups_kernel(const __grid_constant__ InterpolateSampleArgs args,
                          const __grid_constant__ GroupPlan plan) {
  wait_for_earlier_kernels();
  const int64_t row = blockIdx.x / plan.blocks;
  const int part = static_cast<int>(blockIdx.x % plan.blocks);
  const int vocab = static_cast<int>(args.vocab);
  const PackedRow<T> base(row_of<const T>(args.base, row), vocab);
  const PackedRow<T> memory(row_of<const T>(args.memory, row),
                            real_columns(args.memory.cols, vocab));
  auto* sums = reinterpret_cast<GroupSums*>(args.groups) + row * plan.groups;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int end = min(plan.groups, (part + 1) * plan.per_block);
  const float memory_scale = args.inv_temperature * kLog2E;
  const bool odd = lane % 2 == 1;
#pragma unroll 2
  for (int group = part * plan.per_block + warp; group < end; group += kWarps) {
    const int pack = group * kWarpSize + lane;
    const Pack<T> base_pack = base.load(pack), memory_pack = memory.load(pack);
    const TailSum of_base = measure_pack(base_pack, kLog2E);
    const TailSum of_memory = measure_pack(memory_pack, memory_scale);
    // Even lanes add up the base's tails, odd ones the memory's.
    float mine = odd ? of_memory.tail : of_base.tail;
    mine += __shfl_xor_sync(0xffffffffu, odd ? of_base.tail : of_memory.tail, 1);
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 1; offset /= 2) {
      mine += __shfl_xor_sync(0xffffffffu, mine, offset);
    }
    const float other = __shfl_xor_sync(0xffffffffu, mine, 1);
    if (lane == 0) sums[group] = {{of_base.max, mine}, {of_memory.max, other}};
  }
}

// The sum over the columns of both; NaN ends in the tail.
__device__ inline TailSum join(const TailSum& a, const TailSum& b, float scale) {
  const bool swap = b.max > a.max;
  const TailSum high = swap ? b : a, low = swap ? a : b;
  if (low.max == -INFINITY) return {high.max, high.tail + low.tail};
  return {high.max, high.tail + (low.tail + 1.f) * fast_exp2((low.max - high.max) * scale)};
}

// Joins all threads' sums, in a fixed order; every thread gets the result.
__device__ inline TailSum join_block(TailSum sum, float scale, TailSum* parts) {
  sum = merge_lanes(sum, scale);
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();  // the parts of an earlier call may still be read
  if (lane == 0) parts[threadIdx.x / kWarpSize] = sum;
  __syncthreads();  // every warp's part is written before any is read
  return merge_lanes(lane < kWarps ? parts[lane] : TailSum{}, scale);
}

// Chooses among the candidates; -1 if that takes tokens which are not among them. `total` is the
// weight of all tokens, in units of the greatest one's, where top_k keeps all, and `floor` the
// weight that no other token exceeds.
__device__ inline int choose_candidate(const Ordering& ordering, const Filters& filters,
                                       double total, float floor, uint64_t bits,
                                       ChoiceScratch& scratch) {
  sort_candidates(scratch);
  const float top_level = ordering.level(scratch.candidates[0]);
  const auto weight_at = [&](int i) {
    const float level = ordering.level(scratch.candidates[i]);
    return whole_weight(fast_exp2((level - top_level) * filters.inv_temperature));
  };
  const bool cut_by_k = filters.top_k < ordering.n;
  int n = cut_by_k ? min(scratch.count, filters.top_k) : scratch.count;
  const bool beyond_floor = cut_by_k || floor < filters.min_p;
  if (filters.top_p < 1.f) {
    const auto found = static_cast<double>(sum_of(Team{}, n, scratch, weight_at));
    const double nucleus = ceil(filters.top_p * (cut_by_k ? found : total * 0x1p44));
    if (found >= nucleus) {
      const uint64_t last = greater_of(static_cast<uint64_t>(nucleus), 1) - 1;
      n = pick_of(Team{}, n, scratch, weight_at, [&](uint64_t) { return last; }).index + 1;
    } else if (!beyond_floor) {
      return -1;
    }
  } else if (!beyond_floor) {
    return -1;
  }
  const auto least = static_cast<uint64_t>(filters.min_p * 0x1p44f);
  const auto weight = [&](int i) {
    const uint64_t of_token = weight_at(i);
    return of_token >= least ? of_token : 0;
  };
  const auto target_of = [&](uint64_t sum) { return __umul64hi(bits, sum); };
  return ordering.index(scratch.candidates[pick_of(Team{}, n, scratch, weight, target_of).index]);
}

// A column of a group for each thread, and the draw among them by `weight_of(base_x, memory_x)`.
// False if they have no weight.
template <typename T, typename WeightOf>
__device__ bool draw_column(const SampledRow<T, T>& sampled, const Mixture& mixture,
                            const GroupRange& columns, const Picked& group, ChoiceScratch& scratch,
                            WeightOf&& weight_of) {
  static_assert(kGroupColumns<T> <= kThreads, "a thread takes a column");
  const int column = columns.begin + threadIdx.x;
  float base_x = -INFINITY, memory_x = -INFINITY;
  uint64_t weight[1] = {0};
  if (column < columns.end) {
    base_x = sampled.base_x(column);
    memory_x = sampled.memory_x(column);
    weight[0] = whole_weight(weight_of(base_x, memory_x));
  }
  // The columns' sum, rounded otherwise, is not quite the group's: the draw is stretched to it.
  const double place = static_cast<double>(group.rest) / group.weight;
  const Picked token = pick(Team{}, weight, scratch, [&](uint64_t sum) {
    return min(static_cast<uint64_t>(place * sum), sum - 1);
  });
  if (static_cast<int>(threadIdx.x) == token.index) {
    sampled.args.tokens[sampled.row] = column;
    sampled.args.log_probs[sampled.row] = mixture(base_x, memory_x);
  }
  return token.index >= 0;
}

// Ends a row whose groups were measured: a draw at temperature 1, or the greatest tokens decide.
template <typename T>
__global__ void __launch_bounds__(kThreads, kEndingBlocks)
    end_measured_kernel(const __grid_constant__ InterpolateSampleArgs args,
                        const __grid_constant__ GroupPlan plan) {
  __shared__ ChoiceScratch scratch;
  __shared__ TailSum parts[kWarps];
  __shared__ uint16_t again[kMaxGroups];  // groups to be read again
  __shared__ int again_count;
  wait_for_earlier_kernels();
  const SampledRow<T, T> sampled(args, blockIdx.x);
  const auto* sums = reinterpret_cast<const GroupSums*>(args.groups) + sampled.row * plan.groups;
  const float memory_scale = args.inv_temperature * kLog2E;
  GroupSums groups[kEach];
  TailSum base_sum, memory_sum;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int group = threadIdx.x * kEach + i;
    groups[i] = group < plan.groups ? sums[group] : GroupSums{};
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    base_sum = join(base_sum, groups[i].base, kLog2E);
    memory_sum = join(memory_sum, groups[i].memory, memory_scale);
  }
  const RowStats base_stats = join_block(base_sum, kLog2E, parts).stats();
  const RowStats memory_stats = join_block(memory_sum, memory_scale, parts).stats();
  const Mixture mixture(row_weights(args, sampled.row), base_stats, memory_stats,
                        args.inv_temperature);
  if (!mixture.exists()) return sampled.put_nothing();
  // Of each group: what its greatest logits and its sums make of the mixture.
  const auto of_base = [&](int i) {
    return mixture.weights.use_base ? fast_exp2(mixture.base_line(groups[i].base.max)) : 0.f;
  };
  const auto of_memory = [&](int i) {
    return mixture.weights.use_memory ? fast_exp2(mixture.memory_line(groups[i].memory.max)) : 0.f;
  };
  const PackedRow<T> packed(sampled.base, sampled.vocab);
  const Filters filters = filters_of(args);
  const uint64_t bits = sampled.bits();
  const bool greedy = filters.inv_temperature == 0.f;
  if (!greedy && filters.none(sampled.vocab)) {  // temperature 1
    uint64_t weights[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float base = of_base(i), memory = of_memory(i);
      const float base_weight = base > 0.f ? base * (1.f + groups[i].base.tail) : 0.f;
      const float memory_weight = memory > 0.f ? memory * (1.f + groups[i].memory.tail) : 0.f;
      weights[i] = whole_weight(base_weight + memory_weight);
    }
    const Picked group =
        pick(Team{}, weights, scratch, [&](uint64_t total) { return __umul64hi(bits, total); });
    const auto weight_of = [&](float base_x, float memory_x) {
      return mixture.probability(base_x, memory_x);
    };
    if (group.index >= 0 &&
        draw_column(sampled, mixture, packed.group(group.index), group, scratch, weight_of)) {
      return;
    }
    return sampled.choose_slowly(Team{}, mixture, scratch);
  }

  const bool cut_by_k = filters.top_k < sampled.vocab;
  const Ordering ordering(sampled.vocab);
  float low[kEach], high[kEach];  // bounds of a group's greatest probability
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    low[i] = fmaxf(of_base(i), of_memory(i)) * (1.f - kBoundSlack);
    high[i] = (of_base(i) + of_memory(i)) * (1.f + kBoundSlack);
  }
  for (int k = greedy ? 1 : cut_by_k ? filters.top_k : kFirstTopK;; k = kMaxTopK) {
    // As many groups hold a token of this probability as tokens are wanted.
    const float floor = fmaxf(floor_of_top(low, k, scratch), FLT_MIN);
    if (threadIdx.x == 0) scratch.count = again_count = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (high[i] < floor) continue;
      again[atomicAdd(&again_count, 1)] = static_cast<uint16_t>(threadIdx.x * kEach + i);
    }
    __syncthreads();
    uint64_t best = 0;
    for (int g = threadIdx.x / kWarpSize; g < again_count; g += kWarps) {
      const GroupRange columns = packed.group(again[g]);
      const int first = columns.begin + threadIdx.x % kWarpSize;
      float base_x[kPack<T>], memory_x[kPack<T>];
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const int column = first + i * kWarpSize;
        base_x[i] = column < columns.end ? sampled.base_x(column) : -INFINITY;
        memory_x[i] = column < columns.end ? sampled.memory_x(column) : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        if (!(mixture.probability(base_x[i], memory_x[i]) >= floor)) continue;
        const float level = mixture.level(base_x[i], memory_x[i]);
        const uint64_t order = ordering(level, first + i * kWarpSize);
        best = greater_of(best, order);
        if (!greedy) add_candidate(scratch, order);
      }
    }
    best = team_max(Team{}, best, scratch);
    if (greedy) return sampled.put(mixture, ordering.index(best));
    if (scratch.count < k || scratch.count > kMaxCandidates) break;
    const float top_level = ordering.level(best);
    const float floor_weight = fast_exp2((fast_log2(floor) - top_level) * filters.inv_temperature);
    // At temperature 1, which is what comes here without top-k, all weights are the sum of p / max
    // p.
    const double total = fast_exp2(-top_level);
    const int token = choose_candidate(ordering, filters, total, floor_weight, bits, scratch);
    if (token >= 0) return sampled.put(mixture, token);
    if (cut_by_k || k == kMaxTopK || args.rows <= kFewRows) break;
  }
  if (cut_by_k) return sampled.choose_slowly(Team{}, mixture, scratch);
  // A nucleus of very many tokens.
  if (threadIdx.x > 0) return;
  args.tokens[sampled.row] = kLeft;
  args.stats[2 * sampled.row] = base_stats;
  args.stats[2 * sampled.row + 1] = memory_stats;
}

// Ends a row of the pipeline: the group, then the token in it, that the draw falls into.
template <typename T>
__global__ void __launch_bounds__(kThreads, kEndingBlocks)
    end_pipeline_kernel(const __grid_constant__ InterpolateSampleArgs args,
                        const __grid_constant__ PipelinePlan plan) {
  __shared__ ChoiceScratch scratch;
  wait_for_earlier_kernels();
  const SampledRow<T, T> sampled(args, blockIdx.x);
  const int n = pipeline_groups(plan);
  const float* sums = args.groups + sampled.row * n;
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
      pick(Team{}, weights, scratch, [&](uint64_t total) { return __umul64hi(bits, total); });
  const DrawWeight draw(mixture, args.temperature);
  const auto weight_of = [&](float base_x, float memory_x) {
    return draw(mixture.level(base_x, memory_x));
  };
  if (group.index >= 0) {
    const auto columns = pipeline_group(plan, sampled.base, sampled.vocab, group.index);
    if (draw_column(sampled, mixture, columns, group, scratch, weight_of)) return;
  }
  sampled.choose_slowly(Team{}, mixture, scratch);
}

// Runs the kernels of a row's groups, where they serve. False: they do not.
template <typename T>
bool sample_by_groups(const InterpolateSampleArgs& args, int device, cudaStream_t stream,
                      cudaError_t* error) {
  const bool cut_by_k = args.top_k < args.vocab;
  const bool filtered = cut_by_k || args.top_p < 1.f || args.min_p > 0.f;
  const bool by_measures =
      args.temperature == 0.f || (cut_by_k ? args.top_k <= kMaxTopK : args.temperature == 1.f);
  if (by_measures) {
    const GroupPlan plan = plan_groups<T>(args);
    if (plan.groups > kMaxGroups) return false;
    *error = launch_overlapping(measure_groups_kernel<T>, args.rows * plan.blocks, kThreads, 0,
                                device, stream, args, plan);
    if (*error != cudaSuccess) return true;
    *error = launch_overlapping(end_measured_kernel<T>, args.rows, kThreads, 0, device, stream,
                                args, plan);
    const bool may_leave = args.temperature > 0.f && filtered && !cut_by_k;
    if (*error != cudaSuccess || !may_leave) return true;
    *error = launch_teams<T, T>(args, true, device, stream);
    return true;
  }
  if (filtered || args.temperature < kLowTemperature) return false;
  const PipelinePlan plan = plan_pipeline<SampleJob<T>>(args.rows, args.vocab, device);
  if (plan.clusters == 0 || pipeline_groups(plan) > kMaxGroups) return false;
  *error = launch_row_pipeline<SampleJob<T>>(args, plan, stream);
  if (*error != cudaSuccess) return true;
  *error = launch_overlapping(end_pipeline_kernel<T>, args.rows, kThreads, 0, device, stream, args,
                              plan);
  return true;
}

}  // namespace

int64_t sample_groups(int64_t vocab) {
  // The measured groups of float32, and the pipeline's in the worst case: 16 blocks whose last
  // chunk is almost empty.
  const int64_t measured = vocab / kGroupColumns<float> + 2;
  const int64_t chunks = (vocab + 2 * kUnit) / kStripe<float> + 2 * kMaxClusterBlocks;
  const int64_t floats = measured * (sizeof(GroupSums) / sizeof(float));
  return floats > chunks * kWorkerWarps ? floats : chunks * kWorkerWarps;
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
      error = launch_teams<Base, decltype(memory)>(args, false, device, cuda_stream);
    });
  });
  return status_of(error);
}

}  // namespace memdec::cuda
