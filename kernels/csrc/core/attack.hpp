// uniform_start and attack_step: x, z, out are float [B, D] in memory order.
#pragma once

#include <cmath>

#include "philox.hpp"

namespace engine::ENGINE_ISA {

template <typename G>
inline void step_linf(const float* x, const float* z, const G* grad, float* out, int64_t n, float eps,
                      float alpha) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = widen(grad[i]);
    // Both comparisons are false for NaN, so NaN counts as 0.
    const float move = g > 0.0f ? alpha : (g < 0.0f ? -alpha : 0.0f);
    const float low = x[i] - eps, high = x[i] + eps;
    float v = z[i] + move;
    v = v < low ? low : v;
    v = v > high ? high : v;
    out[i] = clamp01(v);
  }
}

// `out` holds the perturbation between the passes. It may be `z`, and must not overlap the others.
template <typename G>
inline void step_l2(const float* x, const float* z, const G* grad, float* out, int64_t n, float eps,
                    float alpha) {
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; ++i) square += widen(grad[i]) * widen(grad[i]);
  float length = std::sqrt(square);
  const bool usable = length > 0.0f && length <= 3.402823466e38f;
  if (!usable) length = 1.0f;
  float size = 0.0f;
#pragma omp simd reduction(+ : size)
  for (int64_t i = 0; i < n; ++i) {
    const float unit = (usable ? widen(grad[i]) : 0.0f) / length;
    const float delta = z[i] + alpha * unit - x[i];
    out[i] = delta;
    size += delta * delta;
  }
  size = std::sqrt(size);
  const float shrink = size > eps ? eps / (size > 1e-30f ? size : 1e-30f) : 1.0f;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = clamp01(x[i] + out[i] * shrink);
}

// `out` may be `z`.
inline void attack_step(const float* x, const float* z, const void* grad, int dtype, float* out,
                        int64_t b, int64_t d, float eps, float alpha, bool l2) {
  const int64_t n = b * d, chunk = l2 ? max(d, 1) : 4096;
  with_type(dtype, [&](auto* type) {
    const auto* g = static_cast<const std::remove_pointer_t<decltype(type)>*>(grad);
#pragma omp parallel for schedule(static) if (n > GRAIN)
    for (int64_t i = 0; i < n; i += chunk) {
      const int64_t count = min(chunk, n - i);
      if (l2)
        step_l2(x + i, z + i, g + i, out + i, count, eps, alpha);
      else
        step_linf(x + i, z + i, g + i, out + i, count, eps, alpha);
    }
  });
}

constexpr int TILE_BLOCKS = 64, TILE = 4 * TILE_BLOCKS;

inline void start_linf(const float* x, float* out, int64_t n, const Stream& s, float eps) {
#pragma omp parallel for schedule(static) if (n > GRAIN / 4)
  for (int64_t i = 0; i < n; i += TILE) {
    uint32_t words[TILE];
    philox(s, uint32_t(i / 4), TILE_BLOCKS, words);
    const int64_t count = min(TILE, n - i);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j)
      out[i + j] = clamp01(x[i + j] + (2.0f * to_uniform(words[j]) - 1.0f) * eps);
  }
}

// Apply Box and Muller's transform to the pairs of a tile of words; out[j] belongs to word j.
inline void normals(const uint32_t* words, float* out) {
  constexpr int PAIRS = TILE / 2;
  float radius[PAIRS], turn[PAIRS], sine[PAIRS], cosine[PAIRS];
  for (int j = 0; j < PAIRS; ++j) {
    radius[j] = 1.0f - to_uniform(words[2 * j]);
    turn[j] = to_uniform(words[2 * j + 1]);
  }
  for (int j = 0; j < PAIRS; j += V) {
    vf s, c;
    sincos_turns(load(turn + j), s, c);
    store(sine + j, s);
    store(cosine + j, c);
    // 1 - u lies in (0, 1], but the polynomial's log(1) may be a rounding above 0.
    const vf square = -2.0f * log_positive(load(radius + j));
    store(radius + j, square > vf{} ? square : vf{});
  }
  for (int j = 0; j < PAIRS; ++j) {
    const float r = __builtin_sqrtf(radius[j]);
    out[2 * j] = r * cosine[j];
    out[2 * j + 1] = r * sine[j];
  }
}

inline void start_l2(const float* x, float* out, int64_t b, int64_t d, const Stream& s, float eps) {
  const int64_t n = b * d;
#pragma omp parallel for schedule(static) if (n > GRAIN / 8)
  for (int64_t i = 0; i < b; ++i) {
    float* row = out + i * d;
    const int64_t begin = i * d, end = begin + d;
    uint32_t words[TILE];
    float tile[TILE];
    float square = 0.0f;
    for (int64_t at = begin / 4 * 4; at < end; at += TILE) {
      philox(s, uint32_t(at / 4), TILE_BLOCKS, words);
      // With an odd total, the reference pairs the last word with 0.
      if (n % 2 && at <= n - 1 && n - 1 < at + TILE && n - at < TILE) words[n - at] = 0;
      normals(words, tile);
      const int64_t from = max(at, begin), to = min(at + TILE, end);
#pragma omp simd reduction(+ : square)
      for (int64_t j = from; j < to; ++j) {
        row[j - begin] = tile[j - at];
        square += tile[j - at] * tile[j - at];
      }
    }
    uint32_t words4[4];
    philox({s.seed, s.step, s.stream + RADIUS_STREAM}, uint32_t(i / 4), 1, words4);
    const double radius = std::pow(double(to_uniform(words4[i % 4])), 1.0 / double(max(d, 1)));
    const float length = std::sqrt(square);
    const float scale = float(radius) * eps / (length > 1e-12f ? length : 1e-12f);
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) row[j] = clamp01(x[begin + j] + row[j] * scale);
  }
}

inline void uniform_start(const float* x, float* out, int64_t b, int64_t d, uint64_t seed,
                          uint64_t step, uint32_t stream, float eps, bool l2) {
  const Stream s{seed, step, stream};
  if (l2)
    start_l2(x, out, b, d, s, eps);
  else
    start_linf(x, out, b * d, s, eps);
}

}  // namespace engine::ENGINE_ISA
