// sgd_ema_step and adamw_ema_step: all parameters in one parallel region and one pass over memory.
// perturb_weights: two of each, as the norms must be known before the first element moves.
#pragma once

#include <cmath>
#include <vector>

#include "simd.hpp"

namespace engine::ENGINE_ISA {

template <typename G, bool NESTEROV, bool AVERAGE>
inline void sgd_range(const Parameter& t, const Sgd& s, int64_t from, int64_t to) {
  float* __restrict p = t.p;
  const G* __restrict g = static_cast<const G*>(t.g);
  float* __restrict m = t.m;
  float* __restrict e = t.average;
  const float decay = t.decay, lr = s.lr, momentum = s.momentum, blend = s.blend;
#pragma omp simd
  for (int64_t i = from; i < to; ++i) {
    const float d = widen(g[i]) + decay * p[i];
    const float new_m = momentum * m[i] + d;
    const float step = NESTEROV ? d + momentum * new_m : new_m;
    const float new_p = p[i] - lr * step;
    m[i] = new_m;
    p[i] = new_p;
    if (AVERAGE) e[i] = e[i] + blend * (new_p - e[i]);
  }
}

template <typename G, bool AVERAGE>
inline void adamw_range(const Parameter& t, const AdamW& s, int64_t from, int64_t to) {
  float* __restrict p = t.p;
  const G* __restrict g = static_cast<const G*>(t.g);
  float* __restrict m = t.m;
  float* __restrict v = t.v;
  float* __restrict e = t.average;
  const float keep = 1.0f - s.lr * t.decay, towards_m = s.towards_m, towards_v = s.towards_v;
  const float beta2 = s.beta2, rate = s.rate, root = s.root, eps = s.eps, blend = s.blend;
#pragma omp simd
  for (int64_t i = from; i < to; ++i) {
    const float d = widen(g[i]);
    const float new_m = m[i] + towards_m * (d - m[i]);
    const float new_v = beta2 * v[i] + towards_v * d * d;
    const float new_p = keep * p[i] - rate * new_m / (std::sqrt(new_v) / root + eps);
    m[i] = new_m;
    v[i] = new_v;
    p[i] = new_p;
    if (AVERAGE) e[i] = e[i] + blend * (new_p - e[i]);
  }
}

// Share the elements of all tensors equally among the threads, across the tensors' boundaries.
// update(type of the gradient, tensor, from, to) updates one piece.
constexpr int64_t PIECE = 8192;

template <typename Update>
inline void over_pieces(const Parameter* tensors, int64_t count, const Update& update) {
  struct Piece {
    int64_t tensor, from, to;
  };
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) {
    total += tensors[t].n;
    for (int64_t from = 0; from < tensors[t].n; from += PIECE)
      pieces.push_back({t, from, min(from + PIECE, tensors[t].n)});
  }
  const int64_t n = int64_t(pieces.size());
#pragma omp parallel for schedule(static) if (total > GRAIN)
  for (int64_t i = 0; i < n; ++i) {
    const Piece& piece = pieces[size_t(i)];
    const Parameter& t = tensors[piece.tensor];
    with_type(t.grad_dtype, [&](auto* type) { update(type, t, piece.from, piece.to); });
  }
}

inline void sgd_ema_step(const Parameter* tensors, int64_t count, const Sgd& s) {
  over_pieces(tensors, count, [&](auto* type, const Parameter& t, int64_t from, int64_t to) {
    using G = std::remove_pointer_t<decltype(type)>;
    if (s.nesterov)
      (t.average ? sgd_range<G, true, true> : sgd_range<G, true, false>)(t, s, from, to);
    else
      (t.average ? sgd_range<G, false, true> : sgd_range<G, false, false>)(t, s, from, to);
  });
}

inline void adamw_ema_step(const Parameter* tensors, int64_t count, const AdamW& s) {
  over_pieces(tensors, count, [&](auto* type, const Parameter& t, int64_t from, int64_t to) {
    using G = std::remove_pointer_t<decltype(type)>;
    (t.average ? adamw_range<G, true> : adamw_range<G, false>)(t, s, from, to);
  });
}

template <typename G>
inline void squares_range(const Parameter& t, int64_t from, int64_t to, double* sums) {
  const float* __restrict p = t.p;
  const G* __restrict g = static_cast<const G*>(t.g);
  double weight = 0, grad = 0;
#pragma omp simd reduction(+ : weight, grad)
  for (int64_t i = from; i < to; ++i) {
    const double d = widen(g[i]);
    weight += double(p[i]) * p[i];
    grad += d * d;
  }
  sums[0] = weight;
  sums[1] = grad;
}

template <typename G>
inline void perturb_range(const Parameter& t, float step, bool go, int64_t from, int64_t to) {
  float* __restrict p = t.p;
  const G* __restrict g = static_cast<const G*>(t.g);
  float* __restrict copy = t.m;
#pragma omp simd
  for (int64_t i = from; i < to; ++i) {
    const float old = p[i];
    copy[i] = old;
    p[i] = go ? old + step * widen(g[i]) : old;
  }
}

inline void perturb_weights(const Parameter* tensors, int64_t count, float gamma, float tiny) {
  // The sums of each piece have a place of their own: they add up in one order for any threads.
  std::vector<int64_t> first(size_t(count) + 1, 0);
  for (int64_t t = 0; t < count; ++t)
    first[size_t(t) + 1] = first[size_t(t)] + (tensors[t].n + PIECE - 1) / PIECE;
  std::vector<double> sums(2 * size_t(first[size_t(count)]), 0.0);
  over_pieces(tensors, count, [&](auto* type, const Parameter& t, int64_t from, int64_t to) {
    using G = std::remove_pointer_t<decltype(type)>;
    const int64_t piece = first[size_t(&t - tensors)] + from / PIECE;
    squares_range<G>(t, from, to, &sums[2 * size_t(piece)]);
  });
  std::vector<float> steps(size_t(count), 0.0f);
  std::vector<char> go(size_t(count), 0);
  for (int64_t t = 0; t < count; ++t) {
    double weight = 0, grad = 0;
    for (int64_t i = first[size_t(t)]; i < first[size_t(t) + 1]; ++i) {
      weight += sums[2 * size_t(i)];
      grad += sums[2 * size_t(i) + 1];
    }
    const float step = float(gamma * std::sqrt(weight) / (std::sqrt(grad) + tiny));
    steps[size_t(t)] = step;
    go[size_t(t)] = std::isfinite(step) && std::isfinite(grad);
  }
  over_pieces(tensors, count, [&](auto* type, const Parameter& t, int64_t from, int64_t to) {
    using G = std::remove_pointer_t<decltype(type)>;
    const size_t at = size_t(&t - tensors);
    perturb_range<G>(t, steps[at], go[at], from, to);
  });
}

}  // namespace engine::ENGINE_ISA
