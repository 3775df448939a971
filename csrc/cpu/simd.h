// Vectors of float32, one width for each SIMD level.
//
// Files that include this are compiled once for each level. Everything they define lives in the
// level's own namespace and they use no template or inline function of the standard library:
// otherwise the linker could keep one level's copy of a shared function for all of them, and a
// machine without AVX-512 would run into it.
#pragma once

#include <cmath>
#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef MEMDEC_SIMD_LEVEL
#error "compile with -DMEMDEC_SIMD_LEVEL=baseline, avx2 or avx512"
#endif

namespace memdec::cpu::MEMDEC_SIMD_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

#define MEMDEC_INLINE inline __attribute__((always_inline))

constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLargest = 3.40282347e38f;

MEMDEC_INLINE bool is_nan(double x) { return x != x; }
template <class T>
MEMDEC_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
MEMDEC_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

template <class To, class From>
MEMDEC_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(result));
  return result;
}

MEMDEC_INLINE Vec splat(float value) { return value - Vec{}; }

// The first `lanes` floats at x; the other lanes hold `fill`. A constant kLanes costs one load.
MEMDEC_INLINE Vec load(const float* x, int lanes, float fill = 0.f) {
  Vec result = splat(fill);
  if (lanes == kLanes) {
    __builtin_memcpy(&result, x, sizeof(result));
  } else {
    for (int i = 0; i < lanes; ++i) result[i] = x[i];
  }
  return result;
}

MEMDEC_INLINE void store(float* x, Vec value, int lanes) {
  if (lanes == kLanes) {
    __builtin_memcpy(x, &value, sizeof(value));
  } else {
    for (int i = 0; i < lanes; ++i) x[i] = value[i];
  }
}

// Calls f(first, lanes) for every vector of [0, n); only the last may have fewer than kLanes.
template <class F>
MEMDEC_INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

// What a lambda given to for_each_vector needs for `lanes` to become a constant in its main loop.
#define MEMDEC_VECTOR_BODY __attribute__((always_inline))

