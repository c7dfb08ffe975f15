"""A registered optimiser, as the engine's optimiser drives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError

_KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": Tensor.clone,
    "int": lambda t: int(t),
    "float": lambda t: float(t),
}


class Registered:
    """Step an optimiser that `engine.optimisers.register` brought, and hold its state.

    Its state may appear in its first step, so a step with it cannot be captured.

    Args:
        make: called with (params, lr, momentum=, weight_decay=).
        name: for messages.
    Raises:
        EngineError: where `make` returns no torch.optim.Optimizer of these parameters.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        name: str,
        params: Sequence[Tensor],
        lr: float,
        *,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.params = params
        made = make(list(params), lr, momentum=momentum, weight_decay=weight_decay)
        if not isinstance(made, torch.optim.Optimizer):
            raise EngineError(
                f"optim.name = {name}: its maker returned no torch.optim.Optimizer, but "
                f"{made!r:.60}"
            )
        self.optimiser = made

    def step(self, lr: float, found_inf: Tensor | None) -> None:
        """Do a step, unless a gradient is not finite; the host waits for the device to know it."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        if found_inf is None or not bool(found_inf):
            self.optimiser.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state's tensors, and its numbers as tensors."""
        found = {}
        for place, table in self._tables():
            for key, value in table.items():
                kind = type(value).__name__ if isinstance(value, int | float) else "tensor"
                if isinstance(value, Tensor):
                    found[f"{place}.tensor.{key}"] = value
                elif kind in _KINDS and kind != "tensor":
                    found[f"{place}.{kind}.{key}"] = torch.tensor(value, dtype=torch.float64)
        return found

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of a checkpoint, by the names of `tensors`."""
        tables = dict(self._tables())
        for name, value in tensors.items():
            place, kind, key = name.split(".", 2)
            if place in tables and kind in _KINDS:
                to = self.params[0].device if value.dim() else value.device
                tables[place][key] = _KINDS[kind](value.to(to))

    def clear(self) -> None:
        """Forget the state: the next step begins with a fresh one."""
        self.optimiser.state.clear()

    def _tables(self) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
        """Give the tables of state by a name: of each parameter, and of each group."""
        for i, p in enumerate(self.params):
            yield f"state{i}", self.optimiser.state[p]
        for i, group in enumerate(self.optimiser.param_groups):
            yield f"group{i}", group
