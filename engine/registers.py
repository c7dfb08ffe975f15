"""The optimisers and the loaders by name: the engine's own, and those that `--import` adds."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import EngineError

Maker = TypeVar("Maker", bound=Callable[..., Any])


class Register:
    """Hold names that a recipe may give, and what makes the registered ones.

    Args:
        title: of one entry, in messages; own: the engine's own names.
    """

    def __init__(self, title: str, own: tuple[str, ...]) -> None:
        self.title, self.own = title, own
        self._makers: dict[str, Callable[..., Any]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._makers

    def names(self) -> list[str]:
        """Return the engine's own names, then those that were registered."""
        return [*self.own, *self._makers]

    def register(self, name: str) -> Callable[[Maker], Maker]:
        """Return a decorator that gives recipes a new entry, called `name`.

        Raises:
            EngineError: for a name that is taken, or that is no plain word.
        """
        if not isinstance(name, str) or not name or name != name.strip() or "/" in name:
            raise EngineError(f"the name of a {self.title} is a plain word, got {name!r}")

        def keep(make: Maker) -> Maker:
            if name in self:
                raise EngineError(
                    f"the {self.title} {name!r} exists already: register another name"
                )
            self._makers[name] = make
            return make

        return keep

    def maker(self, name: str) -> Callable[..., Any] | None:
        """Return what makes a registered entry; None for the engine's own."""
        return self._makers.get(name)

    def checked(self, name: str) -> str:
        """Return `name`, or raise a ValueError that names the nearest known one."""
        if name in self:
            return name
        known = self.names()
        near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"must be one of {', '.join(known)}: {hint}--import MODULE brings your own"
        )


# Made by (params, lr, *, momentum, weight_decay) -> torch.optim.Optimizer.
optimisers = Register(
    "optimiser",
    ("sgd", "adamw", "torch-sgd", "torch-adamw", "apex-sgd", "apex-adam", "apex-lamb"),
)
# Made by (images, labels, batch_size, *, device, workers, seed, ...) -> engine.data.loaders.Loader.
loaders = Register("loader", ("auto", "resident", "dali", "torch", "null"))
