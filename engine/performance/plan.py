"""What a recipe's step costs on a GPU, on paper: FLOPs, bytes, launches, memory, and the time they bound.

The recipe's real step is dispatched on the meta device, where operators have shapes and no data, and
every operator is priced by a roofline: the longer of its arithmetic and its traffic, never below the
shortest time a kernel takes. Nothing here has been fitted to a measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..data import datasets
from ..data.loaders import Batch
from ..device import phases
from ..errors import EngineError
from ..objectives import PGD
from ..recipes import Recipe
from ..runs import build
from ..training.step import Step

# The convolution's share of the stem's ops, as PyTorch counts its own; the arguments are shapes. Here and not
# beside the ops: PyTorch's counter imports Triton, and `import engine` shall not.


@register_flop_formula(torch.ops.engine.input_grad_step)
def _(x, z, stem_grad, weight, *_, **__) -> int:
    return 2 * prod(stem_grad) * prod(weight[1:])


@register_flop_formula(torch.ops.engine.stem_input_grad)
def _(stem_grad, weight, *_, **__) -> int:
    return 2 * prod(stem_grad) * prod(weight[1:])


@register_flop_formula(torch.ops.engine.stem_weight_grad)
def _(x, stem_grad, kh, kw, *_, **__) -> int:
    return 2 * prod(stem_grad) * x[1] * kh * kw


@dataclass(frozen=True)
class Gpu:
    """Peaks as the vendor gives them: dense, no sparsity.

    Attributes:
        tflops: by precision [10^12 a second]; bandwidth [GB/s]; memory [GB].
    """

    name: str
    tflops: dict[str, float]
    bandwidth: float
    memory: float


def _gpu(name: str, fp32: float, tf32: float, half: float, bandwidth: float, memory: float) -> Gpu:
    return Gpu(name, {"fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half}, bandwidth, memory)


GPUS = {
    "a100": _gpu("A100 SXM 80 GB", 19.5, 156.0, 312.0, 2039.0, 80.0),
    "h100": _gpu("H100 SXM", 67.0, 494.7, 989.4, 3350.0, 80.0),
    "h200": _gpu("H200 SXM", 67.0, 494.7, 989.4, 4800.0, 141.0),
}

# Guesses, and shown as such beside every prediction.
COMPUTE = 0.4  # share of the peak that convolutions and matrix products reach
TRAFFIC = 0.8  # share of the bandwidth
SHORTEST = 2e-6  # s, a kernel of no work inside a graph
LAUNCH = 6e-6  # s, host time to launch an operator eagerly
REPLAY = 10e-6  # s, to launch a graph

_NETWORK = {
    phases.ATTACK_FORWARD,
    phases.ATTACK_BACKWARD,
    phases.TRAIN_FORWARD,
    phases.TRAIN_BACKWARD,
}
# Gathers touch as much of the dataset as they produce, not all of it.
_GATHERS = ("engine::augment", "engine::recall", "engine::remember", "aten::index_select")
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass
class _Op:
    name: str
    phase: str
    flops: int
    bytes: int
    saved: int  # bytes of results


class _Priced(TorchDispatchMode):
    """Records the cost of everything dispatched, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[_Op] = []
        self._phases = [phases.BOOKKEEPING]

    def enter(self, name: str) -> None:
        self._phases.append(name)

    def exit(self, name: str) -> None:
        self._phases.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in inputs}
        view = bool(results) and all(t.untyped_storage()._cdata in storages for t in results)
        if name.removeprefix("aten::") in _FREE or (view and not func._schema.is_mutable):
            return out
        price = flop_registry.get(func._overloadpacket)
        flops = price(*args, **kwargs, out_val=out) if price is not None else 0
        written = [] if view else results
        if func._schema.is_mutable:
            written = [t for t in _mutated(func, args, kwargs) if isinstance(t, Tensor)]
        if name in _GATHERS:
            size = max(
                [t.numel() * t.itemsize for t in inputs[1:] + results if t.is_floating_point()],
                default=0,
            )
            traffic = 2 * size
        else:
            traffic = sum(t.numel() * t.itemsize for t in inputs + written)
        saved = sum(t.numel() * t.itemsize for t in written)
        self.ops.append(_Op(name, self._phases[-1], int(flops), traffic, saved))
        return out


def _mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(value)
    for argument in func._schema.arguments:
        if argument.name in kwargs and argument.alias_info is not None:
            yield from tree_leaves(kwargs[argument.name])


