// Softmax, its gradients and the local-ball loss, on V rows of logits at a time. The rows are
// transposed into a tile [K][V], so that a register holds one class of V rows, for any K.
#pragma once

#include <vector>

#include "simd.hpp"

namespace engine::ENGINE_ISA {

// Sum f(k) over the classes, in blocks: a plain sum of a thousand terms loses a digit.
template <typename F>
inline vf sum_over(int64_t classes, F&& f) {
  vf total{};
  for (int64_t from = 0; from < classes; from += 32) {
    const int64_t to = min(from + 32, classes);
    vf block{};
    for (int64_t k = from; k < to; ++k) block += f(k);
    total += block;
  }
  return total;
}

// A tile of V rows: shifted logits t = x - max, their exponentials, the sum and its logarithm.
struct Tile {
  std::vector<float> memory;
  float *t = nullptr, *e = nullptr;
  vf inverse, log_sum;  // of the sum of exponentials
  vi best;

  explicit Tile(int64_t classes) : memory(size_t(2 * classes * V)) {
    t = memory.data();
    e = t + classes * V;
  }

  vf log_p(int64_t k) const { return load(t + k * V) - log_sum; }
  vf p(int64_t k) const { return load(e + k * V) * inverse; }

  void read(const Logits& logits, int64_t row, int64_t rows, int64_t classes) {
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* source = static_cast<const T*>(logits.data) + row * classes;
      int64_t whole = 0;
      for (; rows == V && whole + V <= classes; whole += V) {
        vf square[V];
        for (int r = 0; r < V; ++r) square[r] = load_wide(source + r * classes + whole);
        transpose(square);
        for (int k = 0; k < V; ++k) store(t + (whole + k) * V, square[k]);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = whole; k < classes; ++k) t[k * V + r] = widen(source[r * classes + k]);
    });
    for (int64_t r = rows; r < V; ++r)
      for (int64_t k = 0; k < classes; ++k) t[k * V + r] = 0.0f;
    vf top = load(t);
    best = vi{};
    for (int64_t k = 1; k < classes; ++k) {
      const vf v = load(t + k * V);
      const vi higher = v > top;
      top = higher ? v : top;
      best = higher ? vi{} + int32_t(k) : best;
    }
    const vf sum = sum_over(classes, [&](int64_t k) {
      const vf shifted = load(t + k * V) - top;
      const vf value = exp_negative(shifted);
      store(t + k * V, shifted);
      store(e + k * V, value);
      return value;
    });
    inverse = 1.0f / sum;
    log_sum = log_positive(sum);
  }
};

// Write rows [row, row + rows) of a [B, K] output from a tile [K][V].
inline void write_rows(const Gradient& out, const float* tile, int64_t row, int64_t rows,
                       int64_t classes) {
  with_type(out.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* target = static_cast<T*>(out.data) + row * classes;
    int64_t whole = 0;
    for (; rows == V && whole + V <= classes; whole += V) {
      vf square[V];
      for (int k = 0; k < V; ++k) square[k] = load(tile + (whole + k) * V);
      transpose(square);
      for (int r = 0; r < V; ++r) store_narrow(target + r * classes + whole, square[r]);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = whole; k < classes; ++k) narrow(tile[k * V + r], target[r * classes + k]);
  });
}

inline void cross_entropy_grad(Logits logits, const Labels& target, Gradient out, int64_t b,
                               int64_t classes, float scale) {
  const int64_t tiles = ceil_div(b, V);
#pragma omp parallel if (b * classes > GRAIN / 2)
  {
    Tile tile(classes);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = i * V, rows = min(V, b - row);
      tile.read(logits, row, rows, classes);
      for (int64_t k = 0; k < classes; ++k) store(tile.e + k * V, tile.p(k));
      for (int64_t r = 0; r < rows; ++r)
        target.each(row + r, [&](int64_t k, float part) { tile.e[k * V + r] -= part; });
      for (int64_t k = 0; k < classes; ++k) store(tile.e + k * V, load(tile.e + k * V) * scale);
      write_rows(out, tile.e, row, rows, classes);
    }
  }
}

inline void kl_grad(Logits p_logits, Logits q_logits, Gradient out, int64_t b, int64_t classes,
                    float scale) {
  const int64_t tiles = ceil_div(b, V);
#pragma omp parallel if (b * classes > GRAIN / 4)
  {
    Tile p(classes), q(classes);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = i * V, rows = min(V, b - row);
      p.read(p_logits, row, rows, classes);
      q.read(q_logits, row, rows, classes);
      for (int64_t k = 0; k < classes; ++k) store(q.e + k * V, (q.p(k) - p.p(k)) * scale);
      write_rows(out, q.e, row, rows, classes);
    }
  }
}

