"""Read a file of weights for a network to start from: `model.pretrained`."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import files
from ..errors import EngineError
from ..progress import announce_once

_LIMIT = 16 << 30  # bytes of a file of weights
_SUFFIXES = (".safetensors", ".pt", ".pth")
# Buffers that normalise the images: a file without them leaves the data set's own in place.
_STATISTICS = {"mu", "sigma"}
log = logging.getLogger(__name__)


def start_from(model: nn.Module, path: Path, classes: int) -> None:
    """Load the weights of a file into `model`; a head of other classes stays as it is, and a line
    says so.

    Args:
        path: a state dict: .safetensors, or .pt and .pth, which are read with `weights_only`. It
            may lie under "state_dict" or "model", and its names may begin with "module.".
        classes: the number of logits.
    Raises:
        EngineError: if the file is absent, damaged, holds no state dict, or is of another network.
    """
    weights = {name.removeprefix("module."): t for name, t in _state_dict(path).items()}
    own = model.state_dict()
    head = _head_of(model, classes)
    fresh = {name for name in head if not _fits(weights.get(name), own[name])}
    for name in fresh:
        _check_head(path, name, weights.pop(name, None), own[name])
    if missing := [n for n in own if n not in weights and n not in fresh | _STATISTICS]:
        raise EngineError(
            f"model.pretrained = {path}: it is of another network: it has no {missing[0]}"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
        )
    if unknown := [name for name in weights if name not in own]:
        raise EngineError(
            f"model.pretrained = {path}: it is of another network: {unknown[0]} is not in this one"
        )
    for name, t in weights.items():
        if t.shape != own[name].shape:
            raise EngineError(
                f"model.pretrained = {path}: {name} is {list(t.shape)}, and this network has "
                f"{list(own[name].shape)}: it is of another network"
            )
    model.load_state_dict(weights, strict=False)
    if fresh:
        # Once: a run builds its network several times.
        names = ", ".join(sorted(fresh))
        announce_once(log, f"model.pretrained = {path}: the head is fresh: {names}")


def _head_of(model: nn.Module, classes: int) -> list[str]:
    """Return the names of the weights of the last layer that makes a number for each class."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    last = next((m for m in reversed(layers) if m.weight.shape[0] == classes), None)
    own = set() if last is None else {id(p) for p in last.parameters()}
    return [name for name, t in model.state_dict(keep_vars=True).items() if id(t) in own]


def _fits(t: Tensor | None, own: Tensor) -> bool:
    return t is not None and t.shape == own.shape


def _check_head(path: Path, name: str, t: Tensor | None, own: Tensor) -> None:
    """Refuse a head that differs by more than its number of classes."""
    if t is not None and t.shape[1:] != own.shape[1:]:
        raise EngineError(
            f"model.pretrained = {path}: {name} is {list(t.shape)}, and this network has "
            f"{list(own.shape)}: it is of another network"
        )


def _state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix not in _SUFFIXES:
        raise EngineError(f"model.pretrained = {path}: must end in {', '.join(_SUFFIXES)}")
    with files.opened(path, _LIMIT, "model.pretrained = "):
        pass
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:80]
        raise EngineError(f"model.pretrained = {path} is damaged: {reason}") from None
    except pickle.UnpicklingError:
        raise EngineError(
            f"model.pretrained = {path} holds more than tensors: save model.state_dict() alone"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise EngineError(f"model.pretrained = {path} holds no state dict: save model.state_dict()")
    return dict(found)
