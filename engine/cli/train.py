"""`engine train`: a recipe or a stopped run, in one process or several, to an evaluated run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EngineError
from ..text import printable
from . import result, train_help
from .shared import Commands, add_import, exit_status, parse_overrides, path_of

if TYPE_CHECKING:
    from ..device.distributed import World
    from ..recipes import Recipe
    from ..runs.folder import Run


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a recipe, evaluate it, write a report",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_train, overridable=True)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--run-dir", type=path_of)
    parser.add_argument("--resume", type=path_of, metavar="RUN")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-eval", action="store_true")
    add_import(parser)
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="SECTION")


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.help is not None:
        train_help.show(arguments.recipe, parse_overrides(rest), arguments.help)
        return 0
    from ..device import distributed
    from ..device.machine import keep_freed_memory
    from ..progress import stderr
    from ..runs import found

    keep_freed_memory()
    if arguments.nproc < 1:
        raise EngineError(f"--nproc must be at least 1, got {arguments.nproc}")
    world = distributed.join()
    stderr.quiet = not world.first
    run, recipe = _chosen(arguments, rest)
    if run is not None and (row := found.summary(run)):
        stderr.print(f"{run.path} is finished", highlight=False, soft_wrap=True)
        if world.first:
            # The folder may have moved since.
            result.show({**row, "run_dir": str(run.path)}, recipe, arguments.json)
        return 0
    _check(recipe, arguments, world)
    if arguments.nproc > 1:
        return _launch(arguments, rest, recipe)
    run = run or _new_run(recipe, arguments.run_dir, world)
    return _train_and_report(run, world, arguments)


def _chosen(arguments: argparse.Namespace, rest: list[str]) -> tuple[Run | None, Recipe]:
    """Return the run to resume, or None for a new run, and its recipe."""
    from .. import recipes
    from ..runs.folder import Run

    if arguments.resume is not None:
        # The parser takes the value of a field for RECIPE.
        if arguments.recipe or arguments.run_dir or rest:
            raise EngineError("--resume RUN uses the run's own recipe: give no other argument")
        run = Run.open(arguments.resume)
        return run, run.recipe
    overrides = parse_overrides(rest)
    if arguments.recipe is None:
        raise EngineError(f"which recipe? one of {', '.join(recipes.names())}, or a .toml file")
    return None, recipes.load(arguments.recipe, overrides)


def _check(recipe: Recipe, arguments: argparse.Namespace, world: World) -> None:
    """Find every mistake in the input before a run folder exists; print what will differ."""
    from ..progress import stderr
    from ..runs import build

    processes = max(world.size, arguments.nproc)
    build.check(recipe, evaluated=not arguments.no_eval, processes=processes)
    for note in build.notes(recipe, evaluated=not arguments.no_eval):
        stderr.print(f"engine: {note}", highlight=False, soft_wrap=True)


def _train_and_report(run: Run, world: World, arguments: argparse.Namespace) -> int:
    from .. import plugins
    from ..device import distributed
    from ..progress import stderr
    from ..report import page
    from ..runs import evaluate, train

    recipe, evaluated = run.recipe, not arguments.no_eval
    stderr.print(
        f"{recipe.name}: {recipe.objective.name} on {recipe.data.name}, {recipe.model.name}, "
        f"{recipe.threat.norm} eps {recipe.threat.eps:.4g}, "
        f"{recipe.passes().total} passes a step -> {run.path}",
        highlight=False,
        soft_wrap=True,
    )
    try:
        trained = train.train(run, world)
        distributed.leave()
        if not world.first:
            return 0
        report = evaluate.evaluate_run(run) if evaluated else None
        row = evaluate.summary(run, trained, report)
        if report is not None:
            row["worst_case"] = report.worst_case
            row["report"] = str(page.build(run))
    except KeyboardInterrupt as stopped:
        if world.first:
            again = shlex.join(["--resume", str(run.path), *plugins.words()])
            print(f"engine: stopped; go on with: engine train {printable(again)}", file=sys.stderr)
        return exit_status(stopped)
    result.show(row, recipe, arguments.json)
    return 0


def _new_run(recipe: Recipe, path: Path | None, world: World) -> Run:
    """Make the run's folder in the first process; reuse it where torchrun starts again."""
    from ..device import distributed
    from ..runs.folder import Run, plain

    if world.size == 1:
        return Run.create(recipe, path)
    if path is None:
        # All processes must find the same folder, after a restart as well.
        number = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        path = Path("runs") / f"{plain(recipe.name)}-{number}"
    exists = (path / "recipe.toml").exists()
    if world.first and not (exists and world.restarts):
        Run.create(recipe, path)
    distributed.wait()
    return Run.open(path)


def _launch(arguments: argparse.Namespace, rest: list[str], recipe: Recipe) -> int:
    """Run the same command in `--nproc` processes."""
    from .. import plugins
    from ..device import distributed
    from ..runs.folder import Run

    words = ["train", *plugins.words()]
    if arguments.resume is not None:
        words += ["--resume", str(arguments.resume)]
    else:
        path = arguments.run_dir or Run.new_path(recipe)
        words += [arguments.recipe, *rest, "--run-dir", str(path)]
    words += ["--json"] * arguments.json + ["--no-eval"] * arguments.no_eval
    return distributed.launch(arguments.nproc, words)
