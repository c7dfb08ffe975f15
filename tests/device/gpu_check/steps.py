"""Compare every recipe's captured step with its eager one, bit for bit; count waits; time both.

    python -m tests.device.gpu_check.steps [--batch 64] [RECIPE ...]

One line of JSON for each recipe and precision; the last line is ALL PASS or the number of bad rows.
Without a GPU a tape stands in for the graph (`engine doctor --capture` has it too).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from engine import recipes
from engine.data.loaders import ResidentLoader
from engine.device import capture
from engine.device.machine import device, peak_memory_mb
from engine.models import sources
from engine.performance.capture_audit import Tape
from engine.recipes import Recipe
from engine.runs import build
from engine.runs.images import facts, in_memory
from engine.training.step import Step

# The first replay sees what the capture saw. The second one differs where a number was frozen.
# cuDNN and Triton choose kernels in the first steps, so a GPU gets more.
CPU_STEPS, GPU_STEPS, TIMED = 2, 4, 20


def built(recipe: Recipe, batch: int, recorder: capture.Recorder | None) -> Step:
    """Return the recipe's step on random images of its dataset's shape, at a batch of its own."""
    target, about = device(), facts(recipe)
    recipe = in_memory(recipe)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * batch, *about.shape), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, about.classes, (len(images),), generator=draw)
    torch.manual_seed(0)
    model = build.build_model(recipe, images, about.classes, images.shape[1:]).to(target)
    memory = build.memory_for(recipe, images, target)
    loader = ResidentLoader(
        images,
        labels,
        batch,
        device=target,
        memory=memory,
        extra=None if recipe.data.extra is None else (images, labels),
        share=recipe.data.extra_share,
        **build.sampling_of(recipe),
    )
    step = build.build_step(
        recipe, model, steps=64, memory=memory, take=loader.take, recorder=recorder
    )
    step.train()
    loader.begin(0)
    return step


def timed(step: Step, steps: int) -> float:
    """Return milliseconds a step."""
    wait(step)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait(step)
    return 1e3 * (time.perf_counter() - began) / steps


def wait(step: Step) -> None:
    if step.device.type == "cuda":
        torch.cuda.synchronize(step.device)


def waits(step: Step) -> list[str]:
    """Return the places at which one eager step waits for the device.

    Copies of new tables of gradient addresses are left out: a captured step makes none.
    """
    if step.device.type != "cuda":
        step()
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = {f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)}
    return sorted(place for place in places if "triton/optimisers.py" not in place)


def check(recipe: Recipe, batch: int) -> dict[str, Any]:
    """Run one recipe both ways from one state and compare all that a step changes."""
    target = device()
    gpu = target.type == "cuda"
    steps = GPU_STEPS if gpu else CPU_STEPS
    recipe = replace(recipe, step=replace(recipe.step, capture="off"))
    eager = built(recipe, batch, None)
    for _ in range(steps - 2):
        eager()
    waiting = waits(eager)
    eager_ms = timed(eager, 1)
    recorder: Any = capture.CudaGraphs(target) if gpu else Tape()
    captured = built(recipe, batch, recorder)
    for _ in range(steps - 1):
        captured()
    captured_ms = timed(captured, 1)
    ours, theirs = captured.tensors(), eager.tensors()
    different = [name for name, t in ours.items() if not torch.equal(t, theirs[name])]
    if gpu:
        captured_ms = timed(captured, TIMED)
    row = {
        "recipe": recipe.name,
        "precision": captured.precision,
        "batch": batch,
        "why_eager": captured.why_eager,
        "waits": waiting,
        "different": different[:5],
        "eager_ms": round(eager_ms, 3),
        "captured_ms": round(captured_ms, 3),
        "loss": captured.means()["loss"],
        "memory_mb": peak_memory_mb(),
    }
    captured.close()
    row["ok"] = not (captured.why_eager or waiting or different)
    return row


def wanted(names: list[str], precision: str | None) -> Iterator[Recipe]:
    """Yield the recipes to check: small networks in every precision, where there is a GPU."""
    gpu = torch.cuda.is_available()
    for name in names or recipes.names():
        small = name.startswith(("fashion-mnist", "quickstart"))
        precisions = ("bf16", "fp16", "tf32") if gpu and small else ("bf16",)
        for each in [precision] if precision else precisions:
            yield recipes.load(name, {"step.precision": each})


def main() -> int:
    """Check, print, and return how many rows are bad."""
    parser = argparse.ArgumentParser(description="captured steps against eager ones")
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--batch", type=int, default=64 if torch.cuda.is_available() else 2)
    parser.add_argument("--precision")
    options = parser.parse_args()
    # Without this cuDNN may take another algorithm each time, and sums differ in their last bits.
    torch.backends.cudnn.deterministic = True
    bad = 0
    for recipe in wanted(options.recipes, options.precision):
        if not options.recipes and (missing := sources.unavailable(recipe.model.name)):
            print(json.dumps({"recipe": recipe.name, "skipped": missing}), flush=True)
            continue
        try:
            row = check(recipe, options.batch)
        except Exception as error:
            row = {"recipe": recipe.name, "failed": f"{type(error).__name__}: {error}"[:300]}
        bad += not row.get("ok", False)
        print(json.dumps(row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print("ALL PASS" if bad == 0 else f"{bad} BAD", flush=True)
    return min(bad, 100)


if __name__ == "__main__":
    sys.exit(main())
