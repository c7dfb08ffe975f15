"""Comparisons of two versions: what is more than noise, and what is not."""

from __future__ import annotations

import json

import pytest

from engine import EngineError, cli
from engine.benchmarks import against


def row(op, ms, **more):
    return {
        "op": op,
        "shape": [2, 3],
        "p20_ms": ms,
        "p50_ms": ms,
        "p80_ms": ms,
        "speedup": 2.5,
        **more,
    }


def judged(ours, theirs):
    (found,) = against.judge([[row("a", t)] for t in ours], [[row("a", t)] for t in theirs])
    return found


def test_a_difference_beyond_both_sides_spread_has_a_name():
    assert judged([2.0, 2.1, 2.05], [1.0, 1.02, 1.05])["verdict"] == "slower"
    assert judged([1.0, 1.02, 1.05], [2.0, 2.1, 2.05])["verdict"] == "faster"
    found = judged([2.0, 2.1, 2.05], [1.0, 1.02, 1.05])
    assert found["ratio"] == pytest.approx(2.0, rel=0.05)
    assert found["lowest"] <= found["ratio"] <= found["highest"]
    assert found["op"] == "a"


def test_a_difference_within_the_spread_has_none():
    assert judged([1.0, 1.3, 1.1], [1.05, 1.0, 1.2])["verdict"] == "inside the noise"
    # All rounds agree, by less than a side differs from itself.
    assert judged([1.05, 1.3, 1.1], [1.0, 1.25, 1.05])["verdict"] == "inside the noise"
    assert judged([1.0], [2.0])["verdict"] == "one round: no noise is known"


def test_cases_are_matched_by_what_was_measured():
    ours = [[row("a", 1.0), row("b", 5.0, p50_ms=None), {"loader": "x", "images_per_s": 100.0}]]
    theirs = [[{"loader": "x", "images_per_s": 50.0}, row("a", 2.0), row("c", 1.0)]]
    found = {r.get("op", r.get("loader")): r["ratio"] for r in against.judge(ours, theirs)}
    assert found == {"a": 0.5, "x": 0.5}
    with pytest.raises(EngineError, match="no case in common"):
        against.judge([[row("a", 1.0)]], [[row("b", 1.0)]])


def test_against_a_stored_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"rows": [row("a", 2.0)]}))
    monkeypatch.setattr(against, "_command", lambda *_: lambda: [row("a", 1.0)])
    assert cli.run(["bench", "ops", "--quick", "--against", str(path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["ratio"] == 0.5


def test_mistakes_are_one_line(tmp_path, capsys):
    assert cli.run(["bench", "ops", "--against", "no-such-commit"]) == 2
    assert "no commit" in capsys.readouterr().err
    assert cli.run(["bench", "ops", "--against", "HEAD", "--rounds", "0"]) == 2
    assert "--rounds" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(EngineError, match="holds no benchmark"):
        against._rows("{}", "x.json")
