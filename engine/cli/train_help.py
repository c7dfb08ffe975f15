"""`engine train --help`: the flags, the recipes, and the fields of a recipe by section."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ..errors import EngineError

_WIDTH = 100
_NAME = 27  # columns of a field's name
# The most important section comes first.
_SECTIONS = {
    "data": "images and augmentation",
    "model": "network",
    "threat": "ball round each image in which an adversary may move",
    "attack": "attack of the training steps",
    "objective": "training method; another --objective.name has other fields",
    "weights": "adversarial perturbation of the weights",
    "optim": "optimiser, length and batch size of the training",
    "schedule": "learning rate and eps over the run",
    "evaluation": "attacks on the test images after training",
    "validation": "PGD on held-out training images after each epoch",
    "checkpoint": "checkpoints to resume from",
    "log": "loggers of the epochs' rows",
    "step": "precision and capture of the step",
    "run": "seed, threads and name of the run",
}


def show(name: str | None, overrides: Mapping[str, str], section: str) -> None:
    """Print the help on stdout.

    Args:
        name: the recipe whose values are shown; None: the default of every field.
        overrides: fields that the command line changes.
        section: a key of the sections above, or "" for all.
    """
    from .. import recipes

    if section and section not in _SECTIONS:
        raise EngineError(f"--help {section}: no such section; sections: {', '.join(_SECTIONS)}")
    width = min(_WIDTH, shutil.get_terminal_size().columns)
    recipe = recipes.load(name, overrides) if name else recipes.Recipe()
    if not section:
        print(_usage(recipes.names(), width))
        print(f"\nFields of {name or 'a recipe'}, each with its value, meaning and [unit]:")
    fields = recipes.options(type(recipe.objective))
    for title in [section] if section else _SECTIONS:
        print(f"\n{title}: {_SECTIONS[title]}")
        for field in fields:
            if (field[0].rpartition(".")[0] or "run") == title:
                print("\n".join(_field_lines(recipe, field, width)))


def _usage(recipes: list[str], width: int) -> str:
    return "\n".join(
        [
            "usage: engine train RECIPE [--FIELD VALUE ...] [options]",
            "       engine train --resume RUN",
            "",
            "Start with the smallest recipe: engine train quickstart",
            "",
            _entry("--help SECTION", f"one section of fields: {', '.join(_SECTIONS)}", width),
            _entry("--run-dir DIR", "folder of the run; default: runs/RECIPE-DATE-TIME", width),
            _entry("--resume RUN", "continue a stopped or killed run, bit for bit", width),
            _entry("--no-eval", "train only; `engine eval RUN` evaluates later", width),
            _entry("--json", "print one JSON object on stdout; progress goes to stderr", width),
            _entry("--import MODULE", "networks and objectives of your own, see docs", width),
            _entry(
                "--nproc N", "N processes on this machine that share each batch; default: 1", width
            ),
            "",
            "RECIPE: a path ending in .toml, or",
            *_recipe_lines(recipes, width),
        ]
    )


def _recipe_lines(names: list[str], width: int) -> Iterator[str]:
    """Group the recipes by dataset, a paragraph each."""
    roots = [n for n in names if not any(n.startswith(f"{other}-") for other in names)]
    for root in roots:
        group = ", ".join(n for n in names if n == root or n.startswith(f"{root}-"))
        yield textwrap.fill(
            group, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )


def _entry(left: str, right: str, width: int) -> str:
    return textwrap.fill(
        right,
        width,
        initial_indent=f"  {left:18}",
        subsequent_indent=" " * 20,
        break_on_hyphens=False,
    )


def _field_lines(recipe: Any, field: tuple[str, Any, Any, str], width: int) -> list[str]:
    dotted, hint, _, description = field
    value = recipe
    for part in dotted.split("."):
        value = getattr(value, part)
    text = _typed(value)
    if choices := _choices(dotted, hint):
        description += f"; one of {', '.join(choices)}"
    head = f"  {'--' + dotted:{_NAME}} {text:<10} "
    indent = " " * (_NAME + 14)
    return textwrap.wrap(
        head + description, width, subsequent_indent=indent, break_on_hyphens=False
    )


def _typed(value: Any) -> str:
    """Write a field's value as the command line takes it; "none" leaves a field out."""
    if isinstance(value, tuple):
        return ",".join(map(_typed, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _choices(dotted: str, hint: Any) -> list[str]:
    """List the values that a field takes by name; [] for numbers and free text."""
    from .. import data, models, recipes, registers

    if dotted == "objective.name":
        return list(recipes.objectives())
    if dotted == "model.name":
        return sorted(models.names())
    if dotted == "data.name":
        return list(data.names())
    register = {"optim.name": registers.optimisers, "data.loader": registers.loaders}.get(dotted)
    return list(_literals(hint)) if register is None else register.names()


def _literals(hint: Any) -> Iterator[str]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) in (Annotated, Union, UnionType):
        yield from (text for part in get_args(hint) for text in _literals(part))
