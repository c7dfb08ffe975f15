// apgd_step and fab_step: x, z, last, grad, normal, out are float [B, D] in memory order; step and
// gap are [B]. `out` overlaps no input.
#pragma once

#include <cmath>
#include <limits>

#include "simd.hpp"

namespace engine::ENGINE_ISA {

inline void apgd_linf(const float* x, const float* z, const float* last, const float* grad,
                      float* out, int64_t n, float step, float eps, float momentum) {
  const float rest = 1.0f - momentum;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float low = x[i] - eps < 0.0f ? 0.0f : x[i] - eps;
    const float high = x[i] + eps > 1.0f ? 1.0f : x[i] + eps;
    // Both comparisons are false for NaN, so NaN counts as 0.
    float v = z[i] + (grad[i] > 0.0f ? step : (grad[i] < 0.0f ? -step : 0.0f));
    v = v < low ? low : v;
    v = v > high ? high : v;
    v = z[i] + momentum * (v - z[i]) + rest * (z[i] - last[i]);
    v = v < low ? low : v;
    out[i] = v > high ? high : v;
  }
}

// Return the factor that brings a perturbation of squared length `square` into the ball.
inline float apgd_shrink(float square, float eps) {
  const float size = std::sqrt(square);
  return (size > eps ? eps : size) / (size + 1e-12f);
}

inline void apgd_l2(const float* x, const float* z, const float* last, const float* grad, float* out,
                    int64_t n, float step, float eps, float momentum) {
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; ++i) square += grad[i] * grad[i];
  const float length = std::sqrt(square) + 1e-12f;
  const bool usable = length <= std::numeric_limits<float>::max();
  const float divisor = usable ? length : 1.0f;
  float size = 0.0f;
#pragma omp simd reduction(+ : size)
  for (int64_t i = 0; i < n; ++i) {
    const float unit = (usable ? grad[i] : 0.0f) / divisor;
    const float delta = z[i] + step * unit - x[i];
    out[i] = delta;
    size += delta * delta;
  }
  float shrink = apgd_shrink(size, eps);
  const float rest = 1.0f - momentum;
  size = 0.0f;
#pragma omp simd reduction(+ : size)
  for (int64_t i = 0; i < n; ++i) {
    const float ahead = clamp01(x[i] + shrink * out[i]);
    const float delta = z[i] + momentum * (ahead - z[i]) + rest * (z[i] - last[i]) - x[i];
    out[i] = delta;
    size += delta * delta;
  }
  shrink = apgd_shrink(size, eps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = clamp01(x[i] + shrink * out[i]);
}

inline void apgd_step(const float* x, const float* z, const float* last, const float* grad,
                      const float* step, float* out, int64_t b, int64_t d, float eps, float momentum,
                      bool l2) {
#pragma omp parallel for schedule(static) if (b * d > GRAIN)
  for (int64_t i = 0; i < b; ++i) {
    const int64_t at = i * d;
    (l2 ? apgd_l2 : apgd_linf)(x + at, z + at, last + at, grad + at, out + at, d, step[i], eps,
                               momentum);
  }
}

// The shortest way from p to the plane <normal, way> = -height within [0, 1]; kernels/reference
// explains it. `turn` is minus the height's sign.
template <bool L2>
struct Plane {
  const float* p;
  const float* normal;
  int64_t n;
  float turn, goal, s;

  static float slope(float normal) {
    const float a = std::fabs(normal);
    return a > (L2 ? 1e-8f : 0.0f) && a <= std::numeric_limits<float>::max() ? a : 0.0f;
  }
  float room(int64_t i) const { return normal[i] * turn > 0.0f ? 1.0f - p[i] : p[i]; }

  Plane(const float* p, const float* normal, int64_t n, float height)
      : p(p), normal(normal), n(n), turn(height > 0.0f ? -1.0f : (height < 0.0f ? 1.0f : 0.0f)),
        goal(std::fabs(height)) {
    float rate = 0.0f, whole = 0.0f;
#pragma omp simd reduction(+ : rate, whole)
    for (int64_t i = 0; i < n; ++i) {
      const float a = slope(normal[i]);
      rate += L2 ? a * a : a;
      whole += a * room(i);
    }
    s = goal / rate;
    for (int k = 0; k < 50; ++k) {
      float growth = 0.0f, free = 0.0f;
#pragma omp simd reduction(+ : growth, free)
      for (int64_t i = 0; i < n; ++i) {
        const float a = slope(normal[i]), way = room(i);
        const bool inside = (L2 ? s * a : s) < way;
        growth += inside ? (L2 ? a * a : a) : 0.0f;
        free += inside ? a * way : 0.0f;
      }
      float next = (goal - (whole - free)) / growth;
      next = next > s ? next : s;
      if (!(growth > 0.0f)) next = std::numeric_limits<float>::infinity();
      if (next == s) break;
      s = next;
    }
  }

  float way(int64_t i) const {
    const float a = slope(normal[i]), direction = normal[i] * turn, most = room(i);
    const float moved = (L2 ? s * a : s) < most ? (L2 ? s * a : s) : most;
    return a > 0.0f ? (direction > 0.0f ? moved : (direction < 0.0f ? -moved : 0.0f)) : 0.0f;
  }

  float size() const {
    float total = 0.0f;
    if (L2) {
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) total += way(i) * way(i);
      return std::sqrt(total);
    }
#pragma omp simd reduction(max : total)
    for (int64_t i = 0; i < n; ++i) {
      const float a = std::fabs(way(i));
      total = a > total ? a : total;
    }
    return total;
  }
};

template <bool L2>
inline void fab_row(const float* x, const float* z, const float* normal, float gap, float* out,
                    int64_t n) {
  float between = 0.0f;
#pragma omp simd reduction(+ : between)
  for (int64_t i = 0; i < n; ++i) {
    const bool finite = std::fabs(normal[i]) <= std::numeric_limits<float>::max();
    between += (finite ? normal[i] : 0.0f) * (z[i] - x[i]);
  }
  const Plane<L2> from_point(z, normal, n, gap), from_clean(x, normal, n, gap - between);
  float near = from_point.size(), far = from_clean.size();
  near = near > 1e-8f ? near : 1e-8f;
  far = far > 1e-8f ? far : 1e-8f;
  float pull = near / (near + far);
  pull = pull > 0.1f ? 0.1f : pull;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float ahead = z[i] + 1.05f * from_point.way(i), around = x[i] + 1.05f * from_clean.way(i);
    out[i] = clamp01(ahead * (1.0f - pull) + around * pull);
  }
}

inline void fab_step(const float* x, const float* z, const float* normal, const float* gap,
                     float* out, int64_t b, int64_t d, bool l2) {
#pragma omp parallel for schedule(static) if (b * d > GRAIN / 8)
  for (int64_t i = 0; i < b; ++i) {
    const int64_t at = i * d;
    (l2 ? fab_row<true> : fab_row<false>)(x + at, z + at, normal + at, gap[i], out + at, d);
  }
}

}  // namespace engine::ENGINE_ISA
