"""The owner of CUDA graphs: one stream to capture on, one pool of memory, one place that tears down.

A step that is captured replays with one launch. What it may do is PyTorch's notes on CUDA graphs; the
traps met here: warm-up runs on the stream that captures, for autograd's accumulation nodes and the
libraries' workspaces belong to the stream they were first used on; warm-up does real work, so the
caller restores its state; tables that a kernel wants from the host are filled in after the capture.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels

Run = Callable[[], None]
# Enough for cuDNN's search, Triton's compilation and every lazily made buffer; and as many as PyTorch
# wants of DistributedDataParallel before a capture.
WARM_UP = 11


class Recorder(Protocol):
    """What turns a function of fixed tensors into a replay of what it did to them."""

    def context(self) -> AbstractContextManager[None]: ...
    def warm_up(self, run: Run) -> None: ...
    def record(self, run: Run) -> Run: ...
    def close(self) -> None: ...


def unavailable(device: torch.device) -> str | None:
    """Why nothing can be captured on `device`; None: it can."""
    return (
        None if device.type == "cuda" else f"CUDA graphs need a CUDA device, this is {device.type}"
    )


class CudaGraphs:
    """Records on one side stream into one memory pool. A context manager; `close` frees both.

    Replay runs on the current stream, after whatever was put there before: so are copies into the
    buffers that the graph reads.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # Each with the tensors that it reads and nobody else keeps.
        self.graphs: list[tuple[torch.cuda.CUDAGraph, list[Tensor]]] = []

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What the block enqueues goes to the stream that will capture, in order with what is around it.

        DistributedDataParallel must be made in here: it keeps autograd's accumulation nodes, and with them
        the stream of its making.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            # Where the block fails too: what it enqueued may still be writing.
            current.wait_stream(self.stream)

    def warm_up(self, run: Run) -> None:
        """Run eagerly, `WARM_UP` times, on the stream that will capture."""
        with self.context():
            for _ in range(WARM_UP):
                run()

    def record(self, run: Run) -> Run:
        """Capture `run` without executing it; what comes back replays it.

        Raises:
            RuntimeError: whatever CUDA has against an operation of `run`.
        """
        # An earlier graph that waits for the collector would be destroyed in the middle of this capture.
        gc.collect()
        torch.cuda.synchronize(self.device)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        with kernels.capturing() as kept:
            try:
                # A global capture would forbid its own calls to a loader's threads, and fail theirs.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    run()
            finally:
                # Where a broken capture cannot be ended either, torch stays on the capturing stream.
                torch.cuda.set_stream(current)
        self.graphs.append((graph, kept))
        return graph.replay

    def close(self) -> None:
        """Free the graphs and their memory. Replays made here must not run afterwards."""
        if self.graphs:
            torch.cuda.synchronize(self.device)
        for graph, _ in self.graphs:
            graph.reset()
        self.graphs.clear()

    def __enter__(self) -> CudaGraphs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
