"""NVIDIA apex, where the real one is installed. It is no dependency: PyPI's `apex` is another project."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import EngineError

BUILD = (
    "build it where nvcc is: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)


def load() -> Any:
    """apex's module of optimisers.

    Raises:
        EngineError: when apex is missing, is PyPI's unrelated package, or lacks its CUDA extension.
    """
    try:
        importlib.import_module("apex")
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "apex"
        # PyPI's package is Python 2: importing it fails in whatever way.
        raise EngineError(f"NVIDIA apex is not installed; {BUILD}" if missing else _OTHER) from None
    try:
        optimisers = importlib.import_module("apex.optimizers")
        _ = optimisers.FusedSGD, optimisers.FusedAdam, optimisers.FusedLAMB
    except Exception:
        raise EngineError(_OTHER) from None
    try:
        importlib.import_module("amp_C")
    except Exception:
        raise EngineError(f"apex was built without its CUDA extension; {BUILD}") from None
    return optimisers


def status() -> str:
    """One line for `engine doctor`."""
    try:
        load()
    except EngineError as error:
        return str(error)
    return "NVIDIA apex with its fused optimisers"


_OTHER = (
    "the installed `apex` is not NVIDIA's (PyPI's is an unrelated project): pip uninstall apex, "
    f"then {BUILD}"
)
