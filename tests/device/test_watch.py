"""Test that a replay which does not finish is noticed; the events are stand-ins."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from engine.device import capture, distributed
from engine.device.watch import ReplayWatch


class Event:
    """Stand in for a CUDA event that is reached when `finished` is set."""

    made: list[Event] = []  # noqa: RUF012

    def __init__(self):
        self.finished, self.recorded, self.asked = False, False, 0
        self.made.append(self)

    def record(self):
        self.recorded = True

    def query(self):
        assert self.recorded
        self.asked += 1
        return self.finished


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(Event, "made", [])
    return Event.made


def until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_a_replay_that_does_not_finish_is_reported_once(events):
    reports, told = [], threading.Event()

    def give_up(report):
        reports.append(report)
        told.set()

    watch = ReplayWatch(0.05, interval=0.01, event=Event, give_up=give_up)
    replays = []
    replay = watch.watched(lambda: replays.append(1))
    replay()
    assert told.wait(20)
    replay()
    watch.close()
    assert replays == [1, 1]
    assert reports == [
        "a replayed step has not finished after 0.05 s: another process of this run may be lost"
    ]
    assert len(events) == 1


def test_replays_that_finish_are_watched_one_after_another(events):
    reports = []
    watch = ReplayWatch(30, interval=0.005, event=Event, give_up=reports.append)
    replay = watch.watched(lambda: None)
    for number in (1, 2):
        replay()
        replay()  # the one ahead of it is still pending
        assert len(events) == number
        until(lambda: events[-1].asked > 1)
        events[-1].finished = True
        until(lambda: watch._pending is None)
    watch.close()
    assert not watch._thread.is_alive()
    assert reports == []


def test_an_error_of_the_device_is_left_to_the_main_thread(events):
    class Failed(Event):
        def query(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    reports = []
    watch = ReplayWatch(0.0, interval=0.005, event=Failed, give_up=reports.append)
    watch.watched(lambda: None)()
    watch._thread.join(20)
    assert not watch._thread.is_alive()
    assert reports == []


def test_a_process_that_hangs_in_a_replay_ends_with_one_line():
    code = """
import time
from engine.device.watch import ReplayWatch
class Never:
    def record(self): pass
    def query(self): return False
ReplayWatch(0.2, interval=0.05, event=Never).watched(lambda: None)()
time.sleep(100)  # as the main thread waits for its device
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "engine: a replayed step has not finished after 0.2 s: another process of this run may be "
        "lost"
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_captured_graphs_are_watched_with_several_processes(monkeypatch, events, processes):
    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1

        def reset(self):
            pass

    class Anything:
        def __init__(self, *_, **__):
            pass

        __enter__ = __exit__ = __init__

    for name in ("Stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Anything)
    for name in ("current_stream", "set_stream", "graph_pool_handle", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(distributed, "active", lambda: processes > 1)
    devices = []

    def set_device(index):
        devices.append((index, threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(
        capture,
        "ReplayWatch",
        lambda patience, begin: ReplayWatch(patience, begin=begin, event=Event),
    )
    before = threading.active_count()
    with capture.CudaGraphs(torch.device("cuda")) as graphs:
        replay = graphs.record(lambda: None)
        replay()
        assert Graph.replays == 1
        assert [event.recorded for event in events] == [True] * (processes - 1)
        assert threading.active_count() == before + processes - 1
    assert threading.active_count() == before
    # The thread looks from this process's own device.
    assert devices == [(1, "replay watch")] * (processes - 1)
