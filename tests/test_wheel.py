"""The wheel alone, in an empty environment, from another folder."""

from __future__ import annotations

import json
import shutil
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


@pytest.mark.slow
def test_the_wheel_trains_a_network_and_an_objective_of_a_module_outside(python, tmp_path):
    shutil.copy(ROOT / "tests" / "plugins" / "mynets.py", tmp_path)
    flags = ["--import", "mynets", "--json"]
    words = ["--model.name", "my-net", "--objective.name", "pairing", "--optim.epochs", "2"]
    words += ["--evaluation.autoattack", "none", "--evaluation.examples", "20"]
    run(python, tmp_path, "train", "quickstart", *flags, *words, "--run-dir", "r", "--no-eval")
    # As if it had been stopped before its last step.
    (tmp_path / "r" / "summary.json").unlink()
    row = json.loads(run(python, tmp_path, "train", "--resume", "r", *flags))
    assert row["examples"] == 20
    again = json.loads(run(python, tmp_path, "eval", "r", *flags))
    assert again["clean"] == row["clean"]


def _doctor_here():
    from engine import kernels

    return kernels.backends.table()
