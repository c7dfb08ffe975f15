"""A folder of weights that stands without its run: `config.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files, recipes
from ..errors import EngineError
from ..recipes import Recipe
from ..threat import as_written
from .build import build_model
from .folder import load_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_CONFIG_BYTES = 1 << 20
# Fields of `model` that name files of the machine that trained.
_PATHS = ("init",)


def config_of(recipe: Recipe, shape: torch.Size, classes: int) -> dict[str, Any]:
    """Return the fields of `config.json`: what `load` needs, and the threat.

    Args:
        shape: of an image, [C, H, W].
        classes: number of logits.
    """
    network = dataclasses.asdict(recipe.model)
    return {
        "architecture": recipe.model.name,
        "num_classes": classes,
        "input_shape": list(shape),
        "model": {
            name: value
            for name, value in network.items()
            if value is not None and name not in _PATHS
        },
        "threat": {"norm": recipe.threat.norm, "eps": as_written(recipe.threat.eps)},
    }


def is_exported(folder: Path) -> bool:
    """Tell whether a folder holds exported weights with their `config.json`, and no run."""
    return (folder / CONFIG).is_file() and not (folder / "recipe.toml").exists()


def load(folder: Path) -> nn.Module:
    """Return the network of an exported folder, in evaluation mode, on the CPU.

    Raises:
        EngineError: for a damaged `config.json`, or weights that are missing, damaged, or of
            another network.
    """
    path = folder / CONFIG
    try:
        config = json.loads(files.read_text(path, _CONFIG_BYTES))
        shape = [int(n) for n in config["input_shape"]]
        classes = int(config["num_classes"])
        network = dict(config["model"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EngineError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if len(shape) != 3 or not all(0 < n <= 1 << 16 for n in (*shape, classes)):
        raise EngineError(f"{path} is damaged: input_shape {shape}, num_classes {classes}")
    recipe = recipes.parse({"model": network}, source=str(path))
    model = build_model(recipe, None, classes, torch.Size(shape))
    load_weights(model, folder / WEIGHTS)
    return model.eval()
