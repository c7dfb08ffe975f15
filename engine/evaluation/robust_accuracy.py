"""Robust accuracy: PGD with restarts, AutoAttack, and the pointwise worst case of both."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from .. import rng
from ..adversary.ascent import (
    LogitsGrad,
    ascend,
    random_point,
    towards_errors,
    towards_runner_up,
)
from ..adversary.inputs import check_network, device_of, ready
from ..data import arrays
from ..device.precision import arithmetic, passes
from ..errors import EngineError
from ..models import stem_of
from ..threat import ThreatModel, check_threat
from .autoattack import ensemble, package
from .work import Progress, Work, silent

Judge = Literal["pyautoattack", "engine"]
EvaluationPrecision = Literal["fp32", "bf16"]
PgdLoss = Literal["cross-entropy", "margin"]
PgdStep = Literal["constant", "decaying"]
_GRADIENTS: dict[PgdLoss, Callable[[Tensor], LogitsGrad]] = {
    "cross-entropy": towards_errors,
    "margin": towards_runner_up,
}


@dataclass
class Report:
    """Hold the results of an evaluation.

    Attributes:
        threat: the ball that was attacked in.
        examples: number of test images.
        clean: accuracy in [0, 1]; pgd and autoattack the same, None where the attack was not run.
        worst_case: share of images that withstood every attack that was run.
        after: AutoAttack's robust accuracy after each of its attacks.
        judge: who ran AutoAttack: "pyautoattack" or "engine".
        seconds: wall-clock seconds in all, with those before a kill.
        notes: warnings of AutoAttack's own checks.
        attacks: the attacks of AutoAttack, see `attack_names`.
        precision: of the attacks' passes.
    """

    threat: ThreatModel
    examples: int
    clean: float
    pgd: float | None
    autoattack: float | None
    worst_case: float
    pgd_steps: int
    pgd_restarts: int
    autoattack_version: str
    judge: str
    seconds: float
    after: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    attacks: tuple[str, ...] = ()
    precision: EvaluationPrecision = "fp32"

    def standard_error(self, accuracy: float) -> float:
        """Return the binomial standard error of an accuracy on `examples` images."""
        return math.sqrt(accuracy * (1 - accuracy) / max(self.examples, 1))


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor, *, batch_size: int = 1000) -> Tensor:
    """Predict classes, int64 [N], of [0, 1] images x [N, ...], in the model's present mode."""
    if len(x) == 0:
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    return torch.cat([model(chunk).argmax(dim=1) for chunk in x.split(batch_size)])


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 50,
    restarts: int = 10,
    loss: PgdLoss = "cross-entropy",
    step: PgdStep = "constant",
    seed: int = 0,
    batch_size: int = 500,
    work: Work | None = None,
    precision: EvaluationPrecision = "fp32",
) -> Tensor:
    """Run PGD with restarts (Madry et al., arXiv 1706.06083).

    An image counts as broken if any point of any restart is misclassified. Broken images leave the
    batch, so the cost falls with the robust accuracy.

    Args:
        model: in evaluation mode, [0, 1] images to logits.
        x: float32 [N, ...] in [0, 1]; y: int64 [N].
        loss: what the steps climb: the cross-entropy, or the margin, which is the best wrong logit
            minus the label's.
        step: the step size. constant: eps / 4 (2.5 eps / steps below ten steps); decaying: from eps
            linearly to eps / steps. Constant steps overstate robust accuracy at a large radius.
        work: runs the batches; left out: here and silently.
        precision: of the attack's passes, "fp32" or "bf16". In bf16 an image falls only where the
            float32 network is wrong at the same point; an image that falls in bf16 alone is
            attacked again in float32.
    Returns:
        bool [N], True for images that every point leaves correctly classified.
    """
    gradient, work = _GRADIENTS[loss], work or Work()
    if step == "decaying":
        sizes = [threat.eps * (1 - k / steps) for k in range(steps)]
    else:
        sizes = [threat.eps * max(0.25, 2.5 / steps)] * steps
    robust = predictions(model, x, batch_size=batch_size) == y

    def attack(indices: Tensor, state: Tensor, precision: str = precision) -> Tensor:
        fallen, points = _break(model, x, y, indices, threat, gradient, sizes, state, precision)
        if precision == "fp32" or len(fallen) == 0:
            return fallen.unique()
        wrong = predictions(model, points, batch_size=batch_size) != y[fallen]
        confirmed = fallen[wrong].unique()
        rest = fallen[~wrong].unique()
        rest = rest[~torch.isin(rest, confirmed)]
        return torch.cat([confirmed, attack(rest, state, "fp32")]) if len(rest) else confirmed

    for restart in range(restarts):

        def judge(number: int, indices: Tensor, restart: int = restart) -> Tensor:
            state = rng.state(seed, x.device, step=restart * 1_000_003 + number)
            return attack(indices, state)

        batches = robust.nonzero().flatten().split(batch_size)
        name = f"PGD restart {restart + 1} of {restarts}"
        robust[work.fallen(name, batches, judge)] = False
    return robust


