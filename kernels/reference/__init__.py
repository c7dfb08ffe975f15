"""What every op means, in plain PyTorch.

This file is the definition: the C++ and Triton backends are tested against it, and it serves any
device they do not. Every function runs in float64 as well, and takes tensors that `ops` has already
checked. Two conventions hold throughout.

*Memory order.* `x` and its companions are dense and share one layout (contiguous or channels_last),
and "element i" means the i-th element in memory. One sample is one contiguous run of D elements
either way, so a backend works on a flat [B, D] view and never asks for the layout.

*Randomness.* Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
The key is the 64-bit seed; the 128-bit counter is (block, stream, step low, step high). Seed and
step live in the int64 device tensor `rng` = (seed, step), so a captured graph draws fresh numbers on
every replay once `rng[1]` has been advanced. `stream` separates the draws made within one step.
"""

from .attack import attack_step, attack_step_, uniform_start
from .data import augment, crop, draw_crops, recall, remember
from .logits import cross_entropy_grad, kl_grad, local_ball_loss, local_ball_loss_backward
from .optimisers import adamw_ema_step, sgd_ema_step
from .stem import input_grad_step, stem_input_grad, stem_weight_grad

__all__ = [
    "adamw_ema_step",
    "attack_step",
    "attack_step_",
    "augment",
    "crop",
    "cross_entropy_grad",
    "draw_crops",
    "input_grad_step",
    "kl_grad",
    "local_ball_loss",
    "local_ball_loss_backward",
    "recall",
    "remember",
    "sgd_ema_step",
    "stem_input_grad",
    "stem_weight_grad",
    "uniform_start",
]
