"""Registration of the operators in `torch.library`."""

from __future__ import annotations

import torch

from ..backends import dispatch

library = torch.library.Library("engine", "DEF")


def define(name: str, schema: str):
    """Define `engine::name` and call, on every device, the backend that `backends` chooses.

    A call costs about a quarter of a call through `torch.library.custom_op`.
    """
    position = 1 if name == "local_ball_loss_backward" else 0

    def run(*args):
        first = args[position]
        device = (first[0] if isinstance(first, list) else first).device.type
        return dispatch(name, device)(*args)

    library.define(name + schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.engine, name).default
