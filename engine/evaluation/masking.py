"""Checks for masked gradients, which make a network look more robust than it is.

A defence that hides its gradient looks robust to attacks that follow the gradient (Athalye et al.,
arXiv 1802.00420; the checklist of Carlini et al., arXiv 1902.06705). Then a weaker attack succeeds
more often than a stronger one. The checks look for such cases.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels, rng
from ..threat import ThreatModel
from . import robust_accuracy
from .robust_accuracy import Progress, predictions, share, silent

_NOISES = 20
_QUERIES = 1000


@dataclass(frozen=True)
class Check:
    """Hold the result of one comparison.

    Attributes:
        value: the measured values, with their unit.
        wanted: the expected outcome for a network that does not hide its gradient.
        ok: whether the outcome is the expected one.
    """

    name: str
    value: str
    wanted: str
    ok: bool


def checks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    surrogate: nn.Module | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Check]:
    """Run all checks on images x float32 [N, C, H, W] in [0, 1] with labels y int64 [N].

    Args:
        model: in evaluation mode, [0, 1] images to logits.
        surrogate: another such network, whose adversaries are transferred to the model.
    """
    eps, norm = threat.eps, threat.norm
    # Two standard errors of a difference between accuracies on the same images.
    slack = 2 * math.sqrt(0.25 / max(len(x), 1)) * 0.5

    def pgd(at: float, steps: int) -> float:
        ball = ThreatModel(norm, at)
        return share(robust_accuracy.pgd(model, x, y, ball, steps=steps, restarts=1, seed=seed))

    def percent(*values: float) -> str:
        return " / ".join(f"{100 * v:.1f} %" for v in values)

    results: list[Check] = []
    total = 5 + (surrogate is not None)

    def add(name: str, value: str, wanted: str, ok: bool) -> None:
        results.append(Check(name, value, wanted, ok))
        progress(f"masking: {name}", len(results), total)

    strong = pgd(eps, 50)
    one = pgd(eps, 1)
    add("one step / 50 steps", percent(one, strong), "more steps do more", strong <= one + slack)
    noise = _noise(model, x, y, threat, seed)
    add(
        f"{_NOISES} random points / 50 steps",
        percent(noise, strong),
        "the gradient beats noise",
        strong <= noise + slack,
    )
    square = _square(model, x, y, threat, seed)
    add(
        f"Square, {_QUERIES} queries / 50 steps",
        percent(square, strong),
        "no gradient does no better",
        strong <= square + slack,
    )
    if surrogate is not None:
        moved = _transfer(model, surrogate, x, y, threat, seed)
        add(
            "transferred / own adversaries",
            percent(moved, strong),
            "its own gradient does more",
            strong <= moved + slack,
        )
    twice = pgd(2 * eps, 50)
    add("eps / 2 eps", percent(strong, twice), "falls", twice < strong or strong == 0)
    # Within this ball, any image can become any other image.
    everything = 1.0 if norm == "Linf" else math.sqrt(x[0].numel())
    unbounded = pgd(everything, 50)
    add("unbounded", percent(unbounded), "0 %", unbounded <= 0.01)
    return results


def report(results: list[Check], examples: int) -> dict[str, Any]:
    """Return the content of masking.json."""
    return {
        "examples": examples,
        "passed": all(check.ok for check in results),
        "checks": [asdict(check) for check in results],
    }


@torch.no_grad()
def _noise(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> float:
    """Return the accuracy at the worst of `_NOISES` uniform random points of the ball."""
    right = predictions(model, x) == y
    for number in range(_NOISES):
        state = rng.state(seed, x.device, step=number)
        near = kernels.uniform_start(x, threat.eps, state, norm=threat.norm, stream=rng.RESTART)
        right &= predictions(model, near) == y
    return share(right)


def _square(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> float:
    """Return the accuracy under the Square attack (Andriushchenko et al., arXiv 1912.00049).

    The attack uses no gradient.
    """
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(
        model, p_init=0.8, n_queries=_QUERIES, eps=threat.eps, norm=threat.norm, n_restarts=1,
        seed=seed, verbose=False, device=x.device, resc_schedule=False,
    )  # fmt: skip
    right = predictions(model, x) == y
    for part in right.nonzero().flatten().split(500):
        adversary = attack.perturb(x[part], y[part])
        right[part] &= predictions(model, adversary) == y[part]
    return share(right)


def _transfer(
    model: nn.Module, surrogate: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int
) -> float:
    """Return the accuracy on adversaries of PGD-20 on another network."""
    from ..adversary.attack import Attack

    right = predictions(model, x) == y
    for number, part in enumerate(torch.arange(len(x), device=x.device).split(500)):
        state = rng.state(seed, x.device, step=number)
        adversary, _ = Attack(steps=20)(surrogate, x[part], y[part], threat, state=state)
        right[part] &= predictions(model, adversary) == y[part]
    return share(right)
