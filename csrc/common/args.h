// What each kernel takes, for the CPU and CUDA alike. Plain pointers and numbers: Python owns every
// buffer, and every shape and dtype has been checked there (memdec/ops). Values inside the buffers
// have not: an index out of range gives NaN for its row and is never used as an address.
#pragma once

#include <cstdint>

namespace memdec {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Rows of a tensor [..., cols] whose last dimension is contiguous and whose leading dimensions
// collapse to two: row r starts at
//   (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride   elements from data.
// The width and the strides are separate numbers and every offset is 64-bit.
struct RowsView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t cols = 0;
  int64_t inner_rows = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
};

// The log-softmax of a row is (x - max) * inv_temperature - log_norm. log_norm is log1p of the sum
// of exponentials without the maximum's own term: adding that term, which is 1, in float32 would
// swallow the tail and with it 1 - q. A row without a finite logit has log_norm NaN.
struct RowStats {
  float max;
  float log_norm;
};

// CSR targets. Row i is [indptr[i], indptr[i + 1]); indptr[0] may be above 0 (a slice).
struct SparseRows {
  const int64_t* indptr = nullptr;  // [rows + 1]
  const int32_t* token_ids = nullptr;
  const float* probs = nullptr;
  int64_t slots = 0;  // length of token_ids and probs
};

// log((1 - lmbda) softmax(base) + lmbda softmax(memory * inv_temperature)).
struct InterpolateArgs {
  int64_t rows = 0;
  RowsView base;
  RowsView memory;
  int64_t vocab = 0;  // real tokens, at most base.cols; output columns from vocab on are -inf
  float lmbda = 0.f;  // used when lmbda_rows is null
  const float* lmbda_rows = nullptr;
  int64_t lmbda_stride = 1;  // 0 broadcasts one value
  float inv_temperature = 1.f;
  RowsView out;               // cols = base.cols
  RowStats* stats = nullptr;  // [rows, 2] (base, memory), or null
};

// A token drawn from each row of that mixture, without writing it.
struct InterpolateSampleArgs {
  int64_t rows = 0;
  RowsView base;
  RowsView memory;
  int64_t vocab = 0;
  float lmbda = 0.f;
  const float* lmbda_rows = nullptr;
  int64_t lmbda_stride = 1;
  float inv_temperature = 1.f;     // the memory's
  float temperature = 1.f;         // of the draw; 0: the most probable token
  int64_t top_k = 0;               // at most vocab, which keeps all
  float top_p = 1.f;               // 1 keeps all
  float min_p = 0.f;               // 0 keeps all
  const int64_t* seeds = nullptr;  // [rows], or null when temperature is 0
  int64_t* tokens = nullptr;       // [rows]
  float* log_probs = nullptr;      // [rows]: of the token, in the mixture as it is
  // CUDA's scratch: [rows, 2] (base, memory), and [rows, sample_groups(vocab)].
  RowStats* stats = nullptr;
  float* groups = nullptr;
};

// Gradients of InterpolateArgs' result; a null pointer leaves one out.
struct InterpolateBackwardArgs {
  int64_t rows = 0;
  RowsView base;
  RowsView memory;
  int64_t vocab = 0;
  float lmbda = 0.f;
  const float* lmbda_rows = nullptr;
  int64_t lmbda_stride = 1;
  float inv_temperature = 1.f;
  const RowStats* stats = nullptr;
  RowsView grad_out;            // cols = base.cols, float32, float16 or bfloat16
  RowsView grad_base;           // data may be null; dtype and cols of base
  RowsView grad_memory;         // data may be null; dtype and cols of memory
  float* grad_lmbda = nullptr;  // [rows]
};

// Log-softmax at one label a row; 0 where the label is ignore_index.
struct TokenLogProbsArgs {
  int64_t rows = 0;
  RowsView logits;
  int64_t vocab = 0;
  const int64_t* labels = nullptr;  // [rows]
  int64_t ignore_index = -100;
  float* out = nullptr;       // [rows]
  RowStats* stats = nullptr;  // [rows] or null
};

struct TokenLogProbsBackwardArgs {
  int64_t rows = 0;
  RowsView logits;
  int64_t vocab = 0;
  const int64_t* labels = nullptr;
  int64_t ignore_index = -100;
  const RowStats* stats = nullptr;
  const float* grad_out = nullptr;  // [rows]
  RowsView grad_logits;
};

enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

// KL(target || softmax(logits)) and cross-entropy, a value a row and reduced.
struct SparseKLArgs {
  int64_t rows = 0;
  RowsView logits;
  int64_t vocab = 0;
  SparseRows targets;
  const int64_t* labels = nullptr;  // [rows] or null: then loss = kl
  float alpha = 0.5f;
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::kMean;
  const float* normalizer = nullptr;  // one value on the device, or null: the counted rows
  float* row_loss = nullptr;          // [rows]
  float* row_kl = nullptr;            // [rows]
  float* row_ce = nullptr;            // [rows]
  RowStats* stats = nullptr;          // [rows]
  float* loss = nullptr;              // one value each, untouched for kNone
  float* kl = nullptr;
  float* ce = nullptr;
  float* scale =
      nullptr;  // d loss / d row_loss, one value: 1 / divisor, 1 for kSum, 0 if none counts
  // Gets d loss / d logits, not for kNone; data may be null, or the logits' own.
  RowsView grad_logits;
};

struct SparseKLBackwardArgs {
  int64_t rows = 0;
  RowsView logits;
  int64_t vocab = 0;
  SparseRows targets;
  const int64_t* labels = nullptr;
  float alpha = 0.5f;
  int64_t ignore_index = -100;
  const RowStats* stats = nullptr;
  const float* scale = nullptr;      // one value, or null for 1
  const float* grad_loss = nullptr;  // [rows] with grad_stride 1, one value with 0; null for 1
  int64_t grad_stride = 0;
  RowsView grad_logits;  // may be the logits themselves
};

// Multiplies a gradient that was made for an upstream gradient of 1 by the real one, in place;
// reads and writes nothing when that is exactly 1.
struct SparseKLRescaleArgs {
  int64_t rows = 0;
  RowsView grad_logits;
  const float* grad_loss = nullptr;  // one value
};

// k neighbours of each row to one sparse distribution of each row.
struct KnnScatterArgs {
  int64_t rows = 0;
  int64_t k = 0;
  const void* distances = nullptr;  // [rows, k], row stride distance_stride
  DType distance_dtype = DType::kFloat32;
  int64_t distance_stride = 0;
  const void* tokens = nullptr;  // [rows, k] int32 or int64, row stride token_stride
  bool tokens_are_int64 = false;
  int64_t token_stride = 0;
  float temperature = 1.f;
  int64_t row_slots = 0;          // min(k, max_entries)
  int64_t* indptr = nullptr;      // [rows + 1]
  int32_t* token_ids = nullptr;   // [rows * row_slots]
  float* probs = nullptr;         // [rows * row_slots]
  float* dropped_mass = nullptr;  // [rows] or null
  // Scratch of [rows * row_slots] each and [rows] counts: entries before they are packed.
  int32_t* scratch_ids = nullptr;
  float* scratch_probs = nullptr;
  int64_t* scratch_counts = nullptr;
};

}  // namespace memdec
