"""Read recipes: TOML files and the command line's words, validated into typed values."""

from __future__ import annotations

import copy
import difflib
import math
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from .. import files
from ..data import own
from ..device import apex
from ..errors import EngineError
from ..evaluation.robust_accuracy import check_precision
from ..objectives import OBJECTIVES, LocalBall
from ..text import shown
from .fields import Recipe

# A recipe is a page of text; a larger one is something else.
_RECIPE_BYTES = 1 << 20
# tomllib takes quadratic time for a dotted key.
_KEY_PARTS = 32
# The largest numbers in a recipe: counts fit 32 bits, values fit float32.
_LARGEST_COUNT, _LARGEST_VALUE = (1 << 31) - 1, 1e37
_LONGEST_WORD = 100
# Names that fields had in earlier versions, by section: run folders keep them.
_RENAMED = {"model": {"init": "pretrained"}}
_ADAPTER = TypeAdapter(Recipe)
_DEFAULT_OBJECTIVE = LocalBall().name


def names() -> list[str]:
    """Return the names of the recipes that come with the engine."""
    folder = resources.files("engine").joinpath("recipes")
    return sorted(
        p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")
    )


def _families() -> list[str]:
    """Return the recipes' names, with "cifar10-*" for all that begin so."""
    known = names()
    heads = [n for n in known if not any(n.startswith(f"{other}-") for other in known)]
    variants = [f"{n}-*" for n in heads if any(other.startswith(f"{n}-") for other in known)]
    return sorted([*heads, *variants])


