"""Several recipes trained side by side: same data, same evaluation, every seed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import files, runner
from . import recipe as recipes
from .errors import EngineError
from .progress import stderr, stdout
from .runs import Run, environment


def run(
    names: list[str], overrides: Mapping[str, str], *, seeds: int, out: Path | None
) -> list[dict[str, Any]]:
    """Train and evaluate every recipe with seeds 0..seeds-1, and summarise each over its seeds.

    Recipes alternate within a seed, so a machine that drifts drifts for all of them. A run that has
    its summary already is read, not run again.

    Args:
        overrides: applied to every recipe.
        out: folder for the runs and compare.json; default runs/compare-DATE-TIME.
    Returns:
        One row a recipe: means and standard deviations over seeds.
    """
    if seeds < 1:
        raise EngineError(f"--seeds must be at least 1, got {seeds}")
    out = out or Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    plan = []
    for seed in range(seeds):
        for name in names:
            plan.append(recipes.load(name, {**overrides, "seed": str(seed)}))
    for recipe in plan:
        runner.check(recipe)
    found: dict[str, list[dict[str, Any]]] = {}
    for number, recipe in enumerate(plan):
        folder = out / f"{recipe.name}-seed{recipe.seed}"
        stderr.print(f"run {number + 1} of {len(plan)}: {folder}", highlight=False, soft_wrap=True)
        found.setdefault(recipe.name, []).append(_one(recipe, folder))
    rows = [_summarise(recipe, found[recipe.name]) for recipe in plan[: len(names)]]
    files.write_json(out / "compare.json", {"environment": environment(), "rows": rows})
    return rows


def _one(recipe: recipes.Recipe, folder: Path) -> dict[str, Any]:
    if (folder / "summary.json").exists():
        old = Run.open(folder)
        if old.recipe != recipe:
            raise EngineError(f"{folder} holds a run of another recipe: choose another --out")
        return old.read_json("summary.json")
    if (folder / "recipe.toml").exists():
        raise EngineError(f"{folder} holds an unfinished run: remove it, or choose another --out")
    fresh = Run.create(recipe, folder)
    result = runner.train(recipe, fresh)
    return runner.summary(fresh, result, runner.evaluate_run(fresh))


def _summarise(recipe: recipes.Recipe, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        values = [r[key] for r in rows if r.get(key) is not None]
        return statistics.fmean(values) if values else None

    def deviation(key: str) -> float | None:
        values = [r[key] for r in rows if r.get(key) is not None]
        return statistics.stdev(values) if len(values) > 1 else None

    return {
        "recipe": recipe.name,
        "dataset": recipe.data.name,
        "network": recipe.model.name,
        "norm": recipe.threat.norm,
        "eps": recipe.threat.eps,
        "objective": recipe.objective.name,
        "k": recipe.attack.steps,
        "start": recipe.attack.start,
        "epochs": recipe.optim.epochs,
        "seeds": len(rows),
        "examples": rows[0]["examples"],
        "clean_mean": mean("clean"),
        "pgd_mean": mean("pgd"),
        "pgd_sd": deviation("pgd"),
        "autoattack_mean": mean("autoattack"),
        "autoattack_sd": deviation("autoattack"),
        "train_seconds_mean": mean("train_seconds"),
        "passes_per_step": rows[0]["passes_per_step"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table on stdout; times relative to the slowest recipe."""
    from rich.table import Table

    slowest = max(r["train_seconds_mean"] for r in rows)
    table = Table("recipe", "k", "passes", "clean %", "PGD %", "AutoAttack %", "train s", "time")
    for r in rows:
        table.add_row(
            r["recipe"],
            str(r["k"]),
            str(r["passes_per_step"]),
            _percent(r["clean_mean"]),
            _percent(r["pgd_mean"], r["pgd_sd"]),
            _percent(r["autoattack_mean"], r["autoattack_sd"]),
            f"{r['train_seconds_mean']:.1f}",
            f"{r['train_seconds_mean'] / slowest:.0%}",
        )
    stdout.print(table)
    stdout.print(json.dumps({"examples": rows[0]["examples"], "seeds": rows[0]["seeds"]}))


def _percent(mean: float | None, deviation: float | None = None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")
