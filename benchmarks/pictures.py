"""Make the picture of a live run for README and docs: `make pictures`.

`engine train quickstart` runs in a pseudo-terminal. Its screen is drawn cell by cell, as a still
and as a sped-up animation.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 112, 40
# Seconds between two screens, and the screens of the animation: of training, and after it.
_EVERY, _TRAINING, _EVALUATION = 0.25, 44, 16
_FRAME_MS, _LAST_MS = 120, 4000

Cell = tuple[str, str, bool]  # character, colour, bold
Screen = tuple[tuple[Cell, ...], ...]

_BACKGROUND, _TEXT = "#1c1f24", "#d7dae0"
_COLOURS = {
    "default": _TEXT, "black": "#5c6370", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b",
    "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2", "white": _TEXT,
}  # fmt: skip


def watch(words: Sequence[str], folder: Path, shown: str) -> list[Screen]:
    """Run a command in a pseudo-terminal; yield its screen from time to time, and at the end.

    Args:
        words: the command; it runs in `folder`.
        shown: the text behind the prompt.
    Raises:
        subprocess.CalledProcessError: if the command fails.
    """
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    stream.feed(f"\x1b[1m$ {shown}\x1b[0m\r\n".encode())
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdin=its, stdout=its, stderr=its, close_fds=True
    )
    os.close(its)
    seen, due = [_cells(screen)], time.monotonic()
    try:
        while True:
            if select.select([ours], [], [], _EVERY)[0]:
                try:
                    stream.feed(os.read(ours, 1 << 16))
                except OSError:  # Linux raises this when the other side is closed
                    break
            if time.monotonic() >= due:
                seen.append(_cells(screen))
                due = time.monotonic() + _EVERY
    finally:
        os.close(ours)
        status = process.wait()
    if status:
        raise subprocess.CalledProcessError(status, words)
    return [*seen, _cells(screen)]


def _cells(screen: pyte.Screen) -> Screen:
    return tuple(
        tuple(
            (cell.data, _COLOURS.get(cell.fg) or f"#{cell.fg}", cell.bold)
            for cell in (screen.buffer[y][x] for x in range(screen.columns))
        )
        for y in range(screen.lines)
    )


def text(screen: Screen) -> str:
    """Return a screen's characters, line by line."""
    return "\n".join("".join(cell[0] for cell in row).rstrip() for row in screen)


def draw(screen: Screen, size: int) -> Image.Image:
    """Draw a screen as a picture, in letters of `size` pixels."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain, bold, other = (
        ImageFont.truetype(fonts / f"DejaVuSans{kind}.ttf", size)
        for kind in ("Mono", "Mono-Bold", "")
    )
    width, height, edge = plain.getlength("m"), round(1.3 * size), size
    picture = Image.new(
        "RGB",
        (round(width * len(screen[0])) + 2 * edge, height * len(screen) + 2 * edge),
        _BACKGROUND,
    )
    pen = ImageDraw.Draw(picture)
    for y, row in enumerate(screen):
        for (colour, heavy, dots), run in itertools.groupby(
            enumerate(row), lambda at: _style(at[1])
        ):
            cells = list(run)
            font = other if dots else bold if heavy else plain
            at = edge + cells[0][0] * width, edge + y * height
            pen.text(at, "".join(cell[0] for _, cell in cells), colour, font)
    return picture


def _style(cell: Cell) -> tuple[str, bool, bool]:
    """Return colour, weight, and whether the character is the spinner's.

    matplotlib's monospaced fonts lack the spinner's dots.
    """
    return cell[1], cell[2], "\u2800" <= cell[0] <= "\u28ff"


def before(screens: Sequence[Screen], words: str) -> int:
    """Count the screens before the first one that shows these words."""
    return next(i for i, screen in enumerate(screens) if words in text(screen))


def spread(screens: Sequence[Screen], count: int) -> list[Screen]:
    """Pick `count` screens evenly, with the first and the last."""
    return [screens[round(i * (len(screens) - 1) / (count - 1))] for i in range(count)]


def save(screens: Sequence[Screen], folder: Path) -> list[Path]:
    """Write live.png, at three quarters of the epochs, and live.gif."""
    middle = screens[before(screens, "epoch  16/20") - 1]
    lines = text(middle).rstrip().count("\n") + 1
    draw(middle[:lines], 26).quantize(32).save(folder / "live.png", optimize=True)
    begun, trained = before(screens, "training"), before(screens, "epoch  20/20")
    moments = spread(screens[begun:trained], _TRAINING) + spread(screens[trained:], _EVALUATION)
    first, *rest = [draw(screen, 13).quantize(16) for screen in moments]
    first.save(
        folder / "live.gif",
        save_all=True,
        append_images=rest,
        duration=[*[_FRAME_MS] * len(rest), _LAST_MS],
        loop=0,
        optimize=True,
    )
    return [folder / "live.png", folder / "live.gif"]


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    command = ["train", "quickstart"]
    with tempfile.TemporaryDirectory() as place:
        seen = watch(
            [sys.executable, "-m", "engine", *command], Path(place), " ".join(["engine", *command])
        )
    for path in save(seen, root / "docs" / "images"):
        print(path.relative_to(root))
