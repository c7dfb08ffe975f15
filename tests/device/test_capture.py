"""Test the owner of CUDA graphs without a GPU, and captures that fail."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging

import pytest
import torch

from engine.device import distributed
from engine.device.capture import WARM_UP, CudaGraphs, unavailable
from engine.performance.capture_audit import Tape

from ..conftest import Tiny
from ..training.steps import assert_same, make, train


def test_a_capture_that_fails_is_announced_and_the_step_goes_on(caplog):
    class Broken(Tape):
        def record(self, run):
            try:
                raise RuntimeError("operation not permitted\nwhen the stream is capturing")
            finally:
                # As torch.cuda.graph does at the end of a capture that is broken.
                raise RuntimeError("operation failed due to a previous error during capture")

    torch.manual_seed(0)
    model = Tiny()
    eager, broken = make(copy.deepcopy(model)), make(copy.deepcopy(model), recorder=Broken())
    with caplog.at_level(logging.WARNING):
        train(eager, steps=4)
        train(broken, steps=4)
    assert broken.why_eager == "the capture failed: operation not permitted"
    assert [r.getMessage() for r in caplog.records] == [
        "running without a CUDA graph: the capture failed: operation not permitted"
    ]
    assert_same(broken, eager)


def test_no_cuda_no_graph():
    assert unavailable(torch.device("cpu")) == "CUDA graphs need a CUDA device, this is cpu"
    assert unavailable(torch.device("cuda")) is None


def test_what_averages_gradients_is_made_where_the_capture_will_be(monkeypatch):
    """DistributedDataParallel keeps autograd's accumulation nodes, which remember a stream."""
    inside, made = [], []

    class Watched(Tape):
        @contextlib.contextmanager
        def context(self):
            inside.append(True)
            yield
            inside.pop()

    def averaged(network, compute):
        made.append(bool(inside))
        return functools.partial(compute, network)

    monkeypatch.setattr(distributed, "averaged", averaged)
    make(Tiny(), recorder=Watched())
    make(Tiny())
    assert made == [True, False]


def test_cuda_graphs_warm_up_and_capture_on_one_stream(monkeypatch):
    """The calls that CUDA sees, in order, on a machine that has none."""
    told: list[object] = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class On:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            told.append(f"into {self.what}")

        def __exit__(self, *_):
            told.append(f"out of {self.what}")

    class Graph:
        def replay(self):
            told.append("replay")

        def reset(self):
            told.append("reset")

    def graph(it, *, pool, stream, capture_error_mode):
        assert pool == "pool"
        return On(f"{capture_error_mode} capture on {stream.name}")

    side, current = Stream("side"), Stream("current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: On(s.name))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda s: told.append(f"back on {s.name}"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(gc, "collect", lambda: told.append("collect"))
    with CudaGraphs(torch.device("cuda")) as graphs:
        graphs.warm_up(lambda: told.append("run"))
        replay = graphs.record(lambda: told.append("run"))
        replay()
        assert told == [
            "side waits for current",
            *("into side", *["run"] * WARM_UP, "out of side"),
            "current waits for side",
            "collect",
            "synchronize",
            # A global capture would fail a loader's threads.
            *("into thread_local capture on side", "run", "out of thread_local capture on side"),
            "back on current",
            "replay",
        ]
        told.clear()
        with pytest.raises(ZeroDivisionError):
            graphs.record(lambda: 1 / 0)
        # torch.cuda.graph may leave the process on the capturing stream then.
        assert told[-1] == "back on current"
        told.clear()
        with pytest.raises(ZeroDivisionError):
            graphs.warm_up(lambda: 1 / 0)
        # What the caller then restores, the side stream may still be writing.
        assert told == [
            "side waits for current",
            "into side",
            "out of side",
            "current waits for side",
        ]
        told.clear()
    assert told == ["synchronize", "reset"]
