// sgd_ema_step: every parameter tensor in one parallel region and one pass over memory.
#pragma once

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

inline void sgd_ema_step(const Parameter* tensors, int64_t count, const Sgd& s) {
  // Equal pieces of the tensors laid end to end: no tensor is too small or too large to share.
  constexpr int64_t PIECE = 8192;
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
    with_type(t.grad_dtype, [&](auto* type) {
      using G = std::remove_pointer_t<decltype(type)>;
      if (s.nesterov)
        (t.average ? sgd_range<G, true, true> : sgd_range<G, true, false>)(t, s, piece.from, piece.to);
      else
        (t.average ? sgd_range<G, false, true> : sgd_range<G, false, false>)(t, s, piece.from,
                                                                            piece.to);
    });
  }
}

}  // namespace engine::ENGINE_ISA
