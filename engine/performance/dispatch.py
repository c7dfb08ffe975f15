"""Listen to the operators that PyTorch dispatches, each with its phase of the step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..device import phases

# These operators read a few rows of a tensor: the tensor's size says nothing of their traffic.
GATHERS = ("engine::augment", "engine::recall", "engine::remember", "aten::index_select")
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass(frozen=True)
class Call:
    """Hold one call of an operator.

    Attributes:
        op: the overload, e.g. `aten.add.Tensor`; name: with its namespace, "aten::add".
        result: the return value, of any structure.
        phase: the innermost phase of the step at the call, see `device.phases`.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    phase: str

    @property
    def name(self) -> str:
        return self.op._schema.name

    @property
    def short_name(self) -> str:
        """The name without PyTorch's own namespace: "add", but "engine::augment"."""
        return self.name.removeprefix("aten::")

    @cached_property
    def inputs(self) -> list[Tensor]:
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @cached_property
    def outputs(self) -> list[Tensor]:
        return [t for t in tree_leaves(self.result) if isinstance(t, Tensor)]

    @cached_property
    def launches(self) -> bool:
        """Tell whether the call does work on the device; a view or an allocation does none."""
        return not self._is_view and self.short_name not in _ALLOCATIONS

    @property
    def _is_view(self) -> bool:
        if self.op._schema.is_mutable or not self.outputs:
            return False
        storages = {storage_of(t) for t in self.inputs}
        return all(storage_of(t) in storages for t in self.outputs)

    @property
    def written(self) -> list[Tensor]:
        """The tensors that the call writes: its arguments in place, or else its results."""
        if self.op._schema.is_mutable:
            return [t for t in tree_leaves(list(self._mutated())) if isinstance(t, Tensor)]
        return self.outputs

    def _mutated(self) -> Iterator[Any]:
        for argument, value in zip(self.op._schema.arguments, self.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield value
        for argument in self.op._schema.arguments:
            if argument.name in self.kwargs and argument.alias_info is not None:
                yield self.kwargs[argument.name]


class Spy(TorchDispatchMode):
    """Run every dispatched operator and hand the call to `heard`.

    A spy is a listener of `device.phases` as well: inside `phases.listening(spy)` each call knows
    its phase, outside it belongs to `phases.BOOKKEEPING`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._phases = [phases.BOOKKEEPING]

    @abstractmethod
    def heard(self, call: Call) -> None:
        """Take note of a call that has run."""

    def enter(self, name: str) -> None:
        self._phases.append(name)

    def exit(self, name: str) -> None:
        self._phases.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.heard(Call(func, args, kwargs, result, self._phases[-1]))
        return result


def storage_of(t: Tensor) -> int:
    """Return the identity of the memory behind a tensor: views of one tensor share it."""
    return t.untyped_storage()._cdata
