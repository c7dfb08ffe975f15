"""Predict what a recipe's step costs on a GPU: FLOPs, bytes, launches, memory, and time.

The recipe's real step is dispatched on the meta device, where operators have shapes and no data. A
roofline prices every operator: the longer of its arithmetic and its traffic, never below the
shortest time of a kernel. No number here is fitted to a measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..data.loaders import Batch
from ..device import phases
from ..errors import EngineError
from ..objectives import PGD
from ..recipes import Recipe
from ..runs import synthetic
from ..runs.images import extra_set, facts
from ..training.step import Step
from .dispatch import GATHERS, Call, Spy
from .kernel_count import fusions, kernels_of

# Count the convolution inside the stem's ops, as PyTorch counts its own; the arguments are shapes.
# The formulas do not lie beside the ops: PyTorch's counter imports Triton, which
# `import engine` must not.


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
    """Hold the vendor's peaks of a GPU: dense, no sparsity.

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

# These numbers are guesses; every prediction shows them as such.
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


@dataclass
class _Op:
    name: str
    phase: str
    flops: int
    bytes: int
    saved: int  # bytes of results
    kernels: int
    images: bool  # the result is [B, C, H, W]


class _Priced(Spy):
    """Record the cost of every dispatched operator, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[_Op] = []

    def heard(self, call: Call) -> None:
        if not call.launches:
            return
        formula = flop_registry.get(call.op._overloadpacket)
        flops = formula(*call.args, **call.kwargs, out_val=call.result) if formula else 0
        saved = sum(t.numel() * t.itemsize for t in call.written)
        images = bool(call.written) and all(
            t.dim() == 4 and t.is_floating_point() for t in call.written
        )
        moved, kernels = _bytes_moved(call), kernels_of(call)
        self.ops.append(_Op(call.name, call.phase, int(flops), moved, saved, kernels, images))


def _bytes_moved(call: Call) -> int:
    """Return the bytes that a call reads and writes."""
    if call.name in GATHERS:
        # A gather touches as much of the dataset as it produces, not all of it.
        floats = [t for t in call.inputs[1:] + call.outputs if t.is_floating_point()]
        return 2 * max((t.numel() * t.itemsize for t in floats), default=0)
    return sum(t.numel() * t.itemsize for t in call.inputs + call.written)


@dataclass(frozen=True)
class Price:
    """Hold what one step should cost on a GPU.

    Attributes:
        flops, bytes: of a step; kernels: launches by operator, most first.
        seconds: of a captured step; eager_seconds: of an eager step, bound by the host where the
            launches take longer.
        bound_by: share of the operators' time bound by compute, memory, a kernel's least time.
        fusions: what fusing kernels would save, by name [s]; products: the time of convolutions
            and matrix products alone [s].
    """

    flops: int
    bytes: int
    kernels: dict[str, int]
    seconds: float
    eager_seconds: float
    bound_by: dict[str, float]
    fusions: dict[str, float]
    products: float


@dataclass(frozen=True)
class Plan:
    """Hold a prediction. Times in ms, memory in GB.

    Attributes:
        passes: of the whole batch, by kind.
        flops, bytes: of a step; launches: kernels, which a captured step launches at once.
        kernels: launches by operator, most first.
        step_ms: a captured step; eager_ms: an eager step, bound by the host where the launches take
            longer.
        bound_by: share of `step_ms` in operators bound by compute, memory, a kernel's least time.
        fusions: what fused kernels (`step.compile`) would save of `step_ms`, by name; fused_ms:
            `step_ms` less all of that; products_ms: convolutions and matrix products alone, the
            bound of all fusions.
        memory_gb: weights with optimiser state, activations, dataset, adversary memory, extra
            images (which a device with too little memory leaves on the host).
        share_of_pgd10: `step_ms` over that of PGD-10 on the same network and batch.
        measured_ms: on this machine's GPU; None without a GPU.
    """

    recipe: str
    gpu: str
    precision: str
    batch: int
    passes: dict[str, float]
    flops: int
    bytes: int
    launches: int
    kernels: dict[str, int]
    step_ms: float
    eager_ms: float
    bound_by: dict[str, float]
    fusions: dict[str, float]
    fused_ms: float
    products_ms: float
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
    return plans(recipe, [gpu])[0]


def plans(recipe: Recipe, gpus: Sequence[str]) -> list[Plan]:
    """Predict the recipe's step on each GPU; the step is dispatched once.

    Raises:
        EngineError: for an unknown GPU.
    """
    for gpu in gpus:
        if gpu not in GPUS:
            raise EngineError(f"unknown --gpu {gpu}: {', '.join(GPUS)}")
    step, batch = _on_meta(recipe)
    ops = _dispatch(step, batch)
    pgd10_ops = _dispatch(*_on_meta(_pgd10_of(recipe)))
    return [_plan(recipe, gpu, step, ops, pgd10_ops) for gpu in gpus]


def _plan(recipe: Recipe, gpu: str, step: Step, ops: list[_Op], pgd10_ops: list[_Op]) -> Plan:
    device, precision = GPUS[gpu], _precision(recipe)
    cost, pgd10 = (_price(each, device, precision) for each in (ops, pgd10_ops))
    images = _training_images(recipe)
    passes = recipe.passes()
    basis = assumptions(device, precision)
    extra = _extra_pixels(recipe)
    if extra is None:
        basis.append(
            f"data.extra = {recipe.data.extra} cannot be read here: its memory is not counted"
        )
    if step.optimiser.name != recipe.optim.name:
        basis.append(f"optim.name = {recipe.optim.name} at the price of {step.optimiser.name}")
    return Plan(
        recipe=recipe.name,
        gpu=gpu,
        precision=precision,
        batch=recipe.optim.batch_size,
        passes={**asdict(passes), "total": passes.total},
        flops=cost.flops,
        bytes=cost.bytes,
        launches=sum(cost.kernels.values()),
        kernels=cost.kernels,
        step_ms=1e3 * cost.seconds,
        eager_ms=1e3 * cost.eager_seconds,
        bound_by=cost.bound_by,
        fusions={name: 1e3 * seconds for name, seconds in cost.fusions.items()},
        fused_ms=1e3 * (cost.seconds - sum(cost.fusions.values())),
        products_ms=1e3 * cost.products,
        images_per_second=recipe.optim.batch_size / cost.seconds,
        train_minutes=_steps(recipe) * cost.seconds / 60,
        memory_gb={
            **_memory_gb(recipe, step, ops, images, half=precision in ("bf16", "fp16")),
            "extra images": (extra or 0) / 1e9,
        },
        pgd10_ms=1e3 * pgd10.seconds,
        share_of_pgd10=cost.seconds / pgd10.seconds,
        assumptions=basis,
        measured_ms=measured(recipe),
    )


def _pgd10_of(recipe: Recipe) -> Recipe:
    """Return the recipe with PGD-10 as its objective and attack."""
    attack = replace(recipe.attack, steps=10, start="random", alpha=None)
    return replace(recipe, objective=PGD(), attack=attack)


def _training_images(recipe: Recipe) -> int:
    about = facts(recipe)
    left = about.train - recipe.data.held_out(about.train)
    return min(left, recipe.data.train_examples or about.train)


def _steps(recipe: Recipe) -> int:
    return recipe.optim.epochs * (_training_images(recipe) // recipe.optim.batch_size)


def _precision(recipe: Recipe) -> str:
    return "bf16" if recipe.step.precision == "auto" else recipe.step.precision


def _extra_pixels(recipe: Recipe) -> int | None:
    """Return the number of pixels of the recipe's extra images; None where they are not here."""
    if recipe.data.extra is None:
        return 0
    try:
        extra = extra_set(recipe)
    except EngineError:
        return None
    return extra[0].numel() if extra is not None else 0