// loss: [1]; stats: [6] as in kernels/reference/logits.py.
inline void local_ball_loss(Logits adv, const Labels& target, Logits ball, Logits clean, float lam,
                            float mu, float smoothing, int64_t b, int64_t classes, float* loss,
                            float* stats) {
  const int64_t tiles = ceil_div(b, V);
  // One partial sum a tile, added in order: the same bits for any number of threads.
  std::vector<double> partial(size_t(tiles * 6));
#pragma omp parallel if (b * classes > GRAIN / 4)
  {
    Tile a(classes), o(classes);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = i * V, rows = min(V, b - row);
      double* sums = partial.data() + i * 6;
      const auto count = [&](const Tile& tile) {
        double correct = 0;
        for (int64_t r = 0; r < rows; ++r) correct += tile.best[r] == target.first[row + r];
        return correct;
      };
      const auto total = [&](vf values) {
        double sum = 0;
        for (int64_t r = 0; r < rows; ++r) sum += values[r];
        return sum;
      };
      a.read(adv, row, rows, classes);
      sums[3] = count(a);
      for (int64_t r = 0; r < rows; ++r)
        target.each(row + r, [&](int64_t k, float part) {
          sums[0] -= double(1.0f - smoothing) * part * (a.t[k * V + r] - a.log_sum[r]);
        });
      if (smoothing > 0.0f) {
        const vf all = sum_over(classes, [&](int64_t k) { return a.log_p(k); });
        sums[0] -= double(smoothing) * total(all) / double(classes);
      }
      if (ball.data) {
        o.read(ball, row, rows, classes);
        sums[4] = count(o);
        const vf kl = sum_over(
            classes, [&](int64_t k) { return a.p(k) * (a.log_p(k) - o.log_p(k)); });
        sums[1] = total(kl);
      }
      if (clean.data) {
        o.read(clean, row, rows, classes);
        sums[5] = count(o);
        const vf kl = sum_over(
            classes, [&](int64_t k) { return o.p(k) * (o.log_p(k) - a.log_p(k)); });
        sums[2] = total(kl);
      }
    }
  }
  double sums[6] = {};
  for (int64_t i = 0; i < tiles; ++i)
    for (int j = 0; j < 6; ++j) sums[j] += partial[size_t(i * 6 + j)];
  const double n = double(max(b, 1));
  for (int j = 0; j < 3; ++j) stats[j] = float(sums[j] / n);
  for (int j = 3; j < 6; ++j) stats[j] = float(sums[j]);
  *loss = stats[0];
  if (ball.data) *loss += lam * stats[1];
  if (clean.data) *loss += mu * stats[2];
}

inline void local_ball_loss_backward(float grad_loss, Logits adv, const Labels& target, Logits ball,
                                     Logits clean, float lam, float mu, float smoothing, int64_t b,
                                     int64_t classes, Gradient grad_adv, Gradient grad_ball,
                                     Gradient grad_clean) {
  const int64_t tiles = ceil_div(b, V);
  const float scale = grad_loss / float(max(b, 1));
  const float everywhere = smoothing / float(classes);
#pragma omp parallel if (b * classes > GRAIN / 4)
  {
    Tile a(classes), o(classes);
    std::vector<float> grad(size_t(classes * V));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = i * V, rows = min(V, b - row);
      a.read(adv, row, rows, classes);
      for (int64_t k = 0; k < classes; ++k) store(grad.data() + k * V, a.p(k) - everywhere);
      for (int64_t r = 0; r < rows; ++r)
        target.each(row + r, [&](int64_t k, float part) {
          const int64_t at = k * V + r;
          grad[size_t(at)] = a.e[at] * a.inverse[r] - (everywhere + (1.0f - smoothing) * part);
        });
      if (ball.data) {
        o.read(ball, row, rows, classes);
        const vf mean = sum_over(
            classes, [&](int64_t k) { return a.p(k) * (a.log_p(k) - o.log_p(k)); });
        for (int64_t k = 0; k < classes; ++k) {
          const vf p = a.p(k), gap = a.log_p(k) - o.log_p(k);
          float* g = grad.data() + k * V;
          store(g, load(g) + lam * p * (gap - mean));
          store(o.e + k * V, scale * lam * (o.p(k) - p));
        }
        write_rows(grad_ball, o.e, row, rows, classes);
      }
      if (clean.data) {
        o.read(clean, row, rows, classes);
        const vf mean = sum_over(
            classes, [&](int64_t k) { return o.p(k) * (o.log_p(k) - a.log_p(k)); });
        for (int64_t k = 0; k < classes; ++k) {
          const vf p = o.p(k), gap = o.log_p(k) - a.log_p(k);
          float* g = grad.data() + k * V;
          store(g, load(g) + mu * (a.p(k) - p));
          store(o.e + k * V, scale * mu * p * (gap - mean));
        }
        write_rows(grad_clean, o.e, row, rows, classes);
      }
      for (int64_t k = 0; k < classes; ++k)
        store(grad.data() + k * V, load(grad.data() + k * V) * scale);
      write_rows(grad_adv, grad.data(), row, rows, classes);
    }
  }
}

}  // namespace engine::ENGINE_ISA
