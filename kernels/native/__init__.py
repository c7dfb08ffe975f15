"""The CPU backend: one C++ kernel for each op, with the names and arguments of `reference`.

Each function checks the kernel's assumptions, allocates the output and passes addresses to C++. For
the lists of `sgd_ema_step` and for ops of a few microseconds, an address costs a fraction of a
DLPack exchange. The reference serves the cases without a kernel (float64, mixed strides).
"""

from .attack import attack_step, attack_step_, uniform_start
from .autoattack import apgd_step, fab_step
from .binding import keep_freed_memory, native
from .data import augment, recall, remember
from .logits import cross_entropy_grad, kl_grad, local_ball_loss, local_ball_loss_backward
from .optimisers import adamw_ema_step, perturb_weights, sgd_ema_step
from .stem import input_grad_step, stem_input_grad, stem_weight_grad

ORIGIN = f"C++ with {native.isa()}" + ("" if native.openmp else ", one thread (no OpenMP)")

__all__ = [
    "ORIGIN",
    "adamw_ema_step",
    "apgd_step",
    "attack_step",
    "attack_step_",
    "augment",
    "cross_entropy_grad",
    "fab_step",
    "input_grad_step",
    "keep_freed_memory",
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
