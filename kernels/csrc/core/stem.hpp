// The first convolution: its input gradient (stem_input_grad), the attack step along that gradient
// (input_grad_step), and the gradient of its weights (stem_weight_grad).
//
// For one row (c, y) of the image's gradient, and every column kx of the filter,
//     A_kx[x'] = sum over o and ky of W[o, c, ky, kx] gy[o, (y + padding - ky) / stride, x']
// needs no shifted loads: x' runs along a row of gy, so A_kx stays in registers for the whole sum
// over o and ky. Then gx[c, y, stride x' + kx - padding] += A_kx[x'], once a row. gx is a buffer of
// one sample in the first-level cache, and the step reads it there: the gradient never reaches
// memory.
#pragma once

#include <vector>

#include "attack.hpp"

namespace engine::ENGINE_ISA {

// Multiply KX columns of the filter by N registers of gy's columns, for `taps` filter rows of all
// o. gy[t] is the row of gy for tap t, weight[t] the weights [O][kw] of tap t.
template <int KX, int N>
inline void accumulate(const float* const* gy, const float* const* weight, int taps, int64_t plane,
                       int64_t kw, int64_t out_channels, float* out, int64_t pitch) {
  vf sum[KX][N] = {};
  for (int t = 0; t < taps; ++t) {
    const float* g = gy[t];
    const float* w = weight[t];
    for (int64_t o = 0; o < out_channels; ++o, g += plane, w += kw) {
      vf row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = load(g + n * V);
#pragma GCC unroll 4
      for (int k = 0; k < KX; ++k) {
        const vf factor = splat(w[k]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[k][n] = madd(row[n], factor, sum[k][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < KX; ++k)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out + k * pitch + n * V, sum[k][n]);
}

using Accumulate = void (*)(const float* const*, const float* const*, int, int64_t, int64_t, int64_t,
                            float*, int64_t);
// At most 12 sums, so that they fit 16 registers.
constexpr int MAX_KX = 4, MAX_N = 4;
constexpr Accumulate ACCUMULATE[MAX_KX][MAX_N] = {
    {accumulate<1, 1>, accumulate<1, 2>, accumulate<1, 3>, accumulate<1, 4>},
    {accumulate<2, 1>, accumulate<2, 2>, accumulate<2, 3>, accumulate<2, 4>},
    {accumulate<3, 1>, accumulate<3, 2>, accumulate<3, 3>, accumulate<3, 4>},
    {accumulate<4, 1>, accumulate<4, 2>, accumulate<4, 3>, accumulate<4, 3>},
};

// Compute the gradient of one sample; grad[c, y, x] lies at grad[c * step_c + (y * w + x) *
// step_x]. gy: [O, out_h, out_w] with planes and rows `plane` and `gy_pitch` apart, and V readable
// floats at the end. weight: [C, kh, O, kw]. sums: [kw, pitch] scratch, pitch >= out_w rounded up
// to V; line: [w] scratch. The rows of all o lie a plane apart, and no hardware prefetcher follows
// them. So the loop prefetches `next`, the following sample or null, piece by piece.
inline void stem_gradient(const Stem& s, const float* gy, int64_t plane, int64_t gy_pitch, const float* next,
                          const float* weight, float* grad,
                          int64_t step_c, int64_t step_x, float* sums, int64_t pitch, float* line,
                          const float** rows, const float** weights) {
  const int64_t sample = s.out_channels * s.out_h * s.out_w;
  const int64_t piece = ceil_div(sample, s.channels * s.h);
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t y = 0; y < s.h; ++y) {
      if (next) {
        for (int64_t i = 0; i < piece; i += 16) __builtin_prefetch(next + i, 0, 2);
        next += piece;
      }
      for (int64_t x = 0; x < s.w; ++x) line[x] = 0.0f;
      for (int64_t kx = 0; kx < s.kw;) {
        const int64_t left = s.kw - kx;
        // Split 5 columns into 3 + 2, not 4 + 1.
        const int columns = int(left <= MAX_KX ? left : (left == 5 ? 3 : MAX_KX));
        const int most = columns == 4 ? 3 : MAX_N;
        int taps = 0;
        for (int64_t ky = 0; ky < s.kh; ++ky) {
          const int64_t at = y + s.padding - ky;
          if (at < 0 || at % s.stride || at / s.stride >= s.out_h) continue;
          rows[taps] = gy + at / s.stride * gy_pitch;
          weights[taps++] = weight + (c * s.kh + ky) * s.out_channels * s.kw + kx;
        }
        const int64_t registers = ceil_div(s.out_w, V);
        for (int64_t r = 0; r < registers;) {
          int n = int(registers - r < most ? registers - r : most);
          if (registers - r == most + 1) n = int((registers - r + 1) / 2);
          ACCUMULATE[columns - 1][n - 1](rows, weights, taps, plane, s.kw, s.out_channels,
                                         sums + r * V, pitch);
          for (int t = 0; t < taps; ++t) rows[t] += n * V;
          r += n;
        }
        for (int k = 0; k < columns; ++k) {
          // Only columns x' with 0 <= stride x' + shift < w are in the image.
          const int64_t shift = kx + k - s.padding;
          const int64_t first = shift < 0 ? ceil_div(-shift, s.stride) : 0;
          const int64_t last = min(s.out_w, ceil_div(s.w - shift, s.stride));
          const float* from = sums + k * pitch;
          float* to = line + shift;
          if (s.stride == 1)
            for (int64_t i = first; i < last; ++i) to[i] += from[i];
          else if (s.stride == 2)
            for (int64_t i = first; i < last; ++i) to[2 * i] += from[i];
          else
            for (int64_t i = first; i < last; ++i) to[s.stride * i] += from[i];
        }
        kx += columns;
      }
      float* out = grad + c * step_c + y * s.w * step_x;
      if (step_x == 1)
        for (int64_t x = 0; x < s.w; ++x) out[x] = line[x];
      else
        for (int64_t x = 0; x < s.w; ++x) out[x * step_x] = line[x];
    }
}

// Copy one sample of gy, [O, out_h, out_w] or (channels_last) [out_h, out_w, O] of T, to float with
// rows `pitch` and planes `plane` apart.
template <typename T>
inline void gather_sample(const Stem& s, const T* from, float* to, int64_t plane, int64_t pitch,
                          bool channels_last) {
  if (!channels_last) {
    for (int64_t o = 0; o < s.out_channels; ++o)
      for (int64_t y = 0; y < s.out_h; ++y) {
        float* row = to + o * plane + y * pitch;
        const T* source = from + (o * s.out_h + y) * s.out_w;
#pragma omp simd
        for (int64_t x = 0; x < s.out_w; ++x) row[x] = widen(source[x]);
      }
    return;
  }
  constexpr int64_t BLOCK = V;
  for (int64_t y = 0; y < s.out_h; ++y)
    for (int64_t x0 = 0; x0 < s.out_w; x0 += BLOCK)
      for (int64_t o0 = 0; o0 < s.out_channels; o0 += BLOCK) {
        const T* source = from + (y * s.out_w + x0) * s.out_channels + o0;
        float* target = to + o0 * plane + y * pitch + x0;
        const int64_t xs = min(BLOCK, s.out_w - x0), os = min(BLOCK, s.out_channels - o0);
        if (xs == BLOCK && os == BLOCK) {
          vf block[V];
          for (int x = 0; x < V; ++x) block[x] = load_wide(source + x * s.out_channels);
          transpose(block);
          for (int o = 0; o < V; ++o) store(target + o * plane, block[o]);
        } else {
          for (int64_t o = 0; o < os; ++o)
            for (int64_t x = 0; x < xs; ++x)
              target[o * plane + x] = widen(source[x * s.out_channels + o]);
        }
      }
}

// Call use(i, grad) for each sample i with its input gradient, [C, h, w] or (channels_last) [h, w,
// C]. weight: [O, C, kh, kw] float, contiguous.
template <typename Use>
inline void each_input_grad(const void* gy, int dtype, bool gy_channels_last, const float* weight,
                            const Stem& s, int64_t b, bool channels_last, Use use) {
  const int64_t d = s.channels * s.h * s.w, plane = s.out_h * s.out_w;
  const int64_t sample = s.out_channels * plane;
  std::vector<float> packed(size_t(s.channels * s.kh * s.out_channels * s.kw));
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t ky = 0; ky < s.kh; ++ky)
      for (int64_t o = 0; o < s.out_channels; ++o)
        for (int64_t kx = 0; kx < s.kw; ++kx)
          packed[size_t(((c * s.kh + ky) * s.out_channels + o) * s.kw + kx)] =
              weight[((o * s.channels + c) * s.kh + ky) * s.kw + kx];
  const int64_t pitch = ceil_div(s.out_w, V) * V;
  // Planes a multiple of 4 KiB apart would share one set of the first-level cache.
  const int64_t copy_plane = s.out_h * pitch + 16;
  // A copy with aligned rows pays if every row is read three times or more.
  const bool direct =
      dtype == F32 && !gy_channels_last && plane % 1024 && s.channels * s.kh < 3 * s.stride;
#pragma omp parallel if (b * sample > GRAIN)
  {
    std::vector<float> copy(size_t(s.out_channels * copy_plane)), grad(size_t(d) + 1);
    std::vector<float> line(size_t(s.w) + 1), sums(size_t(s.kw * pitch));
    std::vector<const float*> rows(size_t(s.kh)), weights(size_t(s.kh));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b; ++i) {
      const float* next = static_cast<const float*>(gy) + (i + 1) * sample;
      const int64_t step_c = channels_last ? 1 : s.h * s.w;
      const int64_t step_x = channels_last ? s.channels : 1;
      // The loop reads whole registers: without a copy it would read beyond the tensor's end.
      if (direct && (i + 1) * sample + V <= b * sample) {
        stem_gradient(s, next - sample, plane, s.out_w, next, packed.data(), grad.data(), step_c,
                      step_x, sums.data(), pitch, line.data(), rows.data(), weights.data());
      } else {
        with_type(dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          gather_sample(s, static_cast<const T*>(gy) + i * sample, copy.data(), copy_plane, pitch,
                        gy_channels_last);
        });
        stem_gradient(s, copy.data(), copy_plane, pitch, nullptr, packed.data(), grad.data(),
                      step_c, step_x, sums.data(), pitch, line.data(), rows.data(), weights.data());
      }
      use(i, grad.data());
    }
  }
}

// x, z, out: [B, C, h, w] in one layout.
inline void input_grad_step(const float* x, const float* z, const void* gy, int dtype,
                            bool gy_channels_last, const float* weight, const Stem& s, float* out,
                            int64_t b, bool x_channels_last, float eps, float alpha, bool l2) {
  const int64_t d = s.channels * s.h * s.w;
  each_input_grad(gy, dtype, gy_channels_last, weight, s, b, x_channels_last,
                  [=](int64_t i, const float* grad) {
                    const int64_t at = i * d;
                    if (l2)
                      step_l2(x + at, z + at, grad, out + at, d, eps, alpha);
                    else
                      step_linf(x + at, z + at, grad, out + at, d, eps, alpha);
                  });
}

// out: [B, C, h, w].
inline void stem_input_grad(const void* gy, int dtype, bool gy_channels_last, const float* weight,
                            const Stem& s, int64_t b, float* out) {
  const int64_t d = s.channels * s.h * s.w;
  each_input_grad(gy, dtype, gy_channels_last, weight, s, b, false,
                  [=](int64_t i, const float* grad) {
                    std::memcpy(out + i * d, grad, size_t(d) * sizeof(float));
                  });
}


// Add g[i][o] x[i, t] over the positions i of one sample to sums[t][o], for T taps of the filter
// and two registers of output channels. x: the sample with its padding, rows `pitch` apart; tap t
// reads at offset[t]. g: [out_h, out_w, step], with o along step.
template <int T>
inline void correlate(const Stem& s, const float* x, int64_t pitch, const int64_t* offset,
                      const float* g, int64_t step, float* sums) {
  vf sum[T][2] = {};
  for (int64_t y = 0; y < s.out_h; ++y) {
    const float* row = x + y * s.stride * pitch;
    for (int64_t i = 0; i < s.out_w; ++i, row += s.stride, g += step) {
      const vf low = load(g), high = load(g + V);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        const vf factor = splat(row[offset[t]]);
        sum[t][0] = madd(low, factor, sum[t][0]);
        sum[t][1] = madd(high, factor, sum[t][1]);
      }
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    store(sums + t * step, load(sums + t * step) + sum[t][0]);
    store(sums + t * step + V, load(sums + t * step + V) + sum[t][1]);
  }
}

using Correlate = void (*)(const Stem&, const float*, int64_t, const int64_t*, const float*, int64_t,
                           float*);
constexpr Correlate CORRELATE[] = {correlate<1>, correlate<2>, correlate<3>,
                                   correlate<4>, correlate<5>, correlate<6>};

// weight_grad: [O, C, kh, kw]; bias_grad: [O]; x: [B, C, h, w]; gy: [B, O, out_h, out_w] or
// channels_last. Fixed groups of samples are summed, then the groups in order: the same bits for
// any number of threads.
inline void stem_weight_grad(const float* x, const float* gy, bool gy_channels_last, const Stem& s,
                             int64_t b, float* weight_grad, float* bias_grad) {
  constexpr int64_t GROUP = 8;
  const int64_t taps = s.channels * s.kh * s.kw, positions = s.out_h * s.out_w;
  const int64_t step = ceil_div(s.out_channels, 2 * V) * 2 * V, groups = ceil_div(b, GROUP);
  const int64_t pitch = s.w + 2 * s.padding, plane = (s.h + 2 * s.padding) * pitch;
  const bool direct = gy_channels_last && step == s.out_channels;
  std::vector<int64_t> offset;
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t ky = 0; ky < s.kh; ++ky)
      for (int64_t kx = 0; kx < s.kw; ++kx) offset.push_back(c * plane + ky * pitch + kx);
  // Row `taps` of each group is the bias.
  const int64_t part = (taps + 1) * step;
  std::vector<float> parts(size_t(groups * part));
#pragma omp parallel if (b * positions * step > GRAIN)
  {
    std::vector<float> padded(size_t(s.channels * plane)), copy(size_t(positions * step));
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      float* sums = parts.data() + group * part;
      for (int64_t n = group * GROUP; n < min(b, (group + 1) * GROUP); ++n) {
        for (int64_t c = 0; c < s.channels; ++c)
          for (int64_t y = 0; y < s.h; ++y)
            std::memcpy(padded.data() + c * plane + (y + s.padding) * pitch + s.padding,
                        x + ((n * s.channels + c) * s.h + y) * s.w, size_t(s.w) * sizeof(float));
        const float* g = gy + n * s.out_channels * positions;
        if (!direct) {
          // Copy in tiles: the planes of all o at once are more streams than the cache has ways.
          for (int64_t i0 = 0; i0 < positions; i0 += 16)
            for (int64_t o0 = 0; o0 < s.out_channels; o0 += 16)
              for (int64_t i = i0; i < min(positions, i0 + 16); ++i)
                for (int64_t o = o0; o < min(s.out_channels, o0 + 16); ++o)
                  copy[size_t(i * step + o)] =
                      gy_channels_last ? g[i * s.out_channels + o] : g[o * positions + i];
          g = copy.data();
        }
        for (int64_t o = 0; o < step; o += 2 * V) {
          for (int64_t t = 0; t < taps;) {
            // Blocks of about one size, at most 6: sums and operands fit 16 registers.
            const int64_t left = taps - t, block = ceil_div(left, ceil_div(left, 6));
            CORRELATE[block - 1](s, padded.data(), pitch, offset.data() + t, g + o, step,
                                 sums + t * step + o);
            t += block;
          }
          vf low = {}, high = {};
          for (int64_t i = 0; i < positions; ++i) {
            low += load(g + i * step + o);
            high += load(g + i * step + o + V);
          }
          float* bias = sums + taps * step + o;
          store(bias, load(bias) + low);
          store(bias + V, load(bias + V) + high);
        }
      }
    }
  }
  for (int64_t o = 0; o < s.out_channels; ++o)
    for (int64_t t = 0; t <= taps; ++t) {
      float sum = 0.0f;
      for (int64_t group = 0; group < groups; ++group) sum += parts[size_t(group * part + t * step + o)];
      (t < taps ? weight_grad[o * taps + t] : bias_grad[o]) = sum;
    }
}

}  // namespace engine::ENGINE_ISA
