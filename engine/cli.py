"""The command line: `engine train|eval|export|report|compare|data|plan|bench|profile|doctor|kernels`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import EngineError
from .signals import Stopped, terminate

if TYPE_CHECKING:
    from .distributed import World
    from .recipe import Recipe
    from .runs import Run

# Heavy modules are imported inside the commands: `engine --help` answers at once, and the OpenMP
# runtime that torch loads still listens. By default its idle threads spin, and where another process
# wants the core, every parallel region then waits for a time slice: steps ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake as one EngineError line."""

    def error(self, message: str) -> NoReturn:
        raise EngineError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits 0, 2 on a user's mistake, 130 on Ctrl-C, 143 on SIGTERM."""
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: list[str]) -> int:
    logging.basicConfig(format="engine: %(message)s", level=logging.WARNING)
    try:
        parser = build_parser()
        arguments, rest = parser.parse_known_args(argv)
        command: Callable[..., int] = arguments.run
        if rest and not arguments.overridable:
            raise EngineError(f"unknown argument {rest[0]} (see engine {arguments.command} --help)")
        return command(arguments, rest) if arguments.overridable else command(arguments)
    except EngineError as error:
        rank = os.environ.get("RANK", "0")
        print(
            f"engine: {error}" if rank == "0" else f"engine: (process {rank}) {error}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stopped:
        print("engine: interrupted; what was saved before is whole", file=sys.stderr)
        return _status(stopped)
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody left to tell.
        sys.stderr.close()
        return 0


def build_parser() -> Parser:
    parser = Parser(prog="engine", description="Fast adversarial training on a local ball.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )

    def add(
        name: str, function: Callable[..., int], text: str, overridable: bool = False
    ) -> Parser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=function, overridable=overridable)
        return sub

    train = commands.add_parser(
        "train",
        help="train by a recipe, evaluate, report",
        add_help=False,
        allow_abbrev=False,
    )
    train.set_defaults(run=_train, overridable=True)
    train.add_argument("recipe", nargs="?")
    train.add_argument("--run-dir", type=Path)
    train.add_argument("--resume", type=Path, metavar="RUN")
    train.add_argument("--nproc", type=int, default=1)
    train.add_argument("--json", action="store_true")
    train.add_argument("--no-eval", action="store_true")
    train.add_argument("-h", "--help", action="store_true")

    evaluate = add("eval", _eval, "evaluate a run's checkpoint again", overridable=True)
    evaluate.add_argument("run_dir", type=Path, metavar="RUN")
    evaluate.add_argument("--checkpoint", choices=("best", "last"), default="best")
    evaluate.add_argument(
        "--masking", action="store_true", help="look for masked gradients instead of evaluating"
    )
    evaluate.add_argument(
        "--transfer",
        type=Path,
        metavar="RUN",
        help="with --masking: try that run's adversaries too",
    )
    evaluate.add_argument("--json", action="store_true")

    export = add("export", _export, "weights, RobustBench's claim and a model card of a run")
    export.add_argument("run_dir", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, help="folder; default RUN/export")

    report = add("report", _report, "rebuild a run's report.html")
    report.add_argument("run_dir", type=Path, metavar="RUN")

    compare = add(
        "compare",
        _compare,
        "train methods side by side: accuracy over training time",
        overridable=True,
    )
    compare.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help="recipes, or one protocol file with methods"
    )
    compare.add_argument("--seeds", type=int, help="seeds 0..N-1 of every method [count]")
    compare.add_argument("--epochs", help="budgets: 5,15,45 [passes over the training set]")
    compare.add_argument("--minutes", help="budgets: 1,2.5 [training minutes]")
    compare.add_argument("--target", type=float, help="robust accuracy to give the time to [0..1]")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time [count]")
    compare.add_argument("--out", type=Path, help="folder for the runs; finished ones are kept")
    compare.add_argument(
        "--from-store", action="store_true", help="show the results that come with the engine"
    )
    compare.add_argument("--json", action="store_true")

    data = add("data", _data, "list, fetch, verify or describe datasets")
    data.add_argument("action", choices=("list", "fetch", "verify", "info"))
    data.add_argument("name", nargs="?")

    kernels = add("kernels", _kernels, "what the compiler makes of each Triton kernel, with no GPU")
    kernels.add_argument("--arch", action="append", help="sm_80, sm_90 or sm_100; may be repeated")
    kernels.add_argument("--json", action="store_true")

    plan = add(
        "plan", _plan, "what a recipe's step should cost on a GPU, on paper", overridable=True
    )
    plan.add_argument("recipe")
    plan.add_argument("--gpu", default="h100", help="a100, h100 or h200")
    plan.add_argument("--json", action="store_true")

    profile = add(
        "profile", _profile, "where a step's time goes; or under nsys or ncu", overridable=True
    )
    profile.add_argument("recipe")
    profile.add_argument("--tool", choices=("torch", "nsys", "ncu"), default="torch")
    profile.add_argument("--steps", type=int, default=20, help="steps to measure [count]")
    profile.add_argument("--out", type=Path, help="folder; default runs/profile-RECIPE")
    profile.add_argument("--json", action="store_true")

    bench = add("bench", _bench, "measure on this machine")
    bench.add_argument("what", choices=("ops", "step", "loaders"))
    bench.add_argument(
        "--against", metavar="REF", help="a commit, or a file of results, to compare with"
    )
    bench.add_argument("--rounds", type=int, default=3, help="with --against COMMIT [count]")
    bench.add_argument("--quick", action="store_true", help="under a minute; step: under two")
    bench.add_argument("--json", action="store_true")

    doctor = add(
        "doctor",
        _doctor,
        "what this machine has, and which backend serves each op; or whether a recipe's step can be "
        "captured in a CUDA graph",
        overridable=True,
    )
    doctor.add_argument("--capture", metavar="RECIPE", help="audit the step, no GPU needed")
    doctor.add_argument("--json", action="store_true")
    return parser