@dataclass(frozen=True)
class Price:
    """What one step should cost on a GPU.

    Attributes:
        flops, bytes, launches: a step; `launches` are those of an eager step, a captured one has one.
        seconds: a captured step; eager_seconds: an eager one, bound by the host where launching takes longer.
        bound_by: share of the operators' time bound by compute, by memory, by a kernel's least time.
    """

    flops: int
    bytes: int
    launches: int
    seconds: float
    eager_seconds: float
    bound_by: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """A prediction. Times in ms, memory in GB.

    Attributes:
        passes: of the whole batch, by kind.
        flops, bytes, launches: a step; `launches` are those of an eager step, a captured one has one.
        step_ms: a captured step; eager_ms: an eager one, bound by the host where launching takes longer.
        bound_by: share of `step_ms` in operators bound by compute, by memory, by a kernel's least time.
        memory_gb: weights with optimiser state, activations, dataset, adversary memory.
        share_of_pgd10: `step_ms` over that of PGD-10 on the same network and batch.
        measured_ms: on this machine's GPU, where there is one.
    """

    recipe: str
    gpu: str
    precision: str
    batch: int
    passes: dict[str, float]
    flops: int
    bytes: int
    launches: int
    step_ms: float
    eager_ms: float
    bound_by: dict[str, float]
    images_per_second: float
    train_minutes: float
    memory_gb: dict[str, float]
    pgd10_ms: float
    share_of_pgd10: float
    assumptions: list[str]
    measured_ms: float | None = None


def plan(recipe: Recipe, gpu: str) -> Plan:
    """Predict the recipe's step on a GPU by name.

    Raises:
        EngineError: for an unknown GPU.
    """
    if gpu not in GPUS:
        raise EngineError(f"unknown --gpu {gpu}: {', '.join(GPUS)}")
    device = GPUS[gpu]
    precision = "bf16" if recipe.step.precision == "auto" else recipe.step.precision
    about = datasets.info(recipe.data.name)
    step, batch = _on_meta(recipe)
    ops = _dispatch(step, batch)
    cost = _price(ops, device, precision)
    counterpart = replace(
        recipe, objective=PGD(), attack=replace(recipe.attack, steps=10, start="random", alpha=None)
    )
    pgd10 = price(*_on_meta(counterpart), device, precision)
    images = min(about.train - recipe.data.validation, recipe.data.train_examples or about.train)
    steps = images // recipe.optim.batch_size
    passes = recipe.objective.passes(recipe.attack)
    said = assumptions(device, precision)
    if step.optimiser.name != recipe.optim.name:
        said.append(f"optim.name = {recipe.optim.name} at the price of {step.optimiser.name}")
    pixels = images * about.shape[0] * about.shape[1] * about.shape[2]
    activations = sum(op.saved for op in ops if op.phase == phases.TRAIN_FORWARD)
    moments = 2 if recipe.optim.name.endswith(("adamw", "adam", "lamb")) else 1
    copies = 2 + moments + (recipe.optim.ema > 0)
    half = precision in ("bf16", "fp16")
    weights = sum(p.numel() for p in step.model.parameters())
    return Plan(
        recipe.name,
        gpu,
        precision,
        recipe.optim.batch_size,
        {**asdict(passes), "total": passes.total},
        cost.flops,
        cost.bytes,
        cost.launches,
        1e3 * cost.seconds,
        1e3 * cost.eager_seconds,
        cost.bound_by,
        recipe.optim.batch_size / cost.seconds,
        recipe.optim.epochs * steps * cost.seconds / 60,
        {
            "weights and optimiser": weights * (4 * copies + 2 * half) / 1e9,
            "activations of the loss": activations * (0.5 if half else 1.0) / 1e9,
            "dataset": pixels / 1e9,
            "adversary memory": pixels / 1e9 if recipe.attack.start == "memory" else 0.0,
        },
        1e3 * pgd10.seconds,
        cost.seconds / pgd10.seconds,
        said,
        measured(recipe),
    )


def predicted(recipe: Recipe, gpu: str) -> float:
    """Predict a captured step of the recipe alone [ms], for a GPU of `GPUS`."""
    precision = "bf16" if recipe.step.precision == "auto" else recipe.step.precision
    return 1e3 * price(*_on_meta(recipe), GPUS[gpu], precision).seconds


