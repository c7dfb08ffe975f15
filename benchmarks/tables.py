"""The tables in README and docs, from the stored results: `python -m engine.benchmarks.tables`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def comparison(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of `engine compare` rows; time relative to the slowest."""
    slowest = max(row["train_seconds_mean"] for row in rows)
    lines = [
        "| recipe | objective | start | k | passes | clean % | robust % (PGD) | robust % (APGD) | training s | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        time = row["train_seconds_mean"]
        cells = [
            f"`{row['recipe']}`",
            row["objective"],
            row["start"],
            row["k"],
            row["passes_per_step"],
            _percent(row["clean_mean"]),
            _percent(row["pgd_mean"], row["pgd_sd"]),
            _percent(row["autoattack_mean"], row["autoattack_sd"]),
            f"{time:.0f}",
            f"{time / slowest:.0%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def stored() -> dict[str, str]:
    """Every stored comparison as a table, by file name."""
    return {
        path.stem: comparison(json.loads(path.read_text())["rows"])
        for path in sorted(RESULTS.glob("compare-*.json"))
    }


def _percent(mean: float | None, deviation: float | None = None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


if __name__ == "__main__":
    for name, table in stored().items():
        print(f"{name}\n\n{table}\n")
