// The Python module: its functions take addresses and sizes, and return nothing. kernels/native is
// the only caller. It checks every tensor and allocates every output. All functions release the
// GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <climits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../core/types.hpp"

namespace nb = nanobind;

namespace engine {

namespace portable {
extern const Kernels kernels;
}
#ifdef ENGINE_HAS_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif

namespace {

struct Build {
  std::string name;
  const Kernels* kernels;
};

// The builds that this processor can run, best first.
std::vector<Build> usable() {
  std::vector<Build> builds;
#ifdef ENGINE_HAS_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    builds.push_back({"AVX2", &avx2::kernels});
#endif
  builds.push_back({ENGINE_PORTABLE_NAME, &portable::kernels});
  return builds;
}

const std::vector<Build> builds = usable();
Build run = builds.front();

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const Build& b : builds) all.push_back(b.name);
  return all;
}

void use(const std::string& name) {
  for (const Build& b : builds)
    if (b.name == name) {
      run = b;
      return;
    }
  throw std::invalid_argument("no kernels for " + name);
}

// Keep freed memory in the process, up to glibc's limit of 32 MiB a block. By default every large
// tensor returns to the system when it dies, and the next one pays for its pages again.
bool keep_freed_memory() {
#ifdef __GLIBC__
  return mallopt(M_MMAP_THRESHOLD, 32 << 20) && mallopt(M_TRIM_THRESHOLD, INT_MAX) &&
         mallopt(M_TOP_PAD, 64 << 20);
#else
  return false;
#endif
}

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// With a target outside [0, K) a kernel would read and write outside the logits.
void check_target(const int64_t* target, int64_t b, int64_t classes) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < b; ++i) outside |= uint64_t(target[i]) >= uint64_t(classes);
  if (outside) throw std::out_of_range("target must lie in [0, " + std::to_string(classes) + ")");
}

// second, share: 0 for one label a row.
Labels labels_of(Address target, Address second, Address share, int64_t b, int64_t classes) {
  check_target(at<int64_t>(target), b, classes);
  if (second) check_target(at<int64_t>(second), b, classes);
  return {at<int64_t>(target), at<int64_t>(second), at<float>(share)};
}

void uniform_start(Address x, Address out, int64_t b, int64_t d, int64_t seed, int64_t step,
                   uint32_t stream, float eps, bool l2) {
  run.kernels->uniform_start(at<float>(x), at<float>(out), b, d, uint64_t(seed), uint64_t(step), stream, eps,
                    l2);
}

void attack_step(Address x, Address z, Address grad, int dtype, Address out, int64_t b, int64_t d,
                 float eps, float alpha, bool l2) {
  run.kernels->attack_step(at<float>(x), at<float>(z), at<void>(grad), dtype, at<float>(out), b, d, eps, alpha,
                  l2);
}

void apgd_step(Address x, Address z, Address last, Address grad, Address step, Address out,
               int64_t b, int64_t d, float eps, float momentum, bool l2) {
  run.kernels->apgd_step(at<float>(x), at<float>(z), at<float>(last), at<float>(grad),
                         at<float>(step), at<float>(out), b, d, eps, momentum, l2);
}

void fab_step(Address x, Address z, Address normal, Address gap, Address out, int64_t b, int64_t d,
              bool l2) {
  run.kernels->fab_step(at<float>(x), at<float>(z), at<float>(normal), at<float>(gap),
                        at<float>(out), b, d, l2);
}

void cross_entropy_grad(Address logits, int dtype, Address target, Address second, Address share,
                        Address out, int64_t b, int64_t classes, float scale) {
  const Labels labels = labels_of(target, second, share, b, classes);
  run.kernels->cross_entropy_grad({at<void>(logits), dtype}, labels, {at<void>(out), dtype}, b,
                         classes, scale);
}

void kl_grad(Address p, int p_dtype, Address q, int q_dtype, Address out, int64_t b, int64_t classes,
             float scale) {
  run.kernels->kl_grad({at<void>(p), p_dtype}, {at<void>(q), q_dtype}, {at<void>(out), q_dtype}, b, classes,
              scale);
}

