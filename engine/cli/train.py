"""`engine train`: a recipe or a stopped run, in one process or several, to an evaluated run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, printable
from .shared import Commands, exit_status, parse_overrides, print_row

if TYPE_CHECKING:
    from ..device.distributed import World
    from ..recipes import Recipe
    from ..runs.folder import Run


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train by a recipe, evaluate, report",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_train, overridable=True)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--resume", type=Path, metavar="RUN")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-eval", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    from .. import recipes
    from ..device.machine import keep_freed_memory

    overrides = parse_overrides(rest)
    if arguments.help:
        _train_help(arguments.recipe, overrides)
        return 0
    from ..device import distributed
    from ..progress import stderr
    from ..report import page
    from ..runs import build, evaluate, train
    from ..runs.folder import Run

    keep_freed_memory()
    evaluated = not arguments.no_eval
    if arguments.nproc < 1:
        raise EngineError(f"--nproc must be at least 1, got {arguments.nproc}")
    world = distributed.join()
    stderr.quiet = not world.first
    if arguments.resume is not None:
        if arguments.recipe or arguments.run_dir or overrides:
            raise EngineError("--resume RUN goes on with the run's own recipe: give nothing else")
        run, recipe = Run.open(arguments.resume), None
        if row := run.read_json("summary.json"):
            stderr.print(f"{run.path} is finished", highlight=False, soft_wrap=True)
            if world.first:
                print_row(row, arguments.json)
            return 0
    else:
        if arguments.recipe is None:
            raise EngineError(f"which recipe? one of {', '.join(recipes.names())}, or a .toml file")
        recipe = recipes.load(arguments.recipe, overrides)
    # Everything that can be wrong with the input shows before a run folder exists.
    build.check(
        recipe or run.recipe, evaluated=evaluated, processes=max(world.size, arguments.nproc)
    )
    if arguments.nproc > 1:
        return _launch(arguments, rest, Run.new_path(recipe) if recipe else None)
    if recipe is not None:
        run = _new_run(recipe, arguments.run_dir, world)
    recipe = run.recipe
    stderr.print(
        f"{recipe.name}: {recipe.objective.name} on {recipe.data.name}, {recipe.model.name}, "
        f"{recipe.threat.norm} eps {recipe.threat.eps:.4g}, "
        f"{recipe.objective.passes(recipe.attack).total} passes a step -> {run.path}",
        highlight=False,
        soft_wrap=True,
    )
    try:
        result = train.train(run, world)
        distributed.leave()
        if not world.first:
            return 0
        row = evaluate.summary(run, result, evaluate.evaluate_run(run) if evaluated else None)
        if evaluated:
            row["report"] = str(page.build(run))
    except KeyboardInterrupt as stopped:
        if world.first:
            print(
                "engine: stopped; go on with: engine train --resume "
                + printable(shlex.quote(str(run.path))),
                file=sys.stderr,
            )
        return exit_status(stopped)
    print_row(row, arguments.json)
    return 0


def _new_run(recipe: Recipe, path: Path | None, world: World) -> Run:
    """The run's folder, made by the first process; the one that is there where torchrun starts again."""
    from ..device import distributed
    from ..runs.folder import Run, plain

    if world.size == 1:
        return Run.create(recipe, path)
    if path is None:
        # All processes must come upon the same one, after a restart as well.
        number = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        path = Path("runs") / f"{plain(recipe.name)}-{number}"
    there = (path / "recipe.toml").exists()
    created = None
    if world.first and not (there and world.restarts):
        created = Run.create(recipe, path)
    distributed.wait()
    return created or Run.open(path)


def _launch(arguments: argparse.Namespace, rest: list[str], path: Path | None) -> int:
    """The same command in `--nproc` processes."""
    from ..device import distributed

    words = ["train"]
    if arguments.resume is not None:
        words += ["--resume", str(arguments.resume)]
    else:
        words += [arguments.recipe, *rest, "--run-dir", str(arguments.run_dir or path)]
    words += ["--json"] * arguments.json + ["--no-eval"] * arguments.no_eval
    return distributed.launch(arguments.nproc, words)


def _train_help(name: str | None, overrides: dict[str, str]) -> None:
    from rich.table import Table

    from .. import recipes
    from ..progress import stdout

    recipe = recipes.load(name, overrides) if name else recipes.Recipe()
    stdout.print(
        "usage: engine train RECIPE [--run-dir DIR] [--json] [--no-eval] [--FIELD VALUE ...]\n"
        "       engine train --resume RUN [--json] [--no-eval]\n\n"
        f"RECIPE: {', '.join(recipes.names())}, or a path ending in .toml\n"
        "  --run-dir DIR   where the run goes (default: runs/RECIPE-DATE-TIME)\n"
        "  --resume RUN    go on with a run that was stopped or killed, bit for bit\n"
        "  --nproc N       N processes on this machine, as torchrun starts them; they share each batch\n"
        "  --json          one closing JSON object on stdout; progress goes to stderr\n"
        "  --no-eval       train only; `engine eval RUN` evaluates later\n\n"
        f"Fields, with the values of {name or 'an empty recipe'} (`engine train NAME --help` for another's):",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    values: dict[str, Any] = {}
    for dotted, *_ in recipes.options(type(recipe.objective)):
        value: Any = recipe
        for part in dotted.split("."):
            value = getattr(value, part)
        values[dotted] = value
    table = Table("field", "value", "meaning [unit]", box=None, pad_edge=False)
    for dotted, _, _, description in recipes.options(type(recipe.objective)):
        value = values[dotted]
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        table.add_row(f"--{dotted}", shown, description)
    stdout.print(table)
