"""Profile a training step by phase and by operator; run NVIDIA's profilers on it."""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from .. import files
from ..device import machine, phases, precision
from ..device.machine import environment
from ..errors import EngineError
from ..recipes import Recipe
from ..runs import build
from . import capture_audit, page, plan, timing
from .dispatch import GATHERS

_WARM_UP = 5
_TOOLS = {
    "nsys": (
        "nsys", "profile", "--trace=cuda,nvtx,osrt", "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop", "--cuda-graph-trace=node", "--force-overwrite=true", "-o",
    ),
    "ncu": (
        "ncu", "--set=full", "--nvtx", "--profile-from-start=off", "--graph-profiling=node",
        "--launch-count=200", "--force-overwrite", "-o",
    ),
}  # fmt: skip


class Clock:
    """Listen to the phases of a step and add up each phase's time, inner phases left out.

    The CPU's time is the clock's; a GPU's is the time between events on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._cuda = device.type == "cuda"
        self._stack: list[str] = []
        self._spans: list[tuple[str, Any, Any]] = []
        self._since: Any = None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(self, name: str) -> None:
        self._switch()
        self._stack.append(name)
        self.calls[name] += 1

    def exit(self, name: str) -> None:
        self._switch()
        self._stack.pop()

    def _switch(self) -> None:
        now = self._now()
        if self._stack:
            self._spans.append((self._stack[-1], self._since, now))
        self._since = now

    def finish(self) -> None:
        """Wait for the device and add up the spans."""
        if self._cuda:
            torch.cuda.synchronize()
        for name, begin, end in self._spans:
            self.seconds[name] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        self._spans.clear()


@dataclass(frozen=True)
class Profile:
    """Hold the findings of `engine profile`.

    Attributes:
        step_ms: p20, p50, p80 of the step as training runs it; images_per_second by the median.
        gflop: convolutions and matrix products of a step; gflop_per_s: by the median step;
            share_of_peak: gflop_per_s over peak_gflop_per_s, the best rate of a large matrix
            product on this machine with the step's threads and precision.
        phases: each phase's share of the eager step's time [0..1]; `other`: the rest of the time.
        covered: share of the time in named phases [0..1].
        ops_per_step: operators dispatched, views and allocations left out; by the audit.
        host_syncs: reads of a device value within a step; by the audit.
        stand_in: the optimiser counted in place of apex's; None: the recipe's own.
        cpu_ms, device_ms: of a step in torch.profiler, without the time spent waiting for the
            device; device_ms is None without a GPU.
        top_ops: a row for each operator. calls: a step; ms: a step, callees left out (on a GPU: in
            the kernels it launched); share: of cpu_ms (of device_ms); gb_per_s: its inputs read
            once as float32, a lower bound, None for gathers; share_of_copy: against a large copy
            on this machine; gflop_per_s and share_of_peak: None except for convolutions and
            matrix products.
    """

    recipe: str
    environment: dict[str, Any]
    batch: int
    steps: int
    step_ms: tuple[float, float, float]
    images_per_second: float
    gflop: float
    gflop_per_s: float
    share_of_peak: float
    peak_gflop_per_s: float
    phases: dict[str, float]
    covered: float
    ops_per_step: int
    host_syncs: int
    stand_in: str | None
    cpu_ms: float
    device_ms: float | None
    top_ops: list[dict[str, Any]]
    copy_gb_per_s: float
    peak_memory_mb: int | None
    trace: str
    picture: str
    page: str
    next: str


def profile(recipe: Recipe, out: Path, *, steps: int = 20) -> Profile:
    """Profile the recipe's training step.

    Writes profile.json, profile.html with the same numbers, phases.png and trace.json into `out`.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    out.mkdir(parents=True, exist_ok=True)
    # These two need no measurement: if one fails, no time was spent on measuring.
    audit, gflop = capture_audit.audit(recipe), plan.flops(recipe) / 1e9
    call = build.step_of(recipe)
    for _ in range(_WARM_UP):
        call()
    measured = timing.quantiles([timing.timed(call) for _ in range(steps)])

    device, eager = machine.device(), call
    if device.type == "cuda":
        # Phases are heard from an eager step only: a graph replays without Python.
        eager = build.step_of(replace(recipe, step=replace(recipe.step, capture="off")))
        for _ in range(_WARM_UP):
            eager()
    clock = Clock(device)
    with phases.listening(clock):
        whole = sum(timing.timed(eager) for _ in range(steps))
        clock.finish()
    shares = {name: seconds / whole for name, seconds in clock.seconds.most_common()}
    covered = sum(shares.values())
    shares["other"] = max(0.0, 1.0 - covered)

    trace = out / "trace.json"
    cpu_ms, device_ms, top = _operators(eager, steps=min(steps, 10), trace=trace)
    copied = _copy_gb_per_s(device)
    peak = timing.peak_gflops(device, precision.resolve(recipe.step.precision, device))
    for row in top:
        row["share_of_copy"] = row["gb_per_s"] and row["gb_per_s"] / copied
        row["share_of_peak"] = row["gflop_per_s"] and row["gflop_per_s"] / peak
    rate = 1e3 * gflop / measured.p50
    result = Profile(
        recipe=recipe.name,
        environment=environment(),
        batch=recipe.optim.batch_size,
        steps=steps,
        step_ms=(measured.p20, measured.p50, measured.p80),
        images_per_second=recipe.optim.batch_size / measured.p50 * 1e3,
        gflop=gflop,
        gflop_per_s=rate,
        share_of_peak=rate / peak,
        peak_gflop_per_s=peak,
        phases=shares,
        covered=covered,
        ops_per_step=sum(audit.ops.values()),
        host_syncs=sum("on the host" in line for line in audit.complaints),
        stand_in=audit.stand_in,
        cpu_ms=cpu_ms,
        device_ms=device_ms,
        top_ops=top,
        copy_gb_per_s=copied,
        peak_memory_mb=machine.peak_memory_mb(),
        trace=str(trace),
        picture=str(out / "phases.png"),
        page=str(out / "profile.html"),
        next=shlex.join(command("nsys", [recipe.name], out / "nsys")),
    )
    files.write_json(out / "profile.json", asdict(result))
    page.write(asdict(result))
    return result


