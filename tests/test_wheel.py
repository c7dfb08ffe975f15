"""The wheel alone, in an empty environment, from another folder."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from engine import EngineError
from engine.benchmarks import against

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment that holds the wheel, and sees this one's other packages."""
    try:
        return against.environment(ROOT, tmp_path_factory.mktemp("wheel"))
    except EngineError as error:
        pytest.skip(str(error))


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
