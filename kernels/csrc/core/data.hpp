// augment, recall and remember: crop and mirror the images of a resident [N, C, H, W] dataset.
#pragma once

#include <vector>

#include "attack.hpp"

namespace engine::ENGINE_ISA {

struct Crop {
  int32_t dy, dx, mirrored;
};

// Crop an image: out[c, y, x] = image[c, y + dy, column], or 0 outside the image. column is x + dx,
// or w - 1 - x + dx if mirrored. out[c, y, x] lies at out[c * step_c + (y * w + x) * step_x].
inline void crop(const Images& s, const float* image, const Crop& at, float* out, int64_t step_c,
                 int64_t step_x) {
  // Output columns [first, last) show the image.
  const int64_t first = at.mirrored ? max(0, at.dx) : max(0, -int64_t(at.dx));
  const int64_t last = at.mirrored ? min(s.w, s.w + at.dx) : min(s.w, s.w - at.dx);
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t y = 0; y < s.h; ++y) {
      float* row = out + c * step_c + y * s.w * step_x;
      const int64_t from_y = y + at.dy;
      if (from_y < 0 || from_y >= s.h || first >= last) {
        for (int64_t x = 0; x < s.w; ++x) row[x * step_x] = 0.0f;
        continue;
      }
      const float* from = image + (c * s.h + from_y) * s.w;
      for (int64_t x = 0; x < first; ++x) row[x * step_x] = 0.0f;
      for (int64_t x = last; x < s.w; ++x) row[x * step_x] = 0.0f;
      if (step_x != 1) {
        for (int64_t x = first; x < last; ++x)
          row[x * step_x] = from[at.mirrored ? s.w - 1 - x + at.dx : x + at.dx];
      } else if (at.mirrored) {
#pragma omp simd
        for (int64_t x = first; x < last; ++x) row[x] = from[s.w - 1 - x + at.dx];
      } else {
#pragma omp simd
        for (int64_t x = first; x < last; ++x) row[x] = from[x + at.dx];
      }
    }
}

// The part of an image that a box covers, rows [top, bottom) and columns [left, right).
struct Box {
  int64_t top, bottom, left, right;

  // The box of `tall` x `wide` pixels around the pixel that `word` chooses.
  static Box around(const Images& s, uint32_t word, int64_t tall, int64_t wide) {
    const int64_t y = ((word & 0xFFFF) * s.h >> 16) - tall / 2;
    const int64_t x = ((word >> 16) * s.w >> 16) - wide / 2;
    const int64_t top = max(0, y), left = max(0, x);
    return {top, max(top, min(s.h, y + tall)), left, max(left, min(s.w, x + wide))};
  }

  int64_t area() const { return (bottom - top) * (right - left); }

  template <typename F>
  void each_row(const Images& s, F&& f) const {
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t row = top; row < bottom; ++row) f((c * s.h + row) * s.w + left, right - left);
  }

  void clear(const Images& s, float* image) const {
    each_row(s, [&](int64_t at, int64_t n) {
      for (int64_t j = at; j < at + n; ++j) image[j] = 0.0f;
    });
  }

  void copy(const Images& s, const float* from, float* image) const {
    each_row(s, [&](int64_t at, int64_t n) {
      for (int64_t j = at; j < at + n; ++j) image[j] = from[j];
    });
  }
};

// The first block of the second draw of each sample.
constexpr uint32_t CHANGES = 1u << 31;