Stem stem_of(const std::vector<int64_t>& stem) {
  return {stem.at(0), stem.at(1), stem.at(2), stem.at(3), stem.at(4),
          stem.at(5), stem.at(6), stem.at(7), stem.at(8), stem.at(9)};
}

void input_grad_step(Address x, Address z, Address gy, int dtype, bool gy_channels_last,
                     Address weight, const std::vector<int64_t>& stem, Address out, int64_t b,
                     bool x_channels_last, float eps, float alpha, bool l2) {
  run.kernels->input_grad_step(at<float>(x), at<float>(z), at<void>(gy), dtype, gy_channels_last,
                      at<float>(weight), stem_of(stem), at<float>(out), b, x_channels_last, eps, alpha, l2);
}

void stem_input_grad(Address gy, int dtype, bool gy_channels_last, Address weight,
                     const std::vector<int64_t>& stem, int64_t b, Address out) {
  run.kernels->stem_input_grad(at<void>(gy), dtype, gy_channels_last, at<float>(weight), stem_of(stem), b,
                      at<float>(out));
}

void stem_weight_grad(Address x, Address gy, bool gy_channels_last, const std::vector<int64_t>& stem,
                      int64_t b, Address weight_grad, Address bias_grad) {
  run.kernels->stem_weight_grad(at<float>(x), at<float>(gy), gy_channels_last, stem_of(stem), b,
                       at<float>(weight_grad), at<float>(bias_grad));
}

void local_ball_loss(Address adv, int adv_dtype, Address target, Address second, Address share,
                     Address ball, int ball_dtype, Address clean, int clean_dtype, float lam, float mu,
                     float smoothing, int64_t b, int64_t classes, Address loss, Address stats) {
  const Labels labels = labels_of(target, second, share, b, classes);
  run.kernels->local_ball_loss({at<void>(adv), adv_dtype}, labels, {at<void>(ball), ball_dtype},
                      {at<void>(clean), clean_dtype}, lam, mu, smoothing, b, classes, at<float>(loss),
                      at<float>(stats));
}

void local_ball_loss_backward(float grad_loss, Address adv, int adv_dtype, Address target,
                              Address second, Address share, Address ball, int ball_dtype,
                              Address clean, int clean_dtype, float lam, float mu, float smoothing,
                              int64_t b, int64_t classes, Address grad_adv, Address grad_ball,
                              Address grad_clean) {
  const Labels labels = labels_of(target, second, share, b, classes);
  run.kernels->local_ball_loss_backward(grad_loss, {at<void>(adv), adv_dtype}, labels,
                               {at<void>(ball), ball_dtype}, {at<void>(clean), clean_dtype}, lam, mu,
                               smoothing, b, classes, {at<void>(grad_adv), adv_dtype},
                               {at<void>(grad_ball), ball_dtype}, {at<void>(grad_clean), clean_dtype});
}

void check_index(const int64_t* index, int64_t b, int64_t samples) {
  for (int64_t i = 0; i < b; ++i)
    if (index[i] < 0 || index[i] >= samples)
      throw std::out_of_range("index must lie in [0, " + std::to_string(samples) + ")");
}

void augment(Address images, Address index, int64_t samples, int64_t channels, int64_t h, int64_t w,
             Address x, Address crops, int64_t b, int64_t seed, int64_t step, uint32_t stream, int64_t pad,
             bool flip, int64_t cutout, Address memory, Address start, float eps, bool l2, Address share,
             int64_t erase, float jitter) {
  check_index(at<int64_t>(index), b, samples);
  run.kernels->augment(at<uint8_t>(images), at<int64_t>(index), {channels, h, w}, at<float>(x),
              at<int32_t>(crops), b, uint64_t(seed), uint64_t(step), stream, pad, flip, cutout,
              at<int8_t>(memory), at<float>(start), eps, l2, at<float>(share), erase, jitter);
}