# ---- commands --------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    from . import recipe as recipes

    overrides = _overrides(rest)
    if arguments.help:
        _train_help(arguments.recipe, overrides)
        return 0
    from . import distributed, report, runner
    from .progress import stderr
    from .runs import Run

    _keep_freed_memory()
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
                _show(row, arguments.json)
            return 0
    else:
        if arguments.recipe is None:
            raise EngineError(f"which recipe? one of {', '.join(recipes.names())}, or a .toml file")
        recipe = recipes.load(arguments.recipe, overrides)
    # Everything that can be wrong with the input shows before a run folder exists.
    runner.check(
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
        result = runner.train(run, world)
        distributed.leave()
        if not world.first:
            return 0
        row = runner.summary(run, result, runner.evaluate_run(run) if evaluated else None)
        if evaluated:
            row["report"] = str(report.build(run))
    except KeyboardInterrupt as stopped:
        if world.first:
            print(
                f"engine: stopped; go on with: engine train --resume {shlex.quote(str(run.path))}",
                file=sys.stderr,
            )
        return _status(stopped)
    _show(row, arguments.json)
    return 0


def _new_run(recipe: Recipe, path: Path | None, world: World) -> Run:
    """The run's folder, made by the first process; the one that is there where torchrun starts again."""
    from . import distributed
    from .runs import Run, plain

    if world.size == 1:
        return Run.create(recipe, path)
    if path is None:
        # All processes must come upon the same one, after a restart as well.
        number = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        path = Path("runs") / f"{plain(recipe.name)}-{number}"
    there = (path / "recipe.toml").exists()
    if world.first and not (there and world.restarts):
        Run.create(recipe, path)
    distributed.wait()
    return Run.open(path)


def _launch(arguments: argparse.Namespace, rest: list[str], path: Path | None) -> int:
    """The same command in `--nproc` processes."""
    from . import distributed

    words = ["train"]
    if arguments.resume is not None:
        words += ["--resume", str(arguments.resume)]
    else:
        words += [arguments.recipe, *rest, "--run-dir", str(arguments.run_dir or path)]
    words += ["--json"] * arguments.json + ["--no-eval"] * arguments.no_eval
    return distributed.launch(arguments.nproc, words)


def _eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from . import recipe as recipes
    from . import report, runner
    from .runs import Run

    overrides = _overrides(rest)
    if stray := [
        key for key in overrides if not key.startswith("evaluation.") and key != "threads"
    ]:
        raise EngineError(f"--{stray[0]}: only --evaluation.* can be changed for a finished run")
    _keep_freed_memory()
    Run.open(arguments.run_dir)
    recipe = recipes.load(str(arguments.run_dir / "recipe.toml"), overrides)
    run = Run(arguments.run_dir, recipe)
    if arguments.transfer and not arguments.masking:
        raise EngineError("--transfer belongs to --masking")
    if arguments.masking:
        surrogate = Run.open(arguments.transfer) if arguments.transfer else None
        masking = runner.check_masking(run, arguments.checkpoint, surrogate)
        report.build(run)
        if arguments.json:
            print(json.dumps(masking))
        else:
            _rows(masking["checks"], as_json=False)
        return 0 if masking["passed"] else 1
    found = runner.evaluate_run(run, arguments.checkpoint)
    report.build(run)
    row = {
        "recipe": recipe.name,
        "clean": found.clean,
        "pgd": found.pgd,
        "autoattack": found.autoattack,
        "worst_case": found.worst_case,
        "examples": found.examples,
        "eval_seconds": round(found.seconds, 2),
        "run_dir": str(run.path),
    }
    _show(row, arguments.json)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from .export import export
    from .runs import Run

    for path in export(Run.open(arguments.run_dir), arguments.out):
        print(path)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from . import report
    from .runs import Run

    print(report.build(Run.open(arguments.run_dir)))
    return 0


def _compare(arguments: argparse.Namespace, rest: list[str]) -> int:
    from . import compare

    if arguments.from_store:
        from .benchmarks import tables

        rows = compare.stored(tables.RESULTS)
        if not rows:
            raise EngineError("engine compare: no results are stored")
    else:
        if not arguments.recipes:
            raise EngineError("engine compare: which recipes, or which protocol file?")
        if arguments.jobs < 1:
            raise EngineError(f"--jobs must be at least 1, got {arguments.jobs}")
        _keep_freed_memory()
        protocol = compare.read(
            arguments.recipes,
            _overrides(rest),
            seeds=arguments.seeds,
            epochs=_list("--epochs", arguments.epochs, int),
            minutes=_list("--minutes", arguments.minutes, float),
        )
        rows = compare.run(protocol, out=arguments.out, workers=arguments.jobs)["rows"]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        compare.show(rows, arguments.target)
    return 0


def _list(flag: str, text: str | None, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in (text or "").split(",") if word]
    except ValueError:
        raise EngineError(f"{flag} {text}: numbers with commas between them, please") from None


def _data(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rich.table import Table

    from . import data
    from .progress import stdout

    if arguments.action == "list":
        table = Table("dataset", "images", "training", "test", "classes", box=None, pad_edge=False)
        table.add_column("lies in", overflow="fold")
        for name in data.names():
            about = data.info(name)
            table.add_row(
                name,
                "x".join(map(str, about.shape)),
                str(about.train),
                str(about.test),
                str(len(about.classes)),
                str(about.folder or ("scikit-learn" if not about.files else "not fetched")),
            )
        stdout.print(table)
        return 0
    if arguments.name is None:
        known = ", ".join(data.names())
        raise EngineError(f"engine data {arguments.action}: which dataset? {known}")
    if arguments.action == "fetch":
        print(data.fetch(arguments.name))
        return 0
    if arguments.action == "info":
        print(json.dumps(asdict(data.info(arguments.name)), indent=2, default=str))
        return 0
    checks = data.verify(arguments.name)
    for check in checks:
        print(f"{'ok ' if check.ok else 'BAD'} {check.file}: {check.detail}")
    return 0 if all(check.ok for check in checks) else 2


def _kernels(arguments: argparse.Namespace) -> int:
    from .kernels import audit

    archs = tuple(arguments.arch or audit.ARCHS)
    if unknown := [a for a in archs if a not in audit.ARCHS]:
        raise EngineError(f"unknown --arch {unknown[0]}: {', '.join(audit.ARCHS)}")
    _rows(audit.rows(archs), arguments.json, hidden=("op", "threads", "flat"))
    return 0


def _plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import asdict

    from . import plan
    from . import recipe as recipes
    from .progress import stdout

    found = plan.plan(recipes.load(arguments.recipe, _overrides(rest)), arguments.gpu)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return 0
    passes = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in found.passes.items())
    bound = ", ".join(f"{name} {share:.0%}" for name, share in found.bound_by.items())
    memory = ", ".join(f"{name} {size:.3g}" for name, size in found.memory_gb.items())
    lines = {
        "recipe": f"{found.recipe}, batch {found.batch}, {found.precision}, on {found.gpu}",
        "passes": passes,
        "FLOPs a step": f"{found.flops / 1e9:.4g} G",
        "bytes a step": f"{found.bytes / 1e9:.4g} GB",
        "launches": f"{found.launches} eager, 1 captured",
        "step": f"{found.step_ms:.3g} ms captured, {found.eager_ms:.3g} ms eager (predicted)",
        "bound by": bound,
        "images": f"{found.images_per_second:,.0f} a second",
        "training": f"{found.train_minutes:.3g} minutes, evaluation excluded",
        "memory": f"GB: {memory}",
        "PGD-10": f"{found.pgd10_ms:.3g} ms a step: this takes {found.share_of_pgd10:.0%} of it",
        "measured": "no GPU here" if found.measured_ms is None else f"{found.measured_ms:.3g} ms",
        "assumed": "; ".join(found.assumptions),
    }
    for name, text in lines.items():
        stdout.print(f"{name:14} {text}", highlight=False, soft_wrap=True)
    return 0


def _profile(arguments: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import asdict

    from . import profiling, runner
    from . import recipe as recipes
    from .progress import stdout
    from .runs import plain

    if arguments.steps < 1:
        raise EngineError(f"--steps must be at least 1, got {arguments.steps}")
    recipe = recipes.load(arguments.recipe, _overrides(rest))
    _keep_freed_memory()
    runner.check(recipe, evaluated=False)
    out = arguments.out or Path("runs") / f"profile-{plain(recipe.name)}"
    if profiling.is_watched():
        profiling.watched(recipe, steps=arguments.steps)
        return 0
    if arguments.tool != "torch":
        words = [arguments.recipe, *rest, "--steps", str(arguments.steps)]
        return profiling.run_tool(arguments.tool, words, out / arguments.tool)
    found = profiling.profile(recipe, out, steps=arguments.steps)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return 0
    p20, p50, p80 = found.step_ms
    machine = found.environment
    device = "no GPU" if found.device_ms is None else f"{found.device_ms:.3g} ms"
    lines = {
        "machine": f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}, commit {machine['commit']}",
        "step": f"p20 {p20:.3g}  p50 {p50:.3g}  p80 {p80:.3g} ms, batch {found.batch}, "
        f"{found.images_per_second:,.0f} images a second",
        "operators": f"{found.ops_per_step} a step, {found.host_syncs} reads of the device by the host",
        "time": f"CPU {found.cpu_ms:.3g} ms in operators, device {device}",
        "memory": "unknown"
        if found.peak_memory_mb is None
        else f"{found.peak_memory_mb} MB at most",
    }
    for name, text in lines.items():
        stdout.print(f"{name:10} {text}", highlight=False, soft_wrap=True)
    print()
    for name, share in found.phases.items():
        print(f"{name:16} {share:6.1%}  {'#' * round(50 * share)}")
    print(f"\n{'operator':34} {'calls':>6} {'ms':>8} {'share':>6} {'GB/s':>6} {'of copy':>7}")
    for row in found.top_ops:
        line = f"{row['op'][:34]:34} {row['calls']:6.4g} {row['ms']:8.3f} {row['share']:6.1%} "
        known = row["gb_per_s"] is not None
        print(
            line + (f"{row['gb_per_s']:6.3g} {row['share_of_copy']:7.0%}" if known else f"{'-':>6}")
        )
    print()
    for name, path in (("trace", found.trace), ("picture", found.picture), ("next", found.next)):
        stdout.print(f"{name:10} {path}", highlight=False, soft_wrap=True)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    if arguments.against is not None:
        from .benchmarks import against

        rows = against.run(
            arguments.what, arguments.against, quick=arguments.quick, rounds=arguments.rounds
        )
        _rows(rows, arguments.json)
        return 0
    if arguments.what == "step":
        # As `engine train` runs: that is what is measured.
        _keep_freed_memory()
    found = import_module(f"engine.benchmarks.{arguments.what}").run(quick=arguments.quick)
    _rows(found, arguments.json)
    return 0


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.capture is not None:
        return _audit(arguments.capture, _overrides(rest), arguments.json)
    if rest:
        raise EngineError(f"unknown argument {rest[0]} (see engine doctor --help)")
    from rich.table import Table

    from . import apex, kernels, models
    from . import recipe as recipes
    from .progress import stdout
    from .runs import environment

    found = {
        "environment": {**environment(), "apex": apex.status()},
        "kernels": kernels.backends.table(),
        "models": sorted(models.MODELS),
        "recipes": recipes.names(),
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found["environment"].items():
        stdout.print(f"{key:14} {value}", highlight=False, soft_wrap=True)
    table = Table("op", "device", "backend", "why")
    for row in found["kernels"]:
        table.add_row(row["op"], row["device"], row["backend"], row["why"])
    stdout.print(table)
    stdout.print("models:", ", ".join(found["models"]), highlight=False, soft_wrap=True)
    stdout.print("recipes:", ", ".join(found["recipes"]), highlight=False, soft_wrap=True)
    return 0


def _audit(name: str, overrides: dict[str, str], as_json: bool) -> int:
    from dataclasses import asdict

    from . import audit
    from . import recipe as recipes

    found = audit.audit(recipes.load(name, overrides))
    if as_json:
        print(json.dumps({**asdict(found), "ok": found.ok}))
        return 0 if found.ok else 1
    print(
        f"{found.recipe}: the step can be captured in a CUDA graph; its replays are the eager steps, "
        "bit for bit"
        if found.ok
        else f"{found.recipe}: the step cannot be captured in a CUDA graph"
    )
    for complaint in found.complaints:
        print(f"  {complaint}")
    print("operators a step, views and allocations left out:")
    for phase, count in sorted(found.ops.items(), key=lambda item: -item[1]):
        print(f"  {count:5} {phase}")
    print(
        f"outside the network: {found.attack_step_ops:g} per attack step, {found.loss_ops} for the "
        f"loss, {found.optimiser_ops} for the optimiser and the average"
    )
    return 0 if found.ok else 1


def _keep_freed_memory() -> None:
    """Spare every step the page faults of memory that the C library would have given back.

    It concerns the whole process, so the command line asks for it and the library does not.
    """
    from .kernels import backends

    native, _ = backends.load("native")
    if native is not None:
        native.keep_freed_memory()


def _status(stopped: KeyboardInterrupt) -> int:
    return stopped.status if isinstance(stopped, Stopped) else 130


# ---- helpers ---------------------------------------------------------------------------------


def _overrides(rest: list[str]) -> dict[str, str]:
    """`--attack.steps 2` and `--attack.steps=2` as {"attack.steps": "2"}."""
    found: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--") or len(word) < 3:
            raise EngineError(f"unexpected argument {word!r}: options look like --attack.steps 2")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise EngineError(f"--{key} needs a value")
        found[key] = value
    return found


def _train_help(name: str | None, overrides: dict[str, str]) -> None:
    from rich.table import Table

    from . import recipe as recipes
    from .progress import stdout

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
        table.add_row(f"--{dotted}", shown, description.replace("[", r"\["))
    stdout.print(table)


def _rows(rows: list[dict[str, Any]], as_json: bool, hidden: Sequence[str] = ()) -> None:
    """Rows as JSON, or as plain aligned columns that a narrow terminal wraps rather than cuts."""
    if as_json:
        print(json.dumps(rows))
        return

    def text(value: Any) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    keys = [key for key in rows[0] if key not in hidden]
    lines = [keys, *([text(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    for line in lines:
        print(
            "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        )


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row))
        return
    from rich.table import Table

    from .progress import stdout

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    # Paths are for copying: a narrow terminal wraps them and cuts nothing.
    table.add_column(overflow="fold")
    for key, value in row.items():
        if value is None or value == []:
            continue
        name = _TITLES.get(key, key)
        share = key in ("clean", "pgd", "autoattack", "worst_case")
        table.add_row(name, f"{100 * value:.2f} %" if share else str(value), end_section=False)
    stdout.print(table)


_TITLES = {
    "clean": "clean accuracy",
    "pgd": "PGD accuracy",
    "autoattack": "AutoAttack accuracy",
    "worst_case": "worst case of all attacks",
    "examples": "test images",
    "train_seconds": "training seconds (no evaluation)",
    "eval_seconds": "evaluation seconds",
    "passes_per_step": "passes per step",
    "best_epoch": "best epoch (validation PGD)",
    "rolled_back": "epochs rolled back",
    "peak_memory_mb": "peak memory [MB]",
    "run_dir": "run folder",
}


if __name__ == "__main__":
    main()