def _memory_gb(
    recipe: Recipe, step: Step, ops: list[_Op], images: int, *, half: bool
) -> dict[str, float]:
    """Return the step's memory by part [GB]; `half`: the network's passes take 16 bits a number."""
    pixels = images * prod(facts(recipe).shape)
    remembered = images if recipe.attack.start == "memory" else 0
    if recipe.attack.memory == "host":
        remembered = recipe.optim.batch_size
    activations = sum(op.saved for op in ops if op.phase == phases.TRAIN_FORWARD)
    moments = 2 if recipe.optim.name.endswith(("adamw", "adam", "lamb")) else 1
    copies = 2 + moments + (recipe.optim.ema > 0)
    weights = sum(p.numel() for p in step.model.parameters())
    return {
        "weights and optimiser": weights * (4 * copies + 2 * half) / 1e9,
        "activations of the loss": activations * (0.5 if half else 1.0) / 1e9,
        # Pictures are streamed.
        "dataset": 0.0 if recipe.data.size else pixels / 1e9,
        "adversary memory": remembered * prod(facts(recipe).shape) / 1e9,
    }


def predicted(recipe: Recipe, gpu: str) -> float:
    """Predict a captured step of the recipe alone [ms], for a GPU of `GPUS`."""
    return 1e3 * price(*_on_meta(recipe), GPUS[gpu], _precision(recipe)).seconds


