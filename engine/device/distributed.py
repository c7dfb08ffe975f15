"""Many processes as one training run: who we are, and the few things we say to each other.

Started by torchrun (or `engine train --nproc N`), one process a device. Gradients are averaged by
PyTorch's DistributedDataParallel while the backward pass runs; attacks stay within a rank. What is not
averaged every step is kept the same everywhere by what is here. Alone, every call does nothing.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import EngineError

# A rank that waits this long for another takes it for dead.
_PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among `size`.

    Attributes:
        rank: 0..size-1; rank 0 alone writes, logs and shows progress.
        restarts: how often torchrun has started this run again.
    """

    rank: int = 0
    size: int = 1
    restarts: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> int:
        """This process's part of a global batch.

        Raises:
            EngineError: if it cannot be dealt out evenly.
        """
        if batch % self.size:
            raise EngineError(
                f"optim.batch_size = {batch} cannot be shared by {self.size} processes: take a multiple"
            )
        return batch // self.size


def join() -> World:
    """The world that torchrun's environment describes; on first call the processes meet.

    Raises:
        EngineError: for more processes than GPUs on this machine, where there are GPUs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0)) if size > 1 else 0
    if cuda and local >= torch.cuda.device_count():
        raise EngineError(
            f"process {local} on this machine has no GPU: there are {torch.cuda.device_count()}"
        )
    if size > 1 and not dist.is_initialized():
        options: dict[str, Any] = {"timeout": _PATIENCE}
        if cuda:
            torch.cuda.set_device(local)
            # NCCL then connects at once, and guesses no device in a barrier.
            options["device_id"] = torch.device("cuda", local)
        dist.init_process_group("nccl" if cuda else "gloo", **options)
    return World(rank, size, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def leave() -> None:
    """The run is over for this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def active() -> bool:
    """Whether there are others."""
    return size() > 1


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until all are here."""
    if active():
        dist.barrier()


def mean_(t: Tensor) -> Tensor:
    """`t` averaged over all processes, in place."""
    if active():
        dist.all_reduce(t)
        t /= size()
    return t


def average_statistics(model: nn.Module) -> None:
    """Make BatchNorm's running statistics, which each rank takes of its own images, those of all."""
    if active():
        for t in model.buffers():
            if t.is_floating_point():
                mean_(t)


def gather(t: Tensor) -> Tensor:
    """[B, ...] of every process, [size B, ...] in rank order: the same everywhere."""
    if not active():
        return t
    found = t.new_empty((size() * t.shape[0], *t.shape[1:]))
    # PyTorch 2.13 has renamed it, and warns of the older name.
    together = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    together(found, t.contiguous())
    return found


class _Whole(nn.Module):
    """From batch to loss as one module: what DistributedDataParallel wants to see."""

    def __init__(self, network: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.compute = network, compute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self.network, *args, **kwargs)


def averaged(network: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute(network, ...)` -> outcome; its loss's backward pass leaves gradients averaged over all ranks.

    The whole computation is inside: an objective makes many passes, and only the last backward pass, the
    one that reaches the weights, is to be heard of. Statistics stay with their rank, see
    `average_statistics`.
    """
    if not active():
        return functools.partial(compute, network)
    # Small gradients whose strides differ where nothing else does: not worth a word.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    parallel = nn.parallel.DistributedDataParallel
    # As above: renamed.
    known = inspect.signature(parallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    return parallel(_Whole(network, compute), **options)


def is_broken(error: BaseException) -> bool:
    """Whether `error` says that another process is no longer there."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        active() and any(word in text for word in ("gloo", "nccl", "connection", "timed out"))
    )


def launch(processes: int, words: Sequence[str], *, restarts: int = 3) -> int:
    """Run `python -m engine WORDS` in as many processes on this machine, as torchrun does; the exit status.

    A process that dies takes the others with it; all are started again, up to `restarts` times, and go on
    from the run's last checkpoint.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it has to say of a failure the processes have said themselves.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # Shared with the launcher, the store would hand a restarted process its dead forerunners' addresses
    # (github.com/pytorch/pytorch/issues/135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "engine", *words)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode or 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0
