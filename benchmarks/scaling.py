"""Measure how a training step's cost grows, one axis at a time: `engine bench scaling`.

The base setting is Fast-AT's network, batch 128, one attack step from the adversary memory. Batch,
image side, attack steps, classes, width and processes change in turn. Every point is measured on
this machine, all points of an axis in one run. Every point but those of processes is also predicted
for a GPU by the roofline of `engine plan`, and the prediction goes further than a CPU can. A point
is a step on a batch that lies on the device already.
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
# More steps than any point takes.
_STEPS = 1000
# Steps at a message: a message takes about a tenth of a millisecond.
_STRETCH = 4
# Seconds to wait for a process, which imports torch first, on a machine that may be busy.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Point:
    """Hold one setting of the step.

    Attributes:
        method: an objective's name.
        batch: of all processes together [images].
        size: side of the images [pixels].
        k: attack steps.
        classes: number of logits.
        width: factor on the width of every hidden layer.
    """

    method: str = METHODS[0]
    batch: int = 128
    size: int = 28
    k: int = 1
    classes: int = 10
    width: int = 1


@dataclass(frozen=True)
class Setting:
    """Hold the points to measure.

    Attributes:
        measured, predicted: values by a field of `Point`; measured points are predicted too.
        processes: numbers of processes that share the base batch.
        seconds: for each axis.
    """

    base: Point
    measured: Mapping[str, Sequence[int]]
    predicted: Mapping[str, Sequence[int]]
    processes: Sequence[int]
    seconds: float


def settings(quick: bool) -> Setting:
    # The far ends are predicted only: on a CPU they would take long and show nothing new.
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


class Wider(FastAtMnist):
    """Define Fast-AT's network with every hidden layer `width` times as wide."""

    def __init__(self, in_channels: int, size: tuple[int, int], classes: int, width: int) -> None:
        super().__init__(in_channels, size, classes)
        *_, last = (name for name, _ in self.named_children())
        for name, layer in list(self.named_children()):
            if isinstance(layer, nn.Conv2d):
                ins = layer.in_channels * (1 if name == self.stem_name else width)
                outs, kernel = layer.out_channels * width, layer.kernel_size
                stride, padding = layer.stride, layer.padding
                self.add_module(name, nn.Conv2d(ins, outs, kernel, stride, padding))  # type: ignore[arg-type]
            elif isinstance(layer, nn.Linear):
                outs = layer.out_features * (1 if name == last else width)
                self.add_module(name, type(layer)(layer.in_features * width, outs))


def step_of(point: Point, device: torch.device, world: World = _ALONE) -> tuple[Step, Batch]:
    """Return the recipe's step at `point`, and this process's share of a random batch."""
    overrides = {"objective.name": point.method, "attack.steps": str(point.k)}
    recipe = recipes.load(RECIPE, overrides)
    if device.type == "meta":
        recipe = build.without_gpu(recipe, device)
    shape = (1, point.size, point.size)
    torch.manual_seed(0)
    with device:
        model = Wider(shape[0], shape[1:], point.classes, point.width)
        n = world.share(point.batch)
        index = torch.arange(world.rank * n, (world.rank + 1) * n)
        batch = Batch(
            torch.rand((n, *shape)),
            index % point.classes,
            index,
            torch.zeros((n, 3), dtype=torch.int32),
        )
        memory = build.memory_for(recipe, torch.empty((point.batch, *shape)), device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = build.build_step(recipe, model, steps=_STEPS, memory=memory, rank=world.rank)
    step.train()
    return step, batch


def predict(point: Point) -> plan.Price:
    """Predict the captured step at `point` on `GPU` in `PRECISION`."""
    return plan.price(*step_of(point, torch.device("meta")), plan.GPUS[GPU], PRECISION)


def _call(step: Step, batch: Batch) -> None:
    step(batch)
    if step.device.type == "cuda":
        torch.cuda.synchronize()


# ---- running ---------------------------------------------------------------------------------


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Time and predict every axis.

    Args:
        quick: fewer points and samples; under a minute. The full run takes under five.
    Returns:
        One row per axis, value, method and place: axis (a field of `Point`, or processes), value,
            method, where (cpu, cuda, or the GPU of the prediction), p20_ms, p50_ms, p80_ms (a
            prediction has p50_ms only), images_per_s, gflops (of one process's step).
    """
    setting = settings(quick)
    rows = [row for axis in setting.measured for row in _axis(setting, axis)]
    return rows + _processes(setting)


def _axis(setting: Setting, axis: str) -> list[dict[str, Any]]:
    device = machine.device()
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
            step, batch = step_of(points[case], device)
            stack.callback(step.close)
            calls[key] = partial(_call, step, batch)
        times = timing.side_by_side(calls, seconds=setting.seconds, sample_ms=0.0)
    rows = []
    for key, (method, value) in cases.items():
        price, batch_size = prices[method, value], points[method, value].batch
        rows.append(_row(axis, value, method, device.type, times[key], price.flops, batch_size))
    for (method, value), price in prices.items():
        middle = 1e3 * price.seconds
        rows.append(
            _row(axis, value, method, PREDICTED, middle, price.flops, points[method, value].batch)
        )
    return rows


def _processes(setting: Setting) -> list[dict[str, Any]]:
    """Return rows for each number of processes, all alive together and working in turn."""
    device, base = machine.device(), setting.base
    sizes = [n for n in setting.processes if device.type == "cpu" or n <= torch.cuda.device_count()]
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
                    device.type,
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
    place: str,
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
        "where": place,
        "p20_ms": None if p20 is None else round(p20, 4),
        "p50_ms": round(p50, 4),
        "p80_ms": None if p80 is None else round(p80, 4),
        "images_per_s": round(1e3 * batch / p50),
        "gflops": round(flops / 1e9, 6),
    }


def _key(method: str, value: int) -> str:
    return f"{method} {value}"


@contextmanager
def together(size: int, base: Point) -> Iterator[Callable[[str], None]]:
    """Start `size` processes of one thread each that share the base batch.

    Yields the function that makes all processes step by a method.

    Raises:
        EngineError: if a process has died or does not answer.
    """
    context = multiprocessing.get_context("spawn")
    # The processes meet at a store of this process, as with torchrun: no free port to guess.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes: list[Connection] = []
    workers = []
    for rank in range(size):
        ours, far_end = context.Pipe()
        worker = context.Process(
            target=_serve, args=(far_end, rank, size, store.port, base), daemon=True
        )
        worker.start()
        far_end.close()
        pipes.append(ours)
        workers.append(worker)

    def answered() -> None:
        for rank, pipe in enumerate(pipes):
            try:
                alive = pipe.poll(_PATIENCE) and pipe.recv() is None
            except EOFError:
                alive = False
            if not alive:
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
    """Run in a process of `together`: step at every message, until the pipe is closed."""
    from engine.device.machine import keep_freed_memory

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    keep_freed_memory()
    world, device = distributed.join(), machine.device()
    steps = {m: step_of(replace(base, method=m), device, world) for m in METHODS}
    pipe.send(None)
    try:
        while True:
            step, batch = steps[pipe.recv()]
            for _ in range(_STRETCH):
                _call(step, batch)
            pipe.send(None)
    except EOFError:
        distributed.leave()
