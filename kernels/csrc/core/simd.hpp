// A SIMD register of floats, and the functions on it that the kernels need.
//
// The headers here use neither torch nor Python: templates and loops over raw pointers and sizes.
// All code is in the namespace ENGINE_ISA, which each build of isa.cpp names after its instruction
// set. So the linker can never merge code for AVX2 with the portable build's.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "types.hpp"

#ifndef ENGINE_ISA
#define ENGINE_ISA portable
#endif

namespace engine::ENGINE_ISA {

#if defined(__AVX512F__)
constexpr int V = 16;
#elif defined(__AVX__)
constexpr int V = 8;
#else
constexpr int V = 4;
#endif

typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));

// Below this number of elements, a second thread costs more time than it saves.
constexpr int64_t GRAIN = 16384;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Subtraction of zero, unlike addition, changes no value, so the compiler emits a plain broadcast.
inline vf splat(float a) { return a - vf{}; }
inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// The build sets -ffp-contract=off for equal bits on every machine; `madd` asks for a fused
// product.
inline float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline vf madd(vf a, vf b, vf c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  vf r;
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

// NaN stays NaN, as in torch.clamp.
inline float clamp01(float v) {
  v = v < 0.0f ? 0.0f : v;
  return v > 1.0f ? 1.0f : v;
}

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

// Polynomials of the Cephes library (S. Moshier, netlib.org/cephes), about 1 unit in the last
// place.

// exp(x) for x <= 0; 0 below -87.3, NaN for NaN.
inline vf exp_negative(vf x) {
  const vf low = splat(-87.3f);
  const vf y = x > low ? x : low;
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum rounds to a whole number
  const vf shifted = y * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vf r = madd(n, splat(2.12194440e-4f), madd(n, splat(-0.693359375f), y));
  vf p = splat(1.9875691500e-4f);
  p = madd(p, r, splat(1.3981999507e-3f));
  p = madd(p, r, splat(8.3334519073e-3f));
  p = madd(p, r, splat(4.1665795894e-2f));
  p = madd(p, r, splat(1.6666665459e-1f));
  p = madd(p, r, splat(5.0000001201e-1f));
  p = madd(p, r * r, r) + 1.0f;
  const vi power = ((vi)shifted - 0x4B400000 + 127) << 23;
  const vf value = p * (vf)power;
  return x < low ? vf{} : (x == x ? value : x);
}

// log(x) for normal x > 0; NaN for NaN.
inline vf log_positive(vf x) {
  vi bits = (vi)x;
  // Bring the mantissa to [sqrt(1/2), sqrt(2)), and adapt the exponent.
  const vi e = (bits - 0x3F3504F3) >> 23;
  const vf m = (vf)(bits - (e << 23)) - 1.0f;
  const vf ef = __builtin_convertvector(e, vf);
  const vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = madd(p, m, splat(-1.1514610310e-1f));
  p = madd(p, m, splat(1.1676998740e-1f));
  p = madd(p, m, splat(-1.2420140846e-1f));
  p = madd(p, m, splat(1.4249322787e-1f));
  p = madd(p, m, splat(-1.6668057665e-1f));
  p = madd(p, m, splat(2.0000714765e-1f));
  p = madd(p, m, splat(-2.4999993993e-1f));
  p = madd(p, m, splat(3.3333331174e-1f));
  vf y = p * m * z;
  y = madd(ef, splat(-2.12194440e-4f), y);
  y = y - 0.5f * z;
  const vf value = madd(ef, splat(0.693359375f), m + y);
  return x == x ? value : x;
}

// Sine and cosine of 2 pi u for u in [0, 1): the reduction to an eighth of a turn is exact.
inline void sincos_turns(vf u, vf& sine, vf& cosine) {
  const float magic = 12582912.0f;
  const vf shifted = u * 4.0f + magic;
  const vi quadrant = (vi)shifted;
  const vf t = (u - (shifted - magic) * 0.25f) * 6.283185307179586f;
  const vf z = t * t;
  vf s = splat(-1.9515295891e-4f);
  s = madd(s, z, splat(8.3321608736e-3f));
  s = madd(s, z, splat(-1.6666654611e-1f));
  s = madd(s * z, t, t);
  vf c = splat(2.443315711809948e-5f);
  c = madd(c, z, splat(-1.388731625493765e-3f));
  c = madd(c, z, splat(4.166664568298827e-2f));
  c = madd(c * z, z, 1.0f - 0.5f * z);
  const vi odd = (quadrant & 1) != 0;
  const vf a = odd ? c : s, b = odd ? s : c;
  sine = (quadrant & 2) != 0 ? -a : a;
  cosine = ((quadrant + 1) & 2) != 0 ? -b : b;
}

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline float widen(bfloat v) { return as_float(uint32_t(v.bits) << 16); }
inline float widen(half v) {
  // After the shift the exponent is 112 too low; the product corrects it, also for subnormals.
  const uint32_t magnitude = uint32_t(v.bits & 0x7FFF) << 13;
  float f = as_float(magnitude) * 0x1p112f;
  f = magnitude >= 0x0F800000 ? as_float(magnitude | 0x7F800000) : f;
  return as_float(as_bits(f) | uint32_t(v.bits & 0x8000) << 16);
}

inline void narrow(float v, float& out) { out = v; }
inline void narrow(float v, bfloat& out) {
  const uint32_t bits = as_bits(v);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  out.bits = v == v ? uint16_t(rounded) : uint16_t(0x7FC0);
}
inline void narrow(float v, half& out) {
  const _Float16 h = static_cast<_Float16>(v);
  std::memcpy(&out, &h, 2);
}

inline vf load_wide(const float* p) { return load(p); }
template <typename T>
inline vf load_wide(const T* p) {
  float lanes[V];
  for (int i = 0; i < V; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
}
inline void store_narrow(float* p, vf v) { store(p, v); }
template <typename T>
inline void store_narrow(T* p, vf v) {
  for (int i = 0; i < V; ++i) narrow(v[i], p[i]);
}

// Transpose V x V numbers in place.
inline void transpose(vf (&r)[V]) {
#if defined(__AVX__) && !defined(__AVX512F__)
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(__m256(r[i]), __m256(r[i + 1]));
    pair[i + 1] = _mm256_unpackhi_ps(__m256(r[i]), __m256(r[i + 1]));
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quad[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0x44);
      quad[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0xEE);
    }
  for (int i = 0; i < 4; ++i) {
    r[i] = vf(_mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    r[i + 4] = vf(_mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
#else
  for (int i = 0; i < V; ++i)
    for (int j = 0; j < i; ++j) {
      const float a = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = a;
    }
#endif
}

// Call f with a null pointer of the element type of number `dtype`.
template <typename F>
inline void with_type(int dtype, F&& f) {
  switch (dtype) {
    case F16:
      return f(static_cast<half*>(nullptr));
    case BF16:
      return f(static_cast<bfloat*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace engine::ENGINE_ISA
