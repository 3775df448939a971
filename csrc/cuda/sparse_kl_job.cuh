// sparse_kl_loss with its gradient for an upstream gradient of 1, in one read of the logits and one
// write of the gradient: rows in a pipeline of clusters. The few columns with a target or the label
// are made with care before the sweep, which finds their gradient in the logits' place.
#pragma once

#include "cuda/row_pipeline.cuh"
#include "cuda/sparse_kl_row.cuh"

namespace memdec::cuda {

template <typename T>
struct SparseKLJob {
  static constexpr int kStripes = 1;
  static constexpr int kColumns = kStripe<T>;
  static constexpr int kTogether = 2;
  static constexpr int kRowCost = 8000;
  static constexpr bool kPatches = true;
  static constexpr int kHeld = 2;
  static constexpr int32_t kNone = -1;
  using Args = SparseKLArgs;

  // Entries of a row, those at `worker` and kWorkers apart; an id is kNone where there is none in
  // the slice.
  struct Held {
    int32_t ids[kHeld];
    float probs[kHeld];
    int32_t label;  // -1 if it is out of range
    int32_t count;  // entries that this worker takes, held or not
  };

  // A worker's part of a row.
  struct Carry {
    Slice slice{0, 0, 0, 0};
    WorkerSum sum;
    Held held;
    // Of the next row, as they were read.
    int64_t next_begin;
    int64_t next_end;
    int64_t next_label;
  };

  // Sums over the columns and the entries of a slice. `mass` is NaN where an id is out of range.
  struct alignas(uint4) Part {
    TailSum sum;
    float label_logit = 0.f;
    float label_hits = 0.f;  // entries whose token is the label
    double mass = 0.0;       // of p
    double cross = 0.0;      // of p * (log p - logit)
  };

  struct Shared {
    LogitGradient gradient;
    bool counted;
    bool label_alone;  // the label has no entry
  };

  const SparseKLArgs& args;
  const PipelinePlan& plan;
  int rank;
  int vocab;

  __device__ SparseKLJob(const SparseKLArgs& args, const PipelinePlan& plan, int rank)
      : args(args), plan(plan), rank(rank), vocab(static_cast<int>(args.vocab)) {}

  __device__ bool labelled() const { return args.labels != nullptr; }
  __device__ bool label_in_range(int64_t label) const { return label >= 0 && label < vocab; }
  __device__ double alpha() const { return labelled() ? args.alpha : 1.0; }

  __device__ Slice slice(const T* logits) const {
    return Slice(phase_of(logits), vocab, plan.slots, rank);
  }

  __device__ auto loader(int64_t row) const {
    const T* logits = row_of<const T>(args.logits, row);
    const Slice slice = this->slice(logits);
    return [=](int c, uint32_t chunk, hopper::Barrier full) {
      full.arrive_expect(copied_slots(slice, c * kColumns, kColumns) * sizeof(T));
      copy_slots(chunk, logits, slice, c * kColumns, kColumns, full);
    };
  }

  __device__ void prefetch(int64_t row, Carry* carry) const {
    carry->next_begin = args.targets.indptr[row];
    carry->next_end = args.targets.indptr[row + 1];
    carry->next_label = labelled() ? args.labels[row] : -1;
  }

  __device__ void begin_sum(int64_t row, Carry* carry, int worker) const {
    carry->slice = slice(row_of<const T>(args.logits, row));
    carry->sum = {};
    const auto entries = entries_between(args.targets, carry->next_begin, carry->next_end);
    Held* held = &carry->held;
    held->label = label_in_range(carry->next_label) ? static_cast<int32_t>(carry->next_label) : -1;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int64_t e = entries.begin + worker + h * kWorkers;
      if (e < entries.end) {
        held->ids[h] = args.targets.token_ids[e];
        held->probs[h] = args.targets.probs[e];
      }
    }
    held->count =
        static_cast<int32_t>((entries.end - entries.begin - worker + kWorkers - 1) / kWorkers);
  }

