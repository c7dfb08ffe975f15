"""Compare two versions of the engine, or a run and a stored result.

The verdict tells whether a difference is larger than the noise.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.progress import stderr

Rows = list[dict[str, Any]]
# These columns of a row are measurements; all others name the case.
_MEASURED = ("p20_ms", "p50_ms", "p80_ms", "images_per_s", "reached")


def run(name: str, reference: str, *, quick: bool, rounds: int = 3) -> Rows:
    """Compare this source tree's benchmark `name` with `reference`.

    Args:
        reference: a commit of this repository, built and run in turn with this tree, `rounds`
            times; or a JSON file of rows as `engine bench` prints or stores them, measured at
            another time.
    Returns:
        One row per case that both sides have: the case, ratio (time of this tree over the other's,
            median over rounds), lowest, highest, noise (spread between one side's rounds) and
            verdict.
    Raises:
        EngineError: for a reference that is neither a commit nor a file, or does not build.
    """
    if rounds < 1:
        raise EngineError(f"--rounds must be at least 1, got {rounds}")
    ours = _command(Path(sys.executable), name, quick)
    if Path(reference).is_file():
        stored = [_rows(Path(reference).read_text(encoding="utf-8"), reference)]
        return judge([ours()], stored)
    ours_by_round: list[Rows] = []
    others: list[Rows] = []
    with tempfile.TemporaryDirectory() as folder:
        python = environment(_checkout(reference, Path(folder)), Path(folder))
        their_run = _command(python, name, quick)
        for number in range(rounds):
            stderr.print(f"round {number + 1} of {rounds}", highlight=False)
            # The sides take turns in going first, so that a slowing machine slows both.
            for side, call in ((others, their_run), (ours_by_round, ours))[
                :: 1 if number % 2 else -1
            ]:
                side.append(call())
    return judge(ours_by_round, others)


def judge(ours: Sequence[Rows], theirs: Sequence[Rows]) -> Rows:
    """Return the rows of the comparison from each side's rounds."""
    rows = []
    our_times, their_times = _by_case(ours), _by_case(theirs)
    for case, times in our_times.items():
        if case not in their_times:
            continue
        pairs = list(zip(times, their_times[case], strict=False))
        ratios = [a / b for a, b in pairs]
        ratio = statistics.median(ratios)
        apart = [max(side) / min(side) - 1.0 for side in (times, their_times[case])]
        noise = max(apart) if len(pairs) > 1 else None
        if noise is None:
            verdict = "one round: no noise is known"
        elif abs(ratio - 1.0) <= noise or min(ratios) <= 1.0 <= max(ratios):
            verdict = "inside the noise"
        else:
            verdict = "slower" if ratio > 1.0 else "faster"
        rows.append(
            {
                **dict(case),
                "ratio": ratio,
                "lowest": min(ratios),
                "highest": max(ratios),
                "noise": noise,
                "verdict": verdict,
            }
        )
    if not rows:
        raise EngineError("the two have no case in common: nothing to compare")
    return rows


def _by_case(rounds: Sequence[Rows]) -> dict[tuple, list[float]]:
    """Group times by case over the rounds; images a second become seconds an image."""
    times: dict[tuple, list[float]] = {}
    for rows in rounds:
        for row in rows:
            time = row.get("p50_ms") or row.get("p50_s")
            if time is None and row.get("images_per_s"):
                time = 1.0 / row["images_per_s"]
            if time is None:
                continue
            named = {k: _plain(v) for k, v in row.items() if _names(k, v)}
            times.setdefault(tuple(sorted(named.items())), []).append(time)
    return times


def _names(key: str, value: Any) -> bool:
    return key not in _MEASURED and key != "note" and isinstance(value, str | int | list)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, list) else value


def _command(python: Path, name: str, quick: bool) -> Callable[[], Rows]:
    words = [str(python), "-m", "engine", "bench", name, "--json", *["--quick"] * quick]

    def call() -> Rows:
        # The current folder may hold a package of the same name; this one holds none.
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise EngineError(f"the benchmark failed: {done.stderr.strip().splitlines()[-1]}")
        return _rows(done.stdout, name)

    return call


def _rows(text: str, source: str) -> Rows:
    try:
        stored = json.loads(text)
        return stored["rows"] if isinstance(stored, dict) else stored
    except (ValueError, KeyError) as error:
        raise EngineError(f"{source} holds no benchmark's rows: {error!r}") from None


def _checkout(reference: str, folder: Path) -> Path:
    """Write the files of a commit beside this tree."""
    root = Path(__file__).resolve().parents[1]
    tree = folder / "tree"
    tree.mkdir()
    git = subprocess.run(["git", "-C", str(root), "archive", reference], capture_output=True)
    if git.returncode:
        raise EngineError(f"{reference} is no file, and no commit of {root}")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=git.stdout, check=True)
    return tree


def environment(tree: Path, folder: Path) -> Path:
    """Make an environment with the wheel of `tree`, and this one's other packages."""
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(tree)]
    built = subprocess.run(words, capture_output=True, text=True)
    if built.returncode:
        raise EngineError(f"no wheel can be built: {built.stderr.strip().splitlines()[-1]}")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    # Python reads no .pth file on a path that came from a .pth file, so an editable install stays
    # out.
    (place / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
