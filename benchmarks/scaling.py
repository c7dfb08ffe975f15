"""How a training step's cost grows, one axis at a time: `engine bench scaling`.

Around one base setting (Fast-AT's network, batch 128, one attack step from the adversary memory) batch,
image side, attack steps, classes, width and processes change in turn. Every point is measured on this
machine, all points of an axis in one run; and, processes apart, predicted for a GPU by the roofline of
`engine plan`, further out than a CPU cares to go. A point is a step on a batch that lies there already.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine import recipes
from engine.data.loaders import Batch
from engine.device import distributed, machine
from engine.device.distributed import World
from engine.errors import EngineError
from engine.models.small import FastAtMnist
from engine.performance import plan, timing
from engine.runs import build
from engine.training.step import Step

RECIPE = "fashion-mnist"
METHODS = ("local-ball", "pgd")
GPU, PRECISION = "h100", "bf16"
PREDICTED = f"{GPU} (predicted)"
PROCESSES = "processes"

_ALONE = World()
# More than any point is ever called.
_STEPS = 1000
# Steps at a word: telling a process to step costs about a tenth of a millisecond.
_STRETCH = 4
# A process of its own has torch to import first, on a machine that may be busy.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Point:
    """One setting of the step.

    Attributes:
        method: an objective's name. batch: of all processes together [images]. size: side of the images
            [pixels]. k: attack steps. classes: logits. width: how many times as wide every hidden layer is.
    """

    method: str = METHODS[0]
    batch: int = 128
    size: int = 28
    k: int = 1
    classes: int = 10
    width: int = 1


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        measured, predicted: values by a field of `Point`; what is measured is predicted too.
        processes: that share the base batch.
        seconds: for each axis.
    """

    base: Point
    measured: Mapping[str, Sequence[int]]
    predicted: Mapping[str, Sequence[int]]
    processes: Sequence[int]
    seconds: float


def settings(quick: bool) -> Setting:
    # The far ends are for the paper alone: a CPU there says what it has said before.
    predicted = {
        "batch": (32, 128, 512, 2048, 8192),
        "size": (16, 28, 56, 112, 224),
        "k": (1, 2, 5, 10, 20),
        "classes": (10, 100, 1000, 10_000),
        "width": (1, 2, 4, 8, 16),
    }
    if quick:
        measured: dict[str, tuple[int, ...]] = {
            "batch": (32, 128, 512),
            "size": (16, 28, 56),
            "k": (1, 2, 5, 10),
            "classes": (10, 1000),
            "width": (1, 2, 4),
        }
        return Setting(Point(), measured, predicted, (1, 2), 3.0)
    measured = {
        "batch": (32, 128, 512, 2048),
        "size": (16, 28, 56, 112),
        "k": (1, 2, 5, 10, 20),
        "classes": (10, 100, 1000),
        "width": (1, 2, 4, 8),
    }
    return Setting(Point(), measured, predicted, (1, 2), 35.0)


# ---- what is timed ---------------------------------------------------------------------------


class Wider(FastAtMnist):
    """Fast-AT's network with every hidden layer `width` times as wide; 1: the network itself."""

    def __init__(self, in_channels: int, image_size: int, classes: int, width: int) -> None:
        super().__init__(in_channels, image_size, classes)
        *_, last = (name for name, _ in self.named_children())
        for name, layer in list(self.named_children()):
            if isinstance(layer, nn.Conv2d):
                ins = layer.in_channels * (1 if name == self.stem_name else width)
                outs, kernel = layer.out_channels * width, layer.kernel_size
                stride, padding = layer.stride, layer.padding
                self.add_module(name, nn.Conv2d(ins, outs, kernel, stride, padding))  # type: ignore[arg-type]
            elif isinstance(layer, nn.Linear):
                outs = layer.out_features * (1 if name == last else width)
                self.add_module(name, nn.Linear(layer.in_features * width, outs))


def step_of(point: Point, where: torch.device, world: World = _ALONE) -> tuple[Step, Batch]:
    """The recipe's step at `point`, and a batch of random images: this process's share of it."""
    overrides = {"objective.name": point.method, "attack.steps": str(point.k)}
    recipe = recipes.load(RECIPE, overrides)
    if where.type == "meta":
        recipe = build.without_gpu(recipe, where)
    shape = (1, point.size, point.size)
    torch.manual_seed(0)
    with where:
        model = Wider(*shape[:2], point.classes, point.width)
        n = world.share(point.batch)
        index = torch.arange(world.rank * n, (world.rank + 1) * n)
        batch = Batch(
            torch.rand((n, *shape)),
            index % point.classes,
            index,
            torch.zeros((n, 3), dtype=torch.int32),
        )
        memory = build.memory_for(recipe, torch.empty((point.batch, *shape)), where)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = build.build_step(recipe, model, steps=_STEPS, memory=memory, rank=world.rank)
    step.train()
    return step, batch


def predict(point: Point) -> plan.Price:
    """What the step at `point` should cost on `GPU`, captured, in `PRECISION`."""
    return plan.price(*step_of(point, torch.device("meta")), plan.GPUS[GPU], PRECISION)


