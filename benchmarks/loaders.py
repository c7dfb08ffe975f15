"""Compare loaders: `engine bench loaders`.

The rows hold images a second, and the loader's share of a training step. A sample is a stretch of
batches in a row, after the batches that a loader read ahead while others had their turn: the sample
then includes the work of reading ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from engine import recipes
from engine.adversary.memory import AdversaryMemory
from engine.data import loaders
from engine.data.loaders import Batch, Loader
from engine.data.loaders.dali import unavailable
from engine.device import machine
from engine.performance.timing import quantiles
from engine.runs import build
from engine.threat import Linf

# More batches than any loader reads ahead: DALI two, torch two for each of two processes.
_AHEAD = 5
_STRETCH = 24


@dataclass(frozen=True)
class Setting:
    """Hold images [C, H, W], and the recipe whose training they feed."""

    shape: tuple[int, int, int]
    recipe: str


SETTINGS = (Setting((1, 28, 28), "fashion-mnist"), Setting((3, 32, 32), "cifar10"))
_SAMPLES = 12_000


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Return a row for each loader and image shape, crop and mirror on.

    All loaders of a shape are timed in turn.
    """
    return [row for setting in SETTINGS for row in _rows(setting, 5 if quick else 15)]


def _rows(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    recipe = recipes.load(setting.recipe)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_SAMPLES, *setting.shape), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 10, (_SAMPLES,), generator=draw)
    batch, device = recipe.optim.batch_size, machine.device()
    options: dict[str, Any] = {"device": device, "pad": 4, "flip": True}
    memory = AdversaryMemory(_SAMPLES, setting.shape, Linf(0.1), device=device)

    def loader(name: loaders.LoaderName, **more: Any) -> Loader:
        return loaders.build(name, images, labels, batch, **options, **more)

    made: dict[str, Loader] = {
        "null": loader("null"),
        "resident": loader("resident"),
        "resident, with the attack's start": loader("resident", memory=memory),
    }
    if unavailable() is None:
        made["dali"] = loader("dali", workers=2)
    made |= {f"torch, {n} workers": loader("torch", workers=n) for n in (0, 2)}

    streams = {name: _endless(made[name]) for name in made}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, stream in streams.items():
            times[name].append(_stretch(stream, device))
    timings = {name: quantiles(values) for name, values in times.items()}
    for each in made.values():
        each.close()

    step_ms = _step_ms(recipe, images, labels)
    fastest = min((t for n, t in timings.items() if n.startswith("torch")), key=lambda t: t.p50)
    shape = "x".join(map(str, (*setting.shape[1:], setting.shape[0])))
    return [
        {
            "loader": name,
            "shape": shape,
            "batch": batch,
            "images_per_s": round(1e3 * batch / timing.p50),
            "p20_ms": timing.p20,
            "p50_ms": timing.p50,
            "p80_ms": timing.p80,
            # Compare with torch's loader at its best number of workers on this machine.
            "speedup_vs_torch": fastest.over(timing),
            "share_of_step": timing.p50 / step_ms,
            "step": setting.recipe,
        }
        for name, timing in timings.items()
    ]


def _endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _stretch(stream: Iterator[Batch], device: torch.device) -> float:
    """Return the seconds a batch."""
    for _ in range(_AHEAD):
        next(stream)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(_STRETCH):
        next(stream)
    wait()
    return (time.perf_counter() - began) / _STRETCH


def _step_ms(recipe: recipes.Recipe, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Time the recipe's training step on a batch that lies on the device [ms].

    A residual network takes a quarter of a minute a step on two cores: there a part of the batch is
    timed, and the time is multiplied.
    """
    device = machine.device()
    parts = 8 if recipe.model.name.startswith("preact") and device.type == "cpu" else 1
    model = build.build_model(recipe, images, 10, images.shape[1:]).to(device)
    memory = build.memory_for(recipe, images, device)
    size = recipe.optim.batch_size // parts
    batch = next(loaders.build("null", images, labels, size, device=device).epoch(0))
    step = build.build_step(recipe, model, steps=100, memory=memory)
    step.train()
    times = []
    # The first call includes one-time work.
    for _ in range(2 if parts > 1 else 10):
        began = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    step.close()
    return parts * quantiles(times[1:]).p50
