"""Read a file of weights for a network to start from: `model.init`."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import files
from ..errors import EngineError

_LIMIT = 16 << 30  # bytes of a file of weights
_SUFFIXES = (".safetensors", ".pt", ".pth")
# Buffers that normalise the images: a file without them leaves the data set's own in place.
_STATISTICS = {"mu", "sigma"}


def start_from(model: nn.Module, path: Path) -> None:
    """Load the weights of a file into `model`.

    Args:
        path: a state dict: .safetensors, or .pt and .pth, which are read with `weights_only`. It
            may lie under "state_dict" or "model", and its names may begin with "module.".
    Raises:
        EngineError: if the file is absent, damaged, holds no state dict, or is of another network.
    """
    weights = {name.removeprefix("module."): t for name, t in _state_dict(path).items()}
    own = model.state_dict()
    if missing := [name for name in own if name not in weights | dict.fromkeys(_STATISTICS)]:
        raise EngineError(
            f"model.init = {path}: it is of another network: it has no {missing[0]}"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
        )
    if unknown := [name for name in weights if name not in own]:
        raise EngineError(
            f"model.init = {path}: it is of another network: {unknown[0]} is not in this one"
        )
    for name, t in weights.items():
        if t.shape != own[name].shape:
            raise EngineError(
                f"model.init = {path}: {name} is {list(t.shape)}, and this network has "
                f"{list(own[name].shape)}: another network, or another number of classes"
            )
    model.load_state_dict(weights, strict=False)


def _state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix not in _SUFFIXES:
        raise EngineError(f"model.init = {path}: must end in {', '.join(_SUFFIXES)}")
    with files.opened(path, _LIMIT, "model.init = "):
        pass
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:80]
        raise EngineError(f"model.init = {path} is damaged: {reason}") from None
    except pickle.UnpicklingError:
        raise EngineError(
            f"model.init = {path} holds more than tensors: save model.state_dict() alone"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise EngineError(f"model.init = {path} holds no state dict: save model.state_dict()")
    return dict(found)