def price(step: Step, batch: Batch, device: Gpu, precision: str) -> Price:
    """Predict any step on any batch.

    Args:
        step, batch: on the meta device, the step in float32, where every operator has a meta kernel.
        precision: of the network's passes on the GPU, a key of `Gpu.tflops`.
    """
    return _price(_dispatch(step, batch), device, precision)


def flops(recipe: Recipe) -> int:
    """Floating-point operations of one step of the recipe, as `count` has them; the same on any device."""
    step, batch = _on_meta(recipe)
    return count(lambda: step.run(batch)).total()


def count(call: Callable[[], object]) -> Counter[str]:
    """Floating-point operations of whatever `call` dispatches, by operator: convolutions and matrix products, exactly."""
    priced, found = _Priced(), Counter[str]()
    with priced:
        call()
    for op in priced.ops:
        found[op.name] += op.flops
    return +found


def assumptions(device: Gpu, precision: str) -> list[str]:
    """What a prediction rests on, one line each."""
    return [
        f"{device.name}: {device.tflops[precision]:g} TFLOP/s dense {precision}, {device.bandwidth:g} GB/s (vendor)",
        f"convolutions and matrix products reach {COMPUTE:.0%} of that, traffic {TRAFFIC:.0%} (guesses)",
        f"no kernel takes less than {1e6 * SHORTEST:g} us; launching one eagerly takes the host {1e6 * LAUNCH:g} us (guesses)",
        "operators as PyTorch dispatches them, none fused but the engine's own; the training step alone, "
        "no evaluation",
    ]


def measured(recipe: Recipe) -> float | None:
    """The step's p50 on this machine's GPU in ms; None without one."""
    if not torch.cuda.is_available():
        return None
    where = torch.device("cuda")
    step = _step(recipe, where, steps=200)
    batch = _batch(recipe, where)
    times = []
    for _ in range(60):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step(batch)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    step.close()
    return sorted(times[10:])[25]


def _dispatch(step: Step, batch: Batch) -> list[_Op]:
    """The operators of one step."""
    priced = _Priced()
    with phases.listening(priced), priced:
        step.run(batch)
    return priced.ops


def _on_meta(recipe: Recipe) -> tuple[Step, Batch]:
    where = torch.device("meta")
    return _step(recipe, where, steps=1), _batch(recipe, where)


def _step(recipe: Recipe, where: torch.device, steps: int) -> Step:
    about = datasets.info(recipe.data.name)
    images = torch.empty((recipe.optim.batch_size, *about.shape), dtype=torch.uint8)
    with where:
        model = build.build_model(recipe, None, len(about.classes), images.shape[1:])
    memory = build.memory_for(recipe, images, where)
    if where.type == "meta":
        # Priced in float32; `_price` knows the precision.
        recipe = build.without_gpu(recipe, where)
    step = build.build_step(recipe, model, steps=steps, memory=memory)
    step.train()
    return step


def _batch(recipe: Recipe, where: torch.device) -> Batch:
    about, n = datasets.info(recipe.data.name), recipe.optim.batch_size
    index = torch.arange(n, device=where)
    return Batch(
        torch.zeros((n, *about.shape), device=where),
        index % len(about.classes),
        index,
        torch.zeros((n, 3), dtype=torch.int32, device=where),
        torch.zeros((n, *about.shape), device=where) if recipe.attack.start == "memory" else None,
    )


def _traffic(op: _Op, precision: str) -> int:
    half = precision in ("bf16", "fp16") and op.phase in _NETWORK
    return op.bytes // 2 if half else op.bytes


def _price(ops: list[_Op], device: Gpu, precision: str) -> Price:
    peak = COMPUTE * 1e12 * device.tflops[precision]
    bandwidth = TRAFFIC * 1e9 * device.bandwidth
    bound = {"compute": 0.0, "memory": 0.0, "launch": 0.0}
    for op in ops:
        times = {
            "compute": op.flops / peak,
            "memory": _traffic(op, precision) / bandwidth,
            "launch": SHORTEST,
        }
        limit = max(times, key=lambda name: times[name])
        bound[limit] += times[limit]
    busy = sum(bound.values())
    return Price(
        sum(op.flops for op in ops),
        sum(_traffic(op, precision) for op in ops),
        len(ops),
        busy + REPLAY,
        max(busy, LAUNCH * len(ops)),
        {name: seconds / busy for name, seconds in bound.items()},
    )
