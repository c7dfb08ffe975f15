"""Draw robust accuracy against eps, the loss surface, and example images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    MaxNLocator,
    MultipleLocator,
    PercentFormatter,
)

from ..pictures import BLUE, GREEN, INK, LINE, MUTED, ORANGE, SEQUENTIAL, WHITE
from ..threat import as_written


@dataclass(frozen=True)
class Sweep:
    """Hold robust accuracy against the radius.

    Attributes:
        eps: radii in pixel units, from 0; accuracy: in [0, 1], one for each radius.
        examples: number of test images.
        trained: the radius of training.
    """

    eps: np.ndarray
    accuracy: np.ndarray
    examples: int
    trained: float


def draw_sweep(ax: Axes, sweep: Sweep, others: Mapping[str, float], norm: str) -> None:
    """Draw a sweep, and points for `others`: accuracies at the training radius by attack."""
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


@dataclass(frozen=True)
class Surface:
    """Hold the cross-entropy over a plane through the test images.

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
        """Tell whether half of the images are lost in some part of the plane, not in all."""
        return bool(self.right.min() < 0.5 < self.right.max())


def draw_relief(figure: Figure, surface: Surface, position: int = 111) -> None:
    """Draw the surface in three dimensions."""
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
    # Two labels would overlap at the corner.
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
    # The axis centres its title; this text stands at the left.
    ax.text2D(
        0.03,
        0.99,
        "Mean loss around the test images",
        transform=ax.transAxes,
        size=11,
        weight="bold",
    )


def draw_plane(ax: Axes, surface: Surface, norm: str) -> None:
    """Draw the surface from above, with the threat ball and the line of half the images lost."""
    edge = surface.steps[-1]
    image = ax.imshow(
        surface.loss,
        origin="lower",
        extent=(-edge, edge, -edge, edge),
        cmap=SEQUENTIAL,
        interpolation="bilinear",
    )
    ax.contour(
        surface.steps, surface.steps, surface.loss, 10, colors=WHITE, linewidths=0.6, alpha=0.55
    )
    if surface.crossed:
        ax.contour(
            surface.steps,
            surface.steps,
            surface.right,
            [0.5],
            colors=WHITE,
            linewidths=2,
            linestyles="--",
        )
    # |s| + |t| <= 1 keeps s delta + t eps (random signs) inside the Linf ball.
    turn = np.linspace(0, 2 * np.pi, 5 if norm == "Linf" else 121)
    ax.plot(np.cos(turn), np.sin(turn), color=WHITE, linewidth=1.4)
    for x, label, side in ((0.0, "image", "center"), (1.0, "adversary", "left")):
        ax.plot([x], [0], "o", color=WHITE, markeredgecolor="#1f2937", markersize=6)
        ax.annotate(
            label,
            (x, 0),
            xytext=(0 if side == "center" else 4, 8),
            textcoords="offset points",
            ha=side,
            color=WHITE,
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


@dataclass(frozen=True)
class Tile:
    """Hold one picture of an example, [H, W, 3] in [0, 1], and the network's answer."""

    title: str
    pixels: np.ndarray
    predicted: str | None = None
    confidence: float = 0.0
    right: bool = False

    @property
    def verdict(self) -> str:
        """`✓ Sneaker 98%`, or "" for a picture that is not classified."""
        if self.predicted is None:
            return ""
        return f"{'✓' if self.right else '✗'} {self.predicted} {self.confidence:.0%}"


@dataclass(frozen=True)
class Example:
    label: str
    tiles: tuple[Tile, ...]


def examples_figure(examples: Sequence[Example]) -> Figure:
    """Draw two examples a row, each tile with its verdict beneath."""
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
