"""The project's pictures: one style for all, and what a report draws with it.

Everything here draws on matplotlib's objects (no pyplot, no global figure). Wrap drawing and saving in
`style()`. A figure saved by `save_png` is light; one turned into text by `svg` takes its colours from
the CSS variables of the page it stands in (`css_variables`), so it follows light and dark.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from . import files
from .threat import as_written

# (light, dark). Okabe and Ito's hues, which the common colour blindnesses keep apart, made darker
# or lighter until they stand out from either background.
COLOURS = {
    "ink": ("#1f2328", "#e7e9ec"),
    "muted": ("#5b6570", "#a3adb8"),
    "line": ("#dfe3e8", "#353c44"),
    "panel": ("#ffffff", "#1b1f24"),
    "page": ("#f6f7f8", "#121518"),
    "blue": ("#0072b2", "#5ab0ea"),
    "orange": ("#d55e00", "#f5924e"),
    "green": ("#00805d", "#3fc79c"),
    "purple": ("#a3478a", "#d996c4"),
}
INK, MUTED, LINE, PANEL, _, BLUE, ORANGE, GREEN, PURPLE = (light for light, _ in COLOURS.values())

# Blue takes light away, orange adds it.
DIVERGING = LinearSegmentedColormap.from_list("engine", ["#0b4f8a", "#f4f4f2", "#b84a00"])
SEQUENTIAL = "viridis"
# Stays white on the colour map when the page turns dark.
_WHITE = "#fefefe"

# Any: the stubs want every key as a literal.
_RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    # The same drawing gives the same file.
    "svg.hashsalt": "engine",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The project's matplotlib settings in the block, the user's own afterwards."""
    with matplotlib.rc_context(_RC):
        yield


def panels(
    count: int = 1, *, down: int = 1, width: float = 4.6, height: float = 3.5
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in `down` rows, each `width` x `height` inches."""
    across = -(-count // down)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure on a light ground, atomically."""
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=PANEL)


def png_of(pixels: np.ndarray) -> bytes:
    """A PNG of an array [H, W, 3] in [0, 1], one pixel an entry."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.clip(pixels, 0.0, 1.0), format="png")
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure as an inline <svg>, its colours as CSS variables, its ids starting with `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<= )id="|(?<=href="#)|(?<=url\(#)', lambda m: f"{m[0]}{name}-", text)
    # The page sets the width; the viewBox keeps the shape.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    return text


def css_variables(dark: bool = False) -> str:
    """The colours as CSS declarations, for the page that holds an `svg`."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())


# ---- curves ----------------------------------------------------------------------------------

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
    """Training and validation accuracy of a log (one row an epoch); `best` is the chosen epoch."""
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
    """The loss and what each term adds to it; `weights` by term, 1 where absent."""
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


_SERIES = (BLUE, ORANGE, GREEN, PURPLE, INK, MUTED)
_MARKERS = "osD^vP*X"
_IDEAL: Any = {"color": MUTED, "linewidth": 0.8, "alpha": 0.7, "zorder": 1}
_FRONT: Any = {
    "color": MUTED,
    "linewidth": 0.9,
    "linestyle": ":",
    "zorder": 1,
    "label": "Pareto front",
}
_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.10g}")


