"""Ask the machine: its device, its peak memory, its versions, its commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..kernels import backends


def keep_freed_memory() -> None:
    """Keep freed memory in the process: every step would otherwise pay page faults for it again.

    This changes the whole process, so the command line calls it and the library does not.
    """
    native, _ = backends.load("native")
    if native is not None:
        native.keep_freed_memory()


def device() -> torch.device:
    """Return the device of this process: its current GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def peak_memory_mb() -> int | None:
    """Return the peak memory [MB]: the GPU's, or the process's on the CPU; None where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def environment() -> dict[str, Any]:
    """Return versions, machine and commit, for the numbers in a report."""
    return {
        "engine": _version("robust-engine"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "pyautoattack": _version("pyautoattack"),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "command": _command(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _command() -> str:
    """Return the command line as people type it, without the program's place on this machine."""
    name = Path(sys.argv[0]).name
    return shlex.join(["engine" if name == "__main__.py" else name, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the source tree's commit, with `+` after changes; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
