"""The choice of the backend that serves an op.

Three backends: `triton` (CUDA), `native` (C++, CPU) and `reference` (plain PyTorch, any device).
Each is a module with one function for each op, with the names and arguments of `reference`. The
reference serves an op that a backend lacks. The device of the op's first tensor chooses, and `use`
overrides the choice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from . import reference

Backend = Literal["reference", "native", "triton"]

OPS = (
    "uniform_start",
    "attack_step",
    "attack_step_",
    "apgd_step",
    "fab_step",
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
    "perturb_weights",
)
_BY_DEVICE: dict[str, Backend] = {"cpu": "native", "cuda": "triton"}
_MODULES = {"native": ".native", "triton": ".triton"}
_forced: list[Backend] = []
_log = logging.getLogger("engine.kernels")


@cache
def load(name: Backend) -> tuple[ModuleType | None, str]:
    """Return the backend's module and its origin, or None and the reason why it is missing."""
    if name == "reference":
        return reference, "always there"
    try:
        module = importlib.import_module(_MODULES[name], __package__)
    except ImportError as error:
        return None, str(error)
    return module, getattr(module, "ORIGIN", "loaded")


@cache
def usable(name: Backend) -> tuple[ModuleType | None, str]:
    """Return the result of `load`, after one launch on the backend's device if there is one.

    An import proves little: at its first launch Triton compiles its driver, which needs a C
    compiler, Python's headers and libcuda.
    """
    module, reason = load(name)
    if name != "triton" or module is None or not torch.cuda.is_available():
        return module, reason
    try:
        module.probe()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return None, f"its first launch failed: {type(error).__name__}: {first}"
    return module, reason


@cache
def implementation(op: str, device: str, forced: Backend | None) -> Callable:
    name = forced or _BY_DEVICE.get(device, "reference")
    module, reason = usable(name)
    if module is None and forced:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if module is None:
        _announce(name, reason)
    own = None if module is reference else getattr(module, op, None)
    if own is None:
        return _plain(op)
    # A backend that was asked for by name raises its errors.
    return own if forced else _or_plain(op, own, name, getattr(module, "REFUSED", ()))


def _plain(op: str) -> Callable:
    """Return the reference's op, which runs without autocast.

    Autocast would round the convolutions and products of the reference, and of no other backend.
    """
    run = getattr(reference, op)

    @functools.wraps(run)
    def exactly(*args: object) -> object:
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return run(*args)

    return exactly


def _or_plain(op: str, own: Callable, name: str, refused: tuple[type[Exception], ...]) -> Callable:
    """Return `own`, or the reference's op after a launch that is too large for the device."""
    if not refused:
        return own
    chosen = own

    @functools.wraps(own)
    def serve(*args: object) -> object:
        nonlocal chosen
        try:
            return chosen(*args)
        except refused as error:
            # Nothing is written yet: an op's later launches need no more than its first.
            _log.warning("%s's %s does not run here (%s); plain PyTorch serves it", name, op, error)
            chosen = _plain(op)
            return chosen(*args)

    return serve


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
            module, reason = usable(wanted)
            if module is not None and hasattr(module, op):
                rows.append({"op": op, "device": device, "backend": wanted, "why": reason})
            else:
                why = reason if module is None else f"{wanted} has no {op}"
                rows.append({"op": op, "device": device, "backend": "reference", "why": why})
    return rows


@contextlib.contextmanager
def capturing() -> Iterator[list[Tensor]]:
    """Capture ops in the block, and complete the capture when the block ends.

    Yields:
        A list. After the block it holds the tensors that only the captured graph reads.
    """
    module, _ = load("triton")
    if module is None:
        yield []
        return
    with module.capturing() as kept:
        yield kept
