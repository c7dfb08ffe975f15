"""Timing side by side, and a stamp of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Quantiles of one call's wall-clock time, in milliseconds."""

    p20: float
    p50: float
    p80: float


def side_by_side(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    sample_ms: float = 0.5,
    samples: int = 200,
) -> dict[str, Timing]:
    """Time several callables in turn, so that what disturbs the machine disturbs them all alike.

    Each sample repeats its call until `sample_ms` have passed, as found while warming up.

    Args:
        calls: name to callable without arguments; CPU work, or work that synchronises itself.
        seconds: budget for all of them together, warm-up excluded.
        samples: no more than this many of each, and never fewer than 5.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        call()
        spent = min(_timed(call, 1) for _ in range(3))
        repeats[name] = max(1, min(1000, int(sample_ms * 1e-3 / max(spent, 1e-9))))
        _timed(call, repeats[name])
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(samples):
        if done >= 5 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            times[name].append(_timed(call, repeats[name]) / repeats[name])
    return {name: _quantiles(values) for name, values in times.items()}


def _timed(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - begin


def _quantiles(values: list[float]) -> Timing:
    ordered = sorted(values)

    def at(q: float) -> float:
        return 1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return Timing(at(0.2), at(0.5), at(0.8))


def copier(moved: int) -> Callable[[], object]:
    """A copy of float32 memory that moves `moved` bytes: half of them read, half written."""
    source = torch.ones(max(moved // 8, 1))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(moved: int = 1 << 28, seconds: float = 0.5) -> float:
    """Gigabytes a second that `copier` moves, bytes read and written both counted."""
    timing = side_by_side({"copy": copier(moved)}, seconds=seconds)["copy"]
    return moved / timing.p50 / 1e6


def machine() -> dict[str, object]:
    """What a number must carry to be compared with another."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": _commit(),
        # Above the number of cores, other work ran at the same time: distrust the absolute figures.
        "load": load(),
    }


def load() -> float:
    """Average number of running processes over the last minute, 0 where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's short commit, with a mark if files have changed since; None outside of one."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
