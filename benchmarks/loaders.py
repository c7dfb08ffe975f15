"""Compare loaders: `engine bench loaders`.

The rows hold images a second, and the loader's share of a training step. A sample is a stretch of
batches in a row, after the batches that a loader read ahead while others had their turn: the sample
then includes the work of reading ahead.

The last rows are of JPEGs, 500x375 pixels, random resized crops to 224x224, half of them mirrored.
The files are generated; they lie in the page cache, so no disk is measured.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine import recipes
from engine.adversary.host_memory import HostMemory, ahead
from engine.adversary.memory import AdversaryMemory
from engine.data import loaders
from engine.data.loaders import Batch, Loader
from engine.data.loaders.dali import unavailable
from engine.data.photos import Framing, index_of, of_index
from engine.device import machine
from engine.models.sources import unavailable as unavailable_network
from engine.performance.timing import Timing, quantiles
from engine.runs import build
from engine.runs.images import in_memory
from engine.threat import Linf

log = logging.getLogger(__name__)

# More batches than any loader reads ahead: DALI two, of pictures three, and torch two for each of
# two processes.
_AHEAD = 5
_STRETCH = 24


@dataclass(frozen=True)
class Setting:
    """Hold images [C, H, W], and the recipe whose training they feed."""

    shape: tuple[int, int, int]
    recipe: str


SETTINGS = (Setting((1, 28, 28), "fashion-mnist"), Setting((3, 32, 32), "cifar10"))
_SAMPLES = 12_000


@dataclass(frozen=True)
class Jpegs:
    """Hold what the rows of JPEGs measure.

    Attributes:
        count: files; size: (height, width) of each [pixels]; side: of the network's images.
        batch: images; stretch: batches of one sample.
        step: the recipe whose training step the loaders feed; None: none is timed.
    """

    count: int
    size: tuple[int, int]
    side: int
    batch: int
    stretch: int
    step: str | None = None


JPEGS = Jpegs(count=512, size=(375, 500), side=224, batch=64, stretch=16, step="imagenet-resnet50")
# Files of 75 kB on average.
_QUALITY = 92


class _Remembering(Loader):
    """Give batches with the attack's start from a memory on the host, and write its rows back."""

    def __init__(self, loader: Loader, shape: tuple[int, int, int]) -> None:
        self._loader = loader
        batch = len(next(loader.epoch(0)).y)
        device = machine.device()
        self._memory = HostMemory(_SAMPLES, shape, Linf(0.1), batch=batch, device=device)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        memory = self._memory
        for batch in ahead(self._loader.epoch(epoch, first), memory.prefetch):
            assert batch.samples is not None
            memory.fetch(batch.samples)
            start = memory.recall(batch.samples, batch.x, batch.crops)
            memory.store()
            yield batch._replace(start=start)

    def close(self) -> None:
        self._memory.close()
        self._loader.close()


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Return a row for each loader and image shape, crop and mirror on.

    All loaders of a shape are timed in turn.
    """
    rounds = 5 if quick else 15
    return [
        *(row for setting in SETTINGS for row in _rows(setting, rounds)),
        *_jpeg_rows(JPEGS, rounds),
    ]


def _rows(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    recipe = recipes.load(setting.recipe)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_SAMPLES, *setting.shape), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 10, (_SAMPLES,), generator=draw)
    batch, device = recipe.optim.batch_size, machine.device()
    options: dict[str, Any] = {"device": device, "pad": 4, "flip": True}
    memory = AdversaryMemory(_SAMPLES, setting.shape, Linf(0.1), device=device)

    def loader(name: str, **more: Any) -> Loader:
        return loaders.build(name, images, labels, batch, **options, **more)

    made: dict[str, Loader] = {
        "null": loader("null"),
        "resident": loader("resident"),
        "resident, with the attack's start": loader("resident", memory=memory),
    }
    made["resident, memory on the host"] = _Remembering(loader("resident"), setting.shape)
    if unavailable() is None:
        made["dali"] = loader("dali", workers=2)
    made |= {f"torch, {n} workers": loader("torch", workers=n) for n in (0, 2)}

    timings = _timings(made, rounds, _STRETCH, device)
    # A residual network takes a quarter of a minute a step on two cores.
    parts = 8 if recipe.model.name.startswith("preact") and device.type == "cpu" else 1
    shape = "x".join(map(str, (*setting.shape[1:], setting.shape[0])))
    return _compared(timings, shape, batch, _step_ms(recipe, images, labels, parts), setting.recipe)


def _jpeg_rows(jpegs: Jpegs, rounds: int) -> list[dict[str, Any]]:
    device = machine.device()
    with tempfile.TemporaryDirectory() as place:
        folder = _written(Path(place), jpegs)
        index = index_of(folder, "train", folder / "cache")
        side = jpegs.side
        framing = Framing((side, side), round(side / 0.875))
        photos = of_index(index, framing, "refuse", threads=2, order=True)

        def loader(name: str, workers: int) -> Loader:
            return loaders.build(
                name,
                photos,
                photos.labels,
                jpegs.batch,
                device=device,
                workers=workers,
                scale=(0.08, 1.0),
                flip=True,
            )

        made = {} if unavailable() else {"dali": loader("dali", 2)}
        made |= {f"torch and Pillow, {n} workers": loader("torch", n) for n in (0, 2)}
        timings = _timings(made, rounds, jpegs.stretch, device)
    height, width = jpegs.size
    shape = f"JPEG {width}x{height} to {side}x{side}x3"
    return _compared(timings, shape, jpegs.batch, *_jpeg_step(jpegs))


def _jpeg_step(jpegs: Jpegs) -> tuple[float | None, str]:
    """Time a step on a batch of such images [ms]; return it and its recipe's name.

    (None, "") where the recipe's network is of a package that does not import.
    """
    if jpegs.step is None:
        return None, ""
    recipe = in_memory(recipes.load(jpegs.step))
    if missing := unavailable_network(recipe.model.name):
        log.warning("no share of a step of %s: %s", jpegs.step, missing)
        return None, ""
    # A step on the CPU takes seconds for each image.
    timed = jpegs.batch if machine.device().type == "cuda" else 2
    draw = torch.Generator().manual_seed(0)
    shape = (timed, 3, jpegs.side, jpegs.side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    recipe = replace(recipe, optim=replace(recipe.optim, batch_size=timed))
    step_ms = _step_ms(recipe, images, torch.zeros(timed, dtype=torch.int64))
    return step_ms * jpegs.batch / timed, jpegs.step


def _written(folder: Path, jpegs: Jpegs) -> Path:
    """Write the JPEGs, smooth noise at four scales, and return `folder`."""
    height, width = jpegs.size
    for number in range(jpegs.count):
        draw = np.random.default_rng(number)
        pixels = np.full((height, width, 3), 128.0)
        for side, strength in ((4, 60), (16, 50), (64, 40), (256, 12)):
            noise = draw.normal(0, 1, (side * height // width + 2, side + 2, 3))
            levels = Image.fromarray(np.clip(128 + 40 * noise, 0, 255).astype(np.uint8))
            grown = np.asarray(levels.resize((width, height), Image.Resampling.BICUBIC), np.float64)
            pixels += strength * (grown - 128) / 40
        # Two classes; the test folder must have them too.
        for split in ("train", "val") if number < 2 else ("train",):
            place = folder / split / str(number % 2)
            place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(place / f"{number}.jpg", quality=_QUALITY)
    return folder


def _timings(
    made: Mapping[str, Loader], rounds: int, stretch: int, device: torch.device
) -> dict[str, Timing]:
    """Time the loaders in turn [ms a batch], and close them."""
    streams = {name: _endless(loader) for name, loader in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, stream in streams.items():
            times[name].append(_stretch(stream, stretch, device))
    for each in made.values():
        each.close()
    return {name: quantiles(values) for name, values in times.items()}


def _compared(
    timings: Mapping[str, Timing], shape: str, batch: int, step_ms: float | None, step: str
) -> list[dict[str, Any]]:
    """Return a row for each loader.

    Args:
        step_ms: a training step of the recipe `step`; None: it was not timed.
    """
    # Compare with torch's loader at its best number of workers on this machine.
    fastest = min((t for n, t in timings.items() if n.startswith("torch")), key=lambda t: t.p50)
    return [
        {
            "loader": name,
            "shape": shape,
            "batch": batch,
            "images_per_s": round(1e3 * batch / timing.p50),
            "p20_ms": timing.p20,
            "p50_ms": timing.p50,
            "p80_ms": timing.p80,
            "speedup_vs_torch": fastest.over(timing),
            "share_of_step": step_ms and timing.p50 / step_ms,
            "step": step,
        }
        for name, timing in timings.items()
    ]


def _endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _stretch(stream: Iterator[Batch], count: int, device: torch.device) -> float:
    """Return the seconds a batch."""
    for _ in range(_AHEAD):
        next(stream)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(count):
        next(stream)
    wait()
    return (time.perf_counter() - began) / count


def _step_ms(
    recipe: recipes.Recipe, images: torch.Tensor, labels: torch.Tensor, parts: int = 1
) -> float:
    """Time the recipe's training step on a batch that lies on the device [ms].

    Args:
        parts: where more than one, a batch of such a part is timed, and the time is multiplied.
    """
    device = machine.device()
    model = build.build_model(recipe, images, 10, images.shape[1:]).to(device)
    memory = build.memory_for(recipe, images, device)
    size = recipe.optim.batch_size // parts
    batch = next(loaders.build("null", images, labels, size, device=device).epoch(0))
    step = build.build_step(recipe, model, steps=100, memory=memory)
    step.train()
    times = []
    # The first call includes one-time work. Steps of large networks take seconds: few of these.
    for _ in range(10 if parts == 1 and size > 8 else 3):
        began = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    step.close()
    return parts * quantiles(times[1:]).p50
