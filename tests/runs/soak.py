"""Break real training runs at random moments, resume them, and compare with unbroken runs.
    python -m tests.runs.soak --kills 50
    python -m tests.runs.soak --power-cuts 20

Kills are SIGKILLs of processes. A power cut is simulated within this process (`powercut`): it comes
before a random write, and what was not synced is gone.

Prints one JSON line: kills or cuts, resumed (times that a run went on with --resume), runs,
identical (whether every run ended with the weights of its unbroken twin, bit for bit), lost_lines
(metrics rows that are missing, doubled or different; clock readings aside).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine import cli
from engine.data.loaders import dali

from .powercut import Disk, PowerCut

# Between them: memory, average, momentum, both our optimisers, every loader, repeated batches.
VARIANTS: list[list[str]] = [
    [],
    ["--objective.name", "pgd", "--attack.start", "memory", "--data.loader", "torch"],
    [
        "--objective.name",
        "trades",
        "--optim.name",
        "sgd",
        "--optim.lr",
        "0.1",
        "--optim.ema",
        "0.9",
    ],
    ["--objective.name", "pgd", "--optim.replays", "2", "--data.loader", "dali"],
]
_CLOCK = {"train_seconds", "images_per_second"}

# A program that trains, and kills its own process after KILL_AT steps.
KILLED = """
import os, signal, sys
from engine import cli
from engine.training.step import Step
run, left = Step.__call__, [int(os.environ["KILL_AT"])]
def counted(self, *arguments):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return run(self, *arguments)
Step.__call__ = counted
sys.exit(cli.run(sys.argv[1:]))
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "engine", "train", *words, "--no-eval", "--json"]


def rows(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without its clock readings; a line that is none is an empty row."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            found.append({k: v for k, v in json.loads(line).items() if k not in _CLOCK})
        except ValueError:
            found.append({})
    return found


def differing(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> int:
    return abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours, theirs, strict=False))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


def soak(kills: int, folder: Path, *, seed: int = 0, epochs: int = 40) -> dict[str, Any]:
    """Run until `kills` processes have been killed in training; see the module."""
    draw = random.Random(seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = resumed = runs = lost = 0
    identical = True
    while killed < kills:
        variant = VARIANTS[runs % len(VARIANTS)]
        if "dali" in variant and dali.unavailable():
            variant = [*variant[:-1], "auto"]
        words = ["quickstart", *variant, "--optim.epochs", str(epochs), "--seed", str(runs)]
        whole, broken = folder / f"whole-{runs}", folder / f"broken-{runs}"
        began = time.monotonic()
        subprocess.run(
            command(*words, "--run-dir", str(whole)),
            check=True,
            capture_output=True,
            env=environment,
        )
        length = time.monotonic() - began
        words += ["--checkpoint.seconds", "0.02", "--run-dir", str(broken)]
        while True:
            process = subprocess.Popen(
                command(*words),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
            )
            try:
                # Anywhere between the first import and the end, mostly while it trains.
                _, errors = process.communicate(
                    timeout=None if killed >= kills else draw.uniform(0.3, 1.0) * length
                )
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                killed += 1
            else:
                if process.returncode:
                    raise RuntimeError(errors.decode())
                break
            if (broken / "recipe.toml").exists():
                words = ["--resume", str(broken)]
                resumed += 1
        for name in ("best", "last"):
            ours, theirs = (run / f"{name}.safetensors" for run in (broken, whole))
            identical &= same(load_file(ours), load_file(theirs))
        lost += differing(rows(broken), rows(whole))
        runs += 1
    return {
        "kills": killed,
        "resumed": resumed,
        "runs": runs,
        "identical": identical,
        "lost_lines": lost,
    }


# A run of a second, with a checkpoint at every step.
SHORT = [
    *("quickstart", "--optim.epochs", "2", "--optim.batch_size", "32", "--validation.steps", "1"),
    *("--data.train_examples", "64", "--data.validation", "16", "--checkpoint.seconds", "0"),
]


def train(*words: str) -> None:
    status = cli.run(["train", *words, "--no-eval", "--json"])
    if status:
        raise RuntimeError(f"engine train {' '.join(words)}: status {status}")


def broken_by_power(folder: Path, words: list[str], cut: int | None) -> tuple[int, bool]:
    """Train into FOLDER/run, with a power cut before write `cut`, and go on to the end.

    Returns:
        The writes of the process that was cut, and whether it left a run to resume.
    """
    run = folder / "run"
    run.mkdir(parents=True)
    with Disk(run, cut) as disk, contextlib.suppress(PowerCut):
        train(*words, "--run-dir", str(run))
    if cut is None:
        return disk.writes, False
    disk.restore()
    resumed = (run / "recipe.toml").exists()
    if resumed:
        train("--resume", str(run))
    else:
        train(*words, "--run-dir", str(run))
    return disk.writes, resumed


def power_cuts(
    cuts: int | None, folder: Path, *, seed: int = 0, variants: int = len(VARIANTS)
) -> dict[str, Any]:
    """Cut the power `cuts` times, before random writes; None: once before every write of a run."""
    draw = random.Random(seed)
    done = resumed = runs = lost = 0
    identical = True
    for number in range(variants):
        variant = VARIANTS[number]
        if "dali" in variant and dali.unavailable():
            variant = [*variant[:-1], "auto"]
        words = [*SHORT, *variant, "--seed", str(number)]
        writes, _ = broken_by_power(folder / f"whole-{number}", words, None)
        share = range(number, cuts, variants) if cuts is not None else range(writes)
        for cut in share:
            before = draw.randint(1, writes) if cuts is not None else cut + 1
            broken = folder / f"cut-{number}-{cut}"
            _, again = broken_by_power(broken, words, before)
            resumed += again
            whole = folder / f"whole-{number}" / "run"
            for name in ("best", "last"):
                ours, theirs = (p / f"{name}.safetensors" for p in (broken / "run", whole))
                identical &= ours.read_bytes() == theirs.read_bytes()
            lost += differing(rows(broken / "run"), rows(whole))
            done += 1
            runs += 1
            shutil.rmtree(broken)
    return {
        "cuts": done,
        "resumed": resumed,
        "runs": runs,
        "identical": identical,
        "lost_lines": lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="break, resume, compare")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--power-cuts", type=int, help="in place of kills [count]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.power_cuts is not None:
            with contextlib.redirect_stdout(io.StringIO()):
                found = power_cuts(arguments.power_cuts, Path(folder), seed=arguments.seed)
        else:
            found = soak(arguments.kills, Path(folder), seed=arguments.seed)
    print(json.dumps(found))
    sys.exit(0 if found["identical"] and not found["lost_lines"] else 1)


if __name__ == "__main__":
    main()
