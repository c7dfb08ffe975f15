"""APGD: projected gradient ascent with momentum whose step size adapts to each image.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks" (arXiv 2003.01690), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import kernels
from ...threat import ThreatModel
from .draws import normal, uniform
from .losses import Loss
from .oracle import Attacked, Oracle, lengths, per_sample

# The paper's constants: the share of steps that must raise the loss, and the momentum.
_RISING, _MOMENTUM = 0.75, 0.75


@dataclass
class _State(Attacked):
    """Hold what every image carries from step to step; all tensors [B, ...].

    Attributes:
        image: position in the batch that the attack was given, int64.
        clean: the image, centre of the ball.
        point, previous: this iterate and the one before.
        gradient: of the loss at `point`.
        best, best_gradient, best_loss: of the iterate with the highest loss.
        step: step size [pixel units].
        rises: steps since the last checkpoint that raised the loss [count].
        last_loss: loss of the iterate before.
        checked_best, halved: best loss at the last checkpoint; whether it halved the step.
    """

    image: Tensor
    clean: Tensor
    point: Tensor
    previous: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step: Tensor
    rises: Tensor
    last_loss: Tensor
    checked_best: Tensor
    halved: Tensor

    def move(self, threat: ThreatModel, *, first: bool) -> None:
        """Take the step with momentum (equation 3), and clip it to the ball and to [0, 1]."""
        following = kernels.apgd_step(
            self.clean,
            self.point,
            self.previous,
            self.gradient,
            self.step,
            eps=threat.eps,
            momentum=1.0 if first else _MOMENTUM,
            norm=threat.norm,
        )
        self.previous, self.point = self.point, following

    def record(self, loss: Tensor) -> None:
        """Note the loss [B] at `point`, and the point where it is the best so far."""
        self.rises += loss > self.last_loss
        self.last_loss = loss
        better = loss > self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        wide = per_sample(better, self.point)
        self.best = torch.where(wide, self.point, self.best)
        self.best_gradient = torch.where(wide, self.gradient, self.best_gradient)

    def check(self, interval: int) -> None:
        """Halve the step size where the loss stopped growing, and go back to the best point there.

        Conditions 1 and 2 of section 3.1: too few of the `interval` steps raised the loss; or the
        best loss has not grown since the last checkpoint, and the step was not halved there.
        """
        halve = self.rises <= _RISING * interval
        halve |= ~self.halved & (self.checked_best >= self.best_loss)
        self.halved, self.checked_best = halve, self.best_loss
        self.step = torch.where(halve, 0.5 * self.step, self.step)
        wide = per_sample(halve, self.point)
        self.point = torch.where(wide, self.best, self.point)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)
        self.rises = torch.zeros_like(self.rises)


def checkpoints(steps: int) -> Iterator[int]:
    """Yield the numbers of steps between checkpoints.

    Section 3.1: 22 % of all steps, then 3 % less each time, and never less than 6 %.
    """
    length = max(int(0.22 * steps), 1)
    while True:
        yield length
        length = max(length - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))


def apgd(
    oracle: Oracle,
    x: Tensor,
    start: Tensor,
    loss: Loss,
    threat: ThreatModel,
    *,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Attack a batch once from given points; an image leaves the batch when it falls.

    Args:
        x: float32 [B, C, H, W] in [0, 1], classified rightly; start: a point of each ball.
        loss: of all B images.
        steps: gradient steps, >= 1.
    Returns:
        Positions int64 [F] of the images that fell, and an adversary of each, [F, C, H, W].
    """
    fallen = [(torch.empty(0, dtype=torch.int64, device=x.device), x[:0])]
    intervals = checkpoints(steps)
    left = interval = next(intervals)
    state, logits = _begin(oracle, x, start, loss, threat)
    for number in range(steps + 1):
        wrong = logits.argmax(1) != loss.y
        if wrong.any():
            fallen.append((state.image[wrong], state.point[wrong]))
            state.keep(~wrong)
            loss, logits = loss.take(~wrong), logits[~wrong]
        if number == steps or len(state.image) == 0:
            break
        if number > 0:
            state.record(loss.value(logits))
            left -= 1
            if left == 0:
                state.check(interval)
                left = interval = next(intervals)
        state.move(threat, first=number == 0)
        logits, state.gradient = oracle.gradient(state.point, loss.gradient)
    images, adversaries = zip(*fallen, strict=True)
    return torch.cat(images), torch.cat(adversaries)


def _begin(
    oracle: Oracle, x: Tensor, start: Tensor, loss: Loss, threat: ThreatModel
) -> tuple[_State, Tensor]:
    """Return the state at the start, and the logits [B, K] there."""
    logits, gradient = oracle.gradient(start, loss.gradient)
    value = loss.value(logits)
    state = _State(
        image=torch.arange(len(x), device=x.device),
        clean=x,
        point=start,
        previous=start,
        gradient=gradient,
        best=start,
        best_gradient=gradient,
        best_loss=value,
        step=torch.full_like(value, 2.0 * threat.eps),
        rises=torch.zeros_like(value),
        # The authors' package compares the first step's loss with 0; the same here.
        last_loss=torch.zeros_like(value),
        checked_best=value,
        halved=torch.ones_like(value, dtype=torch.bool),
    )
    return state, logits


def random_start(x: Tensor, threat: ThreatModel, draw: torch.Generator) -> Tensor:
    """Return points of the balls' surface, one an image, clipped to [0, 1].

    Args:
        draw: a CPU generator; B * C * H * W numbers are drawn.
    """
    linf = threat.norm == "Linf"
    noise = (2 * uniform(x.shape, draw) - 1 if linf else normal(x.shape, draw)).to(x.device)
    scale = threat.eps / (lengths(noise, threat.norm) + 1e-12)
    return (x + per_sample(scale, x) * noise).clamp(0.0, 1.0)
