// Rows of logits as float32 chunks, and the loop over rows that every kernel on logits shares.
#pragma once

#include <new>

#include "common/args.h"
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

// n float16 or bfloat16 numbers at `from` to float32.
inline void widen(const char* from, DType dtype, int64_t n, float* to) {
  const auto convert = [&](auto convert_vector) MEMDEC_VECTOR_BODY {
    for_each_vector(n, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      HalfVec half = {};
      __builtin_memcpy(&half, from + 2 * i, 2 * lanes);
      store(to + i, convert_vector(half), lanes);
    });
  };
  if (dtype == DType::kFloat16) {
    convert([](HalfVec half) MEMDEC_VECTOR_BODY { return from_float16(half); });
  } else {
    convert([](HalfVec half) MEMDEC_VECTOR_BODY { return from_bfloat16(half); });
  }
}

// n float32 numbers at `from` rounded to float16 or bfloat16.
inline void narrow(const float* from, int64_t n, DType dtype, char* to) {
  const auto convert = [&](auto convert_vector) MEMDEC_VECTOR_BODY {
    for_each_vector(n, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      const HalfVec half = convert_vector(load(from + i, lanes));
      __builtin_memcpy(to + 2 * i, &half, 2 * lanes);
    });
  };
  if (dtype == DType::kFloat16) {
    convert([](Vec x) MEMDEC_VECTOR_BODY { return to_float16(x); });
  } else {
    convert([](Vec x) MEMDEC_VECTOR_BODY { return to_bfloat16(x); });
  }
}

// Columns [begin, end) of a row as float32, in `buffer` unless they already are. Columns from
// `limit` on (at most the row's width) are not read: they are -inf.
inline const float* read_chunk(const RowsView& view, int64_t row, int64_t begin, int64_t end,
                               int64_t limit, ChunkBuffer& buffer) {
  const char* from = row_address(view, row) + begin * element_size(view.dtype);
  if (view.dtype == DType::kFloat32 && end <= limit) return reinterpret_cast<const float*>(from);
  const int64_t present = larger<int64_t>(0, smaller(end, limit) - begin);
  if (view.dtype != DType::kFloat32) {
    widen(from, view.dtype, present, buffer.values);
  } else if (present > 0) {
    __builtin_memcpy(buffer.values, from, 4 * present);
  }
  for (int64_t i = present; i < end - begin; ++i) buffer.values[i] = -kInfinity;
  return buffer.values;
}

// The memory of a row from `begin` on, to be fetched into the cache while something else is
// computed. It may lie beyond the row: it is never read.
struct Upcoming {
  const char* data;
  int64_t column_bytes;

  MEMDEC_INLINE void prefetch(int64_t column) const {
    __builtin_prefetch(data + column * column_bytes);
  }
};

inline Upcoming upcoming(const RowsView& view, int64_t row, int64_t begin) {
  const int64_t size = element_size(view.dtype);
  return {row_address(view, row) + begin * size, size};
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
  if (view.dtype == DType::kFloat32) {
    __builtin_memcpy(&result, from, 4);
  } else {
    widen(from, view.dtype, 1, &result);
  }
  return result;
}

inline void write_one(const RowsView& view, int64_t row, int64_t column, float value) {
  char* to = row_address(view, row) + column * element_size(view.dtype);
  if (view.dtype == DType::kFloat32) {
    __builtin_memcpy(to, &value, 4);
  } else {
    narrow(&value, 1, view.dtype, to);
  }
}

// An array without initial values that is null when memory runs out.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(new (std::nothrow) T[size]) {}
  ~Scratch() { delete[] data_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

// Less work than this is done by the calling thread: waking the others takes longer.
constexpr int64_t kSerialElements = 16384;

// Runs a job on rows of `cols` columns. A job has plain structs Row and Partial and
//   Row begin(row)                          before the row is read
//   Partial measure(const Row&, begin, end) reads a chunk of columns
//   void fold(Row&, const Partial&)         takes the chunks' results in order of columns
//   void measured(Row&)                     after the last of them
//   void write(const Row&, begin, end)      writes a chunk
//   void finish(const Row&)                 after the last of them
// Threads take whole rows, or chunks when there are few rows. Results are the same bits for any
// number of threads: chunks and the order of their sums do not depend on it.
template <class Job>
void run_rows(const Job& job, int64_t rows, int64_t cols, int threads) {
  using Row = typename Job::Row;
  using Partial = typename Job::Partial;
  const int64_t chunks = (cols + kChunk - 1) / kChunk;
  const auto chunk_end = [cols](int64_t chunk) { return smaller(cols, (chunk + 1) * kChunk); };
  if (rows * cols < kSerialElements) threads = 1;

  if (threads > 1 && chunks > 1 && rows < 4 * threads) {
    Scratch<Row> states(rows);
    Scratch<Partial> partials(rows * chunks);
    if (states.data() != nullptr && partials.data() != nullptr) {
      Row* const state = states.data();
      Partial* const partial = partials.data();
      for (int64_t row = 0; row < rows; ++row) state[row] = job.begin(row);
#pragma omp parallel num_threads(threads)
      {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * chunks; ++i) {
          const int64_t chunk = i % chunks;
          partial[i] = job.measure(state[i / chunks], chunk * kChunk, chunk_end(chunk));
        }
#pragma omp single
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            job.fold(state[row], partial[row * chunks + chunk]);
          }
          job.measured(state[row]);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * chunks; ++i) {
          const int64_t chunk = i % chunks;
          job.write(state[i / chunks], chunk * kChunk, chunk_end(chunk));
        }
      }
      for (int64_t row = 0; row < rows; ++row) job.finish(state[row]);
      return;
    }
  }

  // Rows differ in work (ignored ones have none), so threads take them as they go.
  [[maybe_unused]] const int64_t grain = 1 + kSerialElements / (4 * larger<int64_t>(cols, 1));
#pragma omp parallel for schedule(dynamic, grain) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    Row state = job.begin(row);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      job.fold(state, job.measure(state, chunk * kChunk, chunk_end(chunk)));
    }
    job.measured(state);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      job.write(state, chunk * kChunk, chunk_end(chunk));
    }
    job.finish(state);
  }
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
