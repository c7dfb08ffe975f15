"""The closing table of a run: accuracies with errors, the threat, the files, the next command."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..text import duration, printable

if TYPE_CHECKING:
    from ..recipes import Recipe


def show(row: Mapping[str, Any], recipe: Recipe, as_json: bool) -> None:
    """Print a run's closing row on stdout: one JSON object, or a table for 80 columns.

    Args:
        row: as in summary.json, or as `engine eval` makes it.
    """
    if as_json:
        print(json.dumps(row))
        return
    for line in _lines(row, recipe):
        print(printable(line))


def _lines(row: Mapping[str, Any], recipe: Recipe) -> list[str]:
    lines = ["", *_accuracies(row, recipe)]
    facts = {
        "training": _training(row),
        "rolled back": ", ".join(f"epoch {n}" for n in row.get("rolled_back") or ()),
        "memory": f"{row['peak_memory_mb']:,} MB at most" if row.get("peak_memory_mb") else "",
        "run folder": row["run_dir"],
        "report": _report_of(row["run_dir"]),
        "next": _next(row),
    }
    # Paths and commands are for copying: a terminal wraps a long line, and the copy stays whole.
    return [*lines, *(f"{name:12} {text}" for name, text in facts.items() if text)]


def _accuracies(row: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Return the accuracy table, and the sentence that names the threat."""
    from ..threat import as_written

    if row.get("clean") is None:
        return []

    evaluation, n = recipe.evaluation, row["examples"]
    attacks = row.get("autoattack_attacks") or ()
    restarts = f"{evaluation.pgd_restarts} restart{'s' * (evaluation.pgd_restarts != 1)}"
    names = {
        "clean": "no attack (clean)",
        "pgd": f"PGD, {evaluation.pgd_steps} steps, {restarts}",
        "autoattack": f"AutoAttack ({len(attacks)} attacks)" if attacks else "AutoAttack",
        "worst_case": "worst case of all attacks",
    }
    lines = [f"{'accuracy of ' + recipe.name + ' under':50}  correct   std. error"]
    for key, name in names.items():
        share = row.get(key)
        if share is None:
            continue
        error = math.sqrt(share * (1 - share) / n)
        lines.append(f"  {name:48}  {100 * share:5.1f} %    ± {100 * error:.1f} %")
    moves = "each pixel" if recipe.threat.norm == "Linf" else "the image"
    return [
        *lines,
        f"{n:,} test images, pixels in [0, 1]. An attack may move {moves} by "
        f"{as_written(recipe.threat.eps)} ({recipe.threat.norm}).",
        *([f"AutoAttack: {', '.join(attacks)}."] if attacks else []),
        *(
            [f"Attacks in {evaluation.precision}; adversaries verified in fp32."]
            if evaluation.precision != "fp32"
            else []
        ),
        "",
    ]


def _training(row: Mapping[str, Any]) -> str:
    if "train_seconds" not in row:
        return ""
    best = f"; best epoch by validation: {row['best_epoch']}" if row.get("best_epoch") else ""
    return f"{duration(row['train_seconds'])}, {row['passes_per_step']} network passes a step{best}"


def _next(row: Mapping[str, Any]) -> str:
    """The command to run next."""
    command = "eval" if row.get("clean") is None else "export"
    return shlex.join(["engine", command, row["run_dir"], *plugins.words()])


def _report_of(run: str) -> str:
    path = Path(run) / "report.html"
    return str(path) if path.exists() else ""