def _operators(
    call: Callable[[], object], *, steps: int, trace: Path
) -> tuple[float, float | None, list[dict[str, Any]]]:
    """Return CPU and device milliseconds a step, and the operators that take the most time."""
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, record_shapes=True) as session:
        for _ in range(steps):
            call()
    session.export_chrome_trace(str(trace))
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    flops = _flops(call, session.events(), kind)
    cpu, device, rows = tally(session.key_averages(group_by_input_shape=True), kind)
    total = device if cuda else cpu
    top = sorted(rows.items(), key=lambda item: -item[1]["us"])[:12]
    rows_of_top = [
        {
            "op": name,
            "calls": row["calls"] / steps,
            "ms": row["us"] / 1e3 / steps,
            "share": row["us"] / max(total, 1e-9),
            "gb_per_s": None if name in GATHERS else row["bytes"] / max(row["us"], 1e-9) / 1e3,
            "gflop_per_s": flops[name] * steps / max(row["us"], 1e-9) / 1e3 or None,
        }
        for name, row in top
    ]
    return cpu / 1e3 / steps, device / 1e3 / steps if cuda else None, rows_of_top


def tally(events: Iterable[Any], kind: str) -> tuple[float, float, dict[str, dict[str, float]]]:
    """Add up a profiler's averages: CPU us, device us, and calls, us and bytes by operator.

    With a GPU the averages hold each kernel twice: as device time of the operator that launched it,
    and as a separate row. The device's time is the sum of the separate rows, as in torch's table;
    these rows are no operators.

    Args:
        kind: the attribute that holds an operator's time without its callees.
    """
    rows: dict[str, dict[str, float]] = {}
    cpu = device = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            # These rows include ranges around kernels, such as an optimiser's.
            device += 0.0 if event.is_user_annotation else event.self_device_time_total
            continue
        if event.is_legacy:
            # Without CUPTI the kernels have no rows.
            device += event.self_device_time_total
        if not event.key.endswith("Synchronize"):  # cudaDeviceSynchronize and its like only wait
            cpu += event.self_cpu_time_total
        row = rows.setdefault(event.key, {"calls": 0, "us": 0.0, "bytes": 0.0})
        numbers = [shape for shape in event.input_shapes or () if _is_shape(shape)]
        row["calls"] += event.count
        row["us"] += getattr(event, kind)
        row["bytes"] += event.count * sum(4 * torch.Size(shape).numel() for shape in numbers)
    # On a GPU most operators only call others and launch nothing.
    return cpu, device, {name: row for name, row in rows.items() if row["us"] > 0}


