"""The base class of the objectives, their passes and their results."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adversary.ascent import ascend_after_training, random_point
from ..adversary.attack import Attack
from ..device.phases import ATTACK_START, TRAIN_FORWARD, phase
from ..errors import EngineError
from ..kernels import Labels, MixedLabels
from ..rng import state as rng_state
from ..threat import Ball, ThreatModel, check_pixels

# The option of every objective that smooths its labels.
Smoothing = Annotated[
    float, Field(ge=0, lt=1, description="label smoothing of the cross-entropy [0..1)")
]


@dataclass(frozen=True)
class Passes:
    """Count the passes of a training step over the whole batch, each about one forward pass F."""

    forward: float
    input_grad: float
    weight_grad: float

    @property
    def total(self) -> float:
        # A share of a batch may be any number: print 6.3, not 6.300000000000001.
        total = round(self.forward + self.input_grad + self.weight_grad, 6)
        return int(total) if total == int(total) else total

    def of(self, share: float) -> Passes:
        """Return the same passes over a share of the batch."""
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
    """Return the passes of `steps` attack steps: a forward pass and an input gradient each."""
    return Passes(steps, steps, 0)


def trained_pass(model: nn.Module, x: Tensor) -> Tensor:
    """Run a forward pass that the loss is differentiated through: images to logits [B, K]."""
    with phase(TRAIN_FORWARD):
        return model(x)


def bernoulli_start(x: Tensor, size: float | Tensor, state: Tensor) -> Tensor:
    """Return `x` plus or minus `size` [pixel units] in every pixel, like `x`, clipped to [0, 1]."""
    with phase(ATTACK_START):
        middle = torch.full_like(x, 0.5)
        signs = (random_point(Ball(middle, 0.25, "Linf"), state) - middle).sign()
        return (x + size * signs).clamp(0, 1)


def attacked_pass(
    model: nn.Module, x: Tensor, adversary: Tensor, threat: ThreatModel, attack: Attack
) -> tuple[Tensor, Tensor | Callable[[], Tensor]]:
    """Run a training pass at the adversary; return its logits and the adversary to remember.

    Without attack steps, the adversary to remember is the free step from `ascend_after_training`.
    """
    if attack.steps:
        return trained_pass(model, adversary), adversary
    logits, step = ascend_after_training(model, adversary)
    return logits, lambda: step(threat.around(x), attack.step_size(threat.eps))


def trained_passes(sets: int) -> Passes:
    """Return the forward and full backward passes of `sets` batches."""
    return Passes(sets, sets, sets)


@dataclass(frozen=True)
class Outcome:
    """Hold the result of an objective for the training step.

    Attributes:
        loss: 0-d, differentiable in the weights.
        adversary: like the batch, for the adversary memory; or a function that returns it after the
            loss's backward pass and before the weights change.
        stats: 0-d device tensors to log: batch means of the loss terms.
        correct: 0-d device tensor, the number of adversaries that are classified correctly.
    """

    loss: Tensor
    adversary: Tensor | Callable[[], Tensor]
    stats: dict[str, Tensor]
    correct: Tensor


class Objective(abc.ABC):
    """Compute a training loss with its attack; an objective has options and no state of a run.

    Attributes:
        name: what recipes call the objective.
        free_step: whether the objective can train at the remembered adversary (`attack.steps` = 0).
        mixes: whether the objective takes mixed labels, those of CutMix.
    """

    name: str
    free_step: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    def check(self, attack: Attack) -> None:
        """Raise an EngineError for an attack that this objective cannot use."""
        if attack.steps == 0 and not (self.free_step and attack.start == "memory"):
            raise EngineError(
                "attack.steps = 0 trains at remembered adversaries: it needs attack.start = "
                "memory, and the objective pgd or local-ball"
            )

    def check_mixes(self) -> None:
        """Raise an EngineError if this objective takes no mixed labels."""
        if not self.mixes:
            known = ", ".join(name for name, kind in OBJECTIVES.items() if kind.mixes)
            raise EngineError(
                f"data.cutmix mixes labels, and the objective {self.name} needs one label for each "
                f"image: take one of {known}"
            )

    @abc.abstractmethod
    def passes(self, attack: Attack) -> Passes:
        """Return the passes of one step."""

    @abc.abstractmethod
    def loss_passes(self) -> Passes:
        """Return the passes of the loss alone, at points that the attacks have already found."""

    @abc.abstractmethod
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
        """Compute the loss of one batch; the arguments are those of `__call__`."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Labels,
        threat: ThreatModel,
        attack: Attack,
        *,
        start: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Outcome:
        """Compute the loss of one batch.

        Args:
            model: [0, 1] images to logits [B, K], in training mode.
            x: float32 [B, ...] in [0, 1]; y: int64 [B], or mixed labels where `mixes`.
            start: the attack's starting point (from an `AdversaryMemory`); default a random point.
            state: random state int64 [2], read only. The default is a state of the device, which
                has its seed from `torch.initial_seed()` and which every call advances.
        Raises:
            EngineError: for a model's first batch, called without a state, outside [0, 1]; for
                mixed labels that the objective does not take.
        """
        if isinstance(y, MixedLabels):
            self.check_mixes()
        if state is None and model not in _checked:
            check_pixels(x)
            _checked.add(model)
        if state is not None:
            return self.compute(model, x, y, threat, attack, start, state)
        shared = _shared_state(x.device)
        outcome = self.compute(model, x, y, threat, attack, start, shared)
        shared[1] += 1
        return outcome


# The objectives by the name that recipes use.
OBJECTIVES: dict[str, type[Objective]] = {}
Kind = TypeVar("Kind", bound=type[Objective])


def register(kind: Kind) -> Kind:
    """Give recipes an objective: `objective.name` is the default of the class's field `name`.

    It decorates a frozen dataclass (pydantic's checks its fields) that is an `Objective`.

    Raises:
        EngineError: for another class, or a name that another objective has.
    """
    fields = getattr(kind, "__dataclass_fields__", {})
    name = fields["name"].default if "name" in fields else None
    if not (isinstance(kind, type) and issubclass(kind, Objective) and is_dataclass(kind)):
        raise EngineError(f"{kind!r:.80} is no objective: it must be a dataclass and an Objective")
    if not isinstance(name, str):
        raise EngineError(
            f"objective {kind.__name__} needs a name, as in: name: Literal['mine'] = 'mine'"
        )
    if name in OBJECTIVES:
        raise EngineError(f"there is an objective {name!r} already: register another name")
    OBJECTIVES[name] = kind
    return kind


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
