// Runs each kernel at the SIMD level in use.
#include <atomic>
#include <cstring>

#include "common/kernels.h"

namespace memdec::cpu {
namespace {

struct Level {
  const char* name;
  bool (*runs_here)();
#define MEMDEC_MEMBER(name, Args) Status (*name)(const Args&, int);
  MEMDEC_FOR_EACH_KERNEL(MEMDEC_MEMBER)
#undef MEMDEC_MEMBER
};

}  // namespace

// What the files compiled for a level define.
#define MEMDEC_DECLARE(name, Args) Status name(const Args&, int);
namespace baseline {
MEMDEC_FOR_EACH_KERNEL(MEMDEC_DECLARE)
}
namespace avx2 {
MEMDEC_FOR_EACH_KERNEL(MEMDEC_DECLARE)
}
namespace avx512 {
MEMDEC_FOR_EACH_KERNEL(MEMDEC_DECLARE)
}
#undef MEMDEC_DECLARE

namespace {

const Level kBuiltLevels[] = {
#define MEMDEC_ENTRY(name, Args) baseline::name,
    {"baseline", [] { return true; }, MEMDEC_FOR_EACH_KERNEL(MEMDEC_ENTRY)},
#undef MEMDEC_ENTRY
#ifdef MEMDEC_SIMD_AVX2
#define MEMDEC_ENTRY(name, Args) avx2::name,
    // Every processor with AVX2 has F16C, which older compilers cannot ask for.
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; },
     MEMDEC_FOR_EACH_KERNEL(MEMDEC_ENTRY)},
#undef MEMDEC_ENTRY
#endif
#ifdef MEMDEC_SIMD_AVX512
#define MEMDEC_ENTRY(name, Args) avx512::name,
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
              __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
     },
     MEMDEC_FOR_EACH_KERNEL(MEMDEC_ENTRY)},
#undef MEMDEC_ENTRY
#endif
};
constexpr int kBuiltCount = sizeof(kBuiltLevels) / sizeof(kBuiltLevels[0]);

// The levels that run here. A processor that lacks one lacks those above it.
int runnable_count() {
  static const int count = [] {
    int runnable = 1;
    while (runnable < kBuiltCount && kBuiltLevels[runnable].runs_here()) ++runnable;
    return runnable;
  }();
  return count;
}

std::atomic<const Level*>& level_in_use() {
  static std::atomic<const Level*> level{&kBuiltLevels[runnable_count() - 1]};
  return level;
}

}  // namespace

int simd_level_count() { return runnable_count(); }

const char* simd_level_name(int index) { return kBuiltLevels[index].name; }

const char* simd_level() { return level_in_use().load()->name; }

bool set_simd_level(const char* name) {
  for (int i = 0; i < runnable_count(); ++i) {
    if (std::strcmp(kBuiltLevels[i].name, name) == 0) {
      level_in_use().store(&kBuiltLevels[i]);
      return true;
    }
  }
  return false;
}

#define MEMDEC_DEFINE(name, Args) \
  Status name(const Args& args, int threads) { return level_in_use().load()->name(args, threads); }
MEMDEC_FOR_EACH_KERNEL(MEMDEC_DEFINE)
#undef MEMDEC_DEFINE

}  // namespace memdec::cpu