def _flops(call: Callable[[], object], events: Sequence[Any], kind: str) -> Counter[str]:
    """Return the FLOPs of a step by the profiler's operator.

    The profiler's count (`with_flops`) lacks a convolution's backward pass and the engine's ops,
    and books the forward pass to `aten::conv2d`, which only calls the library. So this function
    counts FLOPs at dispatch. Where an operator only calls another, the other gets the FLOPs.
    """
    flops_of: Counter[str] = Counter()
    for name, flops in plan.count(call).items():
        times: dict[str, list[float]] = {}
        waiting = [event for event in events if event.name == name]
        while waiting:
            event = waiting.pop()
            times.setdefault(event.name, []).append(getattr(event, kind))
            waiting += event.cpu_children
        # The median ignores a call that was interrupted by another process.
        typical = {other: statistics.median(taken) for other, taken in times.items()}
        longest = max(typical, key=lambda other: typical[other], default=name)
        only_calls = typical.get(name, 0.0) < 0.1 * typical.get(longest, 0.0)
        flops_of[longest if only_calls else name] += flops
    return flops_of


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and bool(shape) and all(isinstance(n, int) for n in shape)


def _copy_gb_per_s(device: torch.device) -> float:
    """Return the best rate of five copies of 64 MB, bytes read plus written [GB/s]."""
    moved = 1 << 27
    copy, times = timing.several(timing.copier(moved, device), device)
    copy()
    return moved * times / min(timing.timed(copy) for _ in range(5)) / 1e9


def command(tool: str, words: Sequence[str], out: Path) -> list[str]:
    """Return the command that runs `engine profile WORDS` under `tool` ("nsys" or "ncu")."""
    inner = [sys.executable, "-m", "engine", "profile", *words]
    return ["env", f"{phases.WATCHED}={tool}", *_TOOLS[tool], str(out), *inner]


def run_tool(tool: str, words: Sequence[str], out: Path) -> int:
    """Run the external profiler and return its exit status.

    Raises:
        EngineError: if it is not installed; the line holds the command for another machine.
    """
    words = command(tool, words, out)
    if shutil.which(tool) is None:
        raise EngineError(
            f"{tool} is not installed here; on a machine that has it, run: {shlex.join(words)}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(words).returncode


def watched(recipe: Recipe, *, steps: int = 20) -> None:
    """Run steps between the profiler's marks, with NVTX ranges, in the process of `run_tool`."""
    call = build.step_of(recipe)
    for _ in range(_WARM_UP):
        call()
    runtime = torch.cuda.cudart()
    with phases.nvtx():
        runtime.cudaProfilerStart()
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
        runtime.cudaProfilerStop()


def is_watched() -> bool:
    """Tell whether a profiler started this process to watch it."""
    return os.environ.get(phases.WATCHED) in _TOOLS and torch.cuda.is_available()