  // Calls f(id, p) for this worker's entries that are not held.
  template <typename F>
  __device__ void for_each_more(int64_t row, int worker, F&& f) const {
    const Entries entries = entries_of(args.targets, row);
#pragma unroll 1
    for (int64_t e = entries.begin + worker + kHeld * kWorkers; e < entries.end; e += kWorkers) {
      f(args.targets.token_ids[e], args.targets.probs[e]);
    }
  }

  __device__ void add(Carry* carry, int c, const uint32_t (&chunks)[kTogether], int worker) const {
    const int s = c * kColumns + worker * kPack<T>;
    const auto add = [&](auto count) {
      constexpr int kPacks = decltype(count)::value;
      Pack<T> packs[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        packs[p].words = hopper::load_shared<uint4>(chunks[p] + worker * sizeof(uint4));
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int first = s + p * kColumns;
        if (!carry->slice.template whole<kPack<T>>(first)) mask(&packs[p], carry->slice, first);
      }
      carry->sum.add(packs, kLog2E);
    };
    if (s + kColumns < carry->slice.end) {
      add(std::integral_constant<int, 2>{});
    } else if (s < carry->slice.end) {
      add(std::integral_constant<int, 1>{});
    }
  }

  // `chunk_of(c)` are the chunks of the slice.
  template <typename ChunkOf>
  __device__ Part end_sum(int64_t row, Carry* carry, int worker, ChunkOf&& chunk_of) const {
    const Slice slice = carry->slice;
    Held* held = &carry->held;
    const auto logit = [&](int s) {
      return to_float(value_at<T>(chunk_of(s / kColumns), s % kColumns));
    };
    Part part;
    part.sum = merge_lanes(carry->sum.total(kLog2E), kLog2E);
    bool label_hit = false;
    const auto visit = [&](int32_t id, float p) {
      const float x = logit(id - slice.first);
      part.mass += p;
      label_hit = label_hit || id == held->label;
      if (p != 0.f) part.cross += static_cast<double>(p) * (logf(p) - x);
    };
    const auto check = [&](int32_t id) {
      if (id < 0 || id >= vocab) part.mass = NAN;
    };
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (h < held->count) check(held->ids[h]);
      if (h < held->count && slice.holds(held->ids[h])) {
        visit(held->ids[h], held->probs[h]);
      } else {
        held->ids[h] = kNone;
      }
    }
    if (held->count > kHeld) {
      for_each_more(row, worker, [&](int32_t id, float p) {
        check(id);
        if (slice.holds(id)) visit(id, p);
      });
    }
    // Only warps that hold entries add them up.
    if (__any_sync(0xffffffffu, part.mass != 0.0 || part.cross != 0.0 || label_hit)) {
      part.mass = warp_sum(part.mass);
      part.cross = warp_sum(part.cross);
      part.label_hits = __any_sync(0xffffffffu, label_hit) ? 1.f : 0.f;
    }
    if (worker == 0 && slice.holds(held->label)) {
      part.label_logit = logit(held->label - slice.first);
    }
    return part;
  }

  __device__ Part merge(const Part& part) const {
    Part merged;
    merged.sum = merge_lanes(part.sum, kLog2E);
    merged.label_logit = warp_sum(part.label_logit);
    merged.label_hits = warp_sum(part.label_hits);
    merged.mass = warp_sum(part.mass);
    merged.cross = warp_sum(part.cross);
    return merged;
  }

  __device__ Shared publish(int64_t row, const Part& part) const {
    const Entries entries = entries_of(args.targets, row);
    const RowStats stats = part.sum.stats();
    const bool counted = row_counts(args, row, entries);
    const int64_t label = labelled() ? args.labels[row] : -1;
    double mass = part.mass;
    if (counted && labelled() && !label_in_range(label)) mass = NAN;
    if (rank == 0) {
      const double log_norm = static_cast<double>(stats.max) + stats.log_norm;
      const bool empty = mass == 0.0 && part.cross == 0.0;
      const double kl = empty ? 0.0 : part.cross + part.mass * log_norm;
      const double ce = label_in_range(label) ? log_norm - part.label_logit : NAN;
      write_row(args, row, counted, stats, static_cast<float>(kl), static_cast<float>(ce));
    }
    const double upstream = counted ? *args.scale : 0.0;
    return {LogitGradient(stats, upstream, mass, alpha(), labelled()), counted,
            label_in_range(label) && part.label_hits == 0.f};
  }

  // Puts the gradient of columns with a target or the label in the place of their logits, and marks
  // them: a byte a pack, a bit a column.
  template <typename ChunkOf>
  __device__ void patch(int64_t row, const Shared& shared, const Carry& carry, int worker,
                        ChunkOf&& chunk_of, uint8_t* marks) const {
    if (!shared.counted) return;
    const Held& held = carry.held;
    const Slice slice = carry.slice;
    const auto put = [&](int32_t id, float p) {
      const int s = id - slice.first;
      T& x = value_at<T>(chunk_of(s / kColumns), s % kColumns);
      const double hit = shared.gradient.hit(p, id == held.label);
      x = from_float<T>(shared.gradient.precise(to_float(x), hit));
      const int pack = s / kPack<T>;
      auto* words = reinterpret_cast<uint32_t*>(marks);
      atomicOr(&words[pack / 4], 1u << (pack % 4 * 8 + s % kPack<T>));
    };
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (held.ids[h] != kNone) put(held.ids[h], held.probs[h]);
    }
    if (held.count > kHeld) {
      for_each_more(row, worker, [&](int32_t id, float p) {
        if (slice.holds(id)) put(id, p);
      });
    }
    if (worker == 0 && shared.label_alone && slice.holds(held.label)) put(held.label, 0.f);
  }

  // Stores the gradient of a chunk's columns that this worker takes.
  __device__ auto writer(int64_t row, const Shared& shared, const Carry& carry, int worker,
                         uint8_t* marks) const {
    T* grad = row_of<T>(args.grad_logits, row);
    if (rank == plan.blocks - 1) {  // padding columns
      const int width = static_cast<int>(args.logits.cols);
      for (int i = vocab + worker; i < width; i += kWorkers) grad[i] = from_float<T>(0.f);
    }
    const LogitGradient gradient = shared.gradient;
    const Slice slice = carry.slice;
    return [=](int c, const uint32_t (&chunks)[kTogether]) {
      constexpr int kStep = kPack<T>;
      const int s = c * kColumns + worker * kStep;
      Pack<T> packs[kTogether], results[kTogether];
#pragma unroll
      for (int p = 0; p < kTogether; ++p) {
        packs[p].words = hopper::load_shared<uint4>(chunks[p] + worker * sizeof(uint4));
        const auto x = unpack<T>(packs[p].words);
        T* values = reinterpret_cast<T*>(&results[p].words);
#pragma unroll
        for (int i = 0; i < kStep; ++i) values[i] = from_float<T>(gradient.dense(x[i]));
      }
#pragma unroll
      for (int p = 0; p < kTogether; ++p) {
        const int first = s + p * kColumns;
        if (first >= slice.end) return;
        if (gradient.factor == 0.f) results[p].words = {};  // whatever the logits are
        uint8_t& mark = marks[(c + p) * kWorkers + worker];
        const uint32_t marked = mark;
        if (marked != 0) {
          results[p].take(packs[p], marked);
          mark = 0;
        }
        T* to = grad + slice.first + first;
        if (slice.whole<kStep>(first) && is_aligned(to)) {
          *reinterpret_cast<uint4*>(to) = results[p].words;
        } else {
          const T* values = reinterpret_cast<const T*>(&results[p].words);
#pragma unroll
          for (int i = 0; i < kStep; ++i) {
            if (first + i >= slice.begin && first + i < slice.end) to[i] = values[i];
          }
        }
      }
    };
  }
};

}  // namespace memdec::cuda
