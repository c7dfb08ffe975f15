"""The face every objective shares."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adversary.ascent import ascend_after_training
from ..adversary.attack import Attack
from ..device.phases import TRAIN_FORWARD, phase
from ..errors import EngineError
from ..rng import state as rng_state
from ..threat import ThreatModel, check_pixels


@dataclass(frozen=True)
class Passes:
    """What a training step costs in passes of the whole batch; each costs about one forward pass F."""

    forward: float
    input_grad: float
    weight_grad: float

    @property
    def total(self) -> float:
        # A share of a batch may be any number; nobody wants to read 6.300000000000001.
        total = round(self.forward + self.input_grad + self.weight_grad, 6)
        return int(total) if total == int(total) else total

    def of(self, share: float) -> Passes:
        """The same passes of a share of the batch."""
        if share == 1:
            return self
        return Passes(self.forward * share, self.input_grad * share, self.weight_grad * share)

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.input_grad + other.input_grad,
            self.weight_grad + other.weight_grad,
        )


def attack_passes(steps: int) -> Passes:
    """k forward passes and k input gradients."""
    return Passes(steps, steps, 0)


def trained_pass(model: nn.Module, x: Tensor) -> Tensor:
    """A forward pass that the loss will be differentiated through: images to logits [B, K]."""
    with phase(TRAIN_FORWARD):
        return model(x)


def attacked_pass(
    model: nn.Module, x: Tensor, adversary: Tensor, threat: ThreatModel, attack: Attack
) -> tuple[Tensor, Tensor | Callable[[], Tensor]]:
    """A training pass at the adversary, and what to remember of it: itself, or its free step."""
    if attack.steps:
        return trained_pass(model, adversary), adversary
    logits, step = ascend_after_training(model, adversary)
    return logits, lambda: step(threat.around(x), attack.step_size(threat.eps))


def trained_passes(sets: int) -> Passes:
    """Forward and full backward passes of `sets` batches."""
    return Passes(sets, sets, sets)


@dataclass(frozen=True)
class Outcome:
    """What an objective hands to the training step.

    Attributes:
        loss: 0-d, differentiable in the weights.
        adversary: like the batch, what the adversary memory stores; or what gives it once the loss's
            backward pass has run and before the weights change.
        stats: 0-d device tensors to log: batch means of the loss terms.
        correct: 0-d device tensor, how many adversaries are classified correctly.
    """

    loss: Tensor
    adversary: Tensor | Callable[[], Tensor]
    stats: dict[str, Tensor]
    correct: Tensor


class Objective(abc.ABC):
    """A training loss with the attack it needs; holds options only, no state of a run.

    Attributes:
        free_step: it can train at the remembered adversary itself (`attack.steps` = 0).
    """

    free_step: ClassVar[bool] = False

    def check(self, attack: Attack) -> None:
        """Refuse an attack that this objective cannot use; EngineError."""
        if attack.steps == 0 and not (self.free_step and attack.start == "memory"):
            raise EngineError(
                "attack.steps = 0 trains at remembered adversaries: it needs attack.start = memory, and "
                "the objective pgd or local-ball"
            )

    @abc.abstractmethod
    def passes(self, attack: Attack) -> Passes:
        """What one step costs."""

    @abc.abstractmethod
    def compute(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        attack: Attack,
        start: Tensor | None,
        state: Tensor,
    ) -> Outcome:
        """The loss on one batch; arguments as for `__call__`."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        attack: Attack,
        *,
        start: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Outcome:
        """The loss on one batch.

        Args:
            model: [0, 1] images to logits [B, K], in training mode.
            x: float32 [B, ...] in [0, 1]; y: int64 [B].
            start: where the attack begins (from an `AdversaryMemory`); left out: a random point.
            state: random state int64 [2], not advanced; left out: one kept for the device, seeded
                from `torch.initial_seed()` and advanced by every call.
        Raises:
            EngineError: for a model's first batch, called without a state, outside [0, 1].
        """
        if state is None and model not in _checked:
            check_pixels(x)
            _checked.add(model)
        if state is not None:
            return self.compute(model, x, y, threat, attack, start, state)
        shared = _shared_state(x.device)
        outcome = self.compute(model, x, y, threat, attack, start, shared)
        shared[1] += 1
        return outcome


# The models whose first batch was looked at; a look at every batch would make the host wait.
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Each with the seed that it was made of: to read it there would make the host wait for the device.
_states: dict[torch.device, tuple[int, Tensor]] = {}


def _shared_state(device: torch.device) -> Tensor:
    seed = _seed()
    if device not in _states or _states[device][0] != seed:
        _states[device] = seed, rng_state(seed, device)
    return _states[device][1]


def _seed() -> int:
    return torch.initial_seed() & ((1 << 63) - 1)
