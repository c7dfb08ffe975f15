"""Methods side by side: same data, network and evaluation, every seed, every budget; accuracy over training time.

A protocol names the methods, the seeds and the budgets; each (method, budget, seed) is a run in a folder
of its own, made by a process of its own. A finished run is never run again. The time axis is not the
clock of each run, which shares the machine with whatever else is there: the steps of all methods are
timed in turn, in one process, and a run's training time is its number of steps times its step's median.
What was measured is kept in compare.json as it comes, so a comparison may take many sittings: a run that
was cut short goes on, and one whose folder is gone but whose result is there is not run again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from . import files, plots, runner, runs
from . import recipe as recipes
from .errors import EngineError
from .progress import bar, stderr, stdout
from .recipe import Recipe
from .runs import Run, environment

_POLL_SECONDS = 0.5
_STEPS_SECONDS = 20.0


@dataclass(frozen=True)
class Protocol:
    """What is compared.

    Attributes:
        methods: recipe trees by the method's name.
        epochs, minutes: budgets: passes over the training set, replays counted, or training minutes by the
            measured step.
        chosen: the methods that are trained in this sitting; results of the others stay as they are stored.
        score: "test": clean, PGD and AutoAttack accuracy on the test images; "validation": clean and PGD
            accuracy on the held-out ones, for choosing settings without a look at the test set.
    """

    name: str
    about: str
    methods: Mapping[str, Mapping[str, Any]]
    seeds: int = 3
    epochs: tuple[int, ...] = ()
    minutes: tuple[float, ...] = ()
    chosen: frozenset[str] = frozenset()
    score: Literal["test", "validation"] = "test"


@dataclass(frozen=True)
class Job:
    """One run of a protocol."""

    method: str
    recipe: Recipe

    @property
    def epochs(self) -> int:
        """Passes over the training set: a batch that is replayed is trained on again."""
        return self.recipe.optim.epochs * self.recipe.optim.replays

    @property
    def folder(self) -> str:
        return _folder(self.method, self.epochs, self.recipe.seed)


def _folder(method: str, epochs: int, seed: int) -> str:
    return f"{method}-e{epochs}-s{seed}"


# ---- the protocol ----------------------------------------------------------------------------------


def read(
    names: Sequence[str],
    overrides: Mapping[str, str],
    *,
    methods: Sequence[str] = (),
    seeds: int | None = None,
    epochs: Sequence[int] = (),
    minutes: Sequence[float] = (),
) -> Protocol:
    """A protocol from its file (a TOML file with `methods`), or from recipes.

    Args:
        names: one protocol file, or recipes by name or path.
        overrides: applied to every method, on top.
        methods: those to train now; default all.
        seeds, epochs, minutes: in place of the protocol's own.
    Raises:
        EngineError: a file or recipe that is not there or not valid; a method it does not have; no seed; a
            budget that is none.
    """
    protocol = _from_file(Path(names[0])) if len(names) == 1 and _is_protocol(names[0]) else None
    if protocol is None:
        trees = [recipes.tree(name) for name in names]
        by_name = {str(tree["name"]): tree for tree in trees}
        if len(by_name) < len(names):
            raise EngineError("engine compare: two of the recipes have one name")
        protocol = Protocol("compare", "", by_name)
    for name in methods:
        if name not in protocol.methods:
            near = recipes.nearest(name, list(protocol.methods))
            raise EngineError(f"--methods {name}: {protocol.name} has no such method{near}")
    wanted = replace(
        protocol,
        methods={n: recipes.overridden(tree, overrides) for n, tree in protocol.methods.items()},
        seeds=protocol.seeds if seeds is None else seeds,
        epochs=tuple(epochs) or (() if minutes else protocol.epochs),
        minutes=tuple(minutes) or (() if epochs else protocol.minutes),
        chosen=frozenset(methods or protocol.methods),
    )
    if wanted.seeds < 1:
        raise EngineError(f"--seeds must be at least 1, got {wanted.seeds}")
    if wanted.epochs and wanted.minutes:
        raise EngineError("budgets are epochs or minutes, not both")
    if not all(0 < budget < math.inf for budget in (*wanted.epochs, *wanted.minutes)):
        raise EngineError("a budget of epochs or minutes must be above 0")
    return wanted


def _is_protocol(name: str) -> bool:
    path = Path(name)
    return path.suffix == ".toml" and path.is_file() and "methods" in _toml(path)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(files.read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise EngineError(f"cannot read {path}: {error}") from None


def _from_file(path: Path) -> Protocol:
    """A protocol file: `base` recipe, `common` on top of it, and what each of `methods` changes."""
    spec = _toml(path)
    known = {"about", "base", "common", "methods", "seeds", "epochs", "minutes", "score"}
    if unknown := sorted(spec.keys() - known):
        raise EngineError(
            f"{path}: unknown field {unknown[0]!r}{recipes.nearest(unknown[0], list(known))}"
        )
    wrong = [
        name
        for name, fits in {
            "base": isinstance(spec.get("base"), str),
            "methods": bool(spec["methods"]) and _tables(spec["methods"]),
            "common": isinstance(spec.get("common", {}), dict),
            "seeds": isinstance(spec.get("seeds", 3), int),
            "epochs": _numbers(spec.get("epochs", []), int),
            "minutes": _numbers(spec.get("minutes", []), (int, float)),
            "score": spec.get("score", "test") in ("test", "validation"),
            "about": isinstance(spec.get("about", ""), str),
        }.items()
        if not fits
    ]
    if wrong:
        raise EngineError(f"{path}: {wrong[0]} is missing or not what it should be")
    for name in spec["methods"]:
        # They become folders' names, and protocols come from strangers as well.
        if name != runs.plain(name):
            raise EngineError(
                f"{path}: methods have plain names, letters, digits and -_. : {name!r}"
            )
    common = recipes.merged(recipes.tree(spec["base"]), spec.get("common", {}))
    methods = {
        name: {**recipes.merged(common, change), "name": name}
        for name, change in spec["methods"].items()
    }
    return Protocol(
        path.stem,
        spec.get("about", ""),
        methods,
        seeds=spec.get("seeds", 3),
        epochs=tuple(spec.get("epochs", ())),
        minutes=tuple(spec.get("minutes", ())),
        score=spec.get("score", "test"),
    )


def _tables(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())


def _numbers(value: object, kind: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, kind) and not isinstance(v, bool) for v in value
    )


def jobs(protocol: Protocol, step_ms: Mapping[str, float]) -> list[Job]:
    """All runs, seeds first and methods within them: what stops early is still a comparison."""
    found = []
    for seed in range(protocol.seeds):
        for name, tree in protocol.methods.items():
            if name not in protocol.chosen:
                continue
            recipe = recipes.parse({**tree, "seed": seed}, source=name)
            budgets = [recipe.optim.epochs]
            if protocol.epochs:
                budgets = [max(1, round(n / recipe.optim.replays)) for n in protocol.epochs]
            elif protocol.minutes:
                epoch = runner.steps_per_epoch(recipe) * step_ms[name] / 60e3
                budgets = [max(1, round(minutes / epoch)) for minutes in protocol.minutes]
            for epochs in dict.fromkeys(budgets):
                changed = recipes.merged(tree, {"seed": seed, "optim": {"epochs": epochs}})
                found.append(Job(name, recipes.parse(changed, source=name)))
    return found


# ---- running it ------------------------------------------------------------------------------------


def run(protocol: Protocol, *, out: Path | None = None, workers: int = 1) -> dict[str, Any]:
    """Make every run that is not there yet, and summarise all of them.

    Args:
        out: folder of the runs, and of compare.json, compare.png and steps.json; default
            runs/NAME-DATE-TIME.
        workers: runs at a time; each gets its share of the CPU's cores.
    Returns:
        What compare.json holds: `about`, `environment`, `steps` (timings), `points` (a run each), `rows`
        (a method at a budget each).
    Raises:
        EngineError: a method that cannot be run; a folder with runs of other recipes; a run that failed
            (after all others are done).
    """
    out = out or Path("runs") / f"{protocol.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    recipe_of = {n: recipes.parse(tree, source=n) for n, tree in protocol.methods.items()}
    for recipe in recipe_of.values():
        runner.check(recipe, evaluated=protocol.score == "test")
    steps = _step_times(protocol, out / "steps.json")
    plan = jobs(protocol, {name: row["p50_ms"] for name, row in steps.items()})
    known = _known(protocol, out / "compare.json")
    waiting = [job for job in plan if not _finished(job, out) and job.folder not in known]

    def summed_up() -> dict[str, Any]:
        # Stored ones of methods, budgets and seeds that were not asked for this time too: nothing measured is lost.
        of_folder = {
            folder: _timed(point, recipe_of[point["method"]], steps[point["method"]])
            for folder, point in known.items()
        }
        for job in plan:
            if _finished(job, out):
                of_folder[job.folder] = _point(job, out, steps[job.method])
        points = list(of_folder.values())
        found = {
            "protocol": protocol.name,
            "about": protocol.about,
            "score": protocol.score,
            "environment": environment(),
            "recipes": {name: _plain(tree, name) for name, tree in protocol.methods.items()},
            "steps": steps,
            "points": points,
            "rows": summarise(points),
        }
        files.write_json(out / "compare.json", found)
        if points:
            draw(found, out / "compare.png")
        return found

    failed = _make(waiting, out, protocol.score, workers, summed_up)
    found = summed_up()
    if failed:
        raise EngineError("; ".join(failed))
    return found


def _plain(tree: Mapping[str, Any], name: str) -> str:
    """A method's recipe in full, seed and budget aside."""
    return recipes.dump(recipes.parse({**tree, "seed": 0}, source=name))


