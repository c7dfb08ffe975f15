"""Train methods side by side: same data, network and evaluation, every seed, every budget.

A protocol names the methods, the seeds and the budgets. Each (method, budget, seed) is a run with
its own folder and its own process; a finished run is never run again. The time axis is not the
clock of each run, because a run shares the machine with others. Instead, one process times the
steps of all methods in turn, and a run's training time is its number of steps times the median of
its step. compare.json holds every measurement at once, so a comparison may take many sittings: an
interrupted run resumes, and a run whose result is stored is not run again even if its folder is
gone.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import files, plugins, recipes
from ..device.machine import environment
from ..errors import EngineError
from ..performance import timing
from ..progress import bar, stderr
from ..runs import build, found
from ..runs.folder import Run
from . import kept
from .picture import draw
from .protocol import Job, Protocol, folder_name, jobs
from .scores import summarise

_POLL_SECONDS = 0.5
_STEPS_SECONDS = 20.0


def run(protocol: Protocol, *, out: Path | None = None, workers: int = 1) -> dict[str, Any]:
    """Make every run that is missing, and summarise all of them.

    Args:
        out: folder of the runs, and of compare.json, compare.png and steps.json; default
            runs/NAME-DATE-TIME.
        workers: runs at a time; the runs share the CPU's cores evenly.
    Returns:
        The content of compare.json: `about`, `environment`, `steps` (timings), `points` (one per
        run), `rows` (one per method and budget).
    Raises:
        EngineError: for a method that cannot be run, a folder that cannot be written or holds runs
            of other recipes, or a failed run (after all others are done).
    """
    out = out or Path("runs") / f"{protocol.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    recipe_of = {n: recipes.parse(tree, source=n) for n, tree in protocol.methods.items()}
    for recipe in recipe_of.values():
        build.check(recipe, evaluated=protocol.score == "test")
    # The timing takes long: a folder that cannot be written shows before.
    files.make_writable(out)
    steps = _step_times(protocol, out / "steps.json")
    plan = jobs(protocol, {name: row["p50_ms"] for name, row in steps.items()})
    known = _known(protocol, out / "compare.json")
    waiting = [job for job in plan if not _finished(job, out) and job.folder not in known]

    def summed_up() -> dict[str, Any]:
        # Keep stored points of methods, budgets and seeds outside this call: no measurement is
        # lost.
        of_folder = {
            folder: _timed(point, recipe_of[point["method"]], steps[point["method"]])
            for folder, point in known.items()
        }
        for job in plan:
            if _finished(job, out):
                of_folder[job.folder] = _point(job, out, steps[job.method])
        points = list(of_folder.values())
        comparison = {
            "protocol": protocol.name,
            "about": protocol.about,
            "score": protocol.score,
            "environment": environment(),
            "recipes": {name: _plain(tree, name) for name, tree in protocol.methods.items()},
            "steps": steps,
            "points": points,
            "rows": summarise(points),
        }
        files.write_json(out / "compare.json", comparison)
        if points:
            draw(comparison, out / "compare.png")
        return comparison

    failed = _make(waiting, out, protocol.score, workers, summed_up)
    comparison = summed_up()
    if failed:
        raise EngineError("; ".join(failed))
    return comparison


def _plain(tree: Mapping[str, Any], name: str) -> str:
    """Write a method's recipe in full, with the seed set aside."""
    return recipes.dump(recipes.parse({**tree, "seed": 0}, source=name))


def _same(text: str, tree: Mapping[str, Any], name: str) -> bool:
    """Tell whether a written recipe is the method's, with seed and epochs set aside.

    A budget replaces the epochs, and a point names its own.
    """
    written = recipes.parse(tomllib.loads(text))
    now = recipes.parse({**tree, "seed": 0}, source=name)
    return replace(written, optim=replace(written.optim, epochs=now.optim.epochs)) == now


def _known(protocol: Protocol, path: Path) -> dict[str, dict[str, Any]]:
    """Return the points of an earlier sitting, by run folder.

    Points of methods whose recipes changed since are left out.
    """
    if not path.exists():
        return {}
    comparison = kept.comparison(path)
    try:
        same = {
            name
            for name, text in comparison["recipes"].items()
            if name in protocol.methods and _same(text, protocol.methods[name], name)
        }
    except (ValueError, RecursionError, EngineError) as error:
        raise EngineError(f"{path} is damaged ({error}): move it away") from None
    known = {
        folder_name(point["method"], point["epochs"], point["seed"]): point
        for point in comparison["points"]
        if point["method"] in same and comparison["score"] == protocol.score
    }
    others = len(comparison["points"]) - len(known)
    if others:
        aside = path.with_suffix(f".{time.strftime('%Y%m%d-%H%M%S')}.json")
        shutil.copy(path, aside)
        stderr.print(
            f"{others} results in {path} are of methods that {protocol.name} lacks or has changed: "
            f"this comparison leaves them out, and {aside} keeps them",
            highlight=False,
            soft_wrap=True,
        )
    return known


