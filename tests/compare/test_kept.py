"""Test the results of earlier sittings: whole ones are taken, damaged ones refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import EngineError, cli
from engine.compare import kept, protocol

from ..runs.test_strangers import VALUES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STORED = json.loads((RESULTS / "compare-few.json").read_text())
STEPS = {
    "recipes": {"a": "x = 1"},
    "steps": {"a": {"p20_ms": 1.0, "p50_ms": 2, "p80_ms": 3.0}},
}
OPTIONS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def refused(call, *args):
    """Whether a call refuses its arguments, in one line; it may do nothing else but return."""
    try:
        call(*args)
    except EngineError as error:
        line = str(error)
    else:
        return False
    assert line
    assert "\n" not in line
    assert len(line) < 1000
    return True


def changed(value, path, new):
    """`value` with `new` at the end of `path`, a list of positions: each counts keys or items."""
    value = copy.deepcopy(value)
    inner = value
    for step in path:
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        if not keys:
            break
        key = list(keys)[step % len(keys)]
        if not (isinstance(inner[key], dict | list) and inner[key]) or step % 5 == 0:
            inner[key] = new
            break
        inner = inner[key]
    return value


PATHS = st.lists(st.integers(0, 60), min_size=1, max_size=4)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("compare-*.json")), ids=lambda p: p.stem)
def test_every_stored_comparison_is_whole(path):
    assert kept.comparison(path)["points"]


def fuzz(tmp_path, examples):
    path = tmp_path / "kept.json"
    few = {**STORED, "points": STORED["points"][:2]}

    @settings(max_examples=examples, **OPTIONS)
    @given(where=PATHS, new=VALUES)
    def comparisons(where, new):
        path.write_text(json.dumps(changed(few, where, new)))
        refused(kept.comparison, path)

    @settings(max_examples=examples, **OPTIONS)
    @given(where=PATHS, new=VALUES)
    def steps(where, new):
        path.write_text(json.dumps(changed(STEPS, where, new)))
        refused(kept.step_times, path, STEPS["recipes"])

    @settings(max_examples=examples, **OPTIONS)
    @given(key=st.sampled_from(sorted(PROTOCOL)), new=VALUES)
    def protocols(key, new):
        import tomli_w

        try:
            text = tomli_w.dumps({**PROTOCOL, key: new})
        except (TypeError, ValueError):
            return
        (tmp_path / "p.toml").write_text(text, encoding="utf-8", errors="replace")
        refused(protocol.read, [str(tmp_path / "p.toml")], {})

    comparisons()
    steps()
    protocols()


PROTOCOL = {
    "about": "x",
    "base": "quickstart",
    "seeds": 2,
    "epochs": [1],
    "score": "test",
    "common": {"seed": 1},
    "methods": {"weak": {"attack": {"steps": 1}}},
}


def test_fuzzed_comparisons_and_protocols_are_refused_or_taken(tmp_path):
    fuzz(tmp_path, 100)


@pytest.mark.slow
def test_ten_thousand_fuzzed_comparisons_and_protocols_are_refused_or_taken(tmp_path):
    fuzz(tmp_path, 3400)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", "{", '{"points": 1}', '{"points": [1], "recipes": {}}', "[" * 10_000, "NaN"],
    ids=lambda text: text[:20],
)
def test_a_damaged_comparison_is_refused(text, tmp_path):
    path = tmp_path / "compare.json"
    path.write_text(text)
    assert refused(kept.comparison, path)
    assert text == "1" or refused(kept.step_times, path, {"a": ""}) or "{" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", 1),
        ("epochs", "3"),
        ("epochs", True),
        ("seed", -1),
        ("steps", 1e9),
        ("eps", None),
        ("pgd", 1.5),
        ("pgd", "0.5"),
        ("peak_memory_mb", [1]),
    ],
)
def test_a_point_with_a_wrong_field_is_named(name, value, tmp_path):
    point = {**STORED["points"][0], name: value}
    path = tmp_path / "compare.json"
    path.write_text(json.dumps({**STORED, "points": [point]}))
    with pytest.raises(EngineError, match=f"{name} of point 0 is"):
        kept.comparison(path)


@pytest.mark.parametrize("value", [None, 0, -1, "1", float("nan"), True])
def test_a_timing_that_is_none_is_refused(value, tmp_path):
    steps = copy.deepcopy(STEPS)
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(steps))
    assert kept.step_times(path, STEPS["recipes"]) == STEPS["steps"]
    assert kept.step_times(path, {"a": "x = 2"}) is None
    steps["steps"]["a"]["p50_ms"] = value
    path.write_text(json.dumps(steps))
    with pytest.raises(EngineError, match="no timing"):
        kept.step_times(path, STEPS["recipes"])


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": True},
        {"seeds": 10**9},
        {"seeds": "2"},
        {"epochs": 3},
        {"epochs": [True]},
        {"epochs": [0]},
        {"minutes": [float("inf")]},
        {"base": "nothing"},
        {"base": 1},
        {"methods": {}},
        {"methods": {"weak": 1}},
        {"methods": {"x" * 300: {}}},
        {"score": ["test"]},
        {"common": 1},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_malformed_protocol_is_one_line(change, tmp_path, capsys):
    import tomli_w

    path = tmp_path / "p.toml"
    path.write_text(tomli_w.dumps({**PROTOCOL, **change}))
    assert cli.run(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 700 + len(str(path))
    assert not (tmp_path / "out").exists()