def training_minutes(recipe: Recipe, gpu: str) -> float:
    """Predict the whole training on a GPU of `GPUS` [minutes], evaluation left out."""
    return _steps(recipe) * predicted(recipe, gpu) / 60e3


def price(step: Step, batch: Batch, device: Gpu, precision: str) -> Price:
    """Predict any step on any batch.

    Args:
        step, batch: on the meta device; the step in float32, where every operator has a meta
            kernel.
        precision: of the network's passes on the GPU, a key of `Gpu.tflops`.
    """
    return _price(_dispatch(step, batch), device, precision)


def flops(recipe: Recipe) -> int:
    """Return the floating-point operations of one step of the recipe, by `count`, on any device."""
    step, batch = _on_meta(recipe)
    return count(lambda: step.run(batch)).total()


def count(call: Callable[[], object]) -> Counter[str]:
    """Count the floating-point operations that `call` dispatches, by operator.

    Convolutions and matrix products are counted exactly, everything else as 0.
    """
    priced, flops_of = _Priced(), Counter[str]()
    with priced:
        call()
    for op in priced.ops:
        flops_of[op.name] += op.flops
    return +flops_of


def assumptions(device: Gpu, precision: str) -> list[str]:
    """List the assumptions behind a prediction, one line each."""
    return [
        f"{device.name}: {device.tflops[precision]:g} TFLOP/s dense {precision}, "
        f"{device.bandwidth:g} GB/s (vendor)",
        f"convolutions and matrix products reach {COMPUTE:.0%} of that, traffic {TRAFFIC:.0%} "
        "(guesses)",
        f"no kernel takes less than {1e6 * SHORTEST:g} us; launching one eagerly takes the host "
        f"{1e6 * LAUNCH:g} us (guesses)",
        "operators as PyTorch dispatches them, none fused but the engine's own; the training step "
        "alone, no evaluation",
    ]


def measured(recipe: Recipe) -> float | None:
    """Measure the step's p50 on this machine's GPU [ms]; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    step = synthetic.step(recipe, device, steps=200)
    batch = synthetic.batch(recipe, device)
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
    """Run one step and return its operators."""
    priced = _Priced()
    with phases.listening(priced), priced:
        step.run(batch)
    return priced.ops


def _on_meta(recipe: Recipe) -> tuple[Step, Batch]:
    meta = torch.device("meta")
    return synthetic.step(recipe, meta, steps=1), synthetic.batch(recipe, meta)


def _traffic(op: _Op, precision: str) -> int:
    half = precision in ("bf16", "fp16") and op.phase in _NETWORK
    return op.bytes // 2 if half else op.bytes


def _price(ops: list[_Op], device: Gpu, precision: str) -> Price:
    peak = COMPUTE * 1e12 * device.tflops[precision]
    bandwidth = TRAFFIC * 1e9 * device.bandwidth
    bound = {"compute": 0.0, "memory": 0.0, "launch": 0.0}
    timed: list[tuple[str, str, bool, float]] = []
    products = 0.0
    kernels = Counter[str]()
    for op in ops:
        times = {
            "compute": op.flops / peak,
            "memory": _traffic(op, precision) / bandwidth,
            "launch": SHORTEST * op.kernels,
        }
        limit = max(times, key=lambda name: times[name])
        bound[limit] += times[limit]
        timed.append((op.name, op.phase, op.images, times[limit]))
        products += times[limit] if op.flops else 0.0
        kernels[op.name.removeprefix("aten::")] += op.kernels
    busy = sum(bound.values())
    return Price(
        flops=sum(op.flops for op in ops),
        bytes=sum(_traffic(op, precision) for op in ops),
        kernels=dict(kernels.most_common()),
        seconds=busy + REPLAY,
        eager_seconds=max(busy, LAUNCH * kernels.total()),
        bound_by={name: seconds / busy for name, seconds in bound.items()},
        fusions=fusions(timed),
        products=products,
    )
