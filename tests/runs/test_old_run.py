"""A run folder that commit 8128ba3 wrote, stopped after three of six epochs, still serves."""

import json
import shutil
from pathlib import Path

import pytest

from engine import cli

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_old_run_resumes_and_keeps_its_rows(run):
    before = rows(run)
    assert cli.run(["train", "--resume", str(run)]) == 0
    after = rows(run)
    assert [row["epoch"] for row in after] == [1, 2, 3, 4, 5, 6]
    assert after[:3] == before
    # What that commit itself went on to; another instruction set rounds otherwise.
    assert after[-1]["loss"] == pytest.approx(2.079, abs=0.02)
    assert json.loads((run / "summary.json").read_text())["steps"] == 24


def test_an_old_run_is_evaluated_and_reported(run):
    assert cli.run(["eval", str(run)]) == 0
    assert json.loads((run / "evaluation.json").read_text())["examples"] == 40
    assert cli.run(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
