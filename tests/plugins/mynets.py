"""A network and an objective of one's own, as a user writes them: no part of the engine.

The page docs/adding-a-method.md shows this file.
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

import engine
from engine import kernels
from engine.objectives.base import attack_passes, trained_pass, trained_passes


@engine.models.register("my-net")
def my_net(in_channels, size, classes):
    """Build a network for images [B, C, H, W] in [0, 1]; `size` is (height, width)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, classes),
    )


@engine.objectives.register
@dataclass(frozen=True)
class Pairing(engine.Objective):
    """CE(f(a), y) + weight mean (f(x) - f(a))^2."""

    name: Literal["pairing"] = "pairing"
    weight: Annotated[float, Field(ge=0, description="weight of the pairing term")] = 0.5

    def passes(self, attack):
        return attack_passes(attack.steps) + self.loss_passes()

    def loss_passes(self):
        return trained_passes(2)

    def compute(self, model, x, y, threat, attack, start, state):
        adversary, _ = attack(model, x, y, threat, start=start, state=state)
        at_adversary, at_clean = trained_pass(model, adversary), trained_pass(model, x)
        loss, stats = kernels.local_ball_loss(at_adversary, y)
        pairing = (at_clean - at_adversary).square().mean()
        terms = {"ce": stats.cross_entropy, "pairing": pairing.detach()}
        return engine.Outcome(loss + self.weight * pairing, adversary, terms, stats.correct_adv)