def _known(protocol: Protocol, path: Path) -> dict[str, dict[str, Any]]:
    """Points of an earlier sitting, by their run's folder, of methods whose recipes are what they were."""
    if not path.exists():
        return {}
    try:
        kept = json.loads(files.read_text(path))
        same = {
            name
            for name, text in kept.get("recipes", {}).items()
            if name in protocol.methods
            and recipes.parse(tomllib.loads(text))
            == recipes.parse({**protocol.methods[name], "seed": 0}, source=name)
        }
        known = {
            _folder(point["method"], point["epochs"], point["seed"]): point
            for point in kept["points"]
            if point["method"] in same and kept.get("score") == protocol.score
        }
        others = len(kept["points"]) - len(known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path} is damaged ({error!r}): move it away") from None
    if others:
        aside = path.with_suffix(f".{time.strftime('%Y%m%d-%H%M%S')}.json")
        shutil.copy(path, aside)
        stderr.print(
            f"{others} results in {path} are of methods that are not in {protocol.name}, or not as it has "
            f"them: they are left out, and kept in {aside}",
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
    """Run all of `plan`, calling `finished` after each; what failed, a line each."""
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
    words = [sys.executable, "-m", "engine", "train", *words, "--json"]
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
    """Each method's training step on this machine, timed in turn; kept, and taken again for other methods."""
    recipe_of = {n: recipes.parse(tree, source=n) for n, tree in protocol.methods.items()}
    wanted = {name: recipes.dump(recipe) for name, recipe in recipe_of.items()}
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["recipes"] == wanted:
            return kept["steps"]
    from .benchmarks import measure

    stderr.print("timing the steps of all methods in turn", highlight=False)
    calls = {name: runner.step_of(recipe) for name, recipe in recipe_of.items()}
    timings = measure.side_by_side(calls, seconds=_STEPS_SECONDS, sample_ms=0)
    steps = {
        name: {"p20_ms": t.p20, "p50_ms": t.p50, "p80_ms": t.p80} for name, t in timings.items()
    }
    files.write_json(path, {"environment": environment(), "recipes": wanted, "steps": steps})
    return steps


# ---- what it says ----------------------------------------------------------------------------------


def _point(job: Job, out: Path, step: Mapping[str, float]) -> dict[str, Any]:
    run = Run.open(out / job.folder)
    summary, recipe = run.read_json("summary.json"), job.recipe
    last: dict[str, Any] = next((r for r in reversed(run.metrics()) if "val_pgd" in r), {})
    found = {
        "method": job.method,
        "dataset": recipe.data.name,
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
    return _timed(found, recipe, step)


def _timed(
    point: Mapping[str, Any], recipe: recipes.Recipe, step: Mapping[str, float]
) -> dict[str, Any]:
    """The point with which AutoAttack it was evaluated by, and its training time by the measured step."""
    version = recipe.evaluation.autoattack
    seconds = point["steps"] * step["p50_ms"] / 1e3
    return {**point, "autoattack_version": version, "seconds": seconds}


_SCORES = ("autoattack", "pgd", "clean", "val_pgd", "val_clean")


def summarise(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and budget, in the points' order: means, standard deviations, errors of the mean."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["method"], point["epochs"]), []).append(point)
    rows = []
    for (method, epochs), group in groups.items():
        first = group[0]
        row: dict[str, Any] = {
            "method": method,
            **{
                key: first[key]
                for key in ("dataset", "network", "norm", "eps", "objective", "k", "start")
            },
            "epochs": epochs,
            "seeds": len(group),
            "examples": first["examples"],
            "autoattack_version": first["autoattack_version"],
        }
        for score in _SCORES:
            values = [p[score] for p in group if p.get(score) is not None]
            spread = statistics.stdev(values) if len(values) > 1 else None
            row[f"{score}_mean"] = statistics.fmean(values) if values else None
            row[f"{score}_sd"] = spread
            row[f"{score}_se"] = None if spread is None else spread / math.sqrt(len(values))
        memories = [p["peak_memory_mb"] for p in group if p.get("peak_memory_mb")]
        row |= {
            "train_seconds_mean": statistics.fmean(p["seconds"] for p in group),
            "passes_per_step": first["passes_per_step"],
            "rolled_back": sum(bool(p.get("rolled_back")) for p in group),
            "peak_memory_mb": max(memories) if memories else None,
        }
        rows.append(row)
    best = -math.inf
    on_front = set()
    for row in sorted(rows, key=lambda r: (r["train_seconds_mean"], -(robust(r) or 0))):
        if (robust(row) or 0) > best:
            best = robust(row) or 0
            on_front.add((row["method"], row["epochs"]))
    for row in rows:
        row["pareto"] = (row["method"], row["epochs"]) in on_front
    return rows


def robust(row: Mapping[str, Any], suffix: str = "_mean") -> float | None:
    """A row's robust accuracy: AutoAttack's where it ran, else PGD's, on test images or held-out ones."""
    for score in ("autoattack", "pgd", "val_pgd"):
        if row.get(f"{score}{suffix}") is not None:
            return row[f"{score}{suffix}"]
    return None


def time_to(rows: Sequence[Mapping[str, Any]], target: float) -> dict[str, float | None]:
    """Training seconds until each method's mean robust accuracy reaches `target`, between its budgets in a line.

    None where no budget reaches it.
    """
    found: dict[str, float | None] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        curve = sorted(
            (row["train_seconds_mean"], robust(row) or 0.0)
            for row in rows
            if row["method"] == method
        )
        found[method] = None
        before: tuple[float, float] | None = None
        for seconds, accuracy in curve:
            if accuracy >= target:
                if before is not None and accuracy > before[1]:
                    share = (target - before[1]) / (accuracy - before[1])
                    seconds = before[0] + share * (seconds - before[0])
                found[method] = seconds
                break
            before = seconds, accuracy
    return found


def stored(folder: Path) -> list[dict[str, Any]]:
    """The rows of all comparisons kept in `folder` (compare-*.json), with the protocol's name."""
    return [
        {"protocol": kept.get("protocol", path.stem), **row}
        for path in sorted(folder.glob("compare-*.json"))
        for kept in [json.loads(path.read_text())]
        for row in kept["rows"]
    ]


def show(rows: Sequence[Mapping[str, Any]], target: float | None = None) -> None:
    """The rows as a table on stdout."""
    from rich.table import Table

    reached = {} if target is None else time_to(rows, target)
    table = Table(
        "method", "k", "passes", "epochs", "seeds", "clean %", "robust %", "train s", "front"
    )
    if target is not None:
        table.add_column(f"s to {target:.1%}")
    for row in rows:
        clean = row["val_clean_mean"] if row["clean_mean"] is None else row["clean_mean"]
        cells = [
            row["method"],
            str(row["k"]),
            str(row["passes_per_step"]),
            str(row["epochs"]),
            str(row["seeds"]),
            _percent(clean),
            _percent(robust(row), robust(row, "_sd")),
            f"{row['train_seconds_mean']:.1f}",
            "*" if row["pareto"] else "",
        ]
        if target is not None:
            seconds = reached[row["method"]]
            cells.append("-" if seconds is None else f"{seconds:.1f}")
        table.add_row(*cells)
    stdout.print(table)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy over training time and over passes: a line for each method, a dot for each seed."""
    with plots.style():
        figure, (over_time, over_passes) = plots.panels(2, width=6.0, height=4.6)
        plots.draw_curves(over_time, found["rows"], found["points"], passes=False)
        plots.draw_curves(over_passes, found["rows"], found["points"], passes=True)
        plots.save_png(figure, path)


def _percent(mean: float | None, deviation: float | None = None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")
