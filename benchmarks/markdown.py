"""Write the parts of Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def header(*titles: str) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]


def growth(ends: Sequence[float]) -> list[str]:
    """Return the first and the last of two times and their ratio; dashes for no times."""
    if not ends:
        return ["-", "-"]
    first, last = ends
    # Round to three digits first: "g" alone would write powers of ten.
    return [" to ".join(f"{float(f'{end:.3g}'):,g}" for end in ends), f"{last / first:.1f}x"]


def each(rows: list[dict[str, Any]], shown: Callable[[dict[str, Any]], str]) -> str:
    """Return the text of every row, or their common text."""
    words = [shown(row) for row in rows]
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x"
