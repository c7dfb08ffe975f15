"""The owner of CUDA graphs: one stream to capture on, one pool of memory, one place to free both.

A captured step replays with one launch. PyTorch's notes on CUDA graphs list the operations that a
step may do. The traps here: warm-up runs on the capturing stream, because autograd's accumulation
nodes and the libraries' workspaces belong to the stream of their first use; warm-up does real work,
so the caller restores the state; tables that a kernel wants from the host are filled in after the
capture.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels
from . import distributed
from .watch import ReplayWatch

# A step without arguments: it reads and writes tensors that stay in place.
Work = Callable[[], None]
# Enough for cuDNN's search, Triton's compilation and every lazily made buffer; PyTorch asks for as
# many with DistributedDataParallel before a capture.
WARM_UP = 11


class Recorder(Protocol):
    """Record a function of fixed tensors, to replay its operations on them."""

    def context(self) -> AbstractContextManager[None]: ...
    def warm_up(self, work: Work) -> None: ...
    def record(self, work: Work) -> Work: ...
    def close(self) -> None: ...


def unavailable(device: torch.device) -> str | None:
    """Return why nothing can be captured on `device`, or None."""
    return (
        None if device.type == "cuda" else f"CUDA graphs need a CUDA device, this is {device.type}"
    )


class CudaGraphs:
    """Record on one side stream into one memory pool. A context manager; `close` frees both.

    A replay runs on the current stream, after all earlier work there, and so after copies into the
    buffers that the graph reads. With several processes a thread watches that replays finish.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # Each graph with the tensors that it reads and that nothing else keeps.
        self.graphs: list[tuple[torch.cuda.CUDAGraph, list[Tensor]]] = []
        self._watch: ReplayWatch | None = None

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Enqueue the block's work on the capturing stream, in order with the work around it.

        DistributedDataParallel must be made in such a block: it keeps autograd's accumulation
        nodes, and with them the stream on which it was made.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            # After a failure too: the work of the block may still be writing.
            current.wait_stream(self.stream)

    def warm_up(self, work: Work) -> None:
        """Run `work` eagerly, `WARM_UP` times, on the capturing stream."""
        with self.context():
            for _ in range(WARM_UP):
                work()

    def record(self, work: Work) -> Work:
        """Capture `work` without executing it; return a function that replays it.

        Raises:
            RuntimeError: where CUDA refuses an operation of `work`.
        """
        # The collector could destroy an earlier graph in the middle of this capture.
        gc.collect()
        torch.cuda.synchronize(self.device)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        with kernels.capturing() as kept:
            try:
                # A global capture would fail on calls of a loader's threads.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    work()
            finally:
                # If a broken capture cannot be ended either, torch stays on the capturing stream.
                torch.cuda.set_stream(current)
        self.graphs.append((graph, kept))
        if not distributed.active():
            return graph.replay
        if self._watch is None:
            self._watch = ReplayWatch(
                distributed.PATIENCE.total_seconds(),
                begin=functools.partial(torch.cuda.set_device, torch.cuda.current_device()),
            )
        return self._watch.watched(graph.replay)

    def close(self) -> None:
        """Free the graphs and their memory. Their replays must not run afterwards."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self.graphs:
            torch.cuda.synchronize(self.device)
        for graph, _ in self.graphs:
            graph.reset()
        self.graphs.clear()

    def __enter__(self) -> CudaGraphs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