def load(name_or_path: str, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Return a recipe by name or by path, with `overrides` ("attack.steps" -> "2") on top.

    Raises:
        EngineError: unknown recipe or field (with the nearest name), or a value out of range.
    """
    source, overrides = f"recipe {name_or_path!r}", overrides or {}
    try:
        changed = overridden(tree(name_or_path), overrides)
        data = overrides.get("data.name", "")
        if own.is_path(data) and "name" not in overrides:
            # A recipe is called after its data set; this run has another one.
            changed["name"] = Path(own.absolute(data)).stem
        return parse(changed, source=source)
    except RecursionError:
        raise EngineError(f"{source}: its values are nested too deeply") from None


def tree(name_or_path: str) -> dict[str, Any]:
    """Return a recipe's fields as nested dictionaries, with those it extends, not yet validated."""
    return _read(name_or_path, seen=())


def overridden(tree: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Return `tree` with the command line's words ("attack.steps" -> "2") on top."""
    changed = copy.deepcopy(dict(tree))
    for key, text in overrides.items():
        _set(changed, key, text)
    return changed


def parse(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Return the recipe of nested dictionaries.

    Raises:
        EngineError: as `load` does; its text begins with `source`.
    """
    tree = _renamed(tree)
    _reject_unknown(tree)
    if isinstance(tree.get("objective"), Mapping):
        tree["objective"] = {"name": _DEFAULT_OBJECTIVE, **tree["objective"]}
    try:
        _check_no_truth_values(tree)
        recipe = _ADAPTER.validate_python(tree)
        _check_sizes(_ADAPTER.dump_python(recipe))
        recipe.objective.check(recipe.attack)
        recipe.data.check()
        if recipe.data.scale is not None and recipe.attack.start == "memory":
            raise EngineError(
                "attack.start = memory: the adversary memory does not follow a random resized "
                "crop: set attack.start = random, or drop data.scale"
            )
        if recipe.attack.memory == "host" and recipe.attack.start != "memory":
            raise EngineError("attack.memory = host has no effect: it needs attack.start = memory")
        _check_weights(recipe)
        if recipe.data.cutmix:
            _check_cutmix(recipe)
        apex.check_precision(recipe.optim.name, recipe.step.precision)
        evaluation = recipe.evaluation
        check_precision(evaluation.precision, evaluation.judge, evaluation.autoattack)
    except ValidationError as error:
        raise EngineError(f"{source}: {complaint(error)}") from None
    except EngineError as error:
        raise EngineError(f"{source}: {error}") from None
    return recipe


def _check_weights(recipe: Recipe) -> None:
    weights, optim = recipe.weights, recipe.optim
    if not weights.perturb:
        return
    if optim.name.startswith("apex"):
        raise EngineError(
            f"weights.perturb with optim.name = {optim.name}: take sgd, adamw or torch's optimisers"
        )
    if weights.from_epoch > optim.epochs:
        raise EngineError(
            f"weights.from_epoch = {weights.from_epoch}, but the run has {optim.epochs} epochs"
        )


def _check_cutmix(recipe: Recipe) -> None:
    recipe.objective.check_mixes()
    if recipe.attack.start == "memory":
        raise EngineError(
            "data.cutmix with attack.start = memory: a mixed image has no place in the adversary "
            "memory: set attack.start = random"
        )


def dump(recipe: Recipe) -> str:
    """Return the recipe as TOML, every field written out."""
    return tomli_w.dumps(_without_none(_ADAPTER.dump_python(recipe, mode="json")))


def _read(name_or_path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix == ".toml":
        tree = read_toml(path, "recipe ")
        if "methods" in tree:
            raise EngineError(
                f"{name_or_path} is a study of several methods, not a recipe: "
                f"engine compare {shlex.quote(name_or_path)}"
            )
    elif name_or_path in names():
        source = resources.files("engine").joinpath("recipes", f"{name_or_path}.toml")
        tree = tomllib.loads(source.read_text(encoding="utf-8"))
    else:
        raise EngineError(
            f"unknown recipe {name_or_path!r}{nearest(name_or_path, names())}; "
            f"recipes: {', '.join(_families())}, or a path ending in .toml"
        )
    tree.setdefault("name", path.stem)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str) or parent not in names() or parent in seen:
        raise EngineError(
            f"recipe {name_or_path}: extends {shown(parent)}, which is no recipe by name"
        )
    return merged(_read(parent, (*seen, parent)), tree)


def read_toml(path: Path, title: str = "") -> dict[str, Any]:
    """Return the tables of a TOML file of at most 1 MiB; `title` as for `files.opened`.

    Raises:
        EngineError: where it cannot be read, or is not valid TOML.
    """
    text = files.read_text(path, _RECIPE_BYTES, title)
    keys = re.split(r"""[^\w.\- "']""", text)
    if max(key.count(".") for key in keys) >= _KEY_PARTS:
        raise EngineError(f"{title}{path}: a key has more than {_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    # ValueError: TOMLDecodeError, and a number of more digits than Python reads.
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{title}{path}: not valid TOML: {error}") from None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the fields of `over` in place of its own, table by table."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        # Another objective's options mean nothing here: a new name starts from its own defaults.
        fresh = key == "objective" and isinstance(value, dict) and "name" in value
        if isinstance(value, dict) and isinstance(old, dict) and not fresh:
            value = {**old, **value}
        result[key] = value
    return result


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    """Put the command line's `text` where `key` ("attack.steps", or "attack.batch-norm") points."""
    parts = key.replace("-", "_").split(".")
    parts[1:] = [_RENAMED.get(parts[0], {}).get(part, part) for part in parts[1:]]
    known = {name: annotation for name, annotation, _, _ in options(_objective_of(tree))}
    dotted = ".".join(parts)
    if parts == ["objective", "name"]:
        tree["objective"] = {"name": text}
        return
    if dotted not in known:
        near = nearest(dotted, list(known), "--")
        raise EngineError(f"unknown option {shown(f'--{key}')}{near}")
    value: Any = text
    kind = _bare(known[dotted])
    if get_origin(kind) is tuple:
        value = tuple(part for part in text.split(",") if part and part.lower() != "none")
    elif text.lower() == "none" and type(None) in get_args(kind):
        value = None
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise EngineError(f"recipe: {part} must be a table")
    tree[parts[-1]] = value


def objectives() -> dict[str, type]:
    """Return the objective classes by the name that recipes use."""
    return dict(OBJECTIVES)


def _objective_name(tree: Mapping[str, Any]) -> Any:
    section = tree.get("objective")
    return (
        section.get("name", _DEFAULT_OBJECTIVE)
        if isinstance(section, Mapping)
        else _DEFAULT_OBJECTIVE
    )


def _objective_of(tree: Mapping[str, Any]) -> type:
    name = _objective_name(tree)
    return objectives().get(name, LocalBall) if isinstance(name, str) else LocalBall


@cache
def options(objective: type = LocalBall) -> tuple[tuple[str, Any, Any, str], ...]:
    """Return every field of a recipe: (dotted name, type, default, description with unit)."""

    def walk(cls: type, prefix: str) -> Iterator[tuple[str, Any, Any, str]]:
        hints = get_type_hints(cls, include_extras=True)
        for f in fields(cls):
            hint = objective if f.name == "objective" else hints[f.name]
            if is_dataclass(hint):
                yield from walk(hint, f"{prefix}{f.name}.")  # type: ignore[arg-type]
                continue
            default, description = f.default, ""
            if (prefix, f.name) == ("objective.", "name"):
                description = "training method; each has its own fields"
            elif (prefix, f.name) == ("", "name"):
                description = (
                    "name of the run, for its folder, its closing table and its model card"
                )
            for meta in getattr(hint, "__metadata__", ()):
                description = getattr(meta, "description", None) or description
            info = getattr(cls, "__pydantic_fields__", {}).get(f.name)
            if info is not None and info.default is not PydanticUndefined:
                default = info.default
            yield f"{prefix}{f.name}", hint, default, description

    return tuple(walk(Recipe, ""))


def nearest(word: str, known: list[str], prefix: str = "") -> str:
    """Return `, did you mean X?` where a known word is close, else nothing."""
    # difflib takes quadratic time.
    close = (
        [] if len(word) > _LONGEST_WORD else difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    )
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` with today's names in place of earlier ones; today's name has precedence."""
    renamed = dict(tree)
    for section, names in _RENAMED.items():
        table = renamed.get(section)
        if isinstance(table, Mapping):
            old = {names[key]: value for key, value in table.items() if key in names}
            renamed[section] = old | {k: v for k, v in table.items() if k not in names}
    return renamed


def _reject_unknown(tree: Mapping[str, Any]) -> None:
    chosen = _objective_name(tree)
    if not isinstance(chosen, str) or chosen not in objectives():
        known_names = list(objectives())
        raise EngineError(
            f"recipe: unknown objective {shown(chosen)}{nearest(str(chosen), known_names)}; "
            f"objectives: {', '.join(known_names)}"
        )
    known = [name for name, *_ in options(_objective_of(tree))]
    sections = {name.split(".")[0] for name in known if "." in name}
    for key, value in tree.items():
        if key in sections:
            if not isinstance(value, Mapping):
                raise EngineError(f"recipe: {key} must be a table")
            for inner in value:
                if f"{key}.{inner}" not in known:
                    dotted = f"{key}.{inner}"
                    raise EngineError(
                        f"recipe: unknown field {shown(dotted)}{nearest(dotted, known)}"
                    )
        elif key not in known:
            choices = [*sections, *(n for n in known if "." not in n)]
            raise EngineError(f"recipe: unknown field {shown(key)}{nearest(key, choices)}")


def _check_no_truth_values(tree: Mapping[str, Any]) -> None:
    """Refuse true and false where a field holds numbers: pydantic would read them as 1 and 0."""
    for dotted, hint, *_ in options(_objective_of(tree)):
        value: Any = tree
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        values = value if isinstance(value, list | tuple) else [value]
        truth = next((v for v in values if isinstance(v, bool)), None)
        if truth is not None and _is_numeric(hint):
            raise EngineError(f"{dotted}: must be a number, got {str(truth).lower()}")


def _is_numeric(hint: Any) -> bool:
    """Return whether a field's type holds int or float, alone, in a union or in a tuple."""
    return hint is int or hint is float or any(map(_is_numeric, get_args(hint)))


def complaint(error: ValidationError) -> str:
    """Return the first fault of values that a recipe refuses, in one line."""
    first = error.errors(include_url=False)[0]
    seen = [
        p
        for p in map(str, first["loc"])
        if not p.startswith(("function-", "constrained-", "float", "int", "none"))
    ]
    got = first.get("input")
    value = "" if isinstance(got, dict) else f", got {shown(got)}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{'.'.join(seen) or 'recipe'}: {message}{value}"


def _check_sizes(fields: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse numbers that no tensor, thread or list of this machine can have."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            _check_sizes(value, f"{prefix}{name}.")
        most = _LARGEST_VALUE if isinstance(value, float) else _LARGEST_COUNT
        if isinstance(value, int | float) and value > most:
            bound = f"{most:g}" if isinstance(most, float) else f"{most:,}"
            raise EngineError(f"{prefix}{name} = {shown(value)} is too large: at most {bound}")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("NaN in a recipe")
    return value
