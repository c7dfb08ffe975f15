"""The scaling benchmark: rows that say what was measured and what was not, and their picture."""

import json
import threading
from dataclasses import replace
from multiprocessing import Pipe

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import EngineError, cli, models, pictures
from engine.benchmarks import predictions, scaling, scaling_picture, tables
from engine.device import machine

BASE = scaling.Point(batch=8, size=8)
TINY = scaling.Setting(
    BASE,
    measured={"batch": (4, 8), "k": (1, 2)},
    predicted={"batch": (4, 8, 4096), "k": (1, 2)},
    processes=(),
    seconds=0.05,
)
HERE = machine.device().type


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(scaling, "settings", lambda quick: TINY)
    return scaling.run(quick=True)


def made_up(processes=(1, 2)):
    """Rows of every axis: 10 ms and 1 GFLOP at the base, ten times the time for twice the value."""
    found = []
    for axis in ("batch", "size", "k", "classes", "width"):
        base = getattr(scaling.Point(), axis)
        for method, where in [(m, w) for m in scaling.METHODS for w in ("cpu", scaling.PREDICTED)]:
            for value in (base, 2 * base):
                ms = (10.0 if value == base else 100.0) * (1.0 if where == "cpu" else 0.01)
                time = ms if where != "cpu" else scaling.timing.Timing(0.9 * ms, ms, 1.1 * ms)
                flops = 1_000_000_000 * value // base
                found.append(scaling._row(axis, value, method, where, time, flops, 128))
    for method in scaling.METHODS:
        for n in processes:
            time = scaling.timing.Timing(9.0 / n, 10.0 / n, 11.0 / n)
            found.append(scaling._row("processes", n, method, "cpu", time, 10**9 // n, 128))
    return found


def test_rows_say_what_was_measured_and_what_was_not(rows):
    cases = {(r["axis"], r["value"], r["method"], r["where"]) for r in rows}
    assert len(cases) == len(rows)
    for axis, where, values in (
        ("batch", HERE, TINY.measured["batch"]),
        ("batch", "h100 (predicted)", TINY.predicted["batch"]),
        ("k", HERE, TINY.measured["k"]),
    ):
        for method in ("local-ball", "pgd"):
            assert {v for a, v, m, w in cases if (a, m, w) == (axis, method, where)} == set(values)
    for row in rows:
        if row["where"] == HERE:
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        else:
            assert row["p20_ms"] is row["p80_ms"] is None
            assert row["p50_ms"] > 0
        batch = row["value"] if row["axis"] == "batch" else BASE.batch
        assert row["images_per_s"] == pytest.approx(1e3 * batch / row["p50_ms"], rel=1e-2)
    # One arithmetic for both, and in proportion to the batch.
    flops = {(r["axis"], r["value"], r["method"]): r["gflops"] for r in rows}
    assert all(flops[r["axis"], r["value"], r["method"]] == r["gflops"] for r in rows)
    assert flops["batch", 8, "pgd"] == pytest.approx(2 * flops["batch", 4, "pgd"], rel=1e-3)


def test_the_step_that_is_timed_is_the_recipes():
    step, batch = scaling.step_of(replace(BASE, method="pgd", k=2), torch.device("cpu"))
    before = [p.clone() for p in step.model.parameters()]
    remembered = step.memory.deltas.clone()
    scaling._call(step, batch)
    assert all(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    assert not torch.equal(remembered, step.memory.deltas)
    assert step.objective.passes(step.attack).total == 7
    assert batch.x.shape == (8, 1, 8, 8)


def test_width_one_is_fast_ats_network_and_others_are_wider():
    theirs = models.build("fast-at-mnist", in_channels=1, image_size=28, classes=10)
    same, wide = (scaling.Wider(1, (28, 28), 10, width) for width in (1, 3))
    shapes = [{k: tuple(t.shape) for k, t in m.state_dict().items()} for m in (theirs, same, wide)]
    assert shapes[0] == shapes[1]
    assert shapes[2]["0.weight"] == (48, 1, 4, 4)
    assert shapes[2]["2.weight"] == (96, 48, 4, 4)
    assert shapes[2]["5.weight"] == (300, 96 * 49)
    assert shapes[2]["7.weight"] == (10, 300)
    x = torch.rand(2, 1, 28, 28)
    same.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(same(x), theirs(x))
    assert wide(x).shape == (2, 10)


@settings(max_examples=10, deadline=None)
@given(
    method=st.sampled_from(scaling.METHODS),
    batch=st.integers(1, 5000),
    quarter=st.integers(1, 20),
    k=st.integers(1, 8),
    axis=st.sampled_from(["batch", "size", "k"]),
    more=st.integers(1, 8),
)
def test_a_prediction_never_falls_where_the_work_grows(method, batch, quarter, k, axis, more):
    point = scaling.Point(method, batch=batch, size=4 * quarter, k=k)
    larger = replace(point, **{axis: getattr(point, axis) + more * (4 if axis == "size" else 1)})
    less, most = scaling.predict(point), scaling.predict(larger)
    fewer, more_kernels = (sum(price.kernels.values()) for price in (less, most))
    assert most.flops > less.flops
    assert most.bytes > less.bytes
    # A kernel takes its least time however small it is; another attack step has kernels of its own.
    if axis == "k":
        assert most.seconds > less.seconds
        assert more_kernels > fewer
    else:
        assert most.seconds >= less.seconds * (1 - 1e-9)
        assert more_kernels == fewer


def test_the_picture_tells_measured_from_predicted(monkeypatch, tmp_path):
    kept = {}
    save = pictures.save_png

    def keep(figure, path):
        kept["figure"] = figure
        save(figure, path)

    monkeypatch.setattr(pictures, "save_png", keep)
    scaling_picture.draw({"rows": made_up()}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    figure = kept["figure"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "Batch",
        "Image size",
        "Attack steps",
        "Classes",
        "Width",
        "Processes of one thread",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "local-ball, cpu: measured",
        "local-ball, h100: predicted, never run",
        "pgd, cpu: measured",
        "pgd, h100: predicted, never run",
        "in proportion to the FLOPs",
    ]
    for ax in figure.axes[:5]:
        drawn = {line.get_label(): line for line in ax.lines}
        for method in scaling.METHODS:
            predicted = drawn[f"{method}, h100: predicted, never run"]
            measured = drawn[f"{method}, cpu: measured"]
            assert measured.get_linestyle() == "-"
            assert predicted.get_linestyle() == "--"
            assert measured.get_color() == predicted.get_color()
            assert list(measured.get_ydata()) == [10.0, 100.0]
        # Twice the arithmetic in grey: 20 ms where the step takes 100.
        assert [10.0, 20.0] in [list(line.get_ydata()) for line in ax.lines]
        assert ax.get_yscale() == ax.get_xscale() == "log"
        assert ax.get_ylim() == figure.axes[0].get_ylim()
    throughput = [list(line.get_ydata()) for line in figure.axes[5].lines]
    assert [12800, 25600] in throughput


def test_the_table_tells_growth_from_growth():
    slow = [{**row, "p50_ms": 1234.5} for row in made_up() if row["axis"] == "batch"]
    assert "| 1,230 to 1,230 | 1.0x |" in tables.scaling(slow)
    text = tables.scaling(made_up())
    assert "| k 1 to 2 | pgd | 10 to 100 | 10.0x | 2.0x | 0.1 to 1 | 10.0x |" in text
    assert "| processes 1 to 2 | pgd | 10 to 5 | 0.5x | 0.5x | - | - |" in text


def test_make_tables_draws_what_is_stored(monkeypatch, tmp_path):
    monkeypatch.setattr(tables.results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(predictions, "plans", lambda: "")
    monkeypatch.setattr(predictions, "full_scale", lambda: "")
    for folder in ("results", "docs/images"):
        (tmp_path / folder).mkdir(parents=True)
    for name, marks in (
        ("performance", ["scaling"]),
        ("plan", ["plans"]),
        ("recipes", ["full-scale"]),
    ):
        text = "".join(f"<!-- {mark} -->\n\n<!-- /{mark} -->\n" for mark in marks)
        (tmp_path / "docs" / f"{name}.md").write_text(text)
    (tmp_path / "results" / "scaling.json").write_text(json.dumps({"rows": made_up()}))
    assert "docs/images/scaling.png" in tables.write(tmp_path)
    assert (tmp_path / "docs/images/scaling.png").stat().st_size > 10_000
    assert tables.scaling(made_up()) in (tmp_path / "docs/performance.md").read_text()


def test_a_process_steps_at_every_word_until_its_pipe_closes(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "")
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    called = []
    monkeypatch.setattr(scaling, "_call", lambda step, batch: called.append(len(batch.y)))
    ours, theirs = Pipe()
    worker = threading.Thread(target=scaling._serve, args=(theirs, 0, 1, 0, BASE), daemon=True)
    worker.start()
    for word in (None, "pgd", "local-ball"):
        if word:
            ours.send(word)
        assert ours.poll(30)
        assert ours.recv() is None
    assert called == [8] * 2 * scaling._STRETCH
    ours.close()
    worker.join(30)
    assert not worker.is_alive()


@pytest.mark.slow
def test_processes_share_the_batch(monkeypatch):
    tiny = replace(TINY, measured={}, predicted={}, processes=(1, 2))
    monkeypatch.setattr(scaling, "settings", lambda quick: tiny)
    rows = scaling.run(quick=True)
    assert [(r["method"], r["value"]) for r in rows] == [
        (method, n) for method in scaling.METHODS for n in (1, 2)
    ]
    for one, two in (rows[:2], rows[2:]):
        assert two["gflops"] == pytest.approx(one["gflops"] / 2, rel=1e-2)
        assert 0 < one["p20_ms"] <= one["p50_ms"] <= one["p80_ms"]


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_and_not_a_wait():
    with (
        pytest.raises(EngineError, match="process 0 of 2 has died"),
        scaling.together(2, replace(BASE, size=7)),
    ):
        pass


def test_command_line(monkeypatch, capsys):
    tiny = replace(TINY, measured={"k": (1,)}, predicted={"k": (1,)}, processes=())
    monkeypatch.setattr(scaling, "settings", lambda quick: tiny)
    assert cli.run(["bench", "scaling", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["where"] for row in found] == [HERE, HERE, *["h100 (predicted)"] * 2]
    assert cli.run(["bench", "scaling", "--quick"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:4] == ["axis", "value", "method", "where"]
    assert "h100 (predicted)" in out