// Change brightness, contrast and saturation of three channels, each by a factor, where the crop
// shows the image.
inline void colour(const Images& s, float* image, const Crop& at, const uint32_t* words,
                   float jitter) {
  const auto factor = [&](uint32_t half) {
    return 1.0f + jitter * (float(int32_t(half) - 0x8000) * 0x1p-15f);
  };
  const float brightness = factor(words[2] & 0xFFFF), contrast = factor(words[2] >> 16),
              saturation = factor(words[3] & 0xFFFF);
  const auto brighten = [&](float v) { return 0.5f + contrast * (brightness * v - 0.5f); };
  const auto saturate = [&](float v, float grey) {
    v = grey + saturation * (v - grey);
    v = v < 0.0f ? 0.0f : v;
    return v > 1.0f ? 1.0f : v;
  };
  const int64_t first = at.mirrored ? max(0, at.dx) : max(0, -int64_t(at.dx));
  const int64_t last = at.mirrored ? min(s.w, s.w + at.dx) : min(s.w, s.w - at.dx);
  const int64_t plane = s.h * s.w;
  for (int64_t y = max(0, -int64_t(at.dy)); y < min(s.h, s.h - at.dy); ++y) {
    float *r = image + y * s.w, *g = r + plane, *b = g + plane;
#pragma omp simd
    for (int64_t x = first; x < last; ++x) {
      const float red = brighten(r[x]), green = brighten(g[x]), blue = brighten(b[x]);
      const float grey = 0.299f * red + 0.587f * green + 0.114f * blue;
      r[x] = saturate(red, grey);
      g[x] = saturate(green, grey);
      b[x] = saturate(blue, grey);
    }
  }
}

// Compute one sample's start: x plus its stored steps, with the crop and mirror of the image.
class Start {
 public:
  Start(const Images& s, float eps, bool l2)
      : s_(s), eps_(eps), l2_(l2), image_(size()), z_(size()), zero_(size()) {}

  void operator()(const int8_t* steps, const Crop& at, const float* x, float* out,
                  bool channels_last) {
    const int64_t d = int64_t(size());
    const float quantum = eps_ / 127.0f;
    float *whole = image_.data(), *z = z_.data();
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) whole[j] = float(steps[j]) * quantum;
    crop(s_, whole, at, z, channels_last ? 1 : s_.h * s_.w, channels_last ? s_.channels : 1);
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) z[j] = x[j] + z[j];
    // A step of length 0 projects.
    if (l2_)
      step_l2(x, z, zero_.data(), out, d, eps_, 0.0f);
    else
      step_linf(x, z, zero_.data(), out, d, eps_, 0.0f);
  }

 private:
  size_t size() const { return size_t(s_.channels * s_.h * s_.w); }

  const Images s_;
  const float eps_;
  const bool l2_;
  std::vector<float> image_, z_;
  const std::vector<float> zero_;
};

// x: float [B, C, H, W]; crops: int32 [B, 3]. With a memory int8 [N, C, H, W], also write the
// attack's start to `start`, while x is in cache. With `share` [B], mix the images by boxes.
inline void augment(const uint8_t* images, const int64_t* index, const Images& s, float* x,
                    int32_t* crops, int64_t b, uint64_t seed, uint64_t step, uint32_t stream,
                    int64_t pad, bool flip, int64_t cutout, const int8_t* memory, float* start,
                    float eps, bool l2, float* share, int64_t erase, float jitter) {
  const int64_t d = s.channels * s.h * s.w;
  const uint64_t side = uint64_t(2 * pad + 1);
  const Stream random{seed, step, stream};
  const bool changes = share || erase || jitter > 0.0f;
#pragma omp parallel if (b * d > GRAIN)
  {
    // Convert a whole image at once: rows are too short to fill registers of bytes.
    std::vector<float> image(static_cast<size_t>(d)), other(static_cast<size_t>(share ? d : 0));
    Start form_start(memory ? s : Images{}, eps, l2);
    // Write sample i to `out`, and its words to `words` [8]; return its crop.
    const auto make = [&](int64_t i, uint32_t* words, float* out) {
      philox(random, uint32_t(i), 1, words);
      if (changes) philox(random, uint32_t(i) + CHANGES, 1, words + 4);
      const Crop at{int32_t(int64_t(words[0] * side >> 32) - pad),
                     int32_t(int64_t(words[1] * side >> 32) - pad),
                     int32_t(flip ? words[2] >> 31 : 0)};
      const uint8_t* from = images + index[i] * d;
      float* to = image.data();
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) to[j] = float(from[j]) / 255.0f;
      crop(s, to, at, out, s.h * s.w, 1);
      if (jitter > 0.0f) colour(s, out, at, words + 4, jitter);
      return at;
    };
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b; ++i) {
      uint32_t words[8];
      float* out = x + i * d;
      const Crop at = make(i, words, out);
      crops[3 * i] = at.dy;
      crops[3 * i + 1] = at.dx;
      crops[3 * i + 2] = at.mirrored;
      if (share) {
        uint32_t others[8];
        make((i + 1) % b, others, other.data());
        const int64_t part = max(words[4] & 0xFFFF, words[4] >> 16);
        const Box box = Box::around(s, words[5], (part * s.h + 0x8000) >> 16,
                                    (part * s.w + 0x8000) >> 16);
        box.copy(s, other.data(), out);
        share[i] = float(s.h * s.w - box.area()) / float(s.h * s.w);
      }
      if (cutout) Box::around(s, words[3], cutout, cutout).clear(s, out);
      if (erase && int64_t(words[7] >> 16) < erase)
        Box::around(s, words[3], 1 + ((words[2] & 0xFF) * (s.h / 2) >> 8),
                    1 + ((words[2] >> 8 & 0xFF) * (s.w / 2) >> 8))
            .clear(s, out);
      if (memory) form_start(memory + index[i] * d, at, out, start + i * d, false);
    }
  }
}