// In these two a NaN in b wins and a NaN in a is lost, as in the x86 instructions; compilers make a
// comparison and a blend of the ternary operator.
#if defined(__AVX512F__)
// The forms without a mask make GCC warn about a variable of its own header.
MEMDEC_INLINE Vec vec_max(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
MEMDEC_INLINE Vec vec_min(Vec a, Vec b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#elif defined(__AVX2__)
MEMDEC_INLINE Vec vec_max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
MEMDEC_INLINE Vec vec_min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#elif defined(__SSE2__)
MEMDEC_INLINE Vec vec_max(Vec a, Vec b) { return _mm_max_ps(a, b); }
MEMDEC_INLINE Vec vec_min(Vec a, Vec b) { return _mm_min_ps(a, b); }
#else
MEMDEC_INLINE Vec vec_max(Vec a, Vec b) { return a > b ? a : b; }
MEMDEC_INLINE Vec vec_min(Vec a, Vec b) { return a < b ? a : b; }
#endif

// x where the lane's mask is all ones, else 0.
MEMDEC_INLINE Vec where(IntVec mask, Vec x) { return bits<Vec>(mask & bits<IntVec>(x)); }

MEMDEC_INLINE bool any(IntVec mask) {
  int32_t joined = 0;
  for (int i = 0; i < kLanes; ++i) joined |= mask[i];
  return joined != 0;
}

MEMDEC_INLINE float horizontal_max(Vec x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

MEMDEC_INLINE double horizontal_sum(Vec x) {
  double result = 0;
  for (int i = 0; i < kLanes; ++i) result += static_cast<double>(x[i]);
  return result;
}

// e^x for x <= 88 to 2 units in the last place; 0 below -88, subnormal or 0 from there to -87.33.
MEMDEC_INLINE Vec vec_exp(Vec x) {
  // From here on n is -127 and the power of two's bits are those of 0. NaN stays NaN.
  x = vec_max(splat(-88.0296919f), x);
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold; the
  // exponent's bias is added with it.
  const Vec shifted = x * 1.44269504f + (12582912.f + 127.f);
  const Vec n = shifted - (12582912.f + 127.f);
#if defined(__FMA__)
  const Vec r = x - n * 0.693147182f;  // off by 2e-9 n, far less than the rounding of x
#else
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
  // Minimax on |r| <= ln(2) / 2, relative error 9.2e-8.
  Vec mantissa = r * 0.008290272f + 0.04189816f;
  mantissa = mantissa * r + 0.16667638f;
  mantissa = mantissa * r + 0.49999148f;
  mantissa = mantissa * r + 0.9999997f;
  mantissa = mantissa * r + 1.f;
  // A product, not an addition to the exponent's bits, so that NaN stays NaN.
  return mantissa * bits<Vec>(bits<IntVec>(shifted) << 23);
}

// log x of a positive, normal, finite x; absolute error 1e-7 plus a rounding of the result.
MEMDEC_INLINE Vec vec_log(Vec x) {
  // x = 2^n (1 + f), 2/3 <= 1 + f < 4/3.
  const IntVec from_two_thirds = bits<IntVec>(x) - 0x3f2aaaab;
  const IntVec n = from_two_thirds >> 23;
  const Vec f = bits<Vec>((from_two_thirds & 0x7fffff) + 0x3f2aaaab) - 1.f;
  // Minimax, absolute error 3.1e-8.
  Vec quotient = f * -0.16079763f + 0.17469173f;
  quotient = quotient * f - 0.16266756f;
  quotient = quotient * f + 0.19726129f;
  quotient = quotient * f - 0.250176f;
  quotient = quotient * f + 0.33341746f;
  quotient = quotient * f - 0.4999975f;
  quotient = quotient * f + 0.99999934f;
  return quotient * f + __builtin_convertvector(n, Vec) * 0.693147182f;
}

// --- float16 and bfloat16 -------------------------------------------------------------------

MEMDEC_INLINE Vec from_bfloat16(HalfVec x) {
  return bits<Vec>(__builtin_convertvector(x, UintVec) << 16);
}

// Rounds to nearest, ties to even.
MEMDEC_INLINE HalfVec to_bfloat16(Vec x) {
  const UintVec u = bits<UintVec>(x);
  const UintVec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const UintVec quiet = (u >> 16) | 0x40;
  return __builtin_convertvector(x != x ? quiet : rounded, HalfVec);
}

#if defined(__AVX512F__)
MEMDEC_INLINE Vec from_float16(HalfVec x) {
  return bits<Vec>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(x)));
}
MEMDEC_INLINE HalfVec to_float16(Vec x) {
  return bits<HalfVec>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
MEMDEC_INLINE Vec from_float16(HalfVec x) { return bits<Vec>(_mm256_cvtph_ps(bits<__m128i>(x))); }
MEMDEC_INLINE HalfVec to_float16(Vec x) {
  return bits<HalfVec>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
MEMDEC_INLINE Vec from_float16(HalfVec x) {
  const UintVec u = __builtin_convertvector(x, UintVec);
  const UintVec sign = (u & 0x8000) << 16;
  // The exponents differ by 112; a product also turns float16's subnormals into normal numbers.
  const Vec finite = bits<Vec>((u & 0x7fff) << 13) * 0x1p112f;
  const UintVec special = ((u & 0x7fff) << 13) | 0x7f800000;
  const UintVec is_special = bits<UintVec>((u & 0x7c00) == 0x7c00);
  return bits<Vec>(sign | (is_special & special) | (~is_special & bits<UintVec>(finite)));
}

// Rounds to nearest, ties to even.
MEMDEC_INLINE HalfVec to_float16(Vec x) {
  const UintVec u = bits<UintVec>(x);
  const UintVec sign = (u >> 16) & 0x8000;
  const UintVec size = u & 0x7fffffff;
  const UintVec normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  // Below 2^-14 float32's own addition rounds: 0.5 has a last place of 2^-24, float16's smallest.
  const UintVec subnormal = bits<UintVec>(bits<Vec>(size) + 0.5f) - bits<UintVec>(splat(0.5f));
  UintVec result = size < (113u << 23) ? subnormal : normal;
  result = size >= 0x47800000 ? UintVec{} + 0x7c00 : result;
  result = size > 0x7f800000 ? UintVec{} + 0x7e00 : result;
  return __builtin_convertvector(sign | result, HalfVec);
}
#endif

}  // namespace memdec::cpu::MEMDEC_SIMD_LEVEL
