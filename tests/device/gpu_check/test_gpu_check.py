"""Test that `make gpu-check` runs to its end without a GPU too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import recipes
from engine.performance.capture_audit import Tape

from . import steps
from .__main__ import ROOT, Stage, run, stages

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for the CPU")
# Takes away what makes an editable install importable: as on a machine where nothing was installed.
_BARE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
"""


def check(out: Path, *words: str, bare: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if bare is not None:
        (bare / "sitecustomize.py").write_text(_BARE)
        environment["PYTHONPATH"] = str(bare)
    return subprocess.run(
        [sys.executable, "-m", "tests.device.gpu_check", "--out", str(out), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_nothing_needs_to_be_installed(tmp_path):
    (tmp_path / "bare").mkdir()
    words = ["--stages", "doctor", "gpu-tests", "memcheck"]
    done = check(tmp_path / "out", *words, bare=tmp_path / "bare")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0].startswith("doctor          ok")
    assert [line.split(maxsplit=1)[1] for line in lines[1:3]] == [
        "skipped: no CUDA device here"
    ] * 2
    assert lines[-1] == "ALL PASS"
    # It ran in the copy: there the sources alone can be imported.
    assert (tmp_path / "out" / "tree" / "engine" / "kernels" / "backends.py").exists()


@pytest.mark.slow
def test_all_stages_run_with_stand_ins(tmp_path):
    (tmp_path / "bare").mkdir()
    done = check(tmp_path / "out", "--recipes", "quickstart", bare=tmp_path / "bare")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "ALL PASS"
    wanted = stages(tmp_path, [], gpu=False)
    assert [line.split()[0] for line in lines[: len(wanted)]] == [s.name for s in wanted]
    for stage, line in zip(wanted, lines, strict=False):
        assert line.split()[1] == ("skipped:" if stage.gpu else "ok")


@pytest.mark.parametrize(
    ("code", "remark"),
    [
        ("print('fine')", "ok"),
        ("print('1 BAD'); raise SystemExit(3)", "exit status 3"),
        ("import time; time.sleep(60)", "ended at its limit of time"),
        ("print('running without a CUDA graph: no')", "it says 'without a CUDA graph'"),
    ],
    ids=["good", "failing", "slow", "forbidden"],
)
def test_a_stage_is_bad_where_it_fails(tmp_path, capsys, code, remark):
    stage = Stage("it", 9, [sys.executable, "-c", code], forbidden="without a CUDA graph")
    assert run(stage, tmp_path, tmp_path, dict(os.environ), limit=2) == (remark == "ok")
    assert remark in capsys.readouterr().out
    assert (tmp_path / "it.log").exists()


def test_a_step_that_repeats_itself_when_replayed_is_bad(monkeypatch):
    recipe = recipes.load("quickstart", {"step.precision": "bf16"})
    assert steps.check(recipe, batch=2)["ok"]
    replay = Tape.replay

    def frozen(tape):
        # A graph with a counter's value in it: every replay begins at the same state.
        state = [t for call in tape.calls for t in call.inputs if t.dtype == torch.int64]
        before = [t.clone() for t in state]
        replay(tape)
        for t, value in zip(state, before, strict=True):
            t.copy_(value)

    monkeypatch.setattr(Tape, "replay", frozen)
    row = steps.check(recipe, batch=2)
    assert not row["ok"]
    assert row["different"]


def test_every_recipe_is_among_the_steps():
    words = next(s.words for s in stages(Path(), [], gpu=True) if s.name == "steps")
    # None by name: all of them.
    assert list(words[-1:]) == ["tests.device.gpu_check.steps"]


def test_an_unknown_stage_is_a_mistake(tmp_path):
    done = check(tmp_path, "--stages", "nonsense")
    assert done.returncode == 2
    assert "no stage is called nonsense" in done.stderr
