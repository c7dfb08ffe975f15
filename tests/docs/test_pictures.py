"""The picture of a live run shows what the terminal shows."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("pyte", reason="pyte is not installed (make docs)")

from PIL import Image

from engine.benchmarks import pictures

# Print three epochs, overwrite a line as a progress bar does, and print the terminal's width.
TALK = """
import os, sys, time
for epoch in (15, 16, 20):
    print("training", end="", flush=True)
    time.sleep(0.3)
    print(f"\\r\\x1b[2K\\x1b[32mepoch  {epoch}/20\\x1b[0m", flush=True)
    time.sleep(0.6)
print(os.get_terminal_size().columns, sys.stdout.isatty())
"""


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    return pictures.watch([sys.executable, "-c", TALK], tmp_path_factory.mktemp("here"), "talk")


def test_a_command_is_watched_in_a_terminal(screens):
    lines = pictures.text(screens[-1]).rstrip().split("\n")
    assert lines[0] == "$ talk"
    assert lines[1:] == ["epoch  15/20", "epoch  16/20", "epoch  20/20", "112 True"]
    assert "epoch" not in pictures.text(screens[0])
    character, colour, bold = screens[-1][1][0]
    assert (character, colour, bold) == ("e", "#98c379", False)
    assert screens[-1][0][0][2]


def test_the_still_is_of_the_middle_and_the_other_moves(screens, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_TRAINING", 2)
    monkeypatch.setattr(pictures, "_EVALUATION", 2)
    png, gif = pictures.save(screens, tmp_path)
    with Image.open(png) as drawn:
        # Three lines, the prompt's, the first epoch's and the bar's, with an edge around them.
        assert drawn.height == 3 * round(1.3 * 26) + 2 * 26
        assert (0x98, 0xC3, 0x79) in {rgb for _, rgb in drawn.convert("RGB").getcolors(1 << 16)}
    with Image.open(gif) as moving:
        assert moving.n_frames > 2


def test_a_command_that_fails_gives_no_picture(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        pictures.watch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, "fail")
