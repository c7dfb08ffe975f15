"""What the hot path computes; knows nothing of training. See `ops` for the ops, `backends` for who serves them."""

from . import backends, ops, reference
from .ops import (
    adamw_ema_step,
    attack_step,
    attack_step_,
    augment,
    cross_entropy_grad,
    finish_capture,
    input_grad_step,
    kl_grad,
    local_ball_loss,
    recall,
    remember,
    sgd_ema_step,
    stem_input_grad,
    stem_weight_grad,
    uniform_start,
)

__all__ = [
    "adamw_ema_step",
    "attack_step",
    "attack_step_",
    "augment",
    "backends",
    "cross_entropy_grad",
    "finish_capture",
    "input_grad_step",
    "kl_grad",
    "local_ball_loss",
    "ops",
    "recall",
    "reference",
    "remember",
    "sgd_ema_step",
    "stem_input_grad",
    "stem_weight_grad",
    "uniform_start",
]
