// fused_interpolate in the row pipeline: both models' logits are read once.
#pragma once

#include "cuda/interpolate_mixture.cuh"
#include "cuda/row_pipeline.cuh"

namespace memdec::cuda {

// How the rows of two models are read and summed up, kChunks chunks at a time. Their logits have
// one dtype, and their rows agree (rows_agree).
template <typename T, typename JobArgs, int kChunks = 1>
struct MixtureRows {
  static constexpr int kStripes = 2;  // one of each model
  static constexpr int kColumns = kStripe<T>;
  static constexpr int kTogether = kChunks;
  static constexpr int kRowCost = 2000;
  static constexpr bool kPatches = false;
  using Args = JobArgs;

  struct alignas(uint4) Part {
    TailSum base;
    TailSum memory;
  };

  struct Carry {
    Slice base{0, 0, 0, 0};
    Slice memory{0, 0, 0, 0};
    WorkerSum base_sum;
    WorkerSum memory_sum;
  };

  const Args& args;
  const PipelinePlan& plan;
  int rank;
  int vocab;
  int shared_vocab;  // columns that the memory has

  __device__ MixtureRows(const Args& args, const PipelinePlan& plan, int rank)
      : args(args),
        plan(plan),
        rank(rank),
        vocab(static_cast<int>(args.vocab)),
        shared_vocab(real_columns(args.memory.cols, args.vocab)) {}

  __device__ Slice slice(const T* base, int columns) const {
    return Slice(phase_of(base), columns, plan.slots, rank);
  }

  __device__ float memory_scale() const { return args.inv_temperature * kLog2E; }

  __device__ auto loader(int64_t row) const {
    const T* base = row_of<const T>(args.base, row);
    const T* memory = row_of<const T>(args.memory, row);
    const Slice base_slice = slice(base, vocab), memory_slice = slice(base, shared_vocab);
    return [=](int c, uint32_t chunk, hopper::Barrier full) {
      const int begin = c * kColumns;
      full.arrive_expect((copied_slots(base_slice, begin, kColumns) +
                          copied_slots(memory_slice, begin, kColumns)) *
                         sizeof(T));
      copy_slots(chunk, base, base_slice, begin, kColumns, full);
      copy_slots(chunk + kStripeBytes, memory, memory_slice, begin, kColumns, full);
    };
  }

  __device__ void prefetch(int64_t, Carry*) const {}

  __device__ void begin_sum(int64_t row, Carry* carry, int) const {
    const T* base = row_of<const T>(args.base, row);
    *carry = {slice(base, vocab), slice(base, shared_vocab), {}, {}};
  }

  // This worker's packs of `kPacks` chunks from chunk c on; what is not of the row is -inf.
  template <int kPacks>
  __device__ void load(const Slice& base_slice, const Slice& memory_slice, int c,
                       const uint32_t (&chunks)[kTogether], int worker, Pack<T> (&base)[kPacks],
                       Pack<T> (&memory)[kPacks]) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const uint32_t at = chunks[p] + worker * sizeof(uint4);
      base[p] = {hopper::load_shared<uint4>(at)};
      memory[p] = {hopper::load_shared<uint4>(at + kStripeBytes)};
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int s = (c + p) * kColumns + worker * kPack<T>;
      if (!memory_slice.template whole<kPack<T>>(s)) {  // the base has no fewer columns
        mask(&base[p], base_slice, s);
        mask(&memory[p], memory_slice, s);
      }
    }
  }

  // Calls f(packs) with the number of this worker's packs, from chunk c on, that hold a column.
  template <typename F>
  __device__ void with_packs(const Slice& base_slice, int c, int worker, F&& f) const {
    const int s = c * kColumns + worker * kPack<T>;
    if (kTogether == 2 && s + kColumns < base_slice.end) {
      f(std::integral_constant<int, kTogether>{});
    } else if (s < base_slice.end) {
      f(std::integral_constant<int, 1>{});
    }
  }

  __device__ void add(Carry* carry, int c, const uint32_t (&chunks)[kTogether], int worker) const {
    with_packs(carry->base, c, worker, [&](auto packs) {
      Pack<T> base[packs.value], memory[packs.value];
      load(carry->base, carry->memory, c, chunks, worker, base, memory);
      carry->base_sum.add(base, kLog2E);
      carry->memory_sum.add(memory, memory_scale());
    });
  }

  template <typename ChunkOf>
  __device__ Part end_sum(int64_t, Carry* carry, int, ChunkOf&&) const {
    return {merge_lanes(carry->base_sum.total(kLog2E), kLog2E),
            merge_lanes(carry->memory_sum.total(memory_scale()), memory_scale())};
  }

  __device__ Part merge(const Part& part) const {
    return {merge_lanes(part.base, kLog2E), merge_lanes(part.memory, memory_scale())};
  }
};

