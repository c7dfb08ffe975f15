"""A network with passes compiled by torch.compile, and the same weights and layout."""

from __future__ import annotations

import copy
import logging
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .network import stem_of

log = logging.getLogger(__name__)


def unavailable(device: torch.device) -> str | None:
    """Return the reason why torch.compile cannot work on `device`, or None without a known reason.

    On the CPU, torch.compile passes the linker `-L` and a folder without quotes (PyTorch 2.13's
    `torch/_inductor/cpp_builder.py`), so a space in the path of PyTorch or Python breaks every
    link.
    """
    if device.type != "cpu":
        return None
    folders = (str(Path(torch.__file__).parent / "lib"), sysconfig.get_config_var("LIBDIR") or "")
    spaced = next((folder for folder in folders if " " in folder), None)
    if spaced is None:
        return None
    return f"PyTorch's CPU compiler cannot link from a folder with a space in its path: {spaced}"


def compiled(model: nn.Module) -> nn.Module:
    """Return a view of `model` with compiled passes: it shares parameters, buffers and submodules.

    A compiled pass computes the gradients of all tensors that require one, so weights must not
    require any while an attack runs. The mark `freeze_in_attacks` tells `passes_without_training`
    to freeze them. If torch.compile cannot work, log a warning and return the model itself.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if missing := unavailable(device):
        log.warning("running without torch.compile: %s", missing)
        return model
    view: Any = copy.copy(model)
    part = "forward" if stem_of(model) is None else "body"
    setattr(view, part, torch.compile(getattr(model, part)))
    view.freeze_in_attacks = True
    return view
