// Plain data that crosses from the Python module to the kernels of one instruction set.
#pragma once

#include <cstdint>

namespace engine {

enum Dtype : int { F32 = 0, F16 = 1, BF16 = 2 };

// [B, K] logits, or null.
struct Logits {
  const void* data;
  int dtype;
};
struct Gradient {
  void* data;
  int dtype;
};

struct Stem {
  int64_t channels, h, w;              // of the image
  int64_t out_channels, out_h, out_w;  // of the convolution
  int64_t kh, kw, stride, padding;
};

struct Images {
  int64_t channels, h, w;
};

// One parameter tensor of n elements and its state, in one memory order. `average` may be null;
// `v`, Adam's second moment, is null under SGD.
struct Parameter {
  float* p;
  const void* g;
  float* m;
  float* v;
  float* average;
  int64_t n;
  int grad_dtype;
  float decay;
};

struct Sgd {
  float lr, momentum, blend;  // blend = 1 - ema_decay
  bool nesterov;
};

// rate = lr / (1 - beta1^count), root = sqrt(1 - beta2^count), towards_x = 1 - beta.
struct AdamW {
  float lr, towards_m, beta2, towards_v, rate, root, eps, blend;
};

// One label for each row, or two: then the first has the probability `share`.
struct Labels {
  const int64_t* first;
  const int64_t* second;
  const float* share;

  // Call f(label, probability) for each label of a row.
  template <typename F>
  void each(int64_t row, F&& f) const {
    if (!second || second[row] == first[row]) return f(first[row], 1.0f);
    f(first[row], share[row]);
    f(second[row], 1.0f - share[row]);
  }
};

// The ops, compiled for one instruction set; the comment at each kernel explains its arguments.
struct Kernels {
  void (*uniform_start)(const float* x, float* out, int64_t b, int64_t d, uint64_t seed, uint64_t step,
                        uint32_t stream, float eps, bool l2);
  void (*attack_step)(const float* x, const float* z, const void* grad, int dtype, float* out,
                      int64_t b, int64_t d, float eps, float alpha, bool l2);
  void (*apgd_step)(const float* x, const float* z, const float* last, const float* grad,
                    const float* step, float* out, int64_t b, int64_t d, float eps, float momentum,
                    bool l2);
  void (*fab_step)(const float* x, const float* z, const float* normal, const float* gap, float* out,
                   int64_t b, int64_t d, bool l2);
  void (*cross_entropy_grad)(Logits logits, const Labels& target, Gradient out, int64_t b,
                             int64_t classes, float scale);
  void (*kl_grad)(Logits p, Logits q, Gradient out, int64_t b, int64_t classes, float scale);
  void (*input_grad_step)(const float* x, const float* z, const void* gy, int dtype,
                          bool gy_channels_last, const float* weight, const Stem& stem, float* out,
                          int64_t b, bool x_channels_last, float eps, float alpha, bool l2);
  void (*stem_input_grad)(const void* gy, int dtype, bool gy_channels_last, const float* weight,
                          const Stem& stem, int64_t b, float* out);
  void (*stem_weight_grad)(const float* x, const float* gy, bool gy_channels_last, const Stem& stem,
                           int64_t b, float* weight_grad, float* bias_grad);
  void (*local_ball_loss)(Logits adv, const Labels& target, Logits ball, Logits clean, float lam,
                          float mu, float smoothing, int64_t b, int64_t classes, float* loss,
                          float* stats);
  void (*local_ball_loss_backward)(float grad_loss, Logits adv, const Labels& target, Logits ball,
                                   Logits clean, float lam, float mu, float smoothing, int64_t b,
                                   int64_t classes, Gradient grad_adv, Gradient grad_ball,
                                   Gradient grad_clean);
  void (*augment)(const uint8_t* images, const int64_t* index, const Images& shape, float* x,
                  int32_t* crops, int64_t b, uint64_t seed, uint64_t step, uint32_t stream,
                  int64_t pad, bool flip, int64_t cutout, const int8_t* memory, float* start, float eps, bool l2,
                  float* share, int64_t erase, float jitter);
  void (*recall)(const int8_t* memory, const int64_t* index, const int32_t* crops,
                 const Images& shape, const float* x, float* out, int64_t b, bool channels_last,
                 float eps, bool l2);
  void (*remember)(int8_t* memory, const int64_t* index, const int32_t* crops, const Images& shape,
                   const float* x, const float* z, int64_t b, bool channels_last, float eps);
  void (*sgd_ema_step)(const Parameter* tensors, int64_t count, const Sgd& step);
  void (*adamw_ema_step)(const Parameter* tensors, int64_t count, const AdamW& step);
  void (*perturb_weights)(const Parameter* tensors, int64_t count, float gamma, float tiny);
};

}  // namespace engine
