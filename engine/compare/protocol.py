"""Read a comparison's protocol (methods, seeds, budgets) and list its runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import recipes
from ..errors import EngineError
from ..recipes import Recipe
from ..runs import build
from ..runs.folder import plain
from ..text import shown

_MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Protocol:
    """Hold what a comparison trains and measures.

    Attributes:
        methods: recipe trees by the method's name.
        epochs, minutes: budgets, as passes over the training set (replays counted) or as training
            minutes by the measured step.
        chosen: the methods to train in this sitting; stored results of other methods are kept.
        score: "test": clean, PGD and AutoAttack accuracy on the test images; "validation": clean
            and PGD accuracy on the validation images, to choose settings without a look at the test
            set.
    """

    name: str
    about: str
    methods: Mapping[str, Mapping[str, Any]]
    seeds: int = 3
    epochs: tuple[int, ...] = ()
    minutes: tuple[float, ...] = ()
    chosen: frozenset[str] = frozenset()
    score: Literal["test", "validation"] = "test"


@dataclass(frozen=True)
class Job:
    """Hold one run of a protocol."""

    method: str
    recipe: Recipe

    @property
    def epochs(self) -> int:
        """Return the passes over the training set; each replay of a batch counts."""
        return self.recipe.optim.epochs * self.recipe.optim.replays

    @property
    def folder(self) -> str:
        return folder_name(self.method, self.epochs, self.recipe.seed)


def folder_name(method: str, epochs: int, seed: int) -> str:
    return f"{method}-e{epochs}-s{seed}"


def read(
    names: Sequence[str],
    overrides: Mapping[str, str],
    *,
    methods: Sequence[str] = (),
    seeds: int | None = None,
    epochs: Sequence[int] = (),
    minutes: Sequence[float] = (),
) -> Protocol:
    """Read a protocol from its file (a TOML file with `methods`), or make one from recipes.

    Args:
        names: one protocol file, or recipes by name or path.
        overrides: applied last, to every method.
        methods: the methods to train now; default all.
        seeds, epochs, minutes: replace the protocol's own.
    Raises:
        EngineError: for a file or recipe that is absent or not valid, a method that the protocol
            lacks, no seed, or a budget below 1 epoch or not above 0 minutes.
    """
    protocol = _from_file(Path(names[0])) if len(names) == 1 and is_protocol(names[0]) else None
    if protocol is None:
        trees = [recipes.tree(name) for name in names]
        by_name = {str(tree["name"]): tree for tree in trees}
        if len(by_name) < len(names):
            raise EngineError("engine compare: two of the recipes have one name")
        protocol = Protocol("compare", "", by_name)
    for name in methods:
        if name not in protocol.methods:
            near = recipes.nearest(name, list(protocol.methods))
            raise EngineError(f"--methods {name}: {protocol.name} has no such method{near}")
    wanted = replace(
        protocol,
        methods={n: recipes.overridden(tree, overrides) for n, tree in protocol.methods.items()},
        seeds=protocol.seeds if seeds is None else seeds,
        epochs=tuple(epochs) or (() if minutes else protocol.epochs),
        minutes=tuple(minutes) or (() if epochs else protocol.minutes),
        chosen=frozenset(methods or protocol.methods),
    )
    if wanted.seeds < 1:
        raise EngineError(f"--seeds must be at least 1, got {wanted.seeds}")
    if wanted.epochs and wanted.minutes:
        raise EngineError("budgets are epochs or minutes, not both")
    if not all(0 < budget < math.inf for budget in (*wanted.epochs, *wanted.minutes)):
        raise EngineError("a budget of epochs or minutes must be above 0")
    return wanted


def is_protocol(name: str) -> bool:
    path = Path(name)
    return path.suffix == ".toml" and path.is_file() and "methods" in recipes.read_toml(path)


def _from_file(path: Path) -> Protocol:
    """Read a protocol file: `base` recipe, `common` changes, and the changes of each method."""
    spec = recipes.read_toml(path)
    if unknown := sorted(spec.keys() - _FIELDS):
        raise EngineError(
            f"{path}: unknown field {unknown[0]!r}{recipes.nearest(unknown[0], list(_FIELDS))}"
        )
    for name, (default, fits, wanted) in _FIELDS.items():
        if not fits(spec.get(name, default)):
            fault = f"is {shown(spec[name])}" if name in spec else "is missing"
            raise EngineError(f"{path}: {name} {fault}, and must be {wanted}")
    for name in spec["methods"]:
        # Names become folders, and a protocol may come from a stranger.
        if name != plain(name):
            raise EngineError(
                f"{path}: methods have plain names, letters, digits and -_. : {name!r}"
            )
    common = recipes.merged(recipes.tree(spec["base"]), spec.get("common", {}))
    methods = {
        name: {**recipes.merged(common, change), "name": name}
        for name, change in spec["methods"].items()
    }
    return Protocol(
        path.stem,
        spec.get("about", ""),
        methods,
        seeds=spec.get("seeds", 3),
        epochs=tuple(spec.get("epochs", ())),
        minutes=tuple(spec.get("minutes", ())),
        score=spec.get("score", "test"),
    )


def _tables(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())


def _numbers(value: object, kind: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, kind) and not isinstance(v, bool) for v in value
    )


# The fields of a protocol file: (value where it is absent, check, how the value must be).
_FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "base": (None, lambda v: isinstance(v, str), 'the name or the path of a recipe, "mnist"'),
    "methods": (
        None,
        lambda v: bool(v) and _tables(v),
        "tables, one for each method: [methods.NAME]",
    ),
    "common": ({}, lambda v: isinstance(v, dict), "a table of fields for all methods: [common]"),
    "seeds": (
        3,
        lambda v: type(v) is int and 1 <= v < _MOST_SEEDS,
        f"a whole number from 1 to {_MOST_SEEDS - 1}",
    ),
    "epochs": ([], lambda v: _numbers(v, int), "a list of whole numbers, [5, 15]"),
    "minutes": ([], lambda v: _numbers(v, (int, float)), "a list of numbers, [1, 2.5]"),
    "score": ("test", lambda v: v in ("test", "validation"), '"test" or "validation"'),
    "about": ("", lambda v: isinstance(v, str), "a text in quotes"),
}


def jobs(protocol: Protocol, step_ms: Mapping[str, float]) -> list[Job]:
    """List all runs, seeds outermost and methods inside.

    A comparison that stops early then has whole seeds of all methods.
    """
    plan = []
    for seed in range(protocol.seeds):
        for name, tree in protocol.methods.items():
            if name not in protocol.chosen:
                continue
            recipe = recipes.parse({**tree, "seed": seed}, source=name)
            budgets = [recipe.optim.epochs]
            if protocol.epochs:
                budgets = [max(1, round(n / recipe.optim.replays)) for n in protocol.epochs]
            elif protocol.minutes:
                epoch = build.steps_per_epoch(recipe) * step_ms[name] / 60e3
                budgets = [max(1, round(minutes / epoch)) for minutes in protocol.minutes]
            for epochs in dict.fromkeys(budgets):
                changed = recipes.merged(tree, {"seed": seed, "optim": {"epochs": epochs}})
                plan.append(Job(name, recipes.parse(changed, source=name)))
    return plan
