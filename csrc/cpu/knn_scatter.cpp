// k neighbours of each row to one sparse distribution: softmax of -distance / temperature, equal
// tokens summed in a hash table, entries by falling probability.
#include "common/kernels.h"
#include "cpu/rows.h"

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {
namespace {

constexpr int32_t kLargestId = 0x7fffffff;

// Sorts ascending: the high half is the inverted bits of a positive probability, the low half the
// token id. So order is by falling probability, ties by id.
using Key = uint64_t;

inline Key make_key(float prob, int32_t id) {
  return static_cast<Key>(~bits<uint32_t>(prob)) << 32 | static_cast<uint32_t>(id);
}
inline float key_prob(Key key) { return bits<float>(~static_cast<uint32_t>(key >> 32)); }
inline int32_t key_id(Key key) { return static_cast<int32_t>(key & 0xffffffff); }

void insertion_sort(Key* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const Key key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// Stable sort by the four bytes from `first_byte` on.
void radix_sort(Key* keys, Key* scratch, int64_t n, int first_byte) {
  int32_t counts[4][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t half = static_cast<uint32_t>(keys[i] >> (8 * first_byte));
    for (int byte = 0; byte < 4; ++byte) ++counts[byte][half >> (8 * byte) & 0xff];
  }
  Key* from = keys;
  Key* to = scratch;
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = 8 * (first_byte + byte);
    int32_t* count = counts[byte];
    if (count[from[0] >> shift & 0xff] == n) continue;  // the same everywhere
    int32_t start = 0;
    for (int digit = 0; digit < 256; ++digit) {
      const int32_t size = count[digit];
      count[digit] = start;
      start += size;
    }
    for (int64_t i = 0; i < n; ++i) to[count[from[i] >> shift & 0xff]++] = from[i];
    Key* const sorted = to;
    to = from;
    from = sorted;
  }
  if (from != keys) __builtin_memcpy(keys, from, n * sizeof(Key));
}

constexpr int64_t kInsertionSize = 24;

// Keys in order of probability: puts equal probabilities in order of their ids.
void sort_ties(Key* keys, Key* scratch, int64_t n) {
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = begin + 1;
    while (end < n && keys[end] >> 32 == keys[begin] >> 32) ++end;
    if (end - begin <= kInsertionSize) {
      insertion_sort(keys + begin, end - begin);
    } else {
      radix_sort(keys + begin, scratch, end - begin, 0);
    }
  }
}

void sort_keys(Key* keys, Key* scratch, int64_t n) {
  if (n <= kInsertionSize) return insertion_sort(keys, n);
  radix_sort(keys, scratch, n, 4);
  sort_ties(keys, scratch, n);
}

struct Entry {
  double mass;
  int32_t id;
};

// What one thread needs for a row.
struct Workspace {
  float* weights;  // [k] distances, then weights: exp(-(distance - nearest) / temperature) * kOne
  int32_t* ids;    // [k]
  Entry* entries;  // [k]
  Key* keys;       // [2 * k]
  int32_t* table;  // [1 << table_bits], 1 + an entry's number, 0 for none
  int table_bits;
};

struct Scatter {
  const KnnScatterArgs& args;

  // Distances to float32 and tokens to int32. A neighbour that is none gets token -1.
  void read_neighbours(int64_t row, const Workspace& work) const {
    if (args.k == 0) return;
    const char* distances = static_cast<const char*>(args.distances) +
                            row * args.distance_stride * element_size(args.distance_dtype);
    widen(distances, args.distance_dtype, args.k, work.weights);
    if (args.tokens_are_int64) {
      const int64_t* tokens = static_cast<const int64_t*>(args.tokens) + row * args.token_stride;
      for (int64_t i = 0; i < args.k; ++i) {
        // Too large for an id of the targets: the largest one, which no vocabulary has, so that
        // what reads the targets gives NaN.
        const int64_t token = smaller<int64_t>(tokens[i], kLargestId);
        work.ids[i] = token < 0 ? -1 : static_cast<int32_t>(token);
      }
    } else {
      const int32_t* tokens = static_cast<const int32_t*>(args.tokens) + row * args.token_stride;
      __builtin_memcpy(work.ids, tokens, args.k * sizeof(int32_t));
    }
    for (int64_t i = 0; i < args.k; ++i) {
      if (!(work.weights[i] < kInfinity)) work.ids[i] = -1;
    }
  }

  // The nearest neighbour's weight. Float32 has subnormal probabilities down to e^-104, the sum of
  // many equal tokens may be one of smaller terms, and vec_exp gives 0 below e^-87: with this
  // factor weights down to e^-130 are ordinary numbers.
  static constexpr float kOne = 0x1p80f;

  // Distances to weights; 0 for what is no neighbour.
  void weigh(const Workspace& work) const {
    float nearest = kInfinity;
    for (int64_t i = 0; i < args.k; ++i) {
      const float distance = work.ids[i] >= 0 ? work.weights[i] : kInfinity;
      nearest = smaller(nearest, distance);
      work.weights[i] = distance;
    }
    for_each_vector(args.k, [&](int64_t i, int lanes) MEMDEC_VECTOR_BODY {
      const Vec distance = load(work.weights + i, lanes, kInfinity);
      const Vec exponent = (nearest - distance) / args.temperature;
      Vec weight = vec_exp(exponent) * kOne;
      const IntVec below = (exponent < -87.f) & (exponent > -130.f);
      if (any(below)) {
        for (int lane = 0; lane < lanes; ++lane) {
          const double x = exponent[lane];
          if (below[lane]) weight[lane] = static_cast<float>(::exp(x) * static_cast<double>(kOne));
        }
      }
      // Also where the nearest are at -inf, or all are at +inf (no neighbour).
      weight = distance == nearest ? splat(kOne) : weight;
      store(work.weights + i, where(distance < kInfinity, weight), lanes);
    });
  }

  // Sums the weights of equal tokens in order of input; returns the number of entries.
  int64_t merge(const Workspace& work, double& total) const {
    __builtin_memset(work.table, 0, sizeof(int32_t) << work.table_bits);
    const uint32_t mask = (1u << work.table_bits) - 1;
    int64_t count = 0;
    total = 0;
    for (int64_t i = 0; i < args.k; ++i) {
      const double weight = work.weights[i];
      if (weight == 0) continue;
      const int32_t id = work.ids[i];
      total += weight;
      uint32_t slot = static_cast<uint32_t>(id) * 2654435769u >> (32 - work.table_bits);
      while (work.table[slot] != 0 && work.entries[work.table[slot] - 1].id != id) {
        slot = (slot + 1) & mask;
      }
      if (work.table[slot] == 0) {
        work.entries[count] = {0., id};
        work.table[slot] = static_cast<int32_t>(++count);
      }
      work.entries[work.table[slot] - 1].mass += weight;
    }
    return count;
  }

  void run_row(int64_t row, const Workspace& work) const {
    read_neighbours(row, work);
    weigh(work);
    double total;
    const int64_t entries = merge(work, total);
    const double inverse_total = 1. / total;
    int64_t count = 0;
    for (int64_t i = 0; i < entries; ++i) {
      const float prob = static_cast<float>(work.entries[i].mass * inverse_total);
      if (prob > 0.f) work.keys[count++] = make_key(prob, work.entries[i].id);
    }
    Key* const scratch = work.keys + args.k;
    sort_keys(work.keys, scratch, count);

    double dropped = 0;
    if (count > args.row_slots) {
      double kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        (i < args.row_slots ? kept : dropped) += static_cast<double>(key_prob(work.keys[i]));
      }
      count = args.row_slots;
      for (int64_t i = 0; i < count; ++i) {
        const double prob = static_cast<double>(key_prob(work.keys[i])) / kept;
        work.keys[i] = make_key(static_cast<float>(prob), key_id(work.keys[i]));
      }
      sort_ties(work.keys, scratch, count);  // rounding may have made new ones
    }
    for (int64_t i = 0; i < count; ++i) {
      args.scratch_ids[row * args.row_slots + i] = key_id(work.keys[i]);
      args.scratch_probs[row * args.row_slots + i] = key_prob(work.keys[i]);
    }
    args.scratch_counts[row] = count;
    if (args.dropped_mass != nullptr) args.dropped_mass[row] = static_cast<float>(dropped);
  }

  // Rows one after another from slot 0 on, then empty slots.
  void pack(int threads) const {
    args.indptr[0] = 0;
    for (int64_t row = 0; row < args.rows; ++row) {
      args.indptr[row + 1] = args.indptr[row] + args.scratch_counts[row];
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t count = args.scratch_counts[row];
      if (count == 0) continue;
      const int64_t to = args.indptr[row];
      const int64_t from = row * args.row_slots;
      __builtin_memcpy(args.token_ids + to, args.scratch_ids + from, count * sizeof(int32_t));
      __builtin_memcpy(args.probs + to, args.scratch_probs + from, count * sizeof(float));
    }
    for (int64_t slot = args.indptr[args.rows]; slot < args.rows * args.row_slots; ++slot) {
      args.token_ids[slot] = -1;
      args.probs[slot] = 0.f;
    }
  }
};

}  // namespace

Status knn_scatter(const KnnScatterArgs& args, int threads) {
  if (args.rows * args.k < kSerialElements) threads = 1;
  int table_bits = 1;
  while ((int64_t{1} << table_bits) < 2 * args.k) ++table_bits;
  const Scratch<float> weights(threads * args.k);
  const Scratch<int32_t> ids(threads * args.k);
  const Scratch<Entry> entries(threads * args.k);
  const Scratch<Key> keys(threads * 2 * args.k);
  const Scratch<int32_t> table(static_cast<int64_t>(threads) << table_bits);
  if (weights.data() == nullptr || ids.data() == nullptr || entries.data() == nullptr ||
      keys.data() == nullptr || table.data() == nullptr) {
    return {"no memory for a row of neighbours on each thread"};
  }

  const Scatter scatter{args};
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t first = thread_number() * args.k;
    const Workspace work = {weights.data() + first,
                            ids.data() + first,
                            entries.data() + first,
                            keys.data() + 2 * first,
                            table.data() + (static_cast<int64_t>(thread_number()) << table_bits),
                            table_bits};
    scatter.run_row(row, work);
  }
  scatter.pack(threads);
  return {};
}

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