def _break(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    threat: ThreatModel,
    gradient: Callable[[Tensor], LogitsGrad],
    sizes: list[float],
    state: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Run one restart of PGD.

    Args:
        sizes: of the steps, one after the other [pixel units].
        precision: of the passes, "fp32" or "bf16".
    Returns:
        The members of `indices` that break, int64 [F], some more than once, and the points at which
        they break, [F, C, H, W].
    """
    ball, labels, stem = threat.around(x[indices]), y[indices], stem_of(model)
    z = random_point(ball, state, stream=rng.RESTART)
    broken: list[Tensor] = []
    points: list[Tensor] = []
    for step in range(len(sizes) + 1):
        with passes(precision, x.device):
            if step < len(sizes):
                following, logits = ascend(
                    model, ball, z, gradient(labels), alpha=sizes[step], stem=stem
                )
            else:
                with torch.no_grad():
                    following, logits = z, model(z)
        alive = logits.argmax(dim=1) == labels
        broken.append(indices[~alive])
        points.append(z[~alive])
        if not alive.any():
            break
        # A copy of the batch costs time; it pays after a tenth of the batch is broken.
        if (~alive).sum() * 10 >= len(alive):
            indices, labels, following = indices[alive], labels[alive], following[alive]
            ball = threat.around(ball.centre[alive])
        z = following
    return torch.cat(broken), torch.cat(points)


# Who runs AutoAttack, by the name that recipes use.
JUDGES = {"pyautoattack": package.run, "engine": ensemble.run}


def check_precision(precision: str, judge: str, version: str) -> None:
    """Raise an EngineError where the authors' package is to judge in another precision than fp32.

    Args:
        version: of AutoAttack, as for `attack_names`.
    """
    if precision != "fp32" and judge != "engine" and version != "none":
        raise EngineError(
            f"evaluation.precision = {precision}: the authors' AutoAttack judges in fp32 only: set "
            "evaluation.judge = engine"
        )


def _check_options(
    judge: str, version: str, precision: str, steps: int, restarts: int, batch_size: int
) -> None:
    """Raise an EngineError for an option that no evaluation has."""
    for name, value, allowed in (
        ("judge", judge, JUDGES),
        ("autoattack_version", version, (*ensemble.VERSIONS, "none")),
        ("precision", precision, get_args(EvaluationPrecision)),
    ):
        if value not in allowed:
            raise EngineError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    for name, count in (
        ("pgd_steps", steps),
        ("pgd_restarts", restarts),
        ("batch_size", batch_size),
    ):
        if count < 1:
            raise EngineError(f"{name} must be at least 1, got {count}")
    check_precision(precision, judge, version)


def attack_names(version: str, classes: int) -> tuple[str, ...]:
    """Return the attacks of a version of AutoAttack, in their order.

    The targeted DLR loss of "apgd-t" compares four logits. With fewer classes APGD on the
    difference between the two largest logits takes its place.

    Args:
        version: "standard", "apgd" (its first two attacks) or "none".
        classes: number of logits.
    Raises:
        EngineError: for fewer than two classes.
    """
    if classes < 2:
        raise EngineError(f"an attack needs at least 2 classes, the model has {classes}")
    if version == "none":
        return ()
    second = "apgd-t" if classes >= package.FEWEST_CLASSES else "apgd-difference"
    return ("apgd-ce", second) + (("fab-t", "square") if version == "standard" else ())


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Set evaluation mode without weight gradients in the block, then restore the old state."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for p, _ in wanted:
        # Weight gradients would keep activations, and so memory, in every attack.
        p.requires_grad_(False)
    try:
        yield model
    finally:
        for m, mode in modes:
            m.training = mode
        for p, flag in wanted:
            p.requires_grad_(flag)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    pgd_steps: int = 50,
    pgd_restarts: int = 10,
    autoattack_version: str = "standard",
    judge: Judge = "pyautoattack",
    batch_size: int = 500,
    seed: int = 0,
    precision: EvaluationPrecision = "fp32",
    progress: Progress = silent,
    work: Work | None = None,
) -> Report:
    """Measure clean accuracy, and run PGD with restarts and AutoAttack on the same images.

    Args:
        model: any module from [0, 1] images to logits; its mode is restored afterwards.
        x: float32 [N, C, H, W] in [0, 1]; y: whole numbers [N]; tensors on the model's device, or
            NumPy arrays.
        threat: the ball to attack in.
        pgd_steps, pgd_restarts: of `pgd`, at least 1 each.
        autoattack_version: "standard" (four attacks), "apgd" (the first two) or "none".
        judge: who runs AutoAttack: "pyautoattack", the authors' package, or "engine", the engine's
            own form of the same attacks. It also judges networks of two or three classes, which the
            package's targeted losses do not take.
        batch_size: images in memory at once.
        seed: of both attacks.
        precision: of the attacks' passes, see `pgd`. Clean accuracy and every verdict are the
            float32 network's. The authors' package judges in "fp32" only.
        progress: called with (attack, batches done, batches).
        work: runs the batches in place of `progress`: in several processes, or from where a stopped
            evaluation ended.
    Returns:
        The accuracies, and the robust accuracy after each of AutoAttack's attacks.
    Raises:
        EngineError: if the images leave [0, 1] or there are none, the labels do not fit them, the
            network cannot be attacked (`check_network` lists the cases), an option is unknown, or
            the authors' package is to judge in bf16.
    """
    x, y = arrays.pair((x, y), device_of(model) or torch.device("cpu")) or (x, y)
    return evaluate_parts(
        model,
        [(x, y)],
        threat,
        pgd_steps=pgd_steps,
        pgd_restarts=pgd_restarts,
        autoattack_version=autoattack_version,
        judge=judge,
        batch_size=batch_size,
        seed=seed,
        precision=precision,
        work=work or Work(progress),
    )


class Parts(Protocol):
    """Give a set of images in parts."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class _Part:
    """Hold the results of one part: bool [N], and AutoAttack's answer."""

    clean: Tensor
    pgd: Tensor
    autoattack: Tensor | None
    attacks: tuple[str, ...]
    judge: Judge
    after: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate_parts(
    model: nn.Module,
    parts: Parts,
    threat: ThreatModel,
    *,
    pgd_steps: int = 50,
    pgd_restarts: int = 10,
    autoattack_version: str = "standard",
    judge: Judge = "pyautoattack",
    batch_size: int = 500,
    seed: int = 0,
    precision: EvaluationPrecision = "fp32",
    work: Work | None = None,
) -> Report:
    """Evaluate a set that is too large to lie in memory: all attacks on one part after the other.

    Args:
        parts: each (x, y) as `evaluate` takes them; only one is held at a time.
        batch_size: images in one pass; a part may be larger.
    The other arguments, the result and the errors are those of `evaluate`.
    """
    check_threat(threat)
    _check_options(judge, autoattack_version, precision, pgd_steps, pgd_restarts, batch_size)
    device = device_of(model)
    began, work = time.perf_counter(), work or Work()
    found: list[_Part] = []
    with evaluation_mode(model):
        for number, (x, y) in enumerate(parts):
            x, y = ready(x, y, device, pictures=autoattack_version != "none")
            # The attacks run again on every part.
            work.part = f", part {number + 1} of {len(parts)}" if len(parts) > 1 else ""
            # Passes outside the attacks, and all backward passes, are exact on a GPU too.
            with arithmetic("fp32", x.device):
                part = _evaluate_part(
                    model,
                    x,
                    y,
                    threat,
                    pgd_steps=pgd_steps,
                    pgd_restarts=pgd_restarts,
                    version=autoattack_version,
                    judge=judge,
                    batch_size=batch_size,
                    seed=seed + number,
                    precision=precision,
                    work=work,
                )
            found.append(part)
    if not found:
        raise EngineError("cannot evaluate 0 images")
    clean = torch.cat([part.clean for part in found])
    by_pgd = torch.cat([part.pgd for part in found])
    masks = [part.autoattack for part in found if part.autoattack is not None]
    by_aa = torch.cat(masks) if masks else None
    return Report(
        threat=threat,
        examples=len(clean),
        clean=share(clean),
        pgd=share(by_pgd),
        autoattack=None if by_aa is None else share(by_aa),
        worst_case=share(by_pgd if by_aa is None else by_pgd & by_aa),
        pgd_steps=pgd_steps,
        pgd_restarts=pgd_restarts,
        autoattack_version=autoattack_version,
        judge=found[0].judge,
        precision=precision,
        seconds=work.seconds + time.perf_counter() - began,
        after=_after(found),
        notes=list(dict.fromkeys(note for part in found for note in part.notes)),
        attacks=found[0].attacks,
    )


def _evaluate_part(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    pgd_steps: int,
    pgd_restarts: int,
    version: str,
    judge: Judge,
    batch_size: int,
    seed: int,
    precision: EvaluationPrecision,
    work: Work,
) -> _Part:
    classes = check_network(model, x, y)
    attacks = attack_names(version, classes)
    clean = predictions(model, x, batch_size=batch_size) == y
    by_pgd = pgd(
        model,
        x,
        y,
        threat,
        steps=pgd_steps,
        restarts=pgd_restarts,
        seed=seed,
        batch_size=batch_size,
        work=work,
        precision=precision,
    )
    if classes < package.FEWEST_CLASSES:
        judge = "engine" if attacks else judge
    part = _Part(clean, by_pgd, None, attacks, judge)
    if attacks:
        # The authors' package has one precision: `check_precision`.
        options: dict[str, Any] = {"precision": precision} if judge == "engine" else {}
        verdict = JUDGES[judge](
            model,
            x,
            y,
            threat,
            version=version,
            seed=seed,
            batch_size=batch_size,
            work=work,
            **options,
        )
        part.autoattack = verdict.robust
        part.after, part.notes = verdict.after, verdict.notes
    return part


def _after(parts: list[_Part]) -> dict[str, float]:
    """Return the robust accuracy of all parts after each attack, in the attacks' order.

    A judge skips the attacks that come after the last image of a part has fallen.
    """
    if len(parts) == 1:
        return parts[0].after
    total = sum(len(part.clean) for part in parts)
    return {
        name: sum(part.after.get(name, 0.0) * len(part.clean) for part in parts) / total
        for name in max((part.after for part in parts), key=len)
    }


def share(mask: Tensor) -> float:
    """Return the share of True in bool [N]."""
    return float(mask.double().mean())
