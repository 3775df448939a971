// Rows of logits as float32 chunks, and the loop over rows that every kernel on logits shares.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <new>

#include "common/args.h"
#include "common/status.h"
#include "cpu/simd.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {

// Columns handled at a time: the unit of work that threads share, and of float32 partial sums. A
// few chunks of float32 fit into the first two levels of cache.
constexpr int64_t kChunk = 4096;

// Room for one chunk in float32.
struct alignas(64) ChunkBuffer {
  float values[kChunk];
};

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline char* row_address(const RowsView& view, int64_t row) {
  const int64_t elements =
      row / view.inner_rows * view.outer_stride + row % view.inner_rows * view.inner_stride;
  return static_cast<char*>(view.data) + elements * element_size(view.dtype);
}

template <DType kType>
constexpr int64_t kElementSize = kType == DType::kFloat32 ? 4 : 2;

// Elements i and following of numbers at `from` as float32; the other lanes hold `fill`.
template <DType kType>
MEMDEC_INLINE Vec load_as(const char* from, int64_t i, int lanes, float fill = 0.f) {
  if constexpr (kType == DType::kFloat32) {
    return load(reinterpret_cast<const float*>(from) + i, lanes, fill);
  } else {
    HalfVec half = {};
    __builtin_memcpy(&half, from + 2 * i, 2 * lanes);
    Vec result = kType == DType::kFloat16 ? from_float16(half) : from_bfloat16(half);
    for (int lane = lanes; lane < kLanes; ++lane) result[lane] = fill;
    return result;
  }
}

// Rounds to elements i and following at `to`.
template <DType kType>
MEMDEC_INLINE void store_as(char* to, int64_t i, Vec value, int lanes) {
  if constexpr (kType == DType::kFloat32) {
    store(reinterpret_cast<float*>(to) + i, value, lanes);
  } else {
    const HalfVec half = kType == DType::kFloat16 ? to_float16(value) : to_bfloat16(value);
    __builtin_memcpy(to + 2 * i, &half, 2 * lanes);
  }
}

template <DType type>
struct DTypeTag {
  static constexpr DType kType = type;
};

// f(DTypeTag<dtype>{}): makes the dtype a constant.
template <class F>
MEMDEC_INLINE auto with_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat16) return f(DTypeTag<DType::kFloat16>{});
  if (dtype == DType::kBFloat16) return f(DTypeTag<DType::kBFloat16>{});
  return f(DTypeTag<DType::kFloat32>{});
}

// n numbers at `from` to float32.
inline void widen(const char* from, DType dtype, int64_t n, float* to) {
  with_dtype(dtype, [&](auto type) {
    for_each_vector(n, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      store(to + i, load_as<decltype(type)::kType>(from, i, lanes), lanes);
    });
  });
}

// n float32 numbers at `from`, rounded.
inline void narrow(const float* from, int64_t n, DType dtype, char* to) {
  with_dtype(dtype, [&](auto type) {
    for_each_vector(n, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      store_as<decltype(type)::kType>(to, i, load(from + i, lanes), lanes);
    });
  });
}

// Columns [begin, end) of a row as float32, in `buffer` unless they already are. Columns from
// `limit` on (at most the row's width) are not read: they are -inf.
inline const float* read_chunk(const RowsView& view, int64_t row, int64_t begin, int64_t end,
                               int64_t limit, ChunkBuffer& buffer) {
  const char* from = row_address(view, row) + begin * element_size(view.dtype);
  if (view.dtype == DType::kFloat32 && end <= limit) return reinterpret_cast<const float*>(from);
  const int64_t present = larger<int64_t>(0, smaller(end, limit) - begin);
  widen(from, view.dtype, present, buffer.values);
  for (int64_t i = present; i < end - begin; ++i) buffer.values[i] = -kInfinity;
  return buffer.values;
}

// Where to put float32 results of columns from `begin` on, before write_chunk: the row itself if
// it is float32, else `buffer`.
inline float* chunk_target(const RowsView& view, int64_t row, int64_t begin, ChunkBuffer& buffer) {
  if (view.dtype != DType::kFloat32) return buffer.values;
  return reinterpret_cast<float*>(row_address(view, row)) + begin;
}

inline void write_chunk(const RowsView& view, int64_t row, int64_t begin, int64_t end,
                        const float* values) {
  if (view.dtype == DType::kFloat32) return;
  narrow(values, end - begin, view.dtype, row_address(view, row) + 2 * begin);
}

// One value in every column of [begin, end).
inline void fill_chunk(const RowsView& view, int64_t row, int64_t begin, int64_t end, float value) {
  ChunkBuffer buffer;
  while (begin < end) {
    const int64_t stop = smaller(end, begin + kChunk);
    float* to = chunk_target(view, row, begin, buffer);
    for (int64_t i = 0; i < stop - begin; ++i) to[i] = value;
    write_chunk(view, row, begin, stop, to);
    begin = stop;
  }
}

