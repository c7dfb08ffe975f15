"""NVIDIA apex, where it is installed. It is not a dependency: PyPI's `apex` is another project."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError

BUILD = (
    "build it where nvcc is: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)


def load() -> Any:
    """Return apex's module of optimisers.

    Raises:
        EngineError: when apex is missing, is PyPI's unrelated package, or lacks its CUDA extension.
    """
    try:
        importlib.import_module("apex")
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "apex"
        # PyPI's package is Python 2: its import may raise anything.
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


def check(name: str, device: torch.device) -> None:
    """Refuse an apex optimiser that cannot run on `device`.

    Raises:
        EngineError: without a CUDA device, or as `load` does.
    """
    if device.type != "cuda":
        raise EngineError(f"optim.name = {name} needs a CUDA device: take sgd or adamw")
    load()


def check_precision(optimiser: str, precision: str) -> None:
    """Refuse fp16 for apex's optimisers: its loss scale skips steps, and they cannot.

    Raises:
        EngineError: for an apex optimiser with "fp16".
    """
    if optimiser.startswith("apex") and precision == "fp16":
        raise EngineError(
            f"optim.name = {optimiser} cannot skip a step whose float16 gradients overflow: "
            "take step.precision = bf16, or optim.name = sgd or adamw"
        )


def build(name: str, params: Sequence[Tensor], lr: Tensor, **options: Any) -> torch.optim.Optimizer:
    """Return an apex optimiser with its state made now: checkpoints and graphs need it early.

    Args:
        name: "apex-sgd", "apex-adam" or "apex-lamb".
        lr: 0-d on the device; Adam reads it at every step. The other two read their rate from
            `param_groups`, and LAMB the number of earlier steps too: put both there before each
            step.
        options: the constructor's.
    """
    optimisers = load()
    if name == "apex-sgd":
        external = optimisers.FusedSGD(params, lr=0.0, **options)
    elif name == "apex-adam":
        external = optimisers.FusedAdam(params, lr=0.0, capturable=True, **options)
        for group in external.param_groups:
            # The constructor takes a copy of a rate that is a tensor.
            group["lr"] = lr
            group["step"] = torch.zeros(1, dtype=torch.int32, device=lr.device)
    else:
        external = optimisers.FusedLAMB(params, lr=0.0, **options)
    moments = ("momentum_buffer",) if name == "apex-sgd" else ("exp_avg", "exp_avg_sq")
    for p in params:
        external.state[p] = {moment: torch.zeros_like(p) for moment in moments}
    return external


def status() -> str:
    """Return one line for `engine doctor`."""
    try:
        load()
    except EngineError as error:
        return str(error)
    return "NVIDIA apex with its fused optimisers"


_OTHER = (
    "the installed `apex` is not NVIDIA's (PyPI's is an unrelated project): pip uninstall apex, "
    f"then {BUILD}"
)
