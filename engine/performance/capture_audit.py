"""Tell, without a GPU, whether a step can be captured in a CUDA graph.

A graph replays kernels with the addresses and the numbers that it was captured with. `Tape` does
the same on any device, one level up: it records the operators that a step dispatches, with their
tensors and their Python numbers, and replays that list. If the replays equal the eager steps, the
step holds nothing that a graph would freeze wrongly. The recorded list also shows what a graph
forbids: reading a value on the host, a shape that depends on a tensor's contents, a draw from a
generator, a tensor that may move.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..data.loaders import ResidentLoader
from ..device import phases
from ..device.capture import Work
from ..recipes import Recipe
from ..runs import build
from ..runs.images import facts, in_memory
from ..training.step import Step
from .dispatch import Call, Spy, storage_of

_FROM_HOST = ("lift_fresh", "lift_fresh_copy", "scalar_tensor")


class Tape(Spy):
    """Record what a function dispatches, and replay it. Stands in for `CudaGraphs`.

    Args:
        known: returns the tensors that the function may touch besides those it makes.
    Attributes:
        calls: every operator of the last recording, in order.
        complaints: what a CUDA graph would not allow or would freeze, one line each.
    """

    def __init__(self, known: Callable[[], Iterable[Tensor]] = tuple) -> None:
        super().__init__()
        self.known = known
        self.calls: list[Call] = []
        self.complaints: list[str] = []
        self._made: set[int] = set()

    def context(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def warm_up(self, work: Work) -> None:
        work()

    def record(self, work: Work) -> Work:
        """Run once, recorded; return the function that replays the record."""
        self.calls.clear()
        self._made = {storage_of(t) for t in self.known()}
        with phases.listening(self), self:
            work()
        return self.replay

    def close(self) -> None:
        self.calls.clear()

    def replay(self) -> None:
        """Run every recorded operator again on the recorded tensors, into the recorded results."""
        with torch.no_grad():
            for call in self.calls:
                if call.launches:
                    results = tree_leaves(call.op(*call.args, **call.kwargs))
                    for into, result in zip(tree_leaves(call.result), results, strict=True):
                        if isinstance(into, Tensor) and storage_of(into) != storage_of(result):
                            into.copy_(result)

    def heard(self, call: Call) -> None:
        self._judge(call)
        self._made |= {storage_of(t) for t in call.outputs}
        self.calls.append(call)

    def _judge(self, call: Call) -> None:
        def complain(what: str) -> None:
            line = f"{call.phase}: {call.short_name} {what}"
            if line not in self.complaints:
                self.complaints.append(line)

        values = tree_leaves(call.result)
        if any(isinstance(value, (bool, int, float, complex)) for value in values):
            complain("reads a value of the device on the host")
        if torch.Tag.dynamic_output_shape in call.op.tags:
            complain("makes a tensor whose shape depends on its contents")
        if _draws(call):
            complain("draws random numbers from a generator and not from the step's state")
        if call.short_name in _FROM_HOST:
            complain("makes a tensor from a number of the host's")
        for t in call.inputs:
            if storage_of(t) not in self._made and not getattr(t, "is_constant", False):
                complain(f"touches a tensor {tuple(t.shape)} that the step does not own")


def _draws(call: Call) -> bool:
    """Tell whether an operator draws from a generator; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in call.op.tags:
        return False
    arguments = call.op._schema.arguments
    given = dict(zip((a.name for a in arguments), call.args, strict=False)) | call.kwargs
    default = next((a.default_value for a in arguments if a.name == "dropout_p"), None)
    return given.get("dropout_p", default) != 0


_BATCH, _STEPS = 2, 3


@dataclass(frozen=True)
class Audit:
    """Hold what a recipe's step dispatches, and what forbids capturing it.

    Attributes:
        complaints: one line each; none: the step can be captured.
        ops: operators that launch work (views and allocations left out), by phase.
        attack_step_ops: such operators in one attack step, network passes left out; loss_ops and
            optimiser_ops: in the loss, forward and backward, and in the optimiser with the average.
        stand_in: the optimiser that was recorded in place of apex's, which has no CPU form; None:
            the recipe's own optimiser was recorded.
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
    """Record the recipe's step on a tape, replay it, and compare it with the same step run eagerly.

    The audit takes a small batch of random images of the dataset's shape: the dispatched operators
    depend on neither. It runs on the CPU, with stand-ins for what only a GPU has
    (`build.without_gpu`).
    """
    asked = recipe.optim.name
    recipe = build.without_gpu(recipe, torch.device("cpu"))
    plain, _ = _train(recipe, None)
    tape = Tape()
    taped, complaints = _train(recipe, tape)
    complaints = [*tape.complaints, *complaints]
    if taped.why_eager:
        complaints.append(taped.why_eager)
    replayed, eager = taped.tensors(), plain.tensors()
    for name in replayed:
        if not _same(replayed[name], eager[name]):
            complaints.append(f"{name} differs between replay and eager step after {_STEPS} steps")
    stand_in = None if recipe.optim.name == asked else recipe.optim.name
    if stand_in:
        # The optimiser's name alone tells whether it can be captured.
        taped.optimiser.name = asked
        if taped.optimiser.uncapturable:
            complaints.append(taped.optimiser.uncapturable)
    work = [call for call in tape.calls if call.launches]
    ops = Counter(call.phase for call in work)
    own = [str(call.op) for call in work if call.op.namespace == "engine"]
    climbs = sum(op.startswith(("engine.input_grad_step", "engine.attack_step")) for op in own)
    losses = sum(op.startswith("engine.local_ball_loss_backward") for op in own)
    return Audit(
        recipe=recipe.name,
        complaints=complaints,
        ops=dict(ops),
        attack_step_ops=ops[phases.ATTACK_STEP] / max(climbs, 1),
        loss_ops=ops[phases.LOSS] + losses,
        optimiser_ops=ops[phases.OPTIMISER],
        stand_in=stand_in,
    )


def _train(recipe: Recipe, tape: Tape | None) -> tuple[Step, list[str]]:
    """Run some steps of a recipe on random images; return the step and the tensors that moved."""
    about = facts(recipe)
    recipe = in_memory(recipe)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8 * _BATCH, *about.shape), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, about.classes, (len(images),), generator=draw)
    torch.manual_seed(0)
    model = build.build_model(recipe, images, about.classes, images.shape[1:])
    memory = build.memory_for(recipe, images)
    loader = ResidentLoader(
        images,
        labels,
        _BATCH,
        memory=memory,
        extra=None if recipe.data.extra is None else (images, labels),
        share=recipe.data.extra_share,
        **build.sampling_of(recipe),
    )
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
    """Compare bit for bit; NaN equals NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