template <typename T>
struct InterpolateJob : MixtureRows<T, InterpolateArgs> {
  using Rows = MixtureRows<T, InterpolateArgs>;
  using Shared = Mixture;
  using Rows::args;
  using Rows::Rows;
  using typename Rows::Carry;
  using typename Rows::Part;

  __device__ Mixture publish(int64_t row, const Part& part) const {
    const RowStats base = part.base.stats(), memory = part.memory.stats();
    if (args.stats && this->rank == 0) {
      args.stats[2 * row] = base;
      args.stats[2 * row + 1] = memory;
    }
    return Mixture(row_weights(args, row), base, memory, args.inv_temperature);
  }

  // Writes the results of a chunk's columns that this worker takes.
  __device__ auto writer(int64_t row, const Mixture& shared, const Carry& carry, int worker,
                         uint8_t*) const {
    const Mixture mixture = shared;
    const AnyRow out(args.out, row);
    if (this->rank == this->plan.blocks - 1) {  // padding columns have no mass
      const int width = static_cast<int>(args.base.cols);
      for (int i = this->vocab + worker; i < width; i += kWorkers) out.set(i, -INFINITY);
    }
    const Slice slice = carry.base;
    const int shared_end = carry.memory.end;
    // A model without weight is not looked at: the other's logits stand in.
    const uint32_t base_offset = mixture.weights.use_base ? 0 : kStripeBytes;
    const uint32_t memory_offset = mixture.weights.use_memory ? kStripeBytes : 0;
    return [=](int c, const uint32_t (&chunks)[Rows::kTogether]) {
      const uint32_t chunk = chunks[0];
      out.visit([&](auto* row_out) {
        using Out = std::remove_pointer_t<decltype(row_out)>;
        // As many columns at a time as the packs of both dtypes hold.
        constexpr int kStep = kPack<T> < kPack<Out> ? kPack<T> : kPack<Out>;
        constexpr int kSteps = kPack<T> / kStep;
        const int first = c * Rows::kColumns;
        if (first + worker * kStep >= slice.end) return;
        Out* to = row_out + slice.first + first;
        const bool aligned = is_aligned_to<kStep>(to);
        Values<kStep> results[kSteps];
        bool usual[kSteps];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int i = (step * kWorkers + worker) * kStep;
          const uint32_t at = i * sizeof(T);
          const auto base_x = load_values<T, kStep>(chunk + base_offset + at);
          const auto memory_x = load_values<T, kStep>(chunk + memory_offset + at);
          usual[step] = mixture.group(base_x, memory_x, &results[step]) &&
                        first + i >= slice.begin && first + i + kStep <= shared_end;
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int i = (step * kWorkers + worker) * kStep;
          if (usual[step] && aligned) {
            results[step].store(to + i);
          } else if (usual[step]) {
            results[step].store_unaligned(to + i);
          } else if (first + i < slice.end) {
#pragma unroll 1
            for (int j = i; j < i + kStep; ++j) {
              if (first + j < slice.begin || first + j >= slice.end) continue;
              const float memory_x = first + j < shared_end
                                         ? to_float(value_at<T>(chunk + kStripeBytes, j))
                                         : -INFINITY;
              to[j] = from_float<Out>(mixture(to_float(value_at<T>(chunk, j)), memory_x));
            }
          }
        }
      });
    };
  }
};

}  // namespace memdec::cuda
