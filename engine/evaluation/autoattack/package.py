"""AutoAttack by its authors' package, pyautoattack."""

from __future__ import annotations

import logging
import math
import re
import warnings

from torch import Tensor, nn

from ...errors import EngineError
from ...threat import ThreatModel
from .verdict import Progress, Verdict, silent

# The package's targeted DLR loss compares four logits.
FEWEST_CLASSES = 4


def run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: str = "standard",
    seed: int = 0,
    batch_size: int = 500,
    progress: Progress = silent,
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

    classes = model(x[:1]).shape[1]
    if classes < FEWEST_CLASSES:
        raise EngineError(
            f"AutoAttack needs at least {FEWEST_CLASSES} classes, the model has {classes}"
        )
    attacks = ["apgd-ce", "apgd-t"] if version == "apgd" else None
    after: dict[str, float] = {}
    listener = _Listener(after, progress, batches=math.ceil(len(x) / batch_size))
    logger = logging.getLogger("auto-attack")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
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
            adversaries, predicted = judge.run_standard_evaluation(x, y, batch_size=batch_size)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate
    notes = listener.warnings + [
        str(w.message) for w in caught if "autoattack" in str(w.filename).lower()
    ]
    return Verdict(predicted == y, adversaries, after, notes)


class _Listener(logging.Handler):
    """Read AutoAttack's log lines: accuracy after each attack, progress, warnings."""

    _AFTER = re.compile(r"robust accuracy after ([\w-]+): ([\d.]+)%")
    _BATCH = re.compile(r"^([\w-]+) - (\d+)/(\d+) -")

    def __init__(self, after: dict[str, float], progress: Progress, batches: int) -> None:
        super().__init__(logging.DEBUG)
        self.after, self.progress, self.batches = after, progress, batches
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.warnings.append(line)
        if match := self._AFTER.match(line):
            self.after[match[1].lower()] = float(match[2]) / 100
        if match := self._BATCH.match(line):
            self.progress(match[1], int(match[2]), int(match[3]))
