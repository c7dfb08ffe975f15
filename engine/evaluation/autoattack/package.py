"""AutoAttack by its authors' package, pyautoattack."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...errors import EngineError
from ...threat import ThreatModel
from ..work import Work
from .verdict import Attack, Verdict, in_turn

# The package's targeted DLR loss compares four logits.
FEWEST_CLASSES = 4
_LOGGER = logging.getLogger("auto-attack")


def run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: str = "standard",
    seed: int = 0,
    batch_size: int = 500,
    work: Work | None = None,
) -> Verdict:
    """Run AutoAttack (Croce & Hein, arXiv 2003.01690) of the package pyautoattack.

    Args:
        model: in evaluation mode, [0, 1] images to logits.
        x: float32 [N, C, H, W] in [0, 1]; y: int64 [N].
        version: "standard" (APGD-CE, targeted APGD, targeted FAB, Square), or "apgd" for the first
            two, where APGD-CE has the package's five restarts (standard: one).
    Raises:
        EngineError: for fewer than four classes, which its targeted loss needs.
    """
    from pyautoattack import AutoAttack
    from pyautoattack.checks import check_square_sr

    work = work or Work()
    with torch.no_grad():
        clean = torch.cat([model(images) for images in x.split(batch_size)])
    classes = clean.shape[1]
    if classes < FEWEST_CLASSES:
        raise EngineError(
            f"AutoAttack needs at least {FEWEST_CLASSES} classes, the model has {classes}"
        )
    attacks = ["apgd-ce", "apgd-t"] if version == "apgd" else None
    judge = AutoAttack(
        model,
        norm=threat.norm,
        eps=threat.eps,
        seed=seed,
        device=x.device,
        version="custom" if attacks else "standard",
        attacks=attacks,
    )
    # The standard is nine targets for ten classes and more.
    judge.apgd_targeted.n_target_classes = min(9, classes - 1)
    judge.fab.n_target_classes = min(9, classes - 1)

    def attack_of(name: str) -> Attack:
        def attack(rows: Tensor) -> tuple[Tensor, Tensor]:
            judge.attacks_to_run = [name]
            with _warnings_into(work.notes):
                found, predicted = judge.run_standard_evaluation(
                    x[rows], y[rows], batch_size=batch_size
                )
            fallen = predicted != y[rows]
            return rows[fallen], found[fallen]

        return attack

    names = list(judge.attacks_to_run)
    verdict = in_turn(
        {name: attack_of(name) for name in names}, x, clean.argmax(1) == y, batch_size, work
    )
    notes: list[str] = []
    with _warnings_into(notes):
        start = float((clean.argmax(1) == y).double().mean())
        check_square_sr({"clean": start, **verdict.after}, logger=_LOGGER)
    return replace(verdict, notes=[*work.notes, *notes])


@contextlib.contextmanager
def _warnings_into(notes: list[str]) -> Iterator[None]:
    """Collect the package's warnings, and keep its log lines off the screen."""
    listener = _Listener(notes)
    level, propagate = _LOGGER.level, _LOGGER.propagate
    _LOGGER.addHandler(listener)
    _LOGGER.setLevel(logging.WARNING)
    _LOGGER.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
    finally:
        _LOGGER.removeHandler(listener)
        _LOGGER.setLevel(level)
        _LOGGER.propagate = propagate
    for warning in caught:
        if "autoattack" in str(warning.filename).lower():
            _add(notes, str(warning.message))


class _Listener(logging.Handler):
    """Read the warnings among AutoAttack's log lines."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        _add(self.notes, record.getMessage())


def _add(notes: list[str], note: str) -> None:
    """Add a note, unless it is there: each batch gives the same ones."""
    if note not in notes:
        notes.append(note)
