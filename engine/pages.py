"""Render the HTML pages from their templates, in the project's colours."""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from . import pictures
from .text import duration, percent, printable


def render(name: str, **context: Any) -> str:
    """Render a page from `templates/NAME.html.j2`, in the project's colours."""
    folder = resources.files("engine").joinpath("templates")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda part: folder.joinpath(part).read_text("utf-8")),
    )
    environment.filters |= {"seconds": duration, "percent": percent, "image": _data_uri}
    colours = {
        "light": Markup(pictures.css_variables()),
        "dark": Markup(pictures.css_variables(dark=True)),
    }
    page = environment.get_template(f"{name}.html.j2").render(**colours, **context)
    return printable(page.strip(), "\n\t") + "\n"


def _data_uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(pictures.png_of(pixels)).decode()
