"""Timing side by side. The machine's stamp is `engine.device.machine.environment`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..device import precision as precisions

_SEVERAL = 10


@dataclass(frozen=True)
class Timing:
    """Hold quantiles of one call's wall-clock time [ms], and the samples in the order taken."""

    p20: float
    p50: float
    p80: float
    samples: tuple[float, ...] = field(default=(), repr=False)

    def over(self, other: Timing) -> float:
        """How many times as long as `other` of the same run: the median over rounds.

        Both were timed within each round, so a machine that slows down for a while slows down both.
        """
        pairs = zip(self.samples, other.samples, strict=True)
        ratios = sorted(a / b for a, b in pairs)
        return ratios[len(ratios) // 2]


def side_by_side(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    sample_ms: float = 0.5,
    samples: int = 200,
) -> dict[str, Timing]:
    """Time several callables in turn, so that what disturbs the machine disturbs them all alike.

    Each sample repeats its call until `sample_ms` have passed, as found while warming up.

    Args:
        calls: name to callable without arguments.
        device: where the calls work; on a GPU, each call is waited for. Left out: the calls wait.
        seconds: budget for all of them together, warm-up excluded.
        samples: no more than this many of each, and never fewer than 5.
    """
    calls = {name: waiting(call, device) for name, call in calls.items()}
    repeats = {}
    for name, call in calls.items():
        call()
        spent = timed(call, 1)
        if spent < 0.05:
            spent = min(spent, *(timed(call, 1) for _ in range(3)))
        repeats[name] = max(1, min(1000, int(sample_ms * 1e-3 / max(spent, 1e-9))))
        if repeats[name] > 1:
            timed(call, repeats[name])
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(samples):
        if done >= 5 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            times[name].append(timed(call, repeats[name]) / repeats[name])
    return {name: quantiles(values) for name, values in times.items()}


def waiting(call: Callable[[], object], device: torch.device | str) -> Callable[[], object]:
    """`call`, over when the device is done: by itself a GPU's work is only launched."""
    if torch.device(device).type != "cuda":
        return call

    def whole() -> None:
        call()
        torch.cuda.synchronize(device)

    return whole


def several(
    call: Callable[[], object], device: torch.device | str
) -> tuple[Callable[[], object], int]:
    """Return a call that makes `call` several times and waits once, and the number of times.

    Otherwise the launch would be part of a short kernel's time. On the CPU the number is 1.
    """
    if torch.device(device).type != "cuda":
        return call, 1

    def repeated() -> None:
        for _ in range(_SEVERAL):
            call()

    return waiting(repeated, device), _SEVERAL


def timed(call: Callable[[], object], repeats: int = 1) -> float:
    """Return the wall-clock seconds of `repeats` calls."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - begin


def quantiles(values: list[float]) -> Timing:
    """Return the timing of calls that took `values` seconds each."""
    ordered = sorted(values)

    def at(q: float) -> float:
        return 1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return Timing(at(0.2), at(0.5), at(0.8), tuple(values))


def copier(moved: int, device: torch.device | str = "cpu") -> Callable[[], object]:
    """Return a copy of float32 memory that moves `moved` bytes: half read, half written."""
    source = torch.ones(max(moved // 8, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def peak_gflops(device: torch.device | str = "cpu", precision: str = "fp32") -> float:
    """Return the highest rate of a large matrix product, with torch's present threads [GFLOP/s].

    A step's rate is compared with this rate, because the machine reached it; a vendor's number is
    only promised. The best of a few counts, so that other work on the machine does not lower it.
    It takes a second on two cores.

    Args:
        precision: as `engine.device.precision.resolve` gives it.
    """
    where, best = torch.device(device), 0.0
    for size in (1024, 1536) if where.type == "cpu" else (4096, 8192):
        # In the type that the products are made in: autocast would time its casts as well.
        dtype = precisions.AUTOCAST.get(precision, torch.float32)
        a, b = torch.randn(2, size, size, device=where).to(dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> object:
            return torch.mm(a, b)

        call, times = several(product, where)
        with precisions.arithmetic(precision, where):
            call()
            best = max(best, *(2e-9 * times * size**3 / timed(call) for _ in range(3)))
    return best


def load() -> float:
    """Average number of running processes over the last minute, 0 where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0
