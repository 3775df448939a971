// interpolate_sample in the row pipeline: every logit is read once, and what is written of a row is
// one number for each group of neighbouring columns, from which a small kernel chooses.
#pragma once

#include "cuda/interpolate_job.cuh"

namespace memdec::cuda {

// What a group's number is.
enum class GroupOf {
  kMax,    // its greatest probability
  kSum,    // its probabilities' sum
  kPower,  // the sum of their powers with 1 / temperature
};

// The columns of a group: a pack of each lane of a warp.
template <typename T>
constexpr int kGroupColumns = kWarpSize * kPack<T>;

// Groups of a row.
inline __host__ __device__ int group_count(const PipelinePlan& plan) {
  return plan.blocks * plan.chunks * kWorkerWarps;
}

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

// A token's weight in the draw, in (0, 1]: its probability over a bound of all, to the power
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

  template <GroupOf kOf>
  __device__ float of(const Mixture& mixture, float base_x, float memory_x) const {
    if constexpr (kOf != GroupOf::kPower) return mixture.probability(base_x, memory_x);
    return fast_exp2(fmaf(mixture.log2_probability(base_x, memory_x), inv_temperature, shift));
  }
};

template <typename T, GroupOf kOf>
struct SampleJob : MixtureRows<T, InterpolateSampleArgs> {
  using Rows = MixtureRows<T, InterpolateSampleArgs>;
  struct Shared {
    Mixture mixture;
    DrawWeight weight;
  };
  using Rows::args;
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
    return {mixture, kOf == GroupOf::kPower ? DrawWeight(mixture, args.temperature) : DrawWeight()};
  }

  __device__ auto writer(int64_t row, const Shared& shared, const Carry& carry, int worker,
                         uint8_t*) const {
    const Mixture mixture = shared.mixture;
    const DrawWeight weight = shared.weight;
    const Slice base_slice = carry.base, memory_slice = carry.memory;
    const int64_t first = row * group_count(this->plan) +
                          this->rank * this->plan.chunks * kWorkerWarps + worker / kWarpSize;
    float* groups = args.groups + first;
    return [=](int c, const uint32_t (&chunks)[Rows::kTogether]) {
      const int s = c * Rows::kColumns + worker * kPack<T>;
      float of_group = 0.f;
      if (s < base_slice.end) {
        const uint32_t at = chunks[0] + worker * sizeof(uint4);
        Pack<T> base{hopper::load_shared<uint4>(at)};
        Pack<T> memory{hopper::load_shared<uint4>(at + kStripeBytes)};
        if (!memory_slice.template whole<kPack<T>>(s)) {  // the base has no fewer columns
          mask(&base, base_slice, s);
          mask(&memory, memory_slice, s);
        }
        const auto base_x = unpack<T>(base.words), memory_x = unpack<T>(memory.words);
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          const float value = weight.template of<kOf>(mixture, base_x[i], memory_x[i]);
          of_group = kOf == GroupOf::kMax ? fmaxf(of_group, value) : of_group + value;
        }
      }
      if constexpr (kOf == GroupOf::kMax) {  // as integers, positive floats order alike
        of_group = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(of_group)));
      } else {
        of_group = warp_sum(of_group);
      }
      if (worker % kWarpSize == 0) groups[c * kWorkerWarps] = of_group;
    };
  }
};

}  // namespace memdec::cuda
