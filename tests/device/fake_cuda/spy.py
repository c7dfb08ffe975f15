"""Watch every operator of a step on fake CUDA tensors; complain where a GPU would refuse."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .kernels import has_cuda_kernel

# A tensor whose shape depends on numbers gets the largest shape that it can have.
_LONGEST = ("nonzero", "_unique2")
# What hands a number of the host's over to the device.
_FROM_HOST = ("aten::lift_fresh", "aten::_to_copy", "prim::device")


class Spy(TorchDispatchMode):
    """Watch what is dispatched; to be entered above the fake tensors' own mode.

    Fake tensors hold no numbers, so a read on the host gets 1, or `truth`, and the code goes on.

    Args:
        host: the code may talk to the host, read values and hand over numbers: an evaluation may, a
            training step may not.
    Attributes:
        ops: how often each operator was called.
        complaints: one line for each fault.
    """

    def __init__(self, *, host: bool = False, truth: bool = True) -> None:
        super().__init__()
        self.host, self.truth = host, truth
        self.ops: Counter[str] = Counter()
        self.complaints: list[str] = []
        self._phases: list[str] = []

    def enter(self, name: str) -> None:
        self._phases.append(name)

    def exit(self, name: str) -> None:
        self._phases.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        self.ops[name] += 1
        short = name.partition("::")[2].partition(".")[0]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if short == "_local_scalar_dense":
            self._read(name, "reads a value of the device on the host")
            dtype = inputs[0].dtype
            return self.truth if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if short in _LONGEST or _masked(args):
            self._read(name, "makes a tensor whose shape depends on its contents")
            result = _longest(short, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self._judge(func, name, inputs, outputs)
        return result

    def _judge(self, func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if self.host and name in _FROM_HOST:
            return
        if self.host:
            # CUDA takes a number where a tensor is due.
            inputs = [t for t in inputs if t.dim() or t.device.type != "cpu"]
        places = {t.device.type for t in inputs}
        if len(places) > 1:
            self._complain(name, f"mixes tensors on {' and '.join(sorted(places))}")
        elif "cpu" in places or any(t.device.type == "cpu" for t in outputs):
            shapes = sorted({str(tuple(t.shape)) for t in [*inputs, *outputs]})
            self._complain(name, f"works on the CPU, on {', '.join(shapes)}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._complain(name, "draws random numbers from a generator")
        if not has_cuda_kernel(name):
            self._complain(name, "has no CUDA kernel")

    def _read(self, name: str, what: str) -> None:
        if not self.host:
            self._complain(name, what)

    def _complain(self, name: str, what: str) -> None:
        line = f"{self._phases[-1] if self._phases else 'outside any phase'}: {name} {what}"
        if line not in self.complaints:
            self.complaints.append(line)


def _masked(args: tuple[Any, ...]) -> bool:
    """Whether a tensor is read where a mask is True; writing through a mask changes no shape."""
    indices = [
        t for a in args[1:2] if isinstance(a, list | tuple) for t in a if isinstance(t, Tensor)
    ]
    return len(args) == 2 and any(t.dtype == torch.bool for t in indices)


def _longest(short: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first: Tensor = args[0]
    if short == "nonzero":
        return first.new_empty((first.numel(), first.dim()), dtype=torch.int64)
    if short == "_unique2":
        empty = first.new_empty(0, dtype=torch.int64)
        return first.new_empty(first.numel()), empty, empty
    indices = [
        torch.zeros(t.shape, dtype=torch.int64, device=t.device) if t.dtype == torch.bool else t
        for t in args[1]
    ]
    return func(first, indices, **kwargs)
