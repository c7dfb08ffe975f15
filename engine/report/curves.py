"""Draw the accuracy and loss curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    MaxNLocator,
    PercentFormatter,
)

from ..pictures import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE

_ACCURACIES = (
    ("adv_accuracy", "training, adversaries", PURPLE, (0, (1, 1.2)), "^"),
    ("val_clean", "validation, clean", BLUE, "-", "o"),
    ("val_pgd", "validation, PGD", ORANGE, (0, (5, 1.5)), "s"),
)
_TERMS = (
    ("ce", "cross-entropy", BLUE, (0, (5, 1.5)), "o"),
    ("local", "local", ORANGE, (0, (1, 1.2)), "s"),
    ("global", "global", GREEN, (0, (4, 1.5, 1, 1.5)), "^"),
)


def draw_accuracy(ax: Axes, rows: Sequence[Mapping[str, Any]], best: int | None) -> None:
    """Draw the accuracies of a log (one row an epoch); `best` is the kept epoch."""
    for key, label, colour, dashes, marker in _ACCURACIES:
        _line(ax, rows, key, label, colour, dashes, marker)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_title("Accuracy")
    _mark_best(ax, rows, best)
    _over_epochs(ax, rows)


def draw_losses(
    ax: Axes, rows: Sequence[Mapping[str, Any]], best: int | None, weights: Mapping[str, float]
) -> None:
    """Draw the loss and each term's part of it; `weights` by term, 1 where absent."""
    _line(ax, rows, "loss", "loss", INK, "-", "")
    for key, label, colour, dashes, marker in _TERMS:
        weight = weights.get(key, 1.0)
        shown = label if weight == 1.0 else f"{weight:g} × {label}"
        _line(ax, rows, key, shown, colour, dashes, marker, scale=weight)
    ax.set_ylim(bottom=0)
    ax.set_title("Loss, and its terms")
    _mark_best(ax, rows, None)
    if best is not None:
        ax.axvline(best, color=MUTED, linewidth=1, linestyle=":", zorder=1)
    _over_epochs(ax, rows)


def _line(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
    colour: str,
    dashes: Any,
    marker: str,
    scale: float = 1.0,
) -> None:
    points = [(r["epoch"], scale * r[key]) for r in rows if key in r]
    if not points:
        return
    few = len(points) <= 30
    x, y = zip(*points, strict=True)
    # A single point has no line; it needs a marker.
    mark = (marker or "D") if len(points) == 1 else marker if few else ""
    ax.plot(x, y, color=colour, linestyle=dashes, marker=mark, label=label, clip_on=False)


def _mark_best(ax: Axes, rows: Sequence[Mapping[str, Any]], best: int | None) -> None:
    chosen = next((r for r in rows if r["epoch"] == best and "val_pgd" in r), None)
    if chosen is None:
        return
    ax.axvline(chosen["epoch"], color=MUTED, linewidth=1, linestyle=":", zorder=1)
    ax.plot(
        [chosen["epoch"]],
        [chosen["val_pgd"]],
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=ORANGE,
        markeredgewidth=1.6,
        label=f"best: epoch {chosen['epoch']}",
        linestyle="none",
    )


def _over_epochs(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put epochs on the lower axis, training seconds on the upper axis, the legend beneath."""
    last = rows[-1]["epoch"]
    ax.set_xlim(0, last + max(0.02 * last, 0.1))
    ax.xaxis.set_major_locator(MaxNLocator(min(last, 8), integer=True))
    ax.set_xlabel("epoch")
    epochs = [0, *(r["epoch"] for r in rows)]
    seconds = [0.0, *(r.get("train_seconds", 0.0) for r in rows)]
    if seconds[-1] > 0:
        unit, size = next(
            ((u, s) for u, s in (("h", 3600), ("min", 60)) if seconds[-1] >= 3 * s), ("s", 1)
        )
        ticks = MaxNLocator(5).tick_values(0, seconds[-1] / size)
        ticks = [t for t in ticks if 0 <= t <= seconds[-1] / size]
        top = ax.twiny()
        top.set_xlim(ax.get_xlim())
        top.set_xticks(
            np.interp(np.array(ticks) * size, seconds, epochs), [f"{t:g}" for t in ticks]
        )
        top.set_xlabel(f"training time [{unit}]", labelpad=6)
        top.grid(False)
        top.spines[:].set_visible(False)
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, columnspacing=1.4, handlelength=2.4
    )
