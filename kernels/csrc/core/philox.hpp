// Philox-4x32-10 (Salmon et al., SC 2011), with the words of kernels/reference/philox.py.
#pragma once

#include "simd.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace engine::ENGINE_ISA {

struct Stream {
  uint64_t seed, step;
  uint32_t stream;
};

constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;
constexpr uint32_t RADIUS_STREAM = 1u << 31;

// Write the words of blocks first, ..., first + count - 1: out[4 j + k] is output k of block j.
inline void philox_plain(const Stream& s, uint32_t first, int count, uint32_t* out) {
  for (int j = 0; j < count; ++j) {
    uint32_t c0 = first + uint32_t(j), c1 = s.stream, c2 = uint32_t(s.step),
             c3 = uint32_t(s.step >> 32);
    uint32_t k0 = uint32_t(s.seed), k1 = uint32_t(s.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t(c0) * M0, p1 = uint64_t(c2) * M1;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(p1);
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(p0);
      k0 += W0;
      k1 += W1;
    }
    out[4 * j] = c0;
    out[4 * j + 1] = c1;
    out[4 * j + 2] = c2;
    out[4 * j + 3] = c3;
  }
}

#ifdef __AVX2__
// Compute blocks in 64-bit lanes, four to a register and PAIR registers at a time, to hide the
// multiplier's latency. The multiplier reads only the low half of a lane, so the high halves are
// cleared at the end only.
inline void philox(const Stream& s, uint32_t first, int count, uint32_t* out) {
  constexpr int PAIR = 2;
  const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
  const __m256i step = _mm256_set1_epi64x(int64_t(s.step));
  const __m256i step_high = _mm256_srli_epi64(step, 32), stream = _mm256_set1_epi64x(s.stream);
  int j = 0;
  for (; j + 4 * PAIR <= count; j += 4 * PAIR) {
    __m256i c0[PAIR], c1[PAIR], c2[PAIR], c3[PAIR];
    for (int i = 0; i < PAIR; ++i) {
      const uint32_t at = first + uint32_t(j + 4 * i);
      c0[i] = _mm256_set_epi64x(at + 3, at + 2, at + 1, at);
      c1[i] = stream;
      c2[i] = step;
      c3[i] = step_high;
    }
    uint32_t k0 = uint32_t(s.seed), k1 = uint32_t(s.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
#pragma GCC unroll 2
      for (int i = 0; i < PAIR; ++i) {
        const __m256i p0 = _mm256_mul_epu32(c0[i], m0), p1 = _mm256_mul_epu32(c2[i], m1);
        c0[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[i]), key0);
        c2[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[i]), key1);
        c1[i] = p1;
        c3[i] = p0;
      }
      k0 += W0;
      k1 += W1;
    }
    for (int i = 0; i < PAIR; ++i) {
      const __m256i a = _mm256_or_si256(_mm256_and_si256(c0[i], low), _mm256_slli_epi64(c1[i], 32));
      const __m256i b = _mm256_or_si256(_mm256_and_si256(c2[i], low), _mm256_slli_epi64(c3[i], 32));
      const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
      __m256i* to = reinterpret_cast<__m256i*>(out + 4 * (j + 4 * i));
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
  philox_plain(s, first + uint32_t(j), count - j, out + 4 * j);
}
#else
inline void philox(const Stream& s, uint32_t first, int count, uint32_t* out) {
  philox_plain(s, first, count, out);
}
#endif

// Return the top 24 bits as a number in [0, 1), exactly.
inline float to_uniform(uint32_t word) { return float(int32_t(word >> 8)) * 0x1p-24f; }

}  // namespace engine::ENGINE_ISA
