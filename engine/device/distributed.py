"""Several processes as one training run: their ranks, and the tensors that they exchange.

torchrun (or `engine train --nproc N`) starts one process a device. PyTorch's
DistributedDataParallel averages gradients while the backward pass runs; attacks stay within a rank.
The functions here keep all else the same in every process. In a single process every call does
nothing.
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

# After this wait a rank takes another for dead.
_PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """Hold this process's place among `size` processes.

    Attributes:
        rank: 0..size-1; rank 0 alone writes, logs and shows progress.
        restarts: the number of times that torchrun has restarted this run.
    """

    rank: int = 0
    size: int = 1
    restarts: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> int:
        """Return the size of this process's part of a global batch.

        Raises:
            EngineError: if it cannot be dealt out evenly.
        """
        if batch % self.size:
            raise EngineError(
                f"optim.batch_size = {batch} cannot be shared by {self.size} processes: take a "
                "multiple"
            )
        return batch // self.size


def join(patience: timedelta = _PATIENCE) -> World:
    """Return the world in torchrun's environment; the first call connects the processes.

    Args:
        patience: the wait after which a rank takes another for dead.
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
        options: dict[str, Any] = {"timeout": patience}
        if cuda:
            torch.cuda.set_device(local)
            # NCCL then connects at once, and guesses no device in a barrier.
            options["device_id"] = torch.device("cuda", local)
        dist.init_process_group("nccl" if cuda else "gloo", **options)
    return World(rank, size, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def leave() -> None:
    """Leave the run, at its end for this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def active() -> bool:
    """Return whether there are other processes."""
    return size() > 1


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Wait until all processes are here."""
    if active():
        dist.barrier()


def mean_(t: Tensor) -> Tensor:
    """Average `t` over all processes, in place, and return it."""
    if active():
        dist.all_reduce(t)
        t /= size()
    return t


def average_statistics(model: nn.Module) -> None:
    """Average BatchNorm's running statistics, which each rank takes of its own images."""
    if active():
        for t in model.buffers():
            if t.is_floating_point():
                mean_(t)


def gather(t: Tensor) -> Tensor:
    """Return the tensors [B, ...] of all processes as [size B, ...], in rank order."""
    if not active():
        return t
    found = t.new_empty((size() * t.shape[0], *t.shape[1:]))
    # PyTorch 2.13 has renamed it, and warns of the older name.
    together = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    together(found, t.contiguous())
    return found


def gather_objects(value: Any) -> list[Any]:
    """Return the plain values of all processes, in rank order."""
    if not active():
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


class _Whole(nn.Module):
    """Compute from batch to loss in one module, for DistributedDataParallel."""

    def __init__(self, network: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.compute = network, compute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self.network, *args, **kwargs)


def averaged(network: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return `compute` for `network`; its backward pass averages gradients over all ranks.

    DistributedDataParallel wraps the whole computation: an objective makes many passes, and only
    the last backward pass reaches the weights. Statistics stay with their rank, see
    `average_statistics`.
    """
    if not active():
        return functools.partial(compute, network)
    # The warning concerns small gradients, whose strides alone differ.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    parallel = nn.parallel.DistributedDataParallel
    # As above: renamed.
    known = inspect.signature(parallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    return parallel(_Whole(network, compute), **options)


def is_broken(error: BaseException) -> bool:
    """Return whether `error` means that another process has gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        active() and any(word in text for word in ("gloo", "nccl", "connection", "timed out"))
    )


def launch(processes: int, words: Sequence[str], *, restarts: int = 3) -> int:
    """Run `python -m engine WORDS` in several processes on this machine, as torchrun does.

    If a process dies, the others are stopped too; all are started again, up to `restarts` times,
    and go on from the run's last checkpoint.

    Returns:
        The exit status.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes have reported a failure themselves.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # Shared with the launcher, the store would hand a restarted process its dead forerunners'
    # addresses (github.com/pytorch/pytorch/issues/135712).
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