def _finished(job: Job, out: Path) -> bool:
    folder = out / job.folder
    if not (folder / "summary.json").exists():
        return False
    if Run.open(folder).recipe != job.recipe:
        raise EngineError(f"{folder} holds a run of another recipe: choose another --out")
    return True


def _make(
    plan: list[Job], out: Path, score: str, workers: int, finished: Callable[[], object]
) -> list[str]:
    """Run all of `plan`, call `finished` after each run, and return a line for each failure."""
    failed: list[str] = []
    waiting = list(plan)
    running: dict[subprocess.Popen, Job] = {}
    total = sum(job.recipe.optim.epochs for job in plan)
    with bar() as progress:
        shown = progress.add_task("epochs of all runs", total=total, note="")
        done = 0
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    running[_start(job, out, score, workers)] = job
                time.sleep(_POLL_SECONDS)
                for process in [p for p in running if p.poll() is not None]:
                    job = running.pop(process)
                    done += job.recipe.optim.epochs
                    if process.returncode:
                        failed.append(f"{job.folder}: {_last_line(out / job.folder)}")
                    else:
                        finished()
                    stderr.print(
                        f"{'failed' if process.returncode else 'done'}: {out / job.folder}",
                        highlight=False,
                        soft_wrap=True,
                    )
                under_way = sum(_epochs_done(out / job.folder) for job in running.values())
                names = ", ".join(job.folder for job in running.values())
                progress.update(shown, completed=done + under_way, note=names)
        finally:
            for process in running:
                process.terminate()
                process.wait()
    return failed


def _start(job: Job, out: Path, score: str, workers: int) -> subprocess.Popen:
    folder = out / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "recipe.toml").exists() and Run.open(folder).recipe == job.recipe:
        words = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder)
        wanted = folder / "wanted.toml"
        files.write_text(wanted, recipes.dump(job.recipe))
        words = [str(wanted), "--run-dir", str(folder)]
    words = [sys.executable, "-m", "engine", "train", *words, *plugins.words(), "--json"]
    if score == "validation":
        words.append("--no-eval")
    threads = job.recipe.threads or max(1, (os.cpu_count() or 1) // workers)
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )


def _epochs_done(folder: Path) -> int:
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "died without a word")


def _step_times(protocol: Protocol, path: Path) -> dict[str, dict[str, float]]:
    """Time each method's training step on this machine, in turn.

    The times are kept in `path` and taken again when the methods differ.
    """
    recipe_of = {n: recipes.parse(tree, source=n) for n, tree in protocol.methods.items()}
    wanted = {name: recipes.dump(recipe) for name, recipe in recipe_of.items()}
    if path.exists():
        timed = kept.step_times(path, wanted)
        if timed is not None:
            return timed
    stderr.print("timing the steps of all methods in turn", highlight=False)
    calls = {name: build.step_of(recipe) for name, recipe in recipe_of.items()}
    timings = timing.side_by_side(calls, seconds=_STEPS_SECONDS, sample_ms=0)
    steps = {
        name: {"p20_ms": t.p20, "p50_ms": t.p50, "p80_ms": t.p80} for name, t in timings.items()
    }
    files.write_json(path, {"environment": environment(), "recipes": wanted, "steps": steps})
    # The steps' memory on the device is for the runs to come.
    calls.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return steps


def _point(job: Job, out: Path, step: Mapping[str, float]) -> dict[str, Any]:
    run = Run.open(out / job.folder)
    summary, recipe = found.summary(run), job.recipe
    last: dict[str, Any] = next((r for r in reversed(run.metrics()) if "val_pgd" in r), {})
    point = {
        "method": job.method,
        # The folder of a user's own set says nothing to others.
        "dataset": Path(recipe.data.name).stem,
        "network": recipe.model.name,
        "norm": recipe.threat.norm,
        "eps": recipe.threat.eps,
        "objective": recipe.objective.name,
        "k": recipe.attack.steps,
        "start": recipe.attack.start,
        "epochs": job.epochs,
        "seed": recipe.seed,
        **{key: summary.get(key) for key in ("clean", "pgd", "autoattack", "examples")},
        "val_clean": last.get("val_clean"),
        "val_pgd": last.get("val_pgd"),
        "rolled_back": summary.get("rolled_back"),
        "passes_per_step": summary["passes_per_step"],
        "steps": summary["steps"],
        "clock_seconds": summary["train_seconds"],
        "peak_memory_mb": summary.get("peak_memory_mb"),
    }
    return _timed(point, recipe, step)


def _timed(
    point: Mapping[str, Any], recipe: recipes.Recipe, step: Mapping[str, float]
) -> dict[str, Any]:
    """Add the version of AutoAttack and the training time by the measured step to a point."""
    version = recipe.evaluation.autoattack
    seconds = point["steps"] * step["p50_ms"] / 1e3
    return {**point, "autoattack_version": version, "seconds": seconds}
