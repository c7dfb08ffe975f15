"""The choice of the backend that serves an op.

Three backends: `triton` (CUDA), `native` (C++, CPU) and `reference` (plain PyTorch, any device).
Each is a module with one function for each op, with the names and arguments of `reference`. The
reference serves an op that a backend lacks. The device of the op's first tensor chooses, and `use`
overrides the choice.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Literal

from . import reference

Backend = Literal["reference", "native", "triton"]

OPS = (
    "uniform_start",
    "attack_step",
    "attack_step_",
    "cross_entropy_grad",
    "kl_grad",
    "input_grad_step",
    "stem_input_grad",
    "stem_weight_grad",
    "local_ball_loss",
    "local_ball_loss_backward",
    "augment",
    "recall",
    "remember",
    "sgd_ema_step",
    "adamw_ema_step",
)
_BY_DEVICE: dict[str, Backend] = {"cpu": "native", "cuda": "triton"}
_MODULES = {"native": ".native", "triton": ".triton"}
_forced: list[Backend] = []
_log = logging.getLogger("engine.kernels")


@cache
def load(name: Backend) -> tuple[ModuleType | None, str]:
    """The backend's module and how it came to be there, or None and the reason it is missing."""
    if name == "reference":
        return reference, "always there"
    try:
        module = importlib.import_module(_MODULES[name], __package__)
    except ImportError as error:
        return None, str(error)
    return module, getattr(module, "ORIGIN", "loaded")


@cache
def implementation(op: str, device: str, forced: Backend | None) -> Callable:
    name = forced or _BY_DEVICE.get(device, "reference")
    module, reason = load(name)
    if module is None and forced:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if module is None:
        _announce(name, reason)
    return getattr(module, op, None) or getattr(reference, op)


@cache
def _announce(name: str, reason: str) -> None:
    _log.warning("%s kernels are missing (%s); plain PyTorch serves their ops", name, reason)


def dispatch(op: str, device: str) -> Callable:
    return implementation(op, device, _forced[-1] if _forced else None)


@contextlib.contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run every op in the block on one backend; the reference serves the ops that it lacks.

    Raises:
        RuntimeError: at the first op, if that backend is not available.
    """
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def table() -> list[dict[str, str]]:
    """Return one row for each op and device: the backend that serves it and the reason."""
    rows = []
    for op in OPS:
        for device, wanted in _BY_DEVICE.items():
            module, reason = load(wanted)
            if module is not None and hasattr(module, op):
                rows.append({"op": op, "device": device, "backend": wanted, "why": reason})
            else:
                why = reason if module is None else f"{wanted} has no {op}"
                rows.append({"op": op, "device": device, "backend": "reference", "why": why})
    return rows


def finish_capture() -> None:
    """Fill the tables that a capture left empty; call it before the first replay."""
    module, _ = load("triton")
    if module is not None:
        module.finish_capture()
