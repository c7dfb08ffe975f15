"""`engine kernels --run`: what it prints and how it ends."""

import json

import pytest

from engine import cli
from engine.kernels import audit, backends
from engine.kernels.ptx import run

ROW = {
    "kernel": "linf_step", "dtype": "fp32", "sizes": "3x3x8x16", "arch": "sm_90",
    "launched": ["linf_step_kernel"], "difference": 2.61e-08, "allowed": 5.2e-08, "same_bits": True,
    "outcome": run.EXECUTED,
}  # fmt: skip


@pytest.fixture
def rows(monkeypatch):
    """What the kernels are said to compute; and the architectures that were asked for."""
    given, asked = [ROW], []
    monkeypatch.setattr(backends, "load", lambda name: (object(), "Triton"))
    monkeypatch.setattr(run, "rows", lambda archs: asked.append(archs) or given)
    return given, asked


def test_run_prints_a_row_a_kernel_and_what_came_out(rows, capsys):
    assert cli.run(["kernels", "--run", "--arch", "sm_90"]) == 0
    title, row = capsys.readouterr().out.splitlines()
    assert title.split() == [
        "kernel", "dtype", "sizes", "arch", "difference", "allowed", "same_bits", "outcome"
    ]  # fmt: skip
    assert row.split() == [
        "linf_step",
        "fp32",
        "3x3x8x16",
        "sm_90",
        "2.61e-08",
        "5.2e-08",
        "True",
        "executed",
    ]
    assert cli.run(["kernels", "--run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [ROW]
    assert rows[1] == [("sm_90",), audit.ARCHS]


def test_a_kernel_that_fails_shows_in_the_status(rows, capsys):
    fault = "fault: out of bounds: 4 bytes at byte 256 of argument 0, which has 256"
    failed = {k: ROW[k] for k in ("kernel", "dtype", "sizes", "arch")}
    rows[0].append({**failed, "launched": [], "outcome": fault})
    assert cli.run(["kernels", "--run"]) == 1
    assert fault in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--run"], []])
def test_without_triton_one_line_says_so(words, capsys, monkeypatch):
    monkeypatch.setattr(backends, "load", lambda name: (None, "Triton is not installed (why)"))
    assert cli.run(["kernels", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "engine: no kernels here: Triton is not installed (why); it comes with robust-engine[gpu]"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "--store"], "--store keeps what the compiler made: drop --run"),
        (["--run", "--arch", "sm_75"], "unknown --arch sm_75: sm_80, sm_90, sm_100"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, said, capsys):
    assert cli.run(["kernels", *words]) == 2
    assert capsys.readouterr().err == f"engine: {said}\n"
