// interpolate_sample in the row pipeline: every logit is read once, and what is written of a row
// are a few numbers for each group of neighbouring columns, from which a small kernel chooses.
#pragma once

#include "cuda/interpolate_job.cuh"

namespace memdec::cuda {

// What is added up of a group's tokens.
enum class GroupSum {
  kNone,
  kPlain,  // their probabilities
  kPower,  // their weights in the draw (DrawWeight)
};

// The columns of a group: a pack of each lane of a warp.
template <typename T>
constexpr int kGroupColumns = kWarpSize * kPack<T>;

// Groups of a row.
inline __host__ __device__ int group_count(const PipelinePlan& plan) {
  return plan.blocks * plan.chunks * kWorkerWarps;
}

// Floats that a group takes: bounds of its greatest probability, low and high, and a sum.
constexpr int kGroupFloats = 3;

// What is kept of a row's n groups.
struct RowGroups {
  float2* bounds;
  float* sums;

  __device__ RowGroups(const InterpolateSampleArgs& args, int64_t row, int n)
      : bounds(reinterpret_cast<float2*>(args.groups + row * n * kGroupFloats)),
        sums(args.groups + row * n * kGroupFloats + 2 * n) {}
};

// The columns [begin, end) of group `index`, in order of columns, for a row at `base`.
template <typename T>
struct GroupRange {
  int begin;
  int end;

  __device__ GroupRange(const PipelinePlan& plan, const T* base, int vocab, int index) {
    const int groups = plan.chunks * kWorkerWarps;  // of a slice
    const Slice slice(phase_of(base), vocab, plan.slots, index / groups);
    const int slot = index % groups * kGroupColumns<T>;
    begin = slice.first + max(slot, slice.begin);
    end = slice.first + min(slot + kGroupColumns<T>, slice.end);
  }
};

// A token's weight in the draw, in [0, 1]: its probability over a bound of all, to the power
// 1 / temperature.
struct DrawWeight {
  float inv_temperature = 1.f;
  float shift = 0.f;  // minus the bound's log2, times inv_temperature

  DrawWeight() = default;
  __device__ DrawWeight(const Mixture& mixture, float temperature)
      : inv_temperature(1.f / temperature) {
    const float base = mixture.weights.use_base ? fast_exp2(mixture.base_line.shift) : 0.f;
    const float memory = mixture.weights.use_memory ? fast_exp2(mixture.memory_line.shift) : 0.f;
    shift = -fast_log2(base + memory) * inv_temperature;
  }

  __device__ float operator()(float level) const {
    return fast_exp2(fmaf(level, inv_temperature, shift));
  }

  template <GroupSum kSum, bool kBoth = false>
  __device__ float of(const Mixture& mixture, float base_x, float memory_x) const {
    if constexpr (kSum != GroupSum::kPower) {
      return mixture.template probability<kBoth>(base_x, memory_x);
    } else {
      return (*this)(mixture.template level<kBoth>(base_x, memory_x));
    }
  }
};

template <typename T, bool kBounds, GroupSum kSum>
struct SampleJob : MixtureRows<T, InterpolateSampleArgs, 2> {
  using Rows = MixtureRows<T, InterpolateSampleArgs, 2>;
  struct Shared {
    Mixture mixture;
    DrawWeight weight;
  };
  using Rows::args;
  using Rows::kTogether;
  using Rows::Rows;
  using typename Rows::Carry;
  using typename Rows::Part;

  __device__ Shared publish(int64_t row, const Part& part) const {
    const RowStats base = part.base.stats(), memory = part.memory.stats();
    if (this->rank == 0) {
      args.stats[2 * row] = base;
      args.stats[2 * row + 1] = memory;
    }
    const Mixture mixture(row_weights(args, row), base, memory, args.inv_temperature);
    return {mixture,
            kSum == GroupSum::kPower ? DrawWeight(mixture, args.temperature) : DrawWeight()};
  }

  __device__ auto writer(int64_t row, const Shared& shared, const Carry& carry, int worker,
                         uint8_t*) const {
    const Mixture mixture = shared.mixture;
    const DrawWeight weight = shared.weight;
    const bool both = mixture.both();
    const Slice base_slice = carry.base, memory_slice = carry.memory;
    const int chunks_of_slice = this->plan.chunks;
    const int first = this->rank * chunks_of_slice * kWorkerWarps + worker / kWarpSize;
    const RowGroups groups(args, row, group_count(this->plan));
    const int lane = worker % kWarpSize;
    return [=, rows = static_cast<const Rows*>(this)](int c, const uint32_t (&chunks)[kTogether]) {
      float low[kTogether] = {}, high[kTogether] = {}, sum[kTogether] = {};
      rows->with_packs(base_slice, c, worker, [&](auto packs) {
        constexpr int kPacks = decltype(packs)::value;
        Pack<T> base[kPacks], memory[kPacks];
        rows->load(base_slice, memory_slice, c, chunks, worker, base, memory);
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if constexpr (kBounds) {
            const float a = fast_exp2(mixture.base_line(base[p].greatest()));
            const float b = fast_exp2(mixture.memory_line(memory[p].greatest()));
            const float of_base = mixture.weights.use_base ? a : 0.f;
            const float of_memory = mixture.weights.use_memory ? b : 0.f;
            low[p] = fmaxf(of_base, of_memory);
            high[p] = of_base + of_memory;
          }
        }
        if constexpr (kSum != GroupSum::kNone) {
          const auto add = [&](auto always_both) {
            constexpr bool kBoth = decltype(always_both)::value;
#pragma unroll
            for (int p = 0; p < kPacks; ++p) {
              const auto base_x = unpack<T>(base[p].words), memory_x = unpack<T>(memory[p].words);
#pragma unroll
              for (int i = 0; i < kPack<T>; ++i) {
                sum[p] += weight.template of<kSum, kBoth>(mixture, base_x[i], memory_x[i]);
              }
            }
          };
          if (both) {
            add(std::true_type{});
          } else {
            add(std::false_type{});
          }
        }
      });
      // Lane t puts the numbers of chunk c + t.
      const int group = first + (c + lane) * kWorkerWarps;
      const bool puts = lane < kTogether && c + lane < chunks_of_slice;
      if constexpr (kBounds) {  // as integers, positive floats order alike
        float2 bounds{};
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          const unsigned lowest = __reduce_max_sync(0xffffffffu, __float_as_uint(low[t]));
          const unsigned highest = __reduce_max_sync(0xffffffffu, __float_as_uint(high[t]));
          if (t == lane) bounds = {__uint_as_float(lowest), __uint_as_float(highest)};
        }
        if (puts) groups.bounds[group] = bounds;
      }
      if constexpr (kSum != GroupSum::kNone) {
        // Odd lanes add up the second chunk, even ones the first.
        const bool odd = lane % 2 == 1;
        float mine = odd ? sum[1] : sum[0];
        mine += __shfl_xor_sync(0xffffffffu, odd ? sum[0] : sum[1], 1);
#pragma unroll
        for (int offset = kWarpSize / 2; offset > 1; offset /= 2) {
          mine += __shfl_xor_sync(0xffffffffu, mine, offset);
        }
        if (puts) groups.sums[group] = mine;
      }
    };
  }
};

}  // namespace memdec::cuda
