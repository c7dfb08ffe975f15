"""Make small training steps, and compare them bit for bit, for the tests of the step."""

from __future__ import annotations

import torch
from torch import nn

from engine import AdversaryMemory, Attack, Linf, LocalBall, Schedule
from engine.data.loaders import ResidentLoader
from engine.models.dropout import Dropout
from engine.training.optimiser import Optimiser
from engine.training.step import Step

from ..conftest import Tiny, blobs

STEPS = 20


class Dropped(Tiny):
    """With batch normalisation and dropout: everything that changes while training."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.drop = Dropout(0.3)

    def body(self, h):
        return self.fc(self.drop(torch.tanh(self.bn(h)).flatten(1)))


def make(
    model: nn.Module,
    *,
    objective=None,
    threat=None,
    attack=None,
    optimiser="sgd",
    steps=STEPS,
    lr=0.05,
    memory=None,
    schedule=None,
    **options,
) -> Step:
    model.train()
    return Step(
        model,
        objective=objective or LocalBall(global_weight=0.5),
        threat=threat or Linf(0.1),
        attack=attack or Attack(steps=2),
        optimiser=Optimiser(
            model,
            lr=(schedule or Schedule()).rates(lr, steps),
            name=optimiser,
            weight_decay=1e-3,
            ema=0.9,
        ),
        memory=memory,
        seed=5,
        **options,
    )


def train(step: Step, memory: AdversaryMemory | None = None, steps: int = STEPS) -> None:
    images, labels = blobs(64)
    loader = ResidentLoader(images, labels, 16, pad=1, flip=True, memory=memory)
    epoch = 0
    while step.done < steps:
        for batch in loader.epoch(epoch):
            if step.done < steps:
                step(batch)
        epoch += 1


def assert_same(ours: Step, theirs: Step) -> None:
    """Bit for bit: weights, statistics, momentum, average, counters, metrics, memory."""
    mine, yours = ours.tensors(), theirs.tensors()
    assert mine.keys() == yours.keys()
    for name in mine:
        assert torch.equal(mine[name], yours[name]), name
    assert ours.means() == theirs.means()