inline void recall(const int8_t* memory, const int64_t* index, const int32_t* crops, const Images& s,
                   const float* x, float* out, int64_t b, bool channels_last, float eps, bool l2) {
  const int64_t d = s.channels * s.h * s.w;
#pragma omp parallel if (b * d > GRAIN)
  {
    Start form_start(s, eps, l2);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b; ++i) {
      const Crop at{crops[3 * i], crops[3 * i + 1], crops[3 * i + 2]};
      form_start(memory + index[i] * d, at, x + i * d, out + i * d, channels_last);
    }
  }
}

// Write z - x in steps, rounded to even, to `to`; NaN becomes 0.
inline void quantise(const float* x, const float* z, float steps, int8_t* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float v = (z[i] - x[i]) * steps;
    v = v < -127.0f ? -127.0f : v;
    v = v > 127.0f ? 127.0f : v;
    v = v == v ? v : 0.0f;
    // The sum with 1.5 * 2^23 rounds to a whole number, which is then in the low bits.
    to[i] = int8_t(as_bits(v + 12582912.0f) & 0xFF);
  }
}

inline void remember(int8_t* memory, const int64_t* index, const int32_t* crops, const Images& s,
                     const float* x, const float* z, int64_t b, bool channels_last, float eps) {
  const int64_t d = s.channels * s.h * s.w;
  const int64_t step_c = channels_last ? 1 : s.h * s.w, step_x = channels_last ? s.channels : 1;
  const float steps = 1.0f / (eps > 1e-12f ? eps : 1e-12f) * 127.0f;
#pragma omp parallel if (b * d > GRAIN)
  {
    std::vector<int8_t> sample(static_cast<size_t>(d));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b; ++i) {
      const int64_t dy = crops[3 * i], dx = crops[3 * i + 1];
      const bool mirrored = crops[3 * i + 2] > 0;
      // The crop shows source columns [first, last).
      const int64_t first = max(0, dx), last = min(s.w, s.w + dx);
      quantise(x + i * d, z + i * d, steps, sample.data(), d);
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t y = max(0, dy); y < min(s.h, s.h + dy); ++y) {
          int8_t* row = memory + index[i] * d + (c * s.h + y) * s.w;
          const int8_t* from = sample.data() + c * step_c + (y - dy) * s.w * step_x;
          if (mirrored)
            for (int64_t p = first; p < last; ++p) row[p] = from[(s.w - 1 - p + dx) * step_x];
          else if (step_x == 1)
            for (int64_t p = first; p < last; ++p) row[p] = from[p - dx];
          else
            for (int64_t p = first; p < last; ++p) row[p] = from[(p - dx) * step_x];
        }
    }
  }
}

}  // namespace engine::ENGINE_ISA
