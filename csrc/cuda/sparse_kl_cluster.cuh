// Loss and gradient of a row by a cluster that holds it: one read, one write.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/sparse_kl_row.cuh"

namespace memdec::cuda {

// Which of the columns that a block holds are stored already: a bit each, a byte a group.
struct HeldBitmap {
  uint32_t* words;  // [kHeldGroups * kClusterThreads / 4]
  uint32_t* edges;  // one bit a thread of the block with the single columns

  __device__ void clear() {
    for (int i = threadIdx.x; i < kHeldGroups * kClusterThreads / 4; i += kClusterThreads) {
      words[i] = 0;
    }
    if (threadIdx.x == 0) *edges = 0;
  }
  __device__ uint32_t group(int g) const {
    return reinterpret_cast<const uint8_t*>(words)[g * kClusterThreads + threadIdx.x];
  }
  __device__ bool edge() const { return *edges >> threadIdx.x & 1u; }
};

// Where a column lies in the cluster: the block that holds it and its bit there.
struct Place {
  int rank;
  bool is_edge;
  int bit;  // of HeldBitmap's words, or of its edges

  __device__ Place(int column, int n, int head, int blocks) {
    const int groups = (n - head) / kGroup;
    const int tail = head + groups * kGroup;
    is_edge = column < head || column >= tail;
    if (is_edge) {
      rank = blocks - 1;
      bit = column < head ? column : head + column - tail;
    } else {
      const int group = (column - head) / kGroup;
      rank = group / kClusterThreads % blocks;
      const int held =
          group / (kClusterThreads * blocks) * kClusterThreads + group % kClusterThreads;
      bit = held * kGroup + (column - head) % kGroup;
    }
  }

  // Sets the column's bit; true when it was not set before.
  __device__ bool claim(HeldBitmap& bitmap) const {
    uint32_t* word = is_edge ? bitmap.edges : &bitmap.words[bit / 32];
    const uint32_t mask = 1u << (bit % 32);
    return (atomicOr(word, mask) & mask) == 0;
  }
};

template <typename T>
__global__ void __launch_bounds__(kClusterThreads) sparse_kl_cluster_kernel(SparseKLArgs args) {
#if __CUDA_ARCH__ >= 900
  __shared__ uint32_t words[kHeldGroups * kClusterThreads / 4];
  __shared__ uint32_t edges;
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
  const int64_t row = blockIdx.x / blocks;
  const int thread = rank * kClusterThreads + static_cast<int>(threadIdx.x);
  const int width = static_cast<int>(args.logits.cols);
  const int vocab = static_cast<int>(args.vocab);
  const Entries entries = entries_of(args.targets, row);
  T* grad_logits = row_of<T>(args.grad_logits, row);
  if (!row_counts(args, row, entries)) {
    for (int i = thread; i < width; i += blocks * kClusterThreads) {
      grad_logits[i] = from_float<T>(0.f);
    }
    if (thread == 0) {
      args.row_loss[row] = args.row_kl[row] = args.row_ce[row] = 0.f;
      args.stats[row] = {0.f, 0.f};
    }
    return;
  }

  const T* logits = row_of<const T>(args.logits, row);
  const int head = elements_to_alignment(logits, vocab);
  const HeldColumns columns(vocab, head, rank, blocks);
  HeldRow<T> held;
  held.load(logits, columns, vocab);
  HeldBitmap stored{words, &edges};
  stored.clear();
  __syncthreads();  // the bitmap is clear before bits are set

  // Each block takes the targets in its own columns. Their KL is split so that it needs no softmax:
  // sum p (log p - x) here, sum p * (max + log_norm) after the exchange.
  const bool labelled = args.labels != nullptr;
  const int64_t label = labelled ? args.labels[row] : -1;
  enum { kTargetSum, kCross, kBadIndex };
  double values[3] = {0.0, 0.0, 0.0};
  if (thread == 0 && labelled && (label < 0 || label >= vocab)) values[kBadIndex] = 1.0;
  for (int64_t e = entries.begin + threadIdx.x; e < entries.end; e += kClusterThreads) {
    const int32_t id = args.targets.token_ids[e];
    if (id < 0 || id >= vocab) {
      values[kBadIndex] = 1.0;
      continue;
    }
    const Place place(id, vocab, head, blocks);
    if (place.rank != rank) continue;
    place.claim(stored);
    const float p = args.targets.probs[e];
    values[kTargetSum] += p;
    if (p != 0.f) values[kCross] += static_cast<double>(p) * (logf(p) - to_float(logits[id]));
  }
  const float scales[1] = {kLog2E};
  SoftmaxSum sums[1] = {held.softmax_sum(columns, kLog2E)};
  cluster_merge(sums, scales, values);
  const RowStats stats = sums[0].stats();

  if (values[kBadIndex] > 0.0) {
    for (int i = thread; i < width; i += blocks * kClusterThreads) {
      grad_logits[i] = from_float<T>(NAN);
    }
    if (thread == 0) write_row(args, row, logits, stats, NAN);
    cluster.sync();  // a block's shared memory stays until every block has read it
    return;
  }
  const double kl =
      values[kCross] + values[kTargetSum] * (static_cast<double>(stats.max) + stats.log_norm);
  if (thread == 0) write_row(args, row, logits, stats, kl);

  const LogitGradient gradient(stats, *args.scale, values[kTargetSum], labelled ? args.alpha : 1.0,
                               labelled);
  for (int64_t e = entries.begin + threadIdx.x; e < entries.end; e += kClusterThreads) {
    const int32_t id = args.targets.token_ids[e];
    if (Place(id, vocab, head, blocks).rank != rank) continue;
    const double hit = gradient.hit(args.targets.probs[e], id == label);
    grad_logits[id] = from_float<T>(gradient.precise(to_float(logits[id]), hit));
  }
  if (threadIdx.x == 0 && labelled) {
    const Place place(static_cast<int>(label), vocab, head, blocks);
    if (place.rank == rank && place.claim(stored)) {
      const double hit = gradient.hit(0.f, true);
      grad_logits[label] = from_float<T>(gradient.precise(to_float(logits[label]), hit));
    }
  }
  __syncthreads();  // the label's bit is set before the sweep reads the bitmap

#pragma unroll
  for (int g = 0; g < kHeldGroups; ++g) {
    if (g >= columns.count) break;
    Group values_of_group;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values_of_group.x[i] = gradient.dense(held.groups[g][i]);
    T* target = grad_logits + columns.start(g);
    const uint32_t skip = stored.group(g);
    if (skip == 0 && is_aligned(target)) {
      values_of_group.store(target);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (!(skip >> i & 1u)) target[i] = from_float<T>(values_of_group.x[i]);
      }
    }
  }
  if (columns.edge >= 0 && !stored.edge()) {
    grad_logits[columns.edge] = from_float<T>(gradient.dense(held.edge));
  }
  for (int i = vocab + thread; i < width; i += blocks * kClusterThreads) {
    grad_logits[i] = from_float<T>(0.f);
  }
  cluster.sync();  // a block's shared memory stays until every block has read it
#endif
}

}  // namespace memdec::cuda
