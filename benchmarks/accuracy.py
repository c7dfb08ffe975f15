"""Measure the time to an accuracy: `engine bench accuracy`.

Each seed of each recipe is a whole run, validated under PGD after every epoch. Seeds are the outer
loop, so that a machine that slows down slows all recipes. The clock is `train_seconds` of
metrics.jsonl: steps and their batches, without validation.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import recipes
from engine.performance import timing
from engine.progress import stderr
from engine.recipes import Recipe
from engine.runs import build, images, train
from engine.runs.folder import Run


@dataclass(frozen=True)
class Setting:
    """Hold the recipes to train and their target.

    Attributes:
        recipes: on one dataset, network and threat; the last recipe is the baseline.
        target: validation accuracy under PGD to reach [0..1].
        seeds: 0 .. seeds - 1, of each recipe [count].
        changes: fields set in every recipe.
    """

    recipes: tuple[str, ...]
    target: float
    seeds: int
    changes: Mapping[str, str]


def settings(quick: bool) -> Setting:
    if quick:
        return Setting(("quickstart", "quickstart-pgd10"), 0.7, 3, {})
    return Setting(
        ("fashion-mnist", "fashion-mnist-atta", "fashion-mnist-pgd10"),
        0.65,
        3,
        {"data.train_examples": "20000"},
    )


@dataclass(frozen=True)
class Outcome:
    """Hold the cost of reaching the target in one run, and the final accuracies.

    `seconds` and `epochs` are inf where the run does not reach the target.
    """

    seconds: float
    epochs: float
    clean: float
    pgd: float


def run(quick: bool) -> list[dict[str, Any]]:
    """Train every seed of every recipe.

    Args:
        quick: the 8x8 digits in place of 20,000 images of Fashion-MNIST; about a minute.
    Returns:
        One row a recipe. p20_s, p50_s, p80_s: training seconds until the target is first reached,
        over seeds, None where too few seeds reach it; reached: number of seeds that do;
        epochs_to_target: median; share_of_last: of the last recipe's time, seeds paired, the
        median, None unless all reach it; clean and pgd: validation accuracies after the last epoch,
        means over seeds.
    """
    setting = settings(quick)
    changes = {**setting.changes, "validation.every": "1"}
    chosen = {name: recipes.load(name, changes) for name in setting.recipes}
    for recipe in chosen.values():
        build.check(recipe, evaluated=False)
    before = torch.get_num_threads()
    try:
        return _rows(setting, chosen, _outcomes(setting, chosen, changes))
    finally:
        torch.set_num_threads(before)


def _outcomes(
    setting: Setting, chosen: Mapping[str, Recipe], changes: Mapping[str, str]
) -> dict[str, list[Outcome]]:
    outcomes_of: dict[str, list[Outcome]] = {name: [] for name in chosen}
    for recipe in chosen.values():
        # The first step of a process loads libraries; that time is no training time.
        build.step_of(recipe)()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(setting.seeds):
            for name in chosen:
                stderr.print(f"{name}, seed {seed}", highlight=False)
                recipe = recipes.load(name, {**changes, "seed": str(seed)})
                one = Run.create(recipe, Path(folder) / f"{name}-s{seed}")
                train.train(one)
                outcomes_of[name].append(outcome(one.metrics(), setting.target))
    return outcomes_of


def outcome(rows: list[dict[str, Any]], target: float) -> Outcome:
    """Read the outcome from the rows of a metrics.jsonl."""
    last, never = rows[-1], {"train_seconds": math.inf, "epoch": math.inf}
    first = next((row for row in rows if row["val_pgd"] >= target), never)
    return Outcome(first["train_seconds"], first["epoch"], last["val_clean"], last["val_pgd"])


def _rows(
    setting: Setting, chosen: Mapping[str, Recipe], outcomes_of: Mapping[str, list[Outcome]]
) -> list[dict[str, Any]]:
    timings = {
        name: timing.quantiles([one.seconds for one in outcomes])
        for name, outcomes in outcomes_of.items()
    }
    last = timings[setting.recipes[-1]]
    rows = []
    for name, outcomes in outcomes_of.items():
        recipe, measured = chosen[name], timings[name]
        all_reach = all(map(math.isfinite, (*measured.samples, *last.samples)))
        rows.append(
            {
                "recipe": name,
                "data": recipe.data.name,
                "images": len(images.split(recipe).train[0]),
                "epochs": recipe.optim.epochs,
                "passes": recipe.passes().total,
                "threads": torch.get_num_threads(),
                "target": setting.target,
                "seeds": setting.seeds,
                "reached": sum(map(math.isfinite, measured.samples)),
                "p20_s": _known(measured.p20 / 1e3),
                "p50_s": _known(measured.p50 / 1e3),
                "p80_s": _known(measured.p80 / 1e3),
                "epochs_to_target": _known(statistics.median(one.epochs for one in outcomes)),
                "share_of_last": round(measured.over(last), 3) if all_reach else None,
                "clean": statistics.mean(one.clean for one in outcomes),
                "pgd": statistics.mean(one.pgd for one in outcomes),
            }
        )
    return rows


def _known(value: float) -> float | None:
    return round(float(value), 3) if math.isfinite(value) else None