void recall(Address memory, Address index, Address crops, int64_t samples, int64_t channels, int64_t h,
            int64_t w, Address x, Address out, int64_t b, bool channels_last, float eps, bool l2) {
  check_index(at<int64_t>(index), b, samples);
  run.kernels->recall(at<int8_t>(memory), at<int64_t>(index), at<int32_t>(crops), {channels, h, w},
             at<float>(x), at<float>(out), b, channels_last, eps, l2);
}

void remember(Address memory, Address index, Address crops, int64_t samples, int64_t channels,
              int64_t h, int64_t w, Address x, Address z, int64_t b, bool channels_last, float eps) {
  check_index(at<int64_t>(index), b, samples);
  run.kernels->remember(at<int8_t>(memory), at<int64_t>(index), at<int32_t>(crops), {channels, h, w},
               at<float>(x), at<float>(z), b, channels_last, eps);
}

// One tuple a tensor: p, grad, grad dtype, first moment, second or 0, average or 0, elements,
// weight decay.
using Row = std::tuple<Address, Address, int, Address, Address, Address, int64_t, float>;

std::vector<Parameter> parameters(const std::vector<Row>& rows) {
  std::vector<Parameter> tensors;
  tensors.reserve(rows.size());
  for (const auto& [p, g, dtype, m, v, average, n, decay] : rows)
    tensors.push_back(
        {at<float>(p), at<void>(g), at<float>(m), at<float>(v), at<float>(average), n, dtype, decay});
  return tensors;
}

void sgd_ema_step(const std::vector<Row>& rows, float lr, float momentum, float blend,
                  bool nesterov) {
  const auto tensors = parameters(rows);
  run.kernels->sgd_ema_step(tensors.data(), int64_t(tensors.size()), {lr, momentum, blend, nesterov});
}

void adamw_ema_step(const std::vector<Row>& rows, float lr, float towards_m, float beta2,
                    float towards_v, float rate, float root, float eps, float blend) {
  const auto tensors = parameters(rows);
  run.kernels->adamw_ema_step(tensors.data(), int64_t(tensors.size()),
                     {lr, towards_m, beta2, towards_v, rate, root, eps, blend});
}

void perturb_weights(const std::vector<Row>& rows, float gamma, float tiny) {
  const auto tensors = parameters(rows);
  run.kernels->perturb_weights(tensors.data(), int64_t(tensors.size()), gamma, tiny);
}

}  // namespace
}  // namespace engine

NB_MODULE(_native, m) {
  using namespace engine;
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def("isas", &names);
  m.def("isa", [] { return run.name; });
  m.def("use_isa", &use);  // for tests, which every build must pass
  m.def("keep_freed_memory", &keep_freed_memory);
#ifdef _OPENMP
  m.attr("openmp") = true;
  m.def("threads", [] { return omp_get_max_threads(); });
#else
  m.attr("openmp") = false;
  m.def("threads", [] { return 1; });
#endif
  m.def("uniform_start", &uniform_start, release);
  m.def("attack_step", &attack_step, release);
  m.def("apgd_step", &apgd_step, release);
  m.def("fab_step", &fab_step, release);
  m.def("cross_entropy_grad", &cross_entropy_grad, release);
  m.def("kl_grad", &kl_grad, release);
  m.def("input_grad_step", &input_grad_step, release);
  m.def("stem_input_grad", &stem_input_grad, release);
  m.def("stem_weight_grad", &stem_weight_grad, release);
  m.def("local_ball_loss", &local_ball_loss, release);
  m.def("local_ball_loss_backward", &local_ball_loss_backward, release);
  m.def("augment", &augment, release);
  m.def("recall", &recall, release);
  m.def("remember", &remember, release);
  m.def("sgd_ema_step", &sgd_ema_step, release);
  m.def("adamw_ema_step", &adamw_ema_step, release);
  m.def("perturb_weights", &perturb_weights, release);
}
