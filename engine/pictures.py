"""Define the style of all pictures, and save figures as PNG and SVG."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
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
)

from . import files

# (light, dark). The hues are Okabe and Ito's, which colour-blind readers can tell apart, made
# darker or lighter until they stand out from either background.
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
# Blue: the perturbation removes light; orange: it adds light.
DIVERGING = LinearSegmentedColormap.from_list("engine", ["#0b4f8a", "#f4f4f2", "#b84a00"])
SEQUENTIAL = "viridis"
# White on the colour map, on light and dark pages alike.
WHITE = "#fefefe"
# Any, because the stubs want every key as a literal.
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
    # A fixed salt makes equal drawings equal files.
    "svg.hashsalt": "engine",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the project's matplotlib settings in the block; restore the user's after."""
    with matplotlib.rc_context(_RC):
        yield


def panels(
    count: int = 1, *, down: int = 1, width: float = 4.6, height: float = 3.5
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` axes in `down` rows, each `width` x `height` inches."""
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
    """Encode an array [H, W, 3] in [0, 1] as PNG, one pixel an entry."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.clip(pixels, 0.0, 1.0), format="png")
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """Return the figure as an inline <svg>: CSS variables for colours, ids after `name`."""
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
    """Write the colours as CSS declarations, for the page that holds an `svg`."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())


SERIES = (BLUE, ORANGE, GREEN, PURPLE, INK, MUTED)
MARKERS = "osD^vP*X"
NUMBERS = FuncFormatter(lambda value, _: f"{value:,.10g}")
