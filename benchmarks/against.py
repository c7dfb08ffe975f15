"""Two versions of the engine, or a run and a stored result, side by side: is a difference more than noise?"""

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
# What a benchmark's row measures; all else says what was measured.
_MEASURED = ("p20_ms", "p50_ms", "p80_ms", "images_per_s", "reached")


def run(what: str, reference: str, *, quick: bool, rounds: int = 3) -> Rows:
    """Compare this source tree's benchmark `what` with `reference`.

    Args:
        reference: a commit of this repository, built and run in turn with this tree, `rounds` times; or a
            JSON file of rows as `engine bench` prints or stores them, measured at another time.
    Returns:
        One row per case that both have: what was measured, ratio (time of this over the other's, median
        over rounds), lowest, highest, noise (how far one side's own rounds lie apart) and verdict.
    Raises:
        EngineError: for a reference that is neither, or does not build.
    """
    if rounds < 1:
        raise EngineError(f"--rounds must be at least 1, got {rounds}")
    ours = _command(Path(sys.executable), what, quick)
    if Path(reference).is_file():
        theirs = [_rows(Path(reference).read_text(encoding="utf-8"), reference)]
        return judge([ours()], theirs)
    mine: list[Rows] = []
    others: list[Rows] = []
    with tempfile.TemporaryDirectory() as folder:
        python = environment(_checkout(reference, Path(folder)), Path(folder))
        their_run = _command(python, what, quick)
        for number in range(rounds):
            stderr.print(f"round {number + 1} of {rounds}", highlight=False)
            # Who goes first changes, so that a machine that tires does it to both.
            for side, call in ((others, their_run), (mine, ours))[:: 1 if number % 2 else -1]:
                side.append(call())
    return judge(mine, others)


def judge(ours: Sequence[Rows], theirs: Sequence[Rows]) -> Rows:
    """Rows of the comparison, from each side's rounds."""
    found = []
    mine, others = _by_case(ours), _by_case(theirs)
    for case, times in mine.items():
        if case not in others:
            continue
        pairs = list(zip(times, others[case], strict=False))
        ratios = [a / b for a, b in pairs]
        ratio = statistics.median(ratios)
        apart = [max(side) / min(side) - 1.0 for side in (times, others[case])]
        noise = max(apart) if len(pairs) > 1 else None
        if noise is None:
            verdict = "one round: no noise is known"
        elif abs(ratio - 1.0) <= noise or min(ratios) <= 1.0 <= max(ratios):
            verdict = "inside the noise"
        else:
            verdict = "slower" if ratio > 1.0 else "faster"
        found.append(
            {
                **dict(case),
                "ratio": ratio,
                "lowest": min(ratios),
                "highest": max(ratios),
                "noise": noise,
                "verdict": verdict,
            }
        )
    if not found:
        raise EngineError("the two have no case in common: nothing to compare")
    return found


def _by_case(rounds: Sequence[Rows]) -> dict[tuple, list[float]]:
    """Times by what was measured, over the rounds; images a second as seconds an image."""
    found: dict[tuple, list[float]] = {}
    for rows in rounds:
        for row in rows:
            time = row.get("p50_ms") or row.get("p50_s")
            if time is None and row.get("images_per_s"):
                time = 1.0 / row["images_per_s"]
            if time is None:
                continue
            named = {k: _plain(v) for k, v in row.items() if _names(k, v)}
            found.setdefault(tuple(sorted(named.items())), []).append(time)
    return found


def _names(key: str, value: Any) -> bool:
    return key not in _MEASURED and key != "note" and isinstance(value, str | int | list)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, list) else value


def _command(python: Path, what: str, quick: bool) -> Callable[[], Rows]:
    words = [str(python), "-m", "engine", "bench", what, "--json", *["--quick"] * quick]

    def call() -> Rows:
        # From a neutral folder: the one at hand may hold a package of the same name.
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise EngineError(f"the benchmark failed: {done.stderr.strip().splitlines()[-1]}")
        return _rows(done.stdout, what)

    return call


def _rows(text: str, source: str) -> Rows:
    try:
        found = json.loads(text)
        return found["rows"] if isinstance(found, dict) else found
    except (ValueError, KeyError) as error:
        raise EngineError(f"{source} holds no benchmark's rows: {error!r}") from None


def _checkout(reference: str, folder: Path) -> Path:
    """The files of a commit, beside this tree."""
    root = Path(__file__).resolve().parents[1]
    tree = folder / "tree"
    tree.mkdir()
    git = subprocess.run(["git", "-C", str(root), "archive", reference], capture_output=True)
    if git.returncode:
        raise EngineError(f"{reference} is no file, and no commit of {root}")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=git.stdout, check=True)
    return tree


def environment(tree: Path, folder: Path) -> Path:
    """The Python of a fresh environment that holds the wheel of `tree` and sees this one's other packages."""
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
    # A path from a .pth file is not searched for .pth files: an editable install stays out.
    (place / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
