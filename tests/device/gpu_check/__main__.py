"""Run the stages one after another, each with a limit of its own: a line a stage, a log each.

    python -m tests.device.gpu_check [--out build/gpu-check] [--stages doctor steps ...] [--recipes
    RECIPE ...]

Nothing is installed: where `engine` cannot be imported whole, a copy of the sources serves that has
kernels/ and benchmarks/ where the build would put them; what pip would have brought comes from the
wheels in .whl/ (`make gpu-wheels` downloads them elsewhere). Without a GPU the stages that need one
are skipped by name. The last line is ALL PASS or the number of bad stages.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[3]
# On a GPU. The stand-ins of a CPU take this many times as long.
TOTAL_S, CPU_SLOWER = 470, 30


@dataclass(frozen=True)
class Stage:
    """Hold one command.

    Attributes:
        limit: seconds on a GPU after which it is ended and bad.
        gpu: it needs a CUDA device; tool: and this program.
        forbidden: what its output must not say.
    """

    name: str
    limit: int
    words: Sequence[str]
    gpu: bool = False
    tool: str | None = None
    forbidden: str | None = None


def stages(
    out: Path, recipes: Sequence[str], gpu: bool, parallel: Sequence[str] = ()
) -> list[Stage]:
    """Return all stages, in the order in which they find the most.

    Args:
        parallel: words that make pytest use several processes.
    """
    engine, pytest = ["-m", "engine"], ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    steps = ["-m", "tests.device.gpu_check.steps"]
    others = ["-k", "not capture_that_fails"]  # a stage of its own
    train = ["train", "quickstart", "--optim.epochs", "5", "--run-dir", str(out / "run"), "--json"]
    if not gpu:
        train += ["--evaluation.examples", "20"]
    one = [*steps, "quickstart", "--precision", "bf16", "--batch", "8"]
    python = sys.executable
    sanitizer = ["compute-sanitizer", "--error-exitcode", "7", "--target-processes", "all"]
    return [
        Stage("doctor", 40, [python, *engine, "doctor"]),
        Stage("steps", 150, [python, *steps, *recipes]),
        Stage("gpu-tests", 100, [python, *pytest, "tests/device/test_gpu.py", *others], gpu=True),
        Stage("triton-tests", 150, [python, *pytest, *parallel, "tests/kernels"], gpu=True),
        Stage(
            "train",
            90,
            [python, *engine, *train, "--step.capture", "on" if gpu else "auto"],
            forbidden="without a CUDA graph",
        ),
        Stage("bench", 100, [python, *engine, "bench", "step", "--quick", "--json"]),
        Stage("failed-capture", 40, [python, "-m", "tests.device.failed_capture"], gpu=True),
        Stage("memcheck", 60, [*sanitizer, python, *one], gpu=True, tool="compute-sanitizer"),
        Stage(
            "racecheck",
            60,
            [*sanitizer, "--tool", "racecheck", "--kernel-name", "kns=_kernel", python, *one],
            gpu=True,
            tool="compute-sanitizer",
        ),
    ]


def run(stage: Stage, tree: Path, out: Path, environment: dict[str, str], limit: float) -> bool:
    """Run one stage, print its line, and return whether it was good."""
    log, began = out / f"{stage.name}.log", time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                stage.words,
                cwd=tree,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
            remark = "" if status == 0 else f"exit status {status} "
        except subprocess.TimeoutExpired:
            status, remark = 1, "ended at its limit of time "
    text = log.read_text(errors="replace")
    if stage.forbidden and stage.forbidden in text:
        status, remark = 1, f"it says {stage.forbidden!r} "
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    seconds = time.monotonic() - began
    verdict = "ok" if status == 0 else "BAD"
    print(f"{stage.name:15} {verdict:4} {seconds:4.0f} s  {remark}{last[:140]}", flush=True)
    return status == 0


def tree_and_paths(out: Path) -> tuple[Path, list[Path]]:
    """Return the folder to run in, and an addition to Python's path unless engine is installed."""
    paths = []
    wheels = missing_wheels()
    if wheels:
        site = out / "site"
        words = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        words += ["--upgrade", "--target", str(site), *map(str, wheels)]
        subprocess.run([sys.executable, *words], check=True)
        paths.append(site)
    whole = [sys.executable, "-c", "import engine.kernels, engine.benchmarks"]
    done = subprocess.run(whole, cwd=ROOT, env=environment_with(paths), capture_output=True)
    if done.returncode == 0:
        return ROOT, paths
    tree = out / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    for source, target in (
        ("engine", "engine"),
        ("kernels", "engine/kernels"),
        ("benchmarks", "engine/benchmarks"),
        ("tests", "tests"),
    ):
        shutil.copytree(ROOT / source, tree / target, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree, paths


def environment_with(paths: Sequence[Path]) -> dict[str, str]:
    """Return this process's environment with more folders on Python's path."""
    path = [*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1))),
    }


def missing_wheels() -> list[Path]:
    """Return the carried wheels of packages that this Python lacks."""
    here = {str(d.metadata["Name"]).lower().replace("-", "_") for d in metadata.distributions()}
    return [
        wheel
        for wheel in sorted((ROOT / ".whl").glob("*.whl"))
        if wheel.name.split("-")[0].lower() not in here
    ]


def runs(code: str, environment: dict[str, str]) -> bool:
    """Return whether another Python runs `code` to its end."""
    words = [sys.executable, "-c", code]
    return subprocess.run(words, env=environment, stderr=subprocess.DEVNULL).returncode == 0


def main() -> int:
    """Run what was asked for; return the number of bad stages."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="these alone")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="RECIPE", help="of the steps")
    options = parser.parse_args()
    names = [stage.name for stage in stages(options.out, [], gpu=False)]
    if unknown := set(options.stages or ()) - set(names):
        parser.error(f"no stage is called {min(unknown)}: {', '.join(names)}")
    began, out = time.monotonic(), options.out.resolve()
    shutil.rmtree(out / "run", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    tree, paths = tree_and_paths(out)
    environment = environment_with(paths)
    gpu = runs("import torch; assert torch.cuda.is_available()", environment)
    # Only the stages see what the carried wheels hold.
    parallel = ["-n", "12"] if runs("import xdist", environment) else []
    slower = 1 if gpu else CPU_SLOWER
    bad = 0
    for stage in stages(out, options.recipes, gpu, parallel):
        left = slower * TOTAL_S - (time.monotonic() - began)
        if options.stages and stage.name not in options.stages:
            continue
        if stage.gpu and not gpu:
            print(f"{stage.name:15} skipped: no CUDA device here", flush=True)
        elif stage.tool and shutil.which(stage.tool) is None:
            print(f"{stage.name:15} skipped: {stage.tool} is not installed", flush=True)
        elif left < 5:
            print(f"{stage.name:15} BAD        not run: {slower * TOTAL_S} s are over", flush=True)
            bad += 1
        else:
            bad += not run(stage, tree, out, environment, min(slower * stage.limit, left))
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s, logs in {out}", flush=True)
    print("ALL PASS" if bad == 0 else f"{bad} STAGES BAD", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
