"""Losses of logits, and the gradients at which an attack's backward pass starts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Scalar, check_like, check_logits, check_scalar, check_target
from .define import define


class MixedLabels(NamedTuple):
    """Hold two labels for each sample, where a sample is a mix of two images.

    Attributes:
        first, second: int64 [B], in [0, K). The count of correct predictions takes `first`.
        share: float [B], in [0, 1], the probability of `first`; `second` has the rest.
    """

    first: Tensor
    second: Tensor
    share: Tensor


# One label for each sample, int64 [B], or two.
Labels = Tensor | MixedLabels


_cross_entropy_grad = define(
    "cross_entropy_grad",
    "(Tensor logits, Tensor target, float scale, Tensor? second=None, Tensor? share=None) "
    "-> Tensor",
)


@torch.library.register_fake("engine::cross_entropy_grad")
def _(logits, target, scale, second=None, share=None):
    return torch.empty_like(logits)


def cross_entropy_grad(logits: Tensor, target: Labels, *, scale: float = 1.0) -> Tensor:
    """Return `scale` times the summed cross-entropy's gradient: softmax(logits) - onehot(target).

    As autograd's output gradient, this result starts an attack's backward pass without a loss. The
    attack step uses the gradient's sign or direction only: choose `scale` for the range of 16 bits.

    Args:
        logits: [B, K], float; the op computes in float32 at least.
        target: int64 [B], in [0, K), or mixed labels, whose probabilities take onehot's place.
    Returns:
        [B, K], dtype of `logits`.
    """
    logits = check_logits("logits", logits)
    first, *mixed = _unpacked(target, logits)
    return _cross_entropy_grad(logits, first, float(scale), *mixed)


def _unpacked(target: Labels, logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return checked labels: the first ones, the second ones or None, their shares or None."""
    if isinstance(target, Tensor):
        return check_target(target, logits), None, None
    first, second = check_target(target.first, logits), check_target(target.second, logits)
    share = target.share
    if share.shape != first.shape or not share.is_floating_point():
        raise TypeError(
            f"share must be float [{len(first)}], got {share.dtype} {tuple(share.shape)}"
        )
    if share.device != logits.device:
        raise ValueError(f"share is on {share.device}, not {logits.device}")
    wide = logits.dtype == torch.float64
    return first, second, share.to(torch.float64 if wide else torch.float32).contiguous()


_kl_grad = define(
    "kl_grad",
    "(Tensor p_logits, Tensor q_logits, float scale) -> Tensor",
)


@torch.library.register_fake("engine::kl_grad")
def _(p_logits, q_logits, scale):
    return torch.empty_like(q_logits)


