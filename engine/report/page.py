"""Write the report of a run: one self-contained HTML page, and the same pictures as PNGs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files, pictures, recipes
from ..errors import EngineError
from ..pages import render
from ..recipes import Recipe
from ..runs import found
from ..runs.folder import Run
from ..text import duration
from ..threat import as_written
from .views import View, curves_view, views_of_model


def build(run: Run) -> Path:
    """Write `report.html` and `pictures/*.png` into a run folder; return the page's path.

    Where the data for a picture is missing (no evaluation yet, no checkpoint, no test images on
    this machine), the page has a sentence with the reason, and the old picture is removed.

    Raises:
        EngineError: for files that are damaged or not a run's, or a folder that cannot be written.
    """
    with found.foreign_files(run):
        return _build(run)


def _build(run: Run) -> Path:
    rows, evaluation = run.metrics(), run.read_json("evaluation.json")
    summary, environment = run.read_json("summary.json"), run.read_json("environment.json")
    best = summary.get("best_epoch") or _best_epoch(rows)
    with pictures.style():
        views = [
            curves_view(run.recipe, rows, best),
            *views_of_model(run, evaluation),
        ]
        for view in views:
            _save(view, run.place(f"pictures/{view.name}.png"))
    context = {
        "recipe": run.recipe,
        "folder": run.path.name,
        "best": best,
        "headline": _headline(run.recipe),
        "numbers": _numbers(evaluation),
        "facts": _facts(run.recipe, rows, summary, best),
        "cascade": _cascade(evaluation),
        "evaluation": evaluation,
        "masking": run.read_json("masking.json"),
        "worst_case": _worst_case(evaluation),
        "views": {view.name: view for view in views},
        "first_fields": _first_fields(run.recipe),
        "all_fields": _all_fields(run.recipe),
        "environment": {k: v for k, v in environment.items() if v is not None},
        "radius": as_written,
    }
    page = run.place("report.html")
    files.write_text(page, render("report", **context))
    return page


def _save(view: View, path: Path) -> None:
    if view.png is not None:
        pictures.save_png(view.png, path)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise EngineError(f"cannot remove {path}: {error.strerror}") from error


def _best_epoch(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the epoch with the highest validation PGD accuracy; on ties, the latest."""
    validated = [r for r in rows if "val_pgd" in r]
    return max(validated, key=lambda r: (r["val_pgd"], r["epoch"]))["epoch"] if validated else None


def _headline(recipe: Recipe) -> str:
    attack, objective = recipe.attack, recipe.objective
    weights = {
        "k": attack.steps,
        "λ": getattr(objective, "local_weight", None),
        "μ": getattr(objective, "global_weight", None),
        "ρ": getattr(objective, "rho", None),
    }
    # No-break spaces keep a name and its value on one line.
    options = [f"{k}\u00a0=\u00a0{v:g}" for k, v in weights.items() if v is not None]
    if share := _balls_share(objective):
        options.append(f"balls {share}")
    epochs = f"{recipe.optim.epochs} epoch{'s' * (recipe.optim.epochs != 1)}"
    start = " started from the adversary memory" if attack.start == "memory" else ""
    return (
        f"{recipe.model.name} on {recipe.data.name}, {epochs} of {objective.name} training "
        f"({', '.join(options)}{start}) against {recipe.threat.norm} perturbations "
        f"of at most {as_written(recipe.threat.eps)}."
    )


def _balls_share(objective: Any) -> str:
    """Return which part of a batch gets local balls; "" for all of it, or for no balls."""
    share = getattr(objective, "local_share", 1.0)
    return f"for {share:g} of each batch" if share < 1 else ""