def _call(step: Step, batch: Batch) -> None:
    step(batch)
    if step.device.type == "cuda":
        torch.cuda.synchronize()


# ---- running ---------------------------------------------------------------------------------


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Time and predict every axis.

    Args:
        quick: fewer points and samples; under a minute. All of it takes under five.
    Returns:
        One row per axis, value, method and place: axis (a field of `Point`, or processes), value, method,
        where (cpu, cuda, or the GPU of the prediction), p20_ms, p50_ms, p80_ms (a prediction has only the
        middle one), images_per_s, gflops (of one process's step).
    """
    setting = settings(quick)
    rows = [row for axis in setting.measured for row in _axis(setting, axis)]
    return rows + _processes(setting)


def _axis(setting: Setting, axis: str) -> list[dict[str, Any]]:
    where = machine.device()
    points = {
        (method, value): replace(setting.base, method=method, **{axis: value})
        for method in METHODS
        for value in setting.predicted[axis]
    }
    prices = {case: predict(point) for case, point in points.items()}
    cases = {_key(*case): case for case in points if case[1] in setting.measured[axis]}
    with ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for key, case in cases.items():
            step, batch = step_of(points[case], where)
            stack.callback(step.close)
            calls[key] = partial(_call, step, batch)
        times = timing.side_by_side(calls, seconds=setting.seconds, sample_ms=0.0)
    rows = []
    for key, (method, value) in cases.items():
        price, batch_size = prices[method, value], points[method, value].batch
        rows.append(_row(axis, value, method, where.type, times[key], price.flops, batch_size))
    for (method, value), price in prices.items():
        middle = 1e3 * price.seconds
        rows.append(
            _row(axis, value, method, PREDICTED, middle, price.flops, points[method, value].batch)
        )
    return rows


def _processes(setting: Setting) -> list[dict[str, Any]]:
    """Rows for each number of processes, all of them alive together and working in turn."""
    where, base = machine.device(), setting.base
    sizes = [n for n in setting.processes if where.type == "cpu" or n <= torch.cuda.device_count()]
    with ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for size in sizes:
            tell = stack.enter_context(together(size, base))
            calls |= {_key(method, size): partial(tell, method) for method in METHODS}
        times = timing.side_by_side(calls, seconds=setting.seconds, sample_ms=0.0)
    rows = []
    for method in METHODS:
        for size in sizes:
            samples = [sample / _STRETCH for sample in times[_key(method, size)].samples]
            share = replace(base, method=method, batch=World(size=size).share(base.batch))
            rows.append(
                _row(
                    PROCESSES,
                    size,
                    method,
                    where.type,
                    timing.quantiles(samples),
                    predict(share).flops,
                    base.batch,
                )
            )
    return rows


def _row(
    axis: str,
    value: int,
    method: str,
    where: str,
    time: timing.Timing | float,
    flops: int,
    batch: int,
) -> dict[str, Any]:
    p20, p50, p80 = (
        (None, time, None) if isinstance(time, float) else (time.p20, time.p50, time.p80)
    )
    return {
        "axis": axis,
        "value": value,
        "method": method,
        "where": where,
        "p20_ms": None if p20 is None else round(p20, 4),
        "p50_ms": round(p50, 4),
        "p80_ms": None if p80 is None else round(p80, 4),
        "images_per_s": round(1e3 * batch / p50),
        "gflops": round(flops / 1e9, 6),
    }


def _key(method: str, value: int) -> str:
    return f"{method} {value}"


# ---- processes -------------------------------------------------------------------------------


@contextmanager
def together(size: int, base: Point) -> Iterator[Callable[[str], None]]:
    """`size` processes of one thread each that share the base batch; yields what makes them step by a method.

    Raises:
        EngineError: when one of them is no longer there, or does not answer.
    """
    context = multiprocessing.get_context("spawn")
    # They meet at a store of ours, as they do at torchrun's: no free port to guess.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes: list[Connection] = []
    workers = []
    for rank in range(size):
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=_serve, args=(theirs, rank, size, store.port, base), daemon=True
        )
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)

    def answered() -> None:
        for rank, pipe in enumerate(pipes):
            try:
                there = pipe.poll(_PATIENCE) and pipe.recv() is None
            except EOFError:
                there = False
            if not there:
                raise EngineError(f"process {rank} of {size} has died or does not answer")

    def tell(method: str) -> None:
        for pipe in pipes:
            pipe.send(method)
        answered()

    try:
        answered()
        yield tell
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join(5)
            worker.terminate()


def _serve(pipe: Connection, rank: int, size: int, port: int, base: Point) -> None:
    """A process of `together`: a stretch of steps at every word, until the pipe is closed."""
    from engine.device.machine import keep_freed_memory

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    keep_freed_memory()
    world, where = distributed.join(), machine.device()
    steps = {m: step_of(replace(base, method=m), where, world) for m in METHODS}
    pipe.send(None)
    try:
        while True:
            step, batch = steps[pipe.recv()]
            for _ in range(_STRETCH):
                _call(step, batch)
            pipe.send(None)
    except EOFError:
        distributed.leave()
