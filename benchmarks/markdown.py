"""Write Markdown tables."""

from __future__ import annotations


def header(*titles: str) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
