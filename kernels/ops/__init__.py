"""The ops of the hot path: one definition each, three backends (see `backends`).

Every function checks its arguments, then calls a `torch.library` operator of the namespace
`engine`.
Shapes: B samples, N samples in a dataset, C channels, H x W pixels, K classes. Images are float
tensors in [0, 1], [B, C, H, W] (or [B, ...] for data that is not images), contiguous or
channels_last; a tensor with other strides is copied to a contiguous one. `eps`, `alpha`, `lam`,
`mu` and `lr` may be Python floats. Pass a 0-d tensor on the device for a value that changes during
training or within a CUDA graph. `rng` is an int64 [2] device tensor (seed, step); `reference`
explains its use.
"""

from .attack import attack_step, attack_step_, uniform_start
from .autoattack import apgd_step, fab_step
from .data import Augmented, augment, recall, remember
from .logits import (
    Labels,
    LossStats,
    MixedLabels,
    cross_entropy_grad,
    kl_grad,
    local_ball_loss,
)
from .optimisers import adamw_ema_step, perturb_weights, restore_weights, sgd_ema_step
from .stem import input_grad_step, stem_input_grad, stem_weight_grad

__all__ = [
    "Augmented",
    "Labels",
    "LossStats",
    "MixedLabels",
    "adamw_ema_step",
    "apgd_step",
    "attack_step",
    "attack_step_",
    "augment",
    "cross_entropy_grad",
    "fab_step",
    "input_grad_step",
    "kl_grad",
    "local_ball_loss",
    "perturb_weights",
    "recall",
    "remember",
    "restore_weights",
    "sgd_ema_step",
    "stem_input_grad",
    "stem_weight_grad",
    "uniform_start",
]