def kl_grad(p_logits: Tensor, q_logits: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return `scale` times the gradient of sum KL(softmax(p) || softmax(q)) in `q_logits`.

    Args:
        p_logits, q_logits: [B, K], float; the op computes in float32 at least.
    Returns:
        softmax(q) - softmax(p), [B, K], dtype of `q_logits`.
    """
    q_logits = check_logits("q_logits", q_logits)
    p_logits = check_like("p_logits", check_logits("p_logits", p_logits), q_logits, "q_logits")
    return _kl_grad(p_logits, q_logits, float(scale))


_local_ball_loss = define(
    "local_ball_loss",
    "(Tensor adv, Tensor target, Tensor? ball, Tensor? clean, Tensor lam, Tensor mu, "
    "float label_smoothing, Tensor? second=None, Tensor? share=None) -> (Tensor, Tensor)",
)


@torch.library.register_fake("engine::local_ball_loss")
def _(adv, target, ball, clean, lam, mu, label_smoothing, second=None, share=None):
    dtype = torch.float64 if adv.dtype == torch.float64 else torch.float32
    return adv.new_empty((), dtype=dtype), adv.new_empty(6, dtype=dtype)


_local_ball_loss_backward = define(
    "local_ball_loss_backward",
    "(Tensor grad_loss, Tensor adv, Tensor target, Tensor? ball, Tensor? clean, Tensor lam, "
    "Tensor mu, float label_smoothing, Tensor? second=None, Tensor? share=None) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("engine::local_ball_loss_backward")
def _(grad_loss, adv, target, ball, clean, lam, mu, label_smoothing, second=None, share=None):
    def like(t):
        return adv.new_empty(0) if t is None else torch.empty_like(t)

    return torch.empty_like(adv), like(ball), like(clean)


def _loss_setup(ctx, inputs, output) -> None:
    adv, target, ball, clean, lam, mu, ctx.label_smoothing, second, share = inputs
    ctx.save_for_backward(adv, target, ball, clean, lam, mu, second, share)
    ctx.mark_non_differentiable(output[1])


def _loss_backward(ctx, grad_loss, _grad_stats):
    adv, target, ball, clean, lam, mu, second, share = ctx.saved_tensors
    grad_adv, grad_ball, grad_clean = _local_ball_loss_backward(
        grad_loss, adv, target, ball, clean, lam, mu, ctx.label_smoothing, second, share
    )
    grad_ball = None if ball is None else grad_ball
    grad_clean = None if clean is None else grad_clean
    return grad_adv, None, grad_ball, grad_clean, None, None, None, None, None


torch.library.register_autograd(
    "engine::local_ball_loss", _loss_backward, setup_context=_loss_setup
)


class LossStats(NamedTuple):
    """Hold the parts of `local_ball_loss`: 0-d tensors on the device, without gradient.

    Attributes:
        cross_entropy: batch mean of the (label-smoothed) cross-entropy of `adv`.
        local_kl: batch mean of KL(adv || ball); 0 without `ball`.
        global_kl: batch mean of KL(clean || adv); 0 without `clean`.
        correct_adv, correct_ball, correct_clean: number of samples that these logits classify
            correctly; 0 for logits that were not given.
    """

    cross_entropy: Tensor
    local_kl: Tensor
    global_kl: Tensor
    correct_adv: Tensor
    correct_ball: Tensor
    correct_clean: Tensor


def local_ball_loss(
    adv: Tensor,
    target: Labels,
    ball: Tensor | None = None,
    clean: Tensor | None = None,
    *,
    lam: Scalar = 1.0,
    mu: Scalar = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, LossStats]:
    """Compute CE(adv, target) + lam KL(adv || ball) + mu KL(clean || adv), batch means.

    The formula is the project's own, after the abstract of Lu & Kumar (arXiv 2110.14030); see
    docs/method.md. Without `ball` and `clean` it is (label-smoothed) cross-entropy. The loss is
    differentiable once, in all three sets of logits.

    Args:
        adv, ball, clean: logits [B, K], float; the op computes in float32 at least.
        target: int64 [B], in [0, K), or mixed labels: the cross-entropy is then the mean of both
            labels', weighted by their probabilities.
        lam, mu: weights >= 0.
        label_smoothing: in [0, 1), applied to the cross-entropy only.
    Returns:
        loss: 0-d, float32 (float64 for float64 logits); 0 for an empty batch.
        stats: the means of the three terms and the numbers of correct predictions.
    Raises:
        TypeError, ValueError: for a wrong argument, which the message names.
    """
    adv = check_logits("adv", adv)
    first, *mixed = _unpacked(target, adv)
    if not (0.0 <= label_smoothing < 1.0):
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    others = {"ball": ball, "clean": clean}
    for name, t in others.items():
        if t is not None:
            others[name] = check_like(name, check_logits(name, t), adv, "adv")
    lam, mu = check_scalar("lam", lam, adv), check_scalar("mu", mu, adv)
    loss, stats = _local_ball_loss(
        adv, first, others["ball"], others["clean"], lam, mu, float(label_smoothing), *mixed
    )
    return loss, LossStats(*stats.unbind())
