"""Draw the scaling picture: a panel for each axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import (
    NullLocator,
)

from engine import pictures
from engine.pictures import MARKERS, MUTED, NUMBERS, PANEL, SERIES

from .scaling import PROCESSES, Point

_IDEAL: Any = {"color": MUTED, "linewidth": 0.8, "alpha": 0.7, "zorder": 1}
_LABELS = {
    "batch": ("Batch", "images"),
    "size": ("Image size", "side [pixels]"),
    "k": ("Attack steps", "k"),
    "classes": ("Classes", "logits"),
    "width": ("Width", "times the network's own"),
    PROCESSES: ("Processes of one thread", "processes that share a batch"),
}


def draw(stored: Mapping[str, Any], path: Path) -> None:
    """Draw the rows of `engine bench scaling`, measured and predicted, and save the picture."""
    rows = stored["rows"]
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    times = [row[key] for row in rows for key in ("p20_ms", "p50_ms", "p80_ms") if row[key]]
    with pictures.style():
        figure, panels = pictures.panels(len(axes), down=2, width=4.0, height=3.3)
        for ax, axis in zip(panels, axes, strict=True):
            rows_of_axis = [row for row in rows if row["axis"] == axis]
            if axis == PROCESSES:
                draw_throughput(ax, rows_of_axis)
            else:
                draw_scaling(ax, rows_of_axis, getattr(Point(), axis))
                # One height for all panels: the base setting lies at the same height everywhere.
                ax.set_ylim(0.7 * min(times), 1.4 * max(times))
            ax.set_title(_LABELS[axis][0])
            ax.set_xlabel(_LABELS[axis][1])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        pictures.save_png(figure, path)


def draw_scaling(ax: Axes, rows: Sequence[Mapping[str, Any]], base: int) -> None:
    """Draw a step's milliseconds along one axis.

    Measured lines are solid, predicted ones dashed; the grey line is proportional to the FLOPs.

    Args:
        rows: of that axis, as `engine bench scaling` gives them.
        base: the value at which a grey line meets its curve.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for device, method in dict.fromkeys((row["where"], row["method"]) for row in rows):
        line = _along_axis(rows, device, method)
        number, predicted = methods.index(method), line[0]["p20_ms"] is None
        values, times = ([row[key] for row in line] for key in ("value", "p50_ms"))
        anchor = next(row for row in line if row["value"] == base)
        per_flop = anchor["p50_ms"] / anchor["gflops"]
        ax.plot(values, [per_flop * row["gflops"] for row in line], **_IDEAL)
        if not predicted:
            low, high = ([row[key] for row in line] for key in ("p20_ms", "p80_ms"))
            ax.fill_between(values, low, high, color=SERIES[number], alpha=0.18, linewidth=0)
        ax.plot(
            values,
            times,
            marker=MARKERS[number],
            color=SERIES[number],
            linestyle=(0, (4, 1.8)) if predicted else "-",
            markerfacecolor=PANEL if predicted else SERIES[number],
            label=f"{method}, {device.removesuffix(' (predicted)')}: "
            + ("predicted, never run" if predicted else "measured"),
        )
    ax.plot([], **_IDEAL, label="in proportion to the FLOPs")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(NUMBERS)
    ax.yaxis.set_minor_locator(NullLocator())
    ticks = sorted({row["value"] for row in rows})
    ax.set_xticks(ticks, [f"{value:,}" for value in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("ms a step")


def draw_throughput(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw images a second by processes; the grey line is proportional to the processes.

    Args:
        rows: as `engine bench scaling` gives them for processes; one row has one process.
    """
    ticks = sorted({row["value"] for row in rows})
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        line = _along_axis(rows, rows[0]["where"], method)
        values, rates = ([row[key] for row in line] for key in ("value", "images_per_s"))
        ax.plot([0, ticks[-1]], [0, ticks[-1] * rates[0] / values[0]], **_IDEAL)
        ax.plot(values, rates, marker=MARKERS[number], color=SERIES[number])
    ax.set_xticks(ticks)
    ax.set_xlim(0, ticks[-1] + 0.3)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(NUMBERS)
    ax.set_ylabel("images a second")


def _along_axis(
    rows: Sequence[Mapping[str, Any]], device: str, method: str
) -> list[Mapping[str, Any]]:
    chosen = [row for row in rows if (row["where"], row["method"]) == (device, method)]
    return sorted(chosen, key=lambda row: row["value"])
