"""Compare every op with eager PyTorch and with torch.compile of the same formula, on one device.

The opponents are what a user would write by hand: torch's random numbers where the op draws some,
the library's convolution backward for `input_grad_step`, and the plain formula of
`kernels.reference` elsewhere. The op is called as in training, with checks and dispatch. On a GPU
every call also launches and waits, which a captured step does not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import torch

from engine.device import machine, precision
from engine.kernels import backends
from engine.performance import timing

from .op_cases import Case, cases_on


def run(quick: bool) -> list[dict[str, object]]:
    """Check and time every case on the device that `engine train` would take.

    Args:
        quick: fewer shapes and samples, and torch.compile at the batch of 256 alone; under 60 s.
    Returns:
        One row per case and backend (the op's own, "eager", "compile"): op, shape, backend, p20_ms,
        p50_ms, p80_ms, gbps, share_of_copy (against a copy of as many bytes in the same run),
        speedup_vs_eager, speedup_vs_compile, and note. Where the op disagreed with the reference in
        this run, or the opponent is missing, ratios are None and `note` holds the reason.
    """
    device = machine.device()
    served = {row["op"]: row for row in backends.table() if row["device"] == device.type}
    load, cores = timing.load(), os.cpu_count() or 1
    # Busy cores delay threads that wait for each other: such ratios can be off a hundredfold.
    busy = f"machine busy (load {load} on {cores} cores): distrust" if load > cores + 0.5 else None
    # A first compilation takes some seconds; the next run finds it in Inductor's cache.
    stop_compiling = time.monotonic() + (30.0 if quick else math.inf)
    rows = []
    # By default PyTorch uses tf32 in the convolutions on a GPU.
    with torch.no_grad(), precision.arithmetic("fp32", device):
        for case in cases_on(device, quick):
            small = "128x3" not in case.shape and "2048" not in case.shape
            if quick and not small:
                why_not = "not compiled in the quick run"
            elif time.monotonic() > stop_compiling:
                why_not = "no time left to compile in the quick run"
            else:
                why_not = None
            notes = [busy] if busy else []
            server = served[case.name.split()[0]]
            if server["backend"] == "reference":
                notes.append(f"served by plain PyTorch: {server['why']}")
            seconds = 0.25 if quick else 2.0
            rows += _measure(case, device, server["backend"], notes, why_not, seconds)
    return rows


def _measure(
    case: Case,
    device: torch.device,
    served: str,
    notes: list[str],
    why_not: str | None,
    seconds: float,
) -> list[dict[str, object]]:
    try:
        with device:
            case.check()
        correct = True
    except AssertionError as error:
        correct = False
        notes.append(f"disagrees with the reference: {error}")
    calls: dict[str, Callable[[], object]] = {
        "op": case.op,
        "eager": lambda: case.eager(*case.args),
        "copy": timing.copier(case.bytes, device),
    }
    if why_not is None:
        try:
            compiled = torch.compile(case.eager)
            compiled(*case.args)
            calls["compile"] = lambda: compiled(*case.args)
        except Exception as error:  # the compiler may raise anything
            why_not = f"torch.compile failed: {type(error).__name__}"
    if why_not:
        notes.append(why_not)
    times = timing.side_by_side(calls, device=device, seconds=seconds)

    def ratio(of: str, to: str) -> float | None:
        known = correct and of in times and to in times
        return round(times[of].over(times[to]), 3) if known else None

    rows = []
    for call, backend in (("op", served), ("eager", "eager"), ("compile", "compile")):
        if call in times:
            t = times[call]
            rows.append(
                {
                    "op": case.name,
                    "shape": case.shape,
                    "backend": backend,
                    "p20_ms": round(t.p20, 5),
                    "p50_ms": round(t.p50, 5),
                    "p80_ms": round(t.p80, 5),
                    "gbps": round(case.bytes / t.p50 / 1e6, 3),
                    "share_of_copy": ratio("copy", call),
                    "speedup_vs_eager": ratio("eager", call),
                    "speedup_vs_compile": ratio("compile", call),
                    "note": "; ".join(notes),
                }
            )
    return rows
