"""A network whose passes go through torch.compile, weights and layout untouched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .network import stem_of


def compiled(model: nn.Module) -> nn.Module:
    """`model` with compiled passes: the same parameters, buffers and submodules under another hat.

    A compiled pass computes all gradients that it may be asked for, so weights must not require any
    while an attack runs: `passes_without_training` sees to it by the mark left here.
    """
    view: Any = copy.copy(model)
    part = "forward" if stem_of(model) is None else "body"
    setattr(view, part, torch.compile(getattr(model, part)))
    view.freeze_in_attacks = True
    return view
