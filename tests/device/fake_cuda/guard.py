"""Build the device guard and load it, before torch first looks for CUDA."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
# Where the process that runs the cases finds the library.
VARIABLE = "ENGINE_FAKE_CUDA_GUARD"


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def unavailable() -> str | None:
    """Return why the guard cannot be built here; None: it can."""
    if list((_torch() / "lib").glob("libtorch_cuda.so*")):
        return "this PyTorch is built for CUDA and registers a device guard of its own"
    if _compiler() is None:
        return "no C++ compiler (g++ or clang++) to build the device guard with"
    return None


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)


def build(folder: Path) -> Path:
    """Compile the guard into `folder` and return the library.

    Raises:
        RuntimeError: with what the compiler said.
    """
    compiler, torch, library = _compiler(), _torch(), folder / "guard.so"
    assert compiler is not None
    include = torch / "include"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", str(SOURCE), "-o", str(library)]
    command += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the device guard does not compile: {done.stderr[-2000:]}")
    return library


def load() -> None:
    """Register the guard in this process. `torch` must not have been imported yet."""
    ctypes.CDLL(str(_torch() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.environ[VARIABLE])
