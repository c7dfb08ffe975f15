"""The CUDA backend: one Triton kernel for each op, with the names and arguments of `reference`.

The import needs Triton and no GPU, so that `audit` can compile the kernels anywhere. A run needs
CUDA tensors, or TRITON_INTERPRET=1 set before the first import of Triton.
"""

try:
    import triton
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error})") from error

from .attack import attack_step, attack_step_, uniform_start
from .data import augment, recall, remember
from .launch import INTERPRETING
from .logits import cross_entropy_grad, kl_grad, local_ball_loss, local_ball_loss_backward
from .optimisers import adamw_ema_step, finish_capture, sgd_ema_step
from .stem import input_grad_step

ORIGIN = f"Triton {triton.__version__}" + (", interpreted" if INTERPRETING else "")

__all__ = [
    "ORIGIN",
    "adamw_ema_step",
    "attack_step",
    "attack_step_",
    "augment",
    "cross_entropy_grad",
    "finish_capture",
    "input_grad_step",
    "kl_grad",
    "local_ball_loss",
    "local_ball_loss_backward",
    "recall",
    "remember",
    "sgd_ema_step",
    "uniform_start",
]
