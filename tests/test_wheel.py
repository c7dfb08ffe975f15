"""The wheel alone, in an empty environment, from another folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment that holds the wheel, and sees this one's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
    )
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr.strip().splitlines()[-1]}")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True
    )
    found = folder / "venv" / "bin" / "python"
    place = subprocess.run(
        [found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    # A path from a .pth file is not searched for .pth files: the editable install stays out.
    (Path(place) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found


def run(python: Path, folder: Path, *words: str) -> str:
    done = subprocess.run(
        [python, "-m", "engine", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_benchmarks_and_profiles_anywhere(python, tmp_path):
    where = subprocess.run(
        [python, "-c", "import engine; print(engine.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(ROOT) not in where
    table = json.loads(run(python, tmp_path, "doctor", "--json"))["kernels"]
    if any(row["backend"] == "native" for row in _doctor_here()):
        assert any(row["backend"] == "native" for row in table)
    words = ["--json", "--evaluation.autoattack", "none", "--evaluation.examples", "50"]
    row = json.loads(run(python, tmp_path, "train", "quickstart", *words))
    assert (tmp_path / row["report"]).exists()
    assert row["clean"] > 0.8
    assert json.loads(run(python, tmp_path, "profile", "quickstart", "--json"))["covered"] > 0.9
    assert json.loads(run(python, tmp_path, "bench", "step", "--quick", "--json"))


def _doctor_here():
    from engine import kernels

    return kernels.backends.table()