def draw_curves(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    *,
    passes: bool,
) -> None:
    """Robust accuracy over what training cost: a line through each method's means, a dot for each seed.

    Args:
        rows, points: as `engine compare` writes them.
        passes: cost in network passes of one image, all steps together; else in training seconds.
    """
    from .compare import robust

    def cost(entry: Mapping[str, Any], steps: int) -> float:
        return float(entry["passes_per_step"] * steps) if passes else float(entry["seconds"])

    methods = list(dict.fromkeys(row["method"] for row in rows))
    front, means, runs = [], {}, {}
    for number, method in enumerate(methods):
        colour = _SERIES[number % len(_SERIES)]
        marker = _MARKERS[number // len(_SERIES) % len(_MARKERS)]
        curve = []
        for row in rows:
            if row["method"] != method:
                continue
            mine = [p for p in points if p["method"] == method and p["epochs"] == row["epochs"]]
            places = [cost(p, p["steps"]) for p in mine]
            heights = [robust(p, "") or 0.0 for p in mine]
            ax.plot(places, heights, marker, color=colour, alpha=0.35, markersize=3.5)
            curve.append((sum(places) / len(places), sum(heights) / len(heights)))
            runs[method] = heights
            if row["pareto"]:
                front.append(curve[-1])
        means[method] = curve[-1]
        # Where the colours come round again the marker alone would be easy to miss.
        dashes = "-" if number < len(_SERIES) else "--"
        means_line = zip(*sorted(curve), strict=True)
        ax.plot(*means_line, marker=marker, color=colour, linestyle=dashes, label=method)
    if not passes:
        # Of training time: what is ahead there need not be in passes.
        ax.step(*zip(*sorted(front), strict=True), where="post", **_FRONT)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(_NUMBERS)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("steps x passes a step" if passes else "training time [s]")
    ax.set_title("Robust accuracy against " + ("passes" if passes else "training time"))
    if len(rows) == len(methods) > len(_SERIES):
        _name_points(ax, means, runs)
    elif not passes:
        ax.legend()


def _name_points(
    ax: Axes, points: Mapping[str, tuple[float, float]], runs: Mapping[str, Sequence[float]]
) -> None:
    """Each name beside its point: a key to so many would be a riddle. Names that would touch move apart.

    What lies far below all others, method or single run, would press them together: it is named in a corner,
    and left out.
    """
    low, high = np.quantile([y for _, y in points.values()], (0.25, 0.75))
    floor = low - 1.5 * (high - low)
    shown = {name: at for name, at in points.items() if at[1] >= floor}
    heights = [y for _, y in shown.values()]
    margin = 0.08 * (max(heights) - min(heights)) + 0.005
    ax.set_ylim(min(heights) - margin, max(heights) + margin)
    ax.margins(x=0.16)
    ax.get_xlim()  # the limits are found when they are asked for
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
        taken = sorted((other for where, other in placed if abs(where - x) < 62.0), reverse=True)
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


def draw_scaling(ax: Axes, rows: Sequence[Mapping[str, Any]], base: int) -> None:
    """A step's milliseconds along one axis: measured solid, predicted dashed; grey in proportion to the arithmetic.

    Args:
        rows: of that axis, as `engine bench scaling` gives them.
        base: the value at which a grey line meets its curve.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for where, method in dict.fromkeys((row["where"], row["method"]) for row in rows):
        line = _along_axis(rows, where, method)
        number, predicted = methods.index(method), line[0]["p20_ms"] is None
        values, times = ([row[key] for row in line] for key in ("value", "p50_ms"))
        anchor = next(row for row in line if row["value"] == base)
        per_flop = anchor["p50_ms"] / anchor["gflops"]
        ax.plot(values, [per_flop * row["gflops"] for row in line], **_IDEAL)
        if not predicted:
            low, high = ([row[key] for row in line] for key in ("p20_ms", "p80_ms"))
            ax.fill_between(values, low, high, color=_SERIES[number], alpha=0.18, linewidth=0)
        ax.plot(
            values,
            times,
            marker=_MARKERS[number],
            color=_SERIES[number],
            linestyle=(0, (4, 1.8)) if predicted else "-",
            markerfacecolor=PANEL if predicted else _SERIES[number],
            label=f"{method}, {where.removesuffix(' (predicted)')}: "
            + ("predicted, never run" if predicted else "measured"),
        )
    ax.plot([], **_IDEAL, label="in proportion to the FLOPs")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(_NUMBERS)
    ax.yaxis.set_minor_locator(NullLocator())
    ticks = sorted({row["value"] for row in rows})
    ax.set_xticks(ticks, [f"{value:,}" for value in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("ms a step")


def draw_throughput(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Images a second by processes; grey in proportion to them.

    Args:
        rows: as `engine bench scaling` gives them for processes, one process among them.
    """
    ticks = sorted({row["value"] for row in rows})
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        line = _along_axis(rows, rows[0]["where"], method)
        values, rates = ([row[key] for row in line] for key in ("value", "images_per_s"))
        ax.plot([0, ticks[-1]], [0, ticks[-1] * rates[0] / values[0]], **_IDEAL)
        ax.plot(values, rates, marker=_MARKERS[number], color=_SERIES[number])
    ax.set_xticks(ticks)
    ax.set_xlim(0, ticks[-1] + 0.3)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(_NUMBERS)
    ax.set_ylabel("images a second")


def _along_axis(
    rows: Sequence[Mapping[str, Any]], where: str, method: str
) -> list[Mapping[str, Any]]:
    mine = [row for row in rows if (row["where"], row["method"]) == (where, method)]
    return sorted(mine, key=lambda row: row["value"])


def draw_phases(ax: Axes, shares: Mapping[str, float], step_ms: float) -> None:
    """A bar for each phase of a step: its share of the time [0..1], and milliseconds."""
    names = list(shares)[::-1]
    ax.barh(names, [shares[name] for name in names], color=_SERIES[0])
    for place, name in enumerate(names):
        text = f"{shares[name]:.1%}, {shares[name] * step_ms:.3g} ms"
        ax.annotate(text, (shares[name], place), (4, 0), textcoords="offset points", va="center")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlim(0, 1.25 * max(shares.values()))
    ax.set_title(f"Where a step of {step_ms:.3g} ms goes")


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
    # A lone point has no line to be seen by.
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
    """Epochs below, the training seconds that they took above, the legend beneath."""
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


# ---- robust accuracy against eps ---------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Robust accuracy against the radius.

    Attributes:
        eps: radii in pixel units, from 0; accuracy: in [0, 1], one a radius.
        examples: test images.
        trained: the radius of training.
    """

    eps: np.ndarray
    accuracy: np.ndarray
    examples: int
    trained: float


def draw_sweep(ax: Axes, sweep: Sweep, others: Mapping[str, float], norm: str) -> None:
    """`others` are accuracies at the training radius, by attack, drawn as points."""
    error = np.sqrt(sweep.accuracy * (1 - sweep.accuracy) / sweep.examples)
    ax.fill_between(
        sweep.eps,
        (sweep.accuracy - error).clip(0, 1),
        (sweep.accuracy + error).clip(0, 1),
        color=BLUE,
        alpha=0.18,
        linewidth=0,
    )
    ax.plot(
        sweep.eps,
        sweep.accuracy,
        "o-",
        color=BLUE,
        clip_on=False,
        label=f"PGD-20, {sweep.examples} images",
    )
    ax.axvline(sweep.trained, color=MUTED, linewidth=1, linestyle=":")
    ax.annotate(
        f"trained at {as_written(sweep.trained)}",
        (sweep.trained, 0.0),
        xytext=(-5, 8),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=9,
    )
    marks = (("D", ORANGE), ("s", GREEN))
    for (label, value), (marker, colour) in zip(others.items(), marks, strict=False):
        ax.plot(
            [sweep.trained],
            [value],
            marker,
            color=colour,
            markersize=7,
            markerfacecolor="none",
            markeredgewidth=1.8,
            label=label,
        )
    ax.set_xlim(0, sweep.eps[-1] * 1.02)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel(f"{norm} radius eps [pixel units]")
    ax.set_title("Robust accuracy against eps")
    ax.legend(loc="upper right")


# ---- loss surface ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """Cross-entropy over a plane through the test images.

    Attributes:
        steps: [S], coordinates of both axes in units of eps.
        loss: [S, S], mean cross-entropy; rows along the random direction, columns along the
            adversary's.
        right: [S, S], share of the images classified right.
        examples: images in the mean.
    """

    steps: np.ndarray
    loss: np.ndarray
    right: np.ndarray
    examples: int

    @property
    def crossed(self) -> bool:
        """Whether half of the images are lost somewhere in the plane, but not everywhere."""
        return bool(self.right.min() < 0.5 < self.right.max())


def draw_relief(figure: Figure, surface: Surface, position: int = 111) -> None:
    """The surface in three dimensions."""
    ax: Any = figure.add_subplot(position, projection="3d", computed_zorder=False)
    s, t = np.meshgrid(surface.steps, surface.steps)
    ax.plot_surface(
        s, t, surface.loss, cmap=SEQUENTIAL, rstride=1, cstride=1, linewidth=0.25, antialiased=True
    )
    ax.view_init(elev=28, azim=-125)
    ax.set_box_aspect((1, 1, 0.62), zoom=0.98)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_pane_color((0, 0, 0, 0))
        axis.line.set_color(MUTED)
        axis._axinfo["grid"].update(color=LINE, linewidth=0.6)
    # At the corner two labels would collide.
    ax.set_xticks([-1, 0, 1])
    ax.set_yticks([-1, 0, 1])
    ax.zaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(pad=0, labelsize=8.5)
    ax.set_xlabel("along the adversary [eps]")
    ax.set_ylabel("at random [eps]")
    ax.set_zlabel("cross-entropy")
    edge = surface.steps[-1]
    ax.set_xlim(-edge, edge)
    ax.set_ylim(-edge, edge)
    # Its own title would be centred.
    ax.text2D(
        0.03,
        0.99,
        "Mean loss around the test images",
        transform=ax.transAxes,
        size=11,
        weight="bold",
    )


def draw_plane(ax: Axes, surface: Surface, norm: str) -> None:
    """The same from above, with the threat ball and the line where half of the images are lost."""
    edge = surface.steps[-1]
    image = ax.imshow(
        surface.loss,
        origin="lower",
        extent=(-edge, edge, -edge, edge),
        cmap=SEQUENTIAL,
        interpolation="bilinear",
    )
    ax.contour(
        surface.steps, surface.steps, surface.loss, 10, colors=_WHITE, linewidths=0.6, alpha=0.55
    )
    if surface.crossed:
        ax.contour(
            surface.steps,
            surface.steps,
            surface.right,
            [0.5],
            colors=_WHITE,
            linewidths=2,
            linestyles="--",
        )
    # |s| + |t| <= 1 keeps s delta + t eps (random signs) inside the Linf ball.
    turn = np.linspace(0, 2 * np.pi, 5 if norm == "Linf" else 121)
    ax.plot(np.cos(turn), np.sin(turn), color=_WHITE, linewidth=1.4)
    for x, label, side in ((0.0, "image", "center"), (1.0, "adversary", "left")):
        ax.plot([x], [0], "o", color=_WHITE, markeredgecolor="#1f2937", markersize=6)
        ax.annotate(
            label,
            (x, 0),
            xytext=(0 if side == "center" else 4, 8),
            textcoords="offset points",
            ha=side,
            color=_WHITE,
            fontsize=9,
            bbox={
                "boxstyle": "round,pad=0.15",
                "facecolor": "#000000",
                "alpha": 0.35,
                "linewidth": 0,
            },
        )
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.xaxis.set_major_locator(MultipleLocator(1))
    ax.yaxis.set_major_locator(MultipleLocator(1))
    ax.set_xlabel("along the adversary [eps]")
    ax.set_ylabel(
        "along random signs [eps]" if norm == "Linf" else "along a random direction [eps]"
    )
    ax.set_title("The same from above")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.86, pad=0.03, aspect=28)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("cross-entropy", color=MUTED)


# ---- test images -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """One picture of an example: pixels [H, W, 3] in [0, 1], and what the network says to it."""

    title: str
    pixels: np.ndarray
    predicted: str | None = None
    confidence: float = 0.0
    right: bool = False

    @property
    def verdict(self) -> str:
        """`✓ Sneaker 98%`, or nothing for a picture that is not classified."""
        if self.predicted is None:
            return ""
        return f"{'✓' if self.right else '✗'} {self.predicted} {self.confidence:.0%}"


@dataclass(frozen=True)
class Example:
    label: str
    tiles: tuple[Tile, ...]


def examples_figure(examples: Sequence[Example]) -> Figure:
    """Two examples a row, each tile with its verdict beneath."""
    wide = len(examples[0].tiles)
    rows = -(-len(examples) // 2)
    figure = Figure(figsize=(1.28 * (2 * wide + 0.3), 1.72 * rows + 0.35))
    grid = figure.add_gridspec(
        rows,
        2 * wide + 1,
        width_ratios=[1] * wide + [0.22] + [1] * wide,
        left=0.035,
        right=0.995,
        top=1 - 0.42 / figure.get_figheight(),
        bottom=0.26 / figure.get_figheight(),
        wspace=0.08,
        hspace=0.34,
    )
    for number, example in enumerate(examples):
        row, half = divmod(number, 2)
        for column, tile in enumerate(example.tiles):
            ax = figure.add_subplot(grid[row, half * (wide + 1) + column])
            ax.imshow(tile.pixels.clip(0, 1), interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.spines[:].set_visible(False)
            if row == 0:
                ax.set_title(tile.title, loc="center", fontsize=9, weight="normal", pad=6)
            if column == 0:
                ax.set_ylabel(example.label, color=INK, fontsize=8.5)
            if tile.predicted is not None:
                colour = GREEN if tile.right else ORANGE
                ax.set_xlabel(tile.verdict, color=colour, fontsize=8, labelpad=4)
    return figure
