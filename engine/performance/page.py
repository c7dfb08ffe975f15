"""Write a profile for people: the HTML page and the picture of its phases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from .. import files, pages, pictures
from ..pictures import SERIES


def write(profile: Mapping[str, Any]) -> None:
    """Write the page and the picture of a profile where the profile says.

    Args:
        profile: the fields of `profile.Profile`; `page` and `picture` are the paths to write.
    """
    with pictures.style():
        figure, (ax,) = pictures.panels(width=8.0, height=3.4)
        draw_phases(ax, profile["phases"], profile["step_ms"][1])
        pictures.save_png(figure, Path(profile["picture"]))
        chart = Markup(pictures.svg(figure, "phases"))
    path = Path(profile["page"])
    page = pages.render(
        "profile",
        profile=profile,
        chart=chart,
        folder=path.parent.name,
        trace=Path(profile["trace"]).name,
        environment={k: v for k, v in profile["environment"].items() if v is not None},
    )
    files.write_text(path, page)


def draw_phases(ax: Axes, shares: Mapping[str, float], step_ms: float) -> None:
    """Draw a bar for each phase of a step: its share of the time [0..1], and milliseconds."""
    names = list(shares)[::-1]
    ax.barh(names, [shares[name] for name in names], color=SERIES[0])
    for place, name in enumerate(names):
        text = f"{shares[name]:.1%}, {shares[name] * step_ms:.3g} ms"
        ax.annotate(text, (shares[name], place), (4, 0), textcoords="offset points", va="center")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlim(0, 1.25 * max(shares.values()))
    ax.set_title(f"Where a step of {step_ms:.3g} ms goes")