def _numbers(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the three main numbers; a value of None was not measured."""
    shown = (
        ("clean", "Clean accuracy", "clean_acc", "test images as they are"),
        ("pgd", "PGD accuracy", "pgd_acc", _pgd_words(evaluation)),
        (
            "autoattack",
            "AutoAttack accuracy",
            "autoattack_acc",
            _autoattack_words(evaluation),
        ),
    )
    numbers = []
    for name, title, key, how in shown:
        value = None if evaluation.get(key) is None else float(evaluation[key]) / 100
        error = None
        if value is not None:
            error = math.sqrt(value * (1 - value) / max(int(evaluation["examples"]), 1))
        numbers.append({"name": name, "title": title, "value": value, "error": error, "how": how})
    return numbers


def _autoattack_words(evaluation: Mapping[str, Any]) -> str:
    """Name AutoAttack's attacks, and their program where it is not the authors' package."""
    attacks = evaluation.get("autoattack_attacks") or ()
    if "apgd-difference" in attacks:
        return "for few classes: " + ", ".join(attacks) + _precision_words(evaluation)
    apgd = evaluation.get("autoattack_version") == "apgd"
    words = "its two APGD attacks only" if apgd else "standard: four attacks"
    by_engine = evaluation.get("autoattack_judge") == "engine"
    words = f"{words}, the engine's own" if by_engine else words
    return words + _precision_words(evaluation)


def _precision_words(evaluation: Mapping[str, Any]) -> str:
    """Return the note for attacks in another precision than float32."""
    precision = evaluation.get("precision", "fp32")
    return "" if precision == "fp32" else f"; attacks in {precision}, verified in fp32"


def _pgd_words(evaluation: Mapping[str, Any]) -> str:
    """Write `PGD-50-10` in words."""
    name = evaluation.get("pgd")
    if name is None:
        return "with restarts"
    _, steps, restarts = name.split("-")
    words = f"{steps} steps, {restarts} restart{'s' * (restarts != '1')}"
    return words + _precision_words(evaluation)


def _worst_case(evaluation: Mapping[str, Any]) -> float | None:
    """Return the share that withstood every attack; None if it equals one attack alone."""
    worst = evaluation.get("worst_case_acc")
    if worst in (None, evaluation.get("autoattack_acc"), evaluation.get("pgd_acc")):
        return None
    return float(worst) / 100


def _facts(
    recipe: Recipe,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    best: int | None,
) -> list[tuple[str, str, str]]:
    """Return the facts of the header: (value, name, how it was measured)."""
    seconds = summary.get("train_seconds", rows[-1].get("train_seconds") if rows else None)
    facts = []
    if seconds is not None:
        facts.append((duration(seconds), "training time", "steps and data, evaluation excluded"))
    passes = recipe.passes()
    parts = (
        f"{passes.forward:g} forward, {passes.input_grad:g} input, "
        f"{passes.weight_grad:g} weight gradient"
    )
    facts.append((str(passes.total), "passes a step", parts))
    if rows and "images_per_second" in rows[-1]:
        rate = sum(r["images_per_second"] for r in rows) / len(rows)
        facts.append((f"{rate:,.0f}", "images a second", "mean over the epochs"))
    if best is not None:
        facts.append(
            (f"{best} of {recipe.optim.epochs}", "best epoch", "by validation PGD accuracy")
        )
    return facts


def _cascade(evaluation: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the accuracy in percent without attack and after each of AutoAttack's attacks."""
    after = evaluation.get("after_each_attack") or {}
    if not after:
        return []
    names = {
        "apgd-ce": "APGD, cross-entropy",
        "apgd-t": "APGD, targeted",
        "fab-t": "FAB, targeted",
        "apgd-difference": "APGD, logit difference",
    }
    stages = [("no attack", float(evaluation["clean_acc"]))]
    stages += [(f"+ {names.get(k, k.capitalize())}", float(v)) for k, v in after.items()]
    return stages


def _first_fields(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the fields that readers look for first."""
    attack, optim, objective = recipe.attack, recipe.optim, recipe.objective
    start = "its last adversary (memory)" if attack.start == "memory" else "a random point"
    alpha = as_written(attack.step_size(recipe.threat.eps))
    fields = [
        ("Data", f"{recipe.data.name}{_augmentation(recipe)}"),
        ("Network", recipe.model.name),
        ("Threat", f"{recipe.threat.norm}, eps {as_written(recipe.threat.eps)}"),
        ("Attack in training", f"{attack.steps} steps of {alpha}, from {start}"),
        ("Objective", objective.name),
    ]
    for name, symbol in (("local_weight", "λ"), ("global_weight", "μ"), ("rho", "ρ")):
        if hasattr(objective, name):
            fields.append(
                (
                    f"{name.replace('_', ' ').capitalize()} {symbol}",
                    _shown(getattr(objective, name)),
                )
            )
    if share := _balls_share(objective):
        fields.append(("Local balls", share))
    average = f", averaged weights ({optim.ema:g})" if optim.ema else ""
    fields += [
        ("Optimiser", f"{optim.name}, {recipe.schedule.name} to {optim.lr:g}{average}"),
        ("Length", f"{optim.epochs} epochs, batches of {optim.batch_size}"),
        ("Seed", str(recipe.seed)),
    ]
    return fields


def _augmentation(recipe: Recipe) -> str:
    done = [f"crops after padding by {recipe.data.pad}"] if recipe.data.pad else []
    done += ["mirrored"] if recipe.data.flip else []
    return f" ({', '.join(done)})" if done else ""


def _all_fields(recipe: Recipe) -> list[dict[str, Any]]:
    """Return every field: name, value, whether it differs from the default, description."""
    fields = []
    for name, _, default, description in recipes.options(type(recipe.objective)):
        value: Any = recipe
        for part in name.split("."):
            value = getattr(value, part)
        fields.append(
            {
                "name": name,
                "value": _shown(value),
                "changed": value != default,
                "description": description,
            }
        )
    return fields


def _shown(value: Any) -> str:
    if value is None:
        return "left out"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(_shown(v) for v in value) if isinstance(value, tuple) else str(value)
