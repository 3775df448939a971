// interpolate_sample at a temperature in the row pipeline: every logit is read once, and what is
// written of a row is the sum of the draw's weights in each group of neighbouring columns.
#pragma once

#include "cuda/interpolate_job.cuh"

namespace memdec::cuda {

// The columns of a group: a pack of each lane of a warp.
template <typename T>
constexpr int kGroupColumns = kWarpSize * kPack<T>;

// Groups of a row in the pipeline.
inline __host__ __device__ int pipeline_groups(const PipelinePlan& plan) {
  return plan.blocks * plan.chunks * kWorkerWarps;
}

// The columns [begin, end) of a group.
struct GroupRange {
  int begin;
  int end;
};

// Those of the pipeline's group `index`, in order of columns, for a row at `base`.
template <typename T>
__device__ inline GroupRange pipeline_group(const PipelinePlan& plan, const T* base, int vocab,
                                            int index) {
  const int groups = plan.chunks * kWorkerWarps;  // of a slice
  const Slice slice(phase_of(base), vocab, plan.slots, index / groups);
  const int slot = index % groups * kGroupColumns<T>;
  return {slice.first + max(slot, slice.begin),
          slice.first + min(slot + kGroupColumns<T>, slice.end)};
}

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

  // Of a level (Mixture::level).
  __device__ float operator()(float level) const {
    return fast_exp2(fmaf(level, inv_temperature, shift));
  }
};

template <typename T>
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
    return {mixture, DrawWeight(mixture, args.temperature)};
  }

  __device__ auto writer(int64_t row, const Shared& shared, const Carry& carry, int worker,
                         uint8_t*) const {
    const Mixture mixture = shared.mixture;
    const DrawWeight weight = shared.weight;
    const bool both = mixture.both();
    const Slice base_slice = carry.base, memory_slice = carry.memory;
    const int chunks_of_slice = this->plan.chunks;
    float* sums = args.groups + row * pipeline_groups(this->plan) +
                  this->rank * chunks_of_slice * kWorkerWarps + worker / kWarpSize;
    const int lane = worker % kWarpSize;
    return [=, rows = static_cast<const Rows*>(this)](int c, const uint32_t (&chunks)[kTogether]) {
      float sum[kTogether] = {};
      rows->with_packs(base_slice, c, worker, [&](auto packs) {
        constexpr int kPacks = decltype(packs)::value;
        Pack<T> base[kPacks], memory[kPacks];
        rows->load(base_slice, memory_slice, c, chunks, worker, base, memory);
        const auto add = [&](auto always_both) {
          constexpr bool kBoth = decltype(always_both)::value;
#pragma unroll
          for (int p = 0; p < kPacks; ++p) {
            const auto base_x = unpack<T>(base[p].words), memory_x = unpack<T>(memory[p].words);
#pragma unroll
            for (int i = 0; i < kPack<T>; ++i) {
              sum[p] += weight(mixture.template level<kBoth>(base_x[i], memory_x[i]));
            }
          }
        };
        if (both) {
          add(std::true_type{});
        } else {
          add(std::false_type{});
        }
      });
      // Odd lanes add up the second chunk, even ones the first; lane t puts that of chunk c + t.
      const bool odd = lane % 2 == 1;
      float mine = odd ? sum[1] : sum[0];
      mine += __shfl_xor_sync(0xffffffffu, odd ? sum[0] : sum[1], 1);
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 1; offset /= 2) {
        mine += __shfl_xor_sync(0xffffffffu, mine, offset);
      }
      if (lane < kTogether && c + lane < chunks_of_slice) sums[(c + lane) * kWorkerWarps] = mine;
    };
  }
};

}  // namespace memdec::cuda
