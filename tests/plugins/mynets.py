"""A network, an objective, an optimiser and a loader of one's own: no part of the engine.

The page docs/adding-a-method.md shows this file.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

import engine
from engine import kernels
from engine.data.loaders import Batch, Loader
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


@engine.optimisers.register("lion")
class Lion(torch.optim.Optimizer):
    """Step along the sign of an averaged gradient (Chen et al., arXiv 2302.06675)."""

    def __init__(self, params, lr, *, momentum, weight_decay):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                average = state.setdefault("average", torch.zeros_like(p))
                state["steps"] = state.get("steps", 0) + 1
                direction = average.lerp(p.grad, 1 - group["momentum"]).sign_()
                p.add_(direction + group["weight_decay"] * p, alpha=-group["lr"])
                average.lerp_(p.grad, 0.01)


@engine.loaders.register("in-order")
class InOrder(Loader):
    """Give the images in their order, neither shuffled nor augmented."""

    def __init__(self, images, labels, batch_size, *, device, rank=0, world=1, **unused):
        samples = torch.arange(len(images) // (batch_size * world) * batch_size * world)
        self.batches = samples.view(-1, world, batch_size)[:, rank]
        self.images, self.labels, self.device = images, labels, device

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, first=0):
        for samples in self.batches[first:]:
            x, y = self.images[samples].float() / 255, self.labels[samples]
            crops = torch.zeros((len(samples), 3), dtype=torch.int32)
            yield Batch(*(t.to(self.device) for t in (x, y, samples, crops)))
