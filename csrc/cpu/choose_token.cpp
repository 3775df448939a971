#include "cpu/choose_token.h"

#include <algorithm>
#include <cmath>

namespace memdec::cpu {
namespace {

// Which of n weights, laid side by side, `target` falls into; the last one above 0 at the end.
template <class Weight>
int64_t pick(int64_t n, double target, Weight&& weight) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = weight(i);
    if (w <= 0) continue;
    found = i;
    if (target < w) break;
    target -= w;
  }
  return found;
}

// No more than the k-th greatest of n values: as many blocks of them reach it.
float floor_of_top(const float* x, int64_t n, int64_t k, float* maxima) {
  constexpr int64_t kBlock = 32;
  int64_t blocks = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    maxima[blocks++] = *std::max_element(x + begin, x + std::min(n, begin + kBlock));
  }
  if (blocks < k) return -HUGE_VALF;
  std::nth_element(maxima, maxima + k - 1, maxima + blocks, [](float a, float b) { return a > b; });
  return maxima[k - 1];
}

}  // namespace

int64_t choose_token(const float* log_probs, const float* weights, int64_t n,
                     const InterpolateSampleArgs& args, uint64_t bits, int32_t* ids) {
  const double u = static_cast<double>(bits >> 11) * 0x1p-53;
  double total = 0;
  if (args.top_k >= n && args.top_p >= 1.f && args.min_p <= 0.f) {
    for (int64_t i = 0; i < n; ++i) total += weights[i];
    return pick(n, u * total, [&](int64_t i) { return weights[i]; });
  }

  const auto before = [log_probs](int32_t a, int32_t b) {
    return log_probs[a] != log_probs[b] ? log_probs[a] > log_probs[b] : a < b;
  };
  // The room for ids serves for the maxima of blocks first.
  const float floor = floor_of_top(log_probs, n, args.top_k, reinterpret_cast<float*>(ids));
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (log_probs[i] >= floor && log_probs[i] > -HUGE_VALF) ids[kept++] = static_cast<int32_t>(i);
  }
  if (args.top_k < kept) {
    std::nth_element(ids, ids + args.top_k - 1, ids + kept, before);
    kept = args.top_k;
  }
  for (int64_t i = 0; i < kept; ++i) total += weights[ids[i]];
  const double nucleus = args.top_p < 1.f ? args.top_p * total : total;
  // Falling, as far as the nucleus reaches: sorted piece by piece, each longer than the last.
  double mass = 0;
  int64_t sorted = 0, end = 0;
  for (int64_t piece = 256; sorted < kept && mass < nucleus; piece *= 4) {
    const int64_t next = std::min(kept, sorted + piece);
    if (next < kept) std::nth_element(ids + sorted, ids + next - 1, ids + kept, before);
    std::sort(ids + sorted, ids + next, before);
    sorted = next;
    for (; end < sorted && mass < nucleus; ++end) mass += weights[ids[end]];
  }
  while (end > 1 && weights[ids[end - 1]] < args.min_p) mass -= weights[ids[--end]];
  return ids[pick(end, u * mass, [&](int64_t i) { return weights[ids[i]]; })];
}

}  // namespace memdec::cpu