inline float read_one(const RowsView& view, int64_t row, int64_t column) {
  const char* from = row_address(view, row) + column * element_size(view.dtype);
  float result;
  widen(from, view.dtype, 1, &result);
  return result;
}

inline void write_one(const RowsView& view, int64_t row, int64_t column, float value) {
  char* to = row_address(view, row) + column * element_size(view.dtype);
  narrow(&value, 1, view.dtype, to);
}

// An array without initial values that is null when memory runs out.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(operator new(size * sizeof(T), kAlignment, std::nothrow))) {}
  ~Scratch() { operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};  // a cache line, and a vector of AVX-512
  T* data_;
};

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Less work than this is done by the calling thread: waking the others takes longer.
constexpr int64_t kSerialElements = 16384;

// Runs a job on rows of `cols` columns. A job has plain structs Row and Partial and
//   int64_t kept_floats()                   how many floats a column it keeps between the passes
//   Row begin(row)                          before the row is read
//   Partial measure(const Row&, begin, end, kept)         reads a chunk of columns
//   void fold(Row&, const Partial&)         takes the chunks' results in order of columns
//   void measured(Row&)                     after the last of them
//   void write(const Row&, begin, end, partial, kept)     writes a chunk
//   void finish(const Row&)                 after the last of them
// `write` gets what `measure` returned for the chunk and what it left in `kept`, an array of
// kChunk floats for each that the job keeps.
// Threads take whole rows, or chunks when there are few rows. Results are the same bits for any
// number of threads: chunks and the order of their sums do not depend on it.
template <class Job>
Status run_rows(const Job& job, int64_t rows, int64_t cols, int threads) {
  using Row = typename Job::Row;
  using Partial = typename Job::Partial;
  const int64_t chunks = (cols + kChunk - 1) / kChunk;
  const auto chunk_end = [cols](int64_t chunk) { return smaller(cols, (chunk + 1) * kChunk); };
  if (rows * cols < kSerialElements) threads = 1;

  const bool split_rows = threads > 1 && chunks > 1 && rows < 4 * threads;
  if (!split_rows) threads = static_cast<int>(smaller<int64_t>(threads, rows));
  const int64_t slots = smaller<int64_t>(rows, threads);  // rows at work at the same time
  const int64_t kept_chunk = job.kept_floats() * (chunks == 1 ? (cols + 15) / 16 * 16 : kChunk);
  const Scratch<Row> states(slots);
  const Scratch<Partial> partials(slots * chunks);
  const Scratch<float> kept_floats(slots * chunks * kept_chunk);
  Row* const state = states.data();
  Partial* const partial = partials.data();
  float* const kept = kept_floats.data();
  if (state == nullptr || partial == nullptr || kept == nullptr) {
    return {"no memory for a row of numbers on each thread"};
  }

  if (split_rows) {
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < rows; first += slots) {
      const int64_t count = smaller(slots, rows - first);
#pragma omp single
      for (int64_t i = 0; i < count; ++i) state[i] = job.begin(first + i);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * chunks; ++i) {
        const int64_t chunk = i % chunks;
        partial[i] =
            job.measure(state[i / chunks], chunk * kChunk, chunk_end(chunk), kept + i * kept_chunk);
      }
#pragma omp single
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          job.fold(state[i], partial[i * chunks + chunk]);
        }
        job.measured(state[i]);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * chunks; ++i) {
        const int64_t chunk = i % chunks;
        job.write(state[i / chunks], chunk * kChunk, chunk_end(chunk), partial[i],
                  kept + i * kept_chunk);
      }
#pragma omp single
      for (int64_t i = 0; i < count; ++i) job.finish(state[i]);
    }
    return {};
  }

  // Rows differ in work (ignored ones have none), so threads take them as they go.
  [[maybe_unused]] const int64_t grain = 1 + kSerialElements / (4 * larger<int64_t>(cols, 1));
#pragma omp parallel for schedule(dynamic, grain) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = thread_number() * chunks;
    Row& own = state[thread_number()];
    own = job.begin(row);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t i = first + chunk;
      partial[i] = job.measure(own, chunk * kChunk, chunk_end(chunk), kept + i * kept_chunk);
      job.fold(own, partial[i]);
    }
    job.measured(own);
    // Backwards, since the last chunks are still in the nearest cache.
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t i = first + chunk;
      job.write(own, chunk * kChunk, chunk_end(chunk), partial[i], kept + i * kept_chunk);
    }
    job.finish(own);
  }
  return {};
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
