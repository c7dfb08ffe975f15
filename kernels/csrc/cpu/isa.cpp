// All kernels for one instruction set; compiled once for each, with its ENGINE_ISA and flags.
#include "../core/attack.hpp"
#include "../core/autoattack.hpp"
#include "../core/data.hpp"
#include "../core/logits.hpp"
#include "../core/optimisers.hpp"
#include "../core/stem.hpp"

namespace engine::ENGINE_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    uniform_start,    attack_step, apgd_step, fab_step, cross_entropy_grad, kl_grad, input_grad_step,
    stem_input_grad,  stem_weight_grad, local_ball_loss, local_ball_loss_backward, augment,            recall,  remember,
    sgd_ema_step,    adamw_ema_step,
    perturb_weights,
};

}  // namespace engine::ENGINE_ISA
