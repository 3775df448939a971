// The extension memdec._C: pointers, sizes, strides and a stream in, nothing of torch.
//
// Every kernel is called as f(device, queue, ...): device is -1 for the CPU, else the CUDA device's
// index; queue is the number of threads on the CPU, else the cudaStream_t. Rows of a tensor are the
// tuple (data, dtype, cols, inner_rows, outer_stride, inner_stride), see RowsView; a pointer is an
// int, 0 for none. A kernel that cannot run raises RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/kernels.h"
#include "cpu/huge_pages.h"
#include "search/keep_nearest.h"

namespace py = pybind11;

namespace memdec {
namespace {

using Address = std::uintptr_t;
using Rows = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;

RowsView view(const Rows& rows) {
  const auto& [data, dtype, cols, inner_rows, outer_stride, inner_stride] = rows;
  return {reinterpret_cast<void*>(data),
          static_cast<DType>(dtype),
          cols,
          inner_rows,
          outer_stride,
          inner_stride};
}

RowsView view(const std::optional<Rows>& rows) { return rows ? view(*rows) : RowsView{}; }

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef MEMDEC_WITH_CUDA
constexpr bool kWithCuda = true;
#define MEMDEC_RUN_CUDA(name) status = cuda::name(args, device, pointer<void>(queue))
#else
constexpr bool kWithCuda = false;
#define MEMDEC_RUN_CUDA(name) status = {"memdec was built without CUDA"}
#endif

// Runs kernel `name` on the backend that `device` says, without the GIL, and raises its error.
#define MEMDEC_RUN(name)                                                                          \
  do {                                                                                            \
    Status status;                                                                                \
    {                                                                                             \
      py::gil_scoped_release release;                                                             \
      if (device < 0) {                                                                           \
        status = cpu::name(args, static_cast<int>(queue));                                        \
      } else {                                                                                    \
        MEMDEC_RUN_CUDA(name);                                                                    \
      }                                                                                           \
    }                                                                                             \
    if (!status.ok()) throw std::runtime_error(std::string("memdec " #name ": ") + status.error); \
  } while (false)

// Arguments of a kernel on the mixture of two models, with what they all begin with.
template <typename Args>
Args mixture_args(int64_t rows, const Rows& base, const Rows& memory, int64_t vocab, float lmbda,
                  Address lmbda_rows, int64_t lmbda_stride, float inv_temperature) {
  Args args;
  args.rows = rows;
  args.base = view(base);
  args.memory = view(memory);
  args.vocab = vocab;
  args.lmbda = lmbda;
  args.lmbda_rows = pointer<const float>(lmbda_rows);
  args.lmbda_stride = lmbda_stride;
  args.inv_temperature = inv_temperature;
  return args;
}

void interpolate(int device, Address queue, int64_t rows, const Rows& base, const Rows& memory,
                 int64_t vocab, float lmbda, Address lmbda_rows, int64_t lmbda_stride,
                 float inv_temperature, const Rows& out, Address stats) {
  auto args = mixture_args<InterpolateArgs>(rows, base, memory, vocab, lmbda, lmbda_rows,
                                            lmbda_stride, inv_temperature);
  args.out = view(out);
  args.stats = pointer<RowStats>(stats);
  MEMDEC_RUN(interpolate);
}

void interpolate_backward(int device, Address queue, int64_t rows, const Rows& base,
                          const Rows& memory, int64_t vocab, float lmbda, Address lmbda_rows,
                          int64_t lmbda_stride, float inv_temperature, Address stats,
                          const Rows& grad_out, const std::optional<Rows>& grad_base,
                          const std::optional<Rows>& grad_memory, Address grad_lmbda) {
  auto args = mixture_args<InterpolateBackwardArgs>(rows, base, memory, vocab, lmbda, lmbda_rows,
                                                    lmbda_stride, inv_temperature);
  args.stats = pointer<const RowStats>(stats);
  args.grad_out = view(grad_out);
  args.grad_base = view(grad_base);
  args.grad_memory = view(grad_memory);
  args.grad_lmbda = pointer<float>(grad_lmbda);
  MEMDEC_RUN(interpolate_backward);
}

void interpolate_sample(int device, Address queue, int64_t rows, const Rows& base,
                        const Rows& memory, int64_t vocab, float lmbda, Address lmbda_rows,
                        int64_t lmbda_stride, float inv_temperature, float temperature,
                        int64_t top_k, float top_p, float min_p, Address seeds, Address tokens,
                        Address log_probs, Address stats, Address groups) {
  auto args = mixture_args<InterpolateSampleArgs>(rows, base, memory, vocab, lmbda, lmbda_rows,
                                                  lmbda_stride, inv_temperature);
  args.temperature = temperature;
  args.top_k = top_k;
  args.top_p = top_p;
  args.min_p = min_p;
  args.seeds = pointer<const int64_t>(seeds);
  args.tokens = pointer<int64_t>(tokens);
  args.log_probs = pointer<float>(log_probs);
  args.stats = pointer<RowStats>(stats);
  args.groups = pointer<float>(groups);
  MEMDEC_RUN(interpolate_sample);
}

void token_log_probs(int device, Address queue, int64_t rows, const Rows& logits, int64_t vocab,
                     Address labels, int64_t ignore_index, Address out, Address stats) {
  TokenLogProbsArgs args;
  args.rows = rows;
  args.logits = view(logits);
  args.vocab = vocab;
  args.labels = pointer<const int64_t>(labels);
  args.ignore_index = ignore_index;
  args.out = pointer<float>(out);
  args.stats = pointer<RowStats>(stats);
  MEMDEC_RUN(token_log_probs);
}

void token_log_probs_backward(int device, Address queue, int64_t rows, const Rows& logits,
                              int64_t vocab, Address labels, int64_t ignore_index, Address stats,
                              Address grad_out, const Rows& grad_logits) {
  TokenLogProbsBackwardArgs args;
  args.rows = rows;
  args.logits = view(logits);
  args.vocab = vocab;
  args.labels = pointer<const int64_t>(labels);
  args.ignore_index = ignore_index;
  args.stats = pointer<const RowStats>(stats);
  args.grad_out = pointer<const float>(grad_out);
  args.grad_logits = view(grad_logits);
  MEMDEC_RUN(token_log_probs_backward);
}

void sparse_kl_rescale(int device, Address queue, int64_t rows, const Rows& grad_logits,
                       Address grad_loss) {
  SparseKLRescaleArgs args;
  args.rows = rows;
  args.grad_logits = view(grad_logits);
  args.grad_loss = pointer<const float>(grad_loss);
  MEMDEC_RUN(sparse_kl_rescale);
}

SparseRows sparse_rows(Address indptr, Address token_ids, Address probs, int64_t slots) {
  return {pointer<const int64_t>(indptr), pointer<const int32_t>(token_ids),
          pointer<const float>(probs), slots};
}

void sparse_kl(int device, Address queue, int64_t rows, const Rows& logits, int64_t vocab,
               Address indptr, Address token_ids, Address probs, int64_t slots, Address labels,
               float alpha, int64_t ignore_index, int reduction, Address normalizer,
               Address row_loss, Address row_kl, Address row_ce, Address stats, Address loss,
               Address kl, Address ce, Address scale, const std::optional<Rows>& grad_logits) {
  SparseKLArgs args;
  args.rows = rows;
  args.logits = view(logits);
  args.vocab = vocab;
  args.targets = sparse_rows(indptr, token_ids, probs, slots);
  args.labels = pointer<const int64_t>(labels);
  args.alpha = alpha;
  args.ignore_index = ignore_index;
  args.reduction = static_cast<Reduction>(reduction);
  args.normalizer = pointer<const float>(normalizer);
  args.row_loss = pointer<float>(row_loss);
  args.row_kl = pointer<float>(row_kl);
  args.row_ce = pointer<float>(row_ce);
  args.stats = pointer<RowStats>(stats);
  args.loss = pointer<float>(loss);
  args.kl = pointer<float>(kl);
  args.ce = pointer<float>(ce);
  args.scale = pointer<float>(scale);
  args.grad_logits = view(grad_logits);
  MEMDEC_RUN(sparse_kl);
}

void sparse_kl_backward(int device, Address queue, int64_t rows, const Rows& logits, int64_t vocab,
                        Address indptr, Address token_ids, Address probs, int64_t slots,
                        Address labels, float alpha, int64_t ignore_index, Address stats,
                        Address scale, Address grad_loss, int64_t grad_stride,
                        const Rows& grad_logits) {
  SparseKLBackwardArgs args;
  args.rows = rows;
  args.logits = view(logits);
  args.vocab = vocab;
  args.targets = sparse_rows(indptr, token_ids, probs, slots);
  args.labels = pointer<const int64_t>(labels);
  args.alpha = alpha;
  args.ignore_index = ignore_index;
  args.stats = pointer<const RowStats>(stats);
  args.scale = pointer<const float>(scale);
  args.grad_loss = pointer<const float>(grad_loss);
  args.grad_stride = grad_stride;
  args.grad_logits = view(grad_logits);
  MEMDEC_RUN(sparse_kl_backward);
}

void knn_scatter(int device, Address queue, int64_t rows, int64_t k, Address distances,
                 int distance_dtype, int64_t distance_stride, Address tokens, bool tokens_are_int64,
                 int64_t token_stride, float temperature, int64_t row_slots, Address indptr,
                 Address token_ids, Address probs, Address dropped_mass, Address scratch_ids,
                 Address scratch_probs, Address scratch_counts) {
  KnnScatterArgs args;
  args.rows = rows;
  args.k = k;
  args.distances = pointer<const void>(distances);
  args.distance_dtype = static_cast<DType>(distance_dtype);
  args.distance_stride = distance_stride;
  args.tokens = pointer<const void>(tokens);
  args.tokens_are_int64 = tokens_are_int64;
  args.token_stride = token_stride;
  args.temperature = temperature;
  args.row_slots = row_slots;
  args.indptr = pointer<int64_t>(indptr);
  args.token_ids = pointer<int32_t>(token_ids);
  args.probs = pointer<float>(probs);
  args.dropped_mass = pointer<float>(dropped_mass);
  args.scratch_ids = pointer<int32_t>(scratch_ids);
  args.scratch_probs = pointer<float>(scratch_probs);
  args.scratch_counts = pointer<int64_t>(scratch_counts);
  MEMDEC_RUN(knn_scatter);
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::simd_level_count(); ++i) names.emplace_back(cpu::simd_level_name(i));
  return names;
}

void set_simd_level(const std::string& name) {
  if (cpu::set_simd_level(name.c_str())) return;
  std::string known;
  for (const auto& level : simd_levels()) known += (known.empty() ? "" : ", ") + level;
  throw py::value_error("SIMD level must be one of " + known + ", got " + name);
}

void keep_nearest([[maybe_unused]] int device, [[maybe_unused]] Address queue, int64_t rows,
                  int64_t columns, Address distances, float unit, int64_t first_id, int64_t k,
                  Address nearest) {
  KeepNearestArgs args;
  args.rows = rows;
  args.columns = columns;
  args.distances = pointer<const float>(distances);
  args.unit = unit;
  args.first_id = first_id;
  args.k = k;
  args.nearest = pointer<uint64_t>(nearest);
  Status status;
  MEMDEC_RUN_CUDA(keep_nearest);
  if (!status.ok()) throw std::runtime_error(std::string("memdec keep_nearest: ") + status.error);
}

int64_t sample_groups([[maybe_unused]] int64_t vocab) {
#ifdef MEMDEC_WITH_CUDA
  return cuda::sample_groups(vocab);
#else
  return 0;
#endif
}

std::optional<std::string> cuda_unavailable_reason() {
#ifdef MEMDEC_WITH_CUDA
  const char* reason = cuda::unavailable_reason();
  return reason ? std::optional<std::string>(reason) : std::nullopt;
#else
  return "memdec was built without CUDA";
#endif
}

}  // namespace
}  // namespace memdec

PYBIND11_MODULE(_C, m) {
  using namespace memdec;
  m.doc() = "Native kernels of memdec. Private: call memdec.ops.";
  m.attr("cuda_archs") = MEMDEC_CUDA_ARCHS;  // "" when built without CUDA
  m.attr("with_cuda") = kWithCuda;
  m.attr("compiler") = MEMDEC_COMPILER;
  m.def("simd_levels", &simd_levels, "SIMD levels that are built in and run here, lowest first.");
  m.def("simd_level", &cpu::simd_level, "The SIMD level in use.");
  m.def("set_simd_level", &set_simd_level, "Chooses the SIMD level for this process.");
  m.def(
      "advise_huge_pages",
      [](Address data, int64_t bytes) { cpu::advise_huge_pages(pointer<void>(data), bytes); },
      "Asks for huge pages in memory that is about to be filled.");
  m.def("cuda_unavailable_reason", &cuda_unavailable_reason,
        "None when CUDA kernels can run here, else why not.");
  m.attr("max_nearest") = kMaxNearest;
  m.def("keep_nearest", &keep_nearest,
        "Merges distances on CUDA into the nearest so far, see search/keep_nearest.h.");
  m.def("sample_groups", &sample_groups,
        "Floats of scratch a row that interpolate_sample needs on CUDA.");
#define MEMDEC_DEF(name, Args) m.def(#name, &name);
  MEMDEC_FOR_EACH_KERNEL(MEMDEC_DEF)
#undef MEMDEC_DEF
}
