"""The ops benchmark: every case on the device that training takes."""

import torch

from engine.benchmarks import op_cases, ops
from engine.device import machine
from engine.kernels import backends
from engine.performance import timing

from .test_step import Places

# torch's fused AdamW has no meta form: it is for devices by name. Newton's method in plain PyTorch
# ends where a step changes nothing, and meta tensors have no values to compare.
NOT_HERE = {"adamw_ema_step", "fab_step"}


def test_every_case_lies_on_the_device():
    """A device that has shapes and no numbers stands in for a GPU."""
    for case in op_cases.cases_on(torch.device("meta"), quick=False):
        places = Places()
        with torch.no_grad(), places:
            case.op()
            if case.name not in NOT_HERE:
                case.eager(*case.args)
        assert places.found == {"meta"}, case.name


def test_rows_are_of_the_device(monkeypatch):
    where, timed = torch.device("meta"), []

    def side_by_side(calls, *, device, seconds):
        places = Places()
        for call in calls.values():
            with places:
                call()
        timed.append((device, places.found))
        return {name: timing.quantiles([1e-3]) for name in calls}

    monkeypatch.setattr(machine, "device", lambda: where)
    monkeypatch.setattr(timing, "side_by_side", side_by_side)
    table = [{"op": op, "device": "meta", "backend": "theirs", "why": ""} for op in backends.OPS]
    monkeypatch.setattr(backends, "table", lambda: table)
    cases_on = op_cases.cases_on

    def few(*arguments):
        for case in cases_on(*arguments)[-2:]:
            case.check = lambda: None  # which reads numbers
            yield case

    monkeypatch.setattr(ops, "cases_on", few)
    rows = ops.run(quick=True)
    assert timed == [(where, {"meta"})] * 2
    assert {row["backend"] for row in rows} == {"theirs", "eager"}
