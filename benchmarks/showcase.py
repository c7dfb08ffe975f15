"""Show measured steps and accuracies beside `engine plan`'s prediction: `make gpu-showcase`.

    python -m engine.benchmarks.showcase RUNS

`engine compare benchmarks/studies/showcase.toml --out RUNS` makes RUNS. It keeps every row as it
comes, and draws RUNS/compare.png. After a stop, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import files, recipes
from engine.errors import EngineError
from engine.performance import plan

_HEAD = (
    "method", "passes", "ms a step", "predicted", "images/s", "training minutes",
    "clean %", "PGD %", "AutoAttack %",
)  # fmt: skip


def predictable(gpu: str | None) -> str | None:
    """Return `engine plan`'s name of a device: "h100" for "NVIDIA H100 80GB HBM3", or None."""
    words = (gpu or "").lower().replace("-", " ").split()
    return next((name for name in plan.GPUS if name in words), None)


def rows(kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each method of a compare.json: measured and predicted step, accuracies."""
    gpu = predictable(kept["environment"].get("gpu"))
    table_rows = []
    for row in kept["rows"]:
        name = row["method"]
        recipe = recipes.parse(tomllib.loads(kept["recipes"][name]))
        measured = kept["steps"][name]["p50_ms"]
        table_rows.append(
            {
                "method": name,
                "passes": row["passes_per_step"],
                "step_ms": measured,
                "predicted_ms": plan.predicted(recipe, gpu) if gpu else None,
                "images_per_second": 1e3 * recipe.optim.batch_size / measured,
                "minutes": row["train_seconds_mean"] / 60,
                **{score: row[f"{score}_mean"] for score in ("clean", "pgd", "autoattack")},
            }
        )
    return table_rows


def table(table_rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [_HEAD, ("---",) * len(_HEAD)]
    for row in table_rows:
        shares = (row["clean"], row["pgd"], row["autoattack"])
        lines.append(
            (
                row["method"],
                text(row["passes"], "g"),
                text(row["step_ms"], ".2f"),
                text(row["predicted_ms"], ".2f"),
                text(row["images_per_second"], ",.0f"),
                text(row["minutes"], ".1f"),
                *(text(None if share is None else 100 * share, ".1f") for share in shares),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table and keep it as RUNS/showcase.md."""
    parser = argparse.ArgumentParser(description="a comparison beside the plan")
    parser.add_argument("runs", type=Path)
    path = parser.parse_args(argv).runs / "compare.json"
    try:
        kept = json.loads(path.read_text())
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}: run engine compare first") from None
    gpu, torch = kept["environment"].get("gpu"), kept["environment"].get("torch")
    text = f"{kept['about']}. On {gpu or 'a CPU'}, PyTorch {torch}.\n\n{table(rows(kept))}\n"
    files.write_text(path.with_name("showcase.md"), text)
    print(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EngineError as mistake:
        print(f"engine: {mistake}", file=sys.stderr)
        sys.exit(2)
