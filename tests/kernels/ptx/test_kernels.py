"""Every kernel as compiled, executed: against the reference, and with faults planted in it."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from engine import kernels
from engine.kernels import audit
from engine.kernels.ptx import run

from ..test_audit import run_compiling

# Every function that is launched; the other functions are called by these.
WRITTEN = {
    name
    for source in (Path(kernels.__file__).parent / "triton").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.MULTILINE)
}


def check(rows, archs):
    named = {example.kernel for example in audit.examples()}
    assert {(row["kernel"], row["arch"]) for row in rows} == {(k, a) for k in named for a in archs}
    for arch in archs:
        launched = {name for row in rows if row["arch"] == arch for name in row["launched"]}
        assert launched == WRITTEN, "a kernel that no case executes"
    wrong = [row for row in rows if row["outcome"] != run.EXECUTED]
    assert wrong == []
    # The kernels that an op launches for large inputs only.
    assert all(
        ("finish_loss_kernel" in row["launched"])
        == (row["kernel"] in ("loss_partial", "loss_finish"))
        for row in rows
        if row["kernel"].startswith("loss")
    )


# The newest architecture has instructions for 16 bits that the others lack.
@pytest.mark.parametrize(
    ("archs", "extent"), [(("sm_80", "sm_90"), "kernels"), (("sm_100",), "types")]
)
def test_every_kernel_computes_what_the_reference_does(archs, extent):
    check(run.rows(archs, extent), archs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", audit.ARCHS)
def test_every_case_computes_what_the_reference_does(arch):
    rows = run.rows((arch,), extent="all", seeds=3)
    check(rows, (arch,))
    for kernel, types in {
        "l2_step": 3, "linf_step_bf16_grad": 2, "linf_step_in_place": 3, "cross_entropy_grad": 3,
        "linf_input_grad_bf16_channels_last": 3, "loss": 3, "loss_partial": 3, "loss_backward": 3,
        "sgd_ema": 3,
    }.items():  # fmt: skip
        assert len({row["dtype"] for row in rows if row["kernel"] == kernel}) == types, kernel


# ---- planted faults --------------------------------------------------------------------------

PLANT = """
import json, re
from engine.kernels.ptx import driver, memory, run
from engine.kernels.ptx.cases import cases

first, execute = {case.kernel: case for case in cases("kernels")}, driver.execute

def outcome(kernel, change=lambda ptx: ptx, arguments=lambda values: values):
    def changed(ptx, values, *rest):
        text = change(ptx)
        assert text != ptx or arguments(values) != values, "nothing to change"
        execute(text, arguments(values), *rest)
    driver.execute = changed
    return run.rows_of(first[kernel], ("sm_90",), 2)[0]["outcome"]

def without(pattern, instead=""):
    return lambda ptx: re.sub(pattern, instead, ptx, count=1)

def without_barriers_unwatched(ptx):
    memory.Region.check_races = lambda self: None
    return ptx.replace("bar.sync", "// bar.sync")

print(json.dumps(OUTCOMES))
"""


def planted(outcomes):
    return run_compiling(PLANT.replace("OUTCOMES", outcomes))


def test_planted_faults_show():
    found = planted("""{
    **{f"no barrier in {k}": outcome(k, lambda ptx: ptx.replace("bar.sync", "// bar.sync"))
       for k in ("linf_step_bf16_grad", "l2_step", "l2_start", "loss_partial", "remember",
                 "linf_input_grad_bf16_channels_last")},
    **{f"every program is the first in {k}": outcome(k, without(r"%ctaid.x", "0"))
       for k in ("linf_step", "l2_recall", "sgd_ema")},
    "n too large": outcome("linf_step", arguments=lambda values: [*values[:-1], values[-1] + 64]),
    "no mask": outcome("linf_start", without(r"@%p\\d+ (?=st.global)")),
    "odd address": outcome("linf_step", arguments=lambda values: [values[0] + 4, *values[1:]]),
    "no store": outcome("linf_step", without(r"@%p\\d+ st.global[^;]*;")),
    "no value": outcome("linf_step", without(r"@%p\\d+ ld.global[^;]*;")),
    "another formula": outcome("linf_step", without("max.NaN", "min.NaN")),
    "not quite": outcome("cross_entropy_grad", without("0f3FB8AA3B", "0f3FB8AB3B")),
    # Last, for it takes the search for races out: the order of warps alone then tells.
    "nobody looks": outcome("linf_step_bf16_grad", without_barriers_unwatched),
    }""")
    expected = {
        "no barrier": "fault: race: two threads of block",
        "every program": "fault: race: two blocks",
        "n too large": "fault: out of bounds",
        "no mask": "fault: out of bounds",
        "odd address": "fault: misaligned",
        "no store": "wrong: NaN",
        # What is in registers from the start, or zeros.
        "no value": "wrong: ",
        "another formula": "wrong: not the bits",
        "not quite": "wrong: the difference",
        "nobody looks": "wrong: ",
    }
    for name, outcome in found.items():
        start = next(text for begin, text in expected.items() if name.startswith(begin))
        assert outcome.startswith(start), (name, outcome)
    assert len(found) == 17


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="arch must be one of sm_80, sm_90, sm_100, got 'sm_10'"):
        run.rows(("sm_10",))


def test_each_row_is_printed_when_it_is_done(monkeypatch, capsys):
    outcomes = [run.EXECUTED, "fault: race", run.EXECUTED]
    rows = [{"kernel": f"k{i}", "outcome": outcome} for i, outcome in enumerate(outcomes)]

    def each_row(*_):
        for row in rows:
            yield row
            assert row["outcome"] in capsys.readouterr().out

    monkeypatch.setattr(run, "each_row", each_row)
    monkeypatch.setattr("sys.argv", ["run"])
    assert run._main() == 1
    assert capsys.readouterr().out == "3 rows, 1 bad\n"
    rows[1]["outcome"] = run.EXECUTED
    assert run._main() == 0
    assert capsys.readouterr().out == "3 rows, 0 bad\n"
    # Another Python reads these lines: nothing else may stand among them.
    monkeypatch.setattr("sys.argv", ["run", "--json"])
    monkeypatch.setattr(run, "each_row", lambda *_: iter(rows))
    assert run._main() == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
