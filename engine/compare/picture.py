"""Draw robust accuracy over training time and over passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    LogLocator,
    NullFormatter,
    PercentFormatter,
)

from .. import pictures
from ..pictures import LINE, MARKERS, MUTED, NUMBERS, SERIES
from .scores import robust


def draw(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw robust accuracy over training time and over passes, and save the picture."""
    with pictures.style():
        figure, (over_time, over_passes) = pictures.panels(2, width=6.0, height=4.6)
        draw_curves(over_time, comparison["rows"], comparison["points"], passes=False)
        draw_curves(over_passes, comparison["rows"], comparison["points"], passes=True)
        pictures.save_png(figure, path)


_FRONT: Any = {
    "color": MUTED,
    "linewidth": 0.9,
    "linestyle": ":",
    "zorder": 1,
    "label": "Pareto front",
}


def draw_curves(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    *,
    passes: bool,
) -> None:
    """Draw robust accuracy over the cost of training.

    A line runs through each method's means; each seed is a dot.

    Args:
        rows, points: as `engine compare` writes them.
        passes: the cost is network passes of one image over all steps; otherwise it is training
            seconds.
    """

    def cost(entry: Mapping[str, Any], steps: int) -> float:
        return float(entry["passes_per_step"] * steps) if passes else float(entry["seconds"])

    methods = list(dict.fromkeys(row["method"] for row in rows))
    front, means, runs = [], {}, {}
    for number, method in enumerate(methods):
        colour = SERIES[number % len(SERIES)]
        marker = MARKERS[number // len(SERIES) % len(MARKERS)]
        curve = []
        for row in rows:
            if row["method"] != method:
                continue
            seeds = [p for p in points if p["method"] == method and p["epochs"] == row["epochs"]]
            places = [cost(p, p["steps"]) for p in seeds]
            heights = [robust(p, "") or 0.0 for p in seeds]
            ax.plot(places, heights, marker, color=colour, alpha=0.35, markersize=3.5)
            curve.append((sum(places) / len(places), sum(heights) / len(heights)))
            runs[method] = heights
            if row["pareto"]:
                front.append(curve[-1])
        means[method] = curve[-1]
        # Colours repeat after a while; then the marker alone is easy to miss.
        dashes = "-" if number < len(SERIES) else "--"
        means_line = zip(*sorted(curve), strict=True)
        ax.plot(*means_line, marker=marker, color=colour, linestyle=dashes, label=method)
    if not passes:
        # This front is of training time; the order by passes may differ.
        ax.step(*zip(*sorted(front), strict=True), where="post", **_FRONT)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(NUMBERS)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("steps x passes a step" if passes else "training time [s]")
    ax.set_title("Robust accuracy against " + ("passes" if passes else "training time"))
    if len(rows) == len(methods) > len(SERIES):
        _name_points(ax, means, runs)
    elif not passes:
        ax.legend()


def _name_points(
    ax: Axes, points: Mapping[str, tuple[float, float]], runs: Mapping[str, Sequence[float]]
) -> None:
    """Write each name beside its point, and move names apart that would touch.

    Points far below all others are left out and named in a corner; they would press the rest
    together.
    """
    low, high = np.quantile([y for _, y in points.values()], (0.25, 0.75))
    floor = low - 1.5 * (high - low)
    shown = {name: at for name, at in points.items() if at[1] >= floor}
    heights = [y for _, y in shown.values()]
    margin = 0.08 * (max(heights) - min(heights)) + 0.005
    ax.set_ylim(min(heights) - margin, max(heights) + margin)
    ax.margins(x=0.16)
    ax.get_xlim()  # reading the limits computes them
    below = [f"{name} {y:.1%}" for name, (_, y) in points.items() if y < floor]
    bottom = ax.get_ylim()[0]
    below += [f"a run of {n} {y:.1%}" for n in shown for y in runs[n] if y < bottom]
    if below:
        ax.text(
            0.02,
            0.02,
            f"below: {', '.join(below)}",
            transform=ax.transAxes,
            fontsize=7,
            color=MUTED,
        )
    figure = ax.get_figure()
    assert figure is not None
    to_points = 72.0 / figure.dpi
    placed: list[tuple[float, float]] = []
    for name, at in sorted(shown.items(), key=lambda item: -item[1][1]):
        x, y = (float(v) * to_points for v in ax.transData.transform(at))
        taken = sorted((other for at_x, other in placed if abs(at_x - x) < 62.0), reverse=True)
        height = y
        for other in taken:
            if abs(other - height) < 8.5:
                height = other - 8.5
        placed.append((x, height))
        ax.annotate(
            name,
            at,
            xytext=(7.0, height - y - 2.5),
            textcoords="offset points",
            fontsize=7,
            color=MUTED,
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.7, "shrinkA": 0.0},
        )
