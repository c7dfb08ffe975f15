"""Whether a step can be captured in a CUDA graph, found out without a GPU.

A graph replays kernels on the addresses, and with the numbers, that it was captured with. `Tape` does
the same on any device, one level up: it records the operators that a step dispatches, with their
tensors and their Python numbers, and replays that list. A step whose replays do what the eager step
does holds nothing that a graph would freeze wrongly; whatever it may not do at all (read a value on
the host, shape a tensor by its contents, draw from a generator, touch a tensor that may move) shows
in the list.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data import datasets
from ..data.loaders import ResidentLoader
from ..device import phases
from ..device.capture import Run
from ..recipes import Recipe
from ..runs import build
from ..training.step import Step

_FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_FROM_HOST = ("lift_fresh", "lift_fresh_copy", "scalar_tensor")


@dataclass
class _Entry:
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    phase: str
    replayed: bool


class Tape(TorchDispatchMode):
    """Records what a function dispatches; `replay` does it again. Stands in for `CudaGraphs`.

    Args:
        known: the tensors that the function may touch besides those it makes.
    Attributes:
        entries: every operator of the last recording, in order.
        complaints: what a CUDA graph would not allow or would freeze, one line each.
    """

    def __init__(self, known: Callable[[], Iterable[Tensor]] = tuple) -> None:
        super().__init__()
        self.known = known
        self.entries: list[_Entry] = []
        self.complaints: list[str] = []
        self._phases: list[str] = []
        self._made: set[int] = set()

    # ---- the recorder's face -----------------------------------------------------------------

    def context(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def warm_up(self, run: Run) -> None:
        run()

    def record(self, run: Run) -> Run:
        """Run once, recorded; what comes back replays it."""
        self.entries.clear()
        self._made = {_storage(t) for t in self.known()}
        with phases.listening(self), self:
            run()
        return self.replay

    def close(self) -> None:
        self.entries.clear()

    def replay(self) -> None:
        """Every recorded operator again, on the recorded tensors, into the recorded results."""
        with torch.no_grad():
            for entry in self.entries:
                if entry.replayed:
                    results = tree_leaves(entry.op(*entry.args, **entry.kwargs))
                    for into, result in zip(entry.outputs, results, strict=True):
                        if isinstance(into, Tensor) and _storage(into) != _storage(result):
                            into.copy_(result)

    # ---- listening ---------------------------------------------------------------------------

    def enter(self, name: str) -> None:
        self._phases.append(name)

    def exit(self, name: str) -> None:
        self._phases.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        outputs = tree_leaves(result)
        where = self._phases[-1] if self._phases else phases.BOOKKEEPING
        name = func._schema.name.removeprefix("aten::")
        self._judge(func, name, inputs, outputs, where)
        aliases = {_storage(t) for t in inputs}
        tensors = [t for t in outputs if isinstance(t, Tensor)]
        mutates = func._schema.is_mutable
        view = bool(tensors) and not mutates and all(_storage(t) in aliases for t in tensors)
        self._made |= {_storage(t) for t in tensors}
        replayed = not view and name not in _FACTORIES
        self.entries.append(_Entry(func, args, kwargs, outputs, where, replayed))
        return result

    def _judge(
        self, func: Any, name: str, inputs: list[Tensor], outputs: list[Any], where: str
    ) -> None:
        def complain(what: str) -> None:
            line = f"{where}: {name} {what}"
            if line not in self.complaints:
                self.complaints.append(line)

        if any(isinstance(value, (bool, int, float, complex)) for value in outputs):
            complain("reads a value of the device on the host")
        if torch.Tag.dynamic_output_shape in func.tags:
            complain("makes a tensor whose shape depends on its contents")
        if torch.Tag.nondeterministic_seeded in func.tags:
            complain("draws random numbers from a generator and not from the step's state")
        if name in _FROM_HOST:
            complain("makes a tensor from a number of the host's")
        for t in inputs:
            if _storage(t) not in self._made and not getattr(t, "is_constant", False):
                complain(f"touches a tensor {tuple(t.shape)} that the step does not own")


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


# ---- a recipe's step ---------------------------------------------------------------------------

_BATCH, _STEPS = 2, 3


@dataclass(frozen=True)
class Audit:
    """What a recipe's step dispatches, and what stands against capturing it.

    Attributes:
        complaints: one line each; none: the step can be captured.
        ops: operators that launch work (views and allocations left out), by phase.
        attack_step_ops: such operators in one attack step, network passes left out; loss_ops and
            optimiser_ops: in the loss, forward and backward, and in the optimiser with the average.
        stand_in: the optimiser that was recorded in place of the recipe's, apex's, which has no CPU to run
            on; None: the recipe's own.
    """

    recipe: str
    complaints: list[str]
    ops: dict[str, int]
    attack_step_ops: float
    loss_ops: int
    optimiser_ops: int
    stand_in: str | None = None

    @property
    def ok(self) -> bool:
        return not self.complaints


def audit(recipe: Recipe) -> Audit:
    """Record the recipe's step on a tape, replay it, and hold it against the same step run eagerly.

    Random images of the dataset's shape, a small batch: what is dispatched depends on neither. All on the
    CPU, so with stand-ins for what only a GPU has (`build.without_gpu`).
    """
    asked = recipe.optim.name
    recipe = build.without_gpu(recipe, torch.device("cpu"))
    plain, _ = _train(recipe, None)
    tape = Tape()
    taped, complaints = _train(recipe, tape)
    complaints = [*tape.complaints, *complaints]
    if taped.why_eager:
        complaints.append(taped.why_eager)
    ours, theirs = taped.tensors(), plain.tensors()
    for name in ours:
        if not _same(ours[name], theirs[name]):
            complaints.append(f"{name} differs between replay and eager step after {_STEPS} steps")
    stand_in = None if recipe.optim.name == asked else recipe.optim.name
    if stand_in:
        # Whether apex's can be captured its name says.
        taped.optimiser.name = asked
        if taped.optimiser.uncapturable:
            complaints.append(taped.optimiser.uncapturable)
    work = [entry for entry in tape.entries if entry.replayed]
    ops = Counter(entry.phase for entry in work)
    own = [str(entry.op) for entry in work if entry.op.namespace == "engine"]
    climbs = sum(op.startswith(("engine.input_grad_step", "engine.attack_step")) for op in own)
    losses = sum(op.startswith("engine.local_ball_loss_backward") for op in own)
    return Audit(
        recipe.name,
        complaints,
        dict(ops),
        ops[phases.ATTACK_STEP] / max(climbs, 1),
        ops[phases.LOSS] + losses,
        ops[phases.OPTIMISER],
        stand_in,
    )


def _train(recipe: Recipe, tape: Tape | None) -> tuple[Step, list[str]]:
    """Some steps of a recipe on random images, and what moved meanwhile."""
    about = datasets.info(recipe.data.name)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8 * _BATCH, *about.shape), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, len(about.classes), (len(images),), generator=draw)
    torch.manual_seed(0)
    model = build.build_model(recipe, images, len(about.classes), images.shape[1:])
    memory = build.memory_for(recipe, images)
    loader = ResidentLoader(images, labels, _BATCH, memory=memory, **build.sampling_of(recipe))
    step = build.build_step(
        recipe, model, steps=len(images), memory=memory, take=loader.take, recorder=tape
    )
    if tape is not None:
        tape.known = lambda: [*step.tensors().values(), *loader.tensors()]
    step.train()
    places = {name: t.data_ptr() for name, t in step.tensors().items()}
    loader.begin(0)
    for _ in range(_STEPS):
        step()
    moved = [
        f"{name} moved in memory between steps"
        for name, t in step.tensors().items()
        if name in places and t.data_ptr() != places[name]
    ]
    return step, moved


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN like NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
