"""The definition of every op, in plain PyTorch.

The tests hold the C++ and Triton backends against this package, and it serves every other device.
Every function also runs in float64, and takes tensors that `ops` has checked. Two conventions hold
throughout.

*Memory order.* `x` and its companions are dense and share one layout (contiguous or
channels_last), and "element i" means the i-th element in memory. In both layouts one sample is one
contiguous run of D elements, so a backend works on a flat [B, D] view and does not need the layout.

*Random numbers.* Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). The key is the 64-bit seed; the 128-bit counter is (block, stream, step low, step high).
The int64 device tensor `rng` = (seed, step) holds seed and step, so a captured graph draws new
numbers in every replay after `rng[1]` was advanced. `stream` separates the draws within one step.
"""

from .attack import attack_step, attack_step_, uniform_start
from .autoattack import apgd_step, fab_step
from .data import augment, crop, draw_crops, recall, remember
from .logits import cross_entropy_grad, kl_grad, local_ball_loss, local_ball_loss_backward
from .optimisers import TINY, adamw_ema_step, perturb_weights, sgd_ema_step
from .stem import input_grad_step, stem_input_grad, stem_weight_grad

__all__ = [
    "TINY",
    "adamw_ema_step",
    "apgd_step",
    "attack_step",
    "attack_step_",
    "augment",
    "crop",
    "cross_entropy_grad",
    "draw_crops",
    "fab_step",
    "input_grad_step",
    "kl_grad",
    "local_ball_loss",
    "local_ball_loss_backward",
    "perturb_weights",
    "recall",
    "remember",
    "sgd_ema_step",
    "stem_input_grad",
    "stem_weight_grad",
    "uniform_start",
]
