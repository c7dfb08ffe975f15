"""Stored results: a command makes them, with the machine and the command in them."""

from __future__ import annotations

import json

import pytest

from engine import cli, results
from engine.benchmarks import loaders
from engine.kernels import audit

ROWS = [{"loader": "resident", "p50_ms": 1.0}]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(results, "FOLDER", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(loaders, "run", lambda quick: ROWS)
    return tmp_path


def test_a_result_knows_its_machine_and_its_command(checkout, capsys):
    assert cli.run(["bench", "loaders", "--quick", "--store", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == ROWS
    path = checkout / "benchmarks" / "results" / "loaders.json"
    assert str(path) in err.replace("\n", "")
    found = json.loads(path.read_text())
    assert found["rows"] == ROWS
    assert found["command"] == "engine bench loaders --quick --store"
    # Not the path of whatever started this process.
    assert found["environment"]["command"] == found["command"]
    assert {"cpu", "threads", "torch", "commit", "time"} <= found["environment"].keys()


def test_outside_a_checkout_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "engine" / "benchmarks" / "results")
    monkeypatch.setattr(loaders, "run", lambda quick: pytest.fail("measured in vain"))
    assert cli.run(["bench", "loaders", "--store"]) == 2
    err = capsys.readouterr().err
    assert "source checkout" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "engine").exists()


def test_a_comparison_is_not_stored(checkout, capsys):
    assert cli.run(["bench", "loaders", "--store", "--against", "HEAD"]) == 2
    assert "--against" in capsys.readouterr().err
    assert not (checkout / "benchmarks").exists()


def test_the_kernels_audit_is_stored_whole(checkout, monkeypatch, capsys):
    monkeypatch.setattr(audit, "rows", lambda archs: [{"kernel": "loss", "arch": a} for a in archs])
    assert cli.run(["kernels", "--store", "--arch", "sm_90"]) == 2
    assert "drop --arch" in capsys.readouterr().err
    assert not (checkout / "benchmarks").exists()
    assert cli.run(["kernels", "--store"]) == 0
    found = json.loads((checkout / "benchmarks" / "results" / "audit.json").read_text())
    assert [row["arch"] for row in found["rows"]] == list(audit.ARCHS)
    assert found["command"] == found["environment"]["command"] == "engine kernels --store"
    assert found["environment"]["triton"]
