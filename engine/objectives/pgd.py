"""PGD adversarial training (Madry et al., arXiv 1706.06083). 2k + 3 F."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.attack import Attack
from ..device.phases import LOSS, phase
from ..kernels import Labels
from ..threat import ThreatModel
from .base import (
    Objective,
    Outcome,
    Passes,
    Smoothing,
    attack_passes,
    attacked_pass,
    trained_passes,
)


@dataclass(frozen=True)
class PGD(Objective):
    """Minimise E[CE(f(a), y)], with a from k projected gradient steps (equation 2.1).

    With k = 1 from a random point this is Fast-AT's FGSM-RS (Wong et al., arXiv 2001.03994). With
    k = 1 from the adversary memory it is ATTA (Zheng et al., arXiv 1912.11969). With k = 0 and
    `optim.replays` it is Free-AT (Shafahi et al., arXiv 1904.12843).
    """

    free_step: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    name: Literal["pgd"] = "pgd"
    label_smoothing: Smoothing = 0.0

    def passes(self, attack: Attack) -> Passes:
        return attack_passes(attack.steps) + self.loss_passes()

    def loss_passes(self) -> Passes:
        return trained_passes(1)

    def compute(
        self,
        model: nn.Module,
        x: Tensor,
        y: Labels,
        threat: ThreatModel,
        attack: Attack,
        start: Tensor | None,
        state: Tensor,
    ) -> Outcome:
        adversary, _ = attack(model, x, y, threat, start=start, state=state)
        logits, keep = attacked_pass(model, x, adversary, threat, attack)
        with phase(LOSS):
            loss, stats = kernels.local_ball_loss(logits, y, label_smoothing=self.label_smoothing)
        return Outcome(loss, keep, {"ce": stats.cross_entropy}, stats.correct_adv)
