"""The CUDA backend: one Triton kernel for each op, with the names and arguments of `reference`.

The import needs Triton and no GPU, so that `audit` can compile the kernels anywhere. A run needs
CUDA tensors, or TRITON_INTERPRET=1 set before the first import of Triton.
"""

try:
    import triton
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error})") from error

import torch
from triton.runtime.errors import OutOfResources

from .attack import attack_step, attack_step_, uniform_start
from .autoattack import apgd_step, fab_step
from .data import augment, recall, remember
from .launch import INTERPRETING
from .logits import cross_entropy_grad, kl_grad, local_ball_loss, local_ball_loss_backward
from .optimisers import adamw_ema_step, capturing, perturb_weights, sgd_ema_step
from .stem import input_grad_step

ORIGIN = f"Triton {triton.__version__}" + (", interpreted" if INTERPRETING else "")
# The errors of a launch that needs more registers or shared memory than the device has.
REFUSED = (OutOfResources,)


def probe() -> None:
    """Launch one small kernel on the current device and wait for it; its errors are raised."""
    x, eps = torch.zeros((1, 4), device="cuda"), torch.zeros((), device="cuda")
    attack_step(x, x, x, eps, eps, "Linf")
    torch.cuda.synchronize()


__all__ = [
    "ORIGIN",
    "REFUSED",
    "adamw_ema_step",
    "apgd_step",
    "attack_step",
    "attack_step_",
    "augment",
    "capturing",
    "cross_entropy_grad",
    "fab_step",
    "input_grad_step",
    "kl_grad",
    "local_ball_loss",
    "local_ball_loss_backward",
    "perturb_weights",
    "probe",
    "recall",
    "remember",
    "sgd_ema_step",
    "uniform_start",
]
