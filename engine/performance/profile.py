"""Where a step's time goes: by phase, by operator, and the commands for NVIDIA's profilers."""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import (
    PercentFormatter,
)
from torch.autograd import DeviceType

from .. import files, pages, pictures
from ..device import machine, phases, precision
from ..device.machine import environment
from ..errors import EngineError
from ..pictures import SERIES
from ..recipes import Recipe
from ..runs import build
from . import capture_audit, plan, timing


def draw_phases(ax: Axes, shares: Mapping[str, float], step_ms: float) -> None:
    """A bar for each phase of a step: its share of the time [0..1], and milliseconds."""
    names = list(shares)[::-1]
    ax.barh(names, [shares[name] for name in names], color=SERIES[0])
    for place, name in enumerate(names):
        text = f"{shares[name]:.1%}, {shares[name] * step_ms:.3g} ms"
        ax.annotate(text, (shares[name], place), (4, 0), textcoords="offset points", va="center")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlim(0, 1.25 * max(shares.values()))
    ax.set_title(f"Where a step of {step_ms:.3g} ms goes")


_WARM_UP = 5
# They read a few rows of what they are given: its size says nothing of the traffic.
_GATHERS = {"engine::augment", "engine::recall", "engine::remember", "aten::index_select"}
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
    """A phase listener that adds up each phase's own time, inner phases not counted twice.

    On the CPU by the clock; on a GPU by events, which say how long the device was at it.
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
        """Sum up; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        for name, begin, end in self._spans:
            self.seconds[name] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        self._spans.clear()


@dataclass(frozen=True)
class Profile:
    """What `engine profile` found.

    Attributes:
        step_ms: p20, p50, p80 of the step as training runs it; images_per_second by the median.
        gflop: of a step, convolutions and matrix products; gflop_per_s by the median step, share_of_peak
            against peak_gflop_per_s: the best that a large matrix product reached on this machine, with
            the step's threads and precision.
        phases: share of the eager step's time of each phase, `other` what no phase covers [0..1].
        covered: what the named phases cover [0..1].
        ops_per_step: operators dispatched, views and allocations left out; by the audit.
        host_syncs: reads of a device value within a step; by the audit.
        stand_in: the optimiser that the audit counted in place of apex's; None: the recipe's own.
        cpu_ms, device_ms: of a step in torch.profiler, waiting for the device not counted; device_ms is
            None without a GPU.
        top_ops: op, calls a step, ms a step of its own (on a GPU: in the kernels it launched), share of
            cpu_ms (of device_ms), gb_per_s (its inputs taken as float32, once: a lower bound; None for
            gathers), share_of_copy (against a large copy on this machine), gflop_per_s and share_of_peak
            (None for what is neither convolution nor matrix product).
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

    Writes profile.json, the page profile.html with the same numbers, phases.png and trace.json into `out`.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    out.mkdir(parents=True, exist_ok=True)
    # What needs no measurement first: where it fails, none was made for nothing.
    found, gflop = capture_audit.audit(recipe), plan.flops(recipe) / 1e9
    call = build.step_of(recipe)
    for _ in range(_WARM_UP):
        call()
    measured = timing.quantiles([timing.timed(call) for _ in range(steps)])

    device, eager = machine.device(), call
    if device.type == "cuda":
        # By phase the step must run eagerly: Python is not there when a graph replays.
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
    picture = out / "phases.png"
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
        ops_per_step=sum(found.ops.values()),
        host_syncs=sum("on the host" in line for line in found.complaints),
        stand_in=found.stand_in,
        cpu_ms=cpu_ms,
        device_ms=device_ms,
        top_ops=top,
        copy_gb_per_s=copied,
        peak_memory_mb=machine.peak_memory_mb(),
        trace=str(trace),
        picture=str(picture),
        page=str(out / "profile.html"),
        next=shlex.join(command("nsys", [recipe.name], out / "nsys")),
    )
    with pictures.style():
        figure, (ax,) = pictures.panels(width=8.0, height=3.4)
        draw_phases(ax, shares, measured.p50)
        pictures.save_png(figure, picture)
        chart = Markup(pictures.svg(figure, "phases"))
    files.write_json(out / "profile.json", asdict(result))
    page = pages.render(
        "profile",
        profile=result,
        chart=chart,
        folder=out.name,
        trace=trace.name,
        environment={k: v for k, v in result.environment.items() if v is not None},
    )
    files.write_text(out / "profile.html", page)
    return result


def _operators(
    call: Callable[[], object], *, steps: int, trace: Path
) -> tuple[float, float | None, list[dict[str, Any]]]:
    """CPU and device milliseconds a step, and the operators with the most time of their own."""
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
    found = [
        {
            "op": name,
            "calls": row["calls"] / steps,
            "ms": row["us"] / 1e3 / steps,
            "share": row["us"] / max(total, 1e-9),
            "gb_per_s": None if name in _GATHERS else row["bytes"] / max(row["us"], 1e-9) / 1e3,
            "gflop_per_s": flops[name] * steps / max(row["us"], 1e-9) / 1e3 or None,
        }
        for name, row in top
    ]
    return cpu / 1e3 / steps, device / 1e3 / steps if cuda else None, found


def tally(events: Iterable[Any], kind: str) -> tuple[float, float, dict[str, dict[str, float]]]:
    """Microseconds of the CPU and of the device in a profiler's averages; calls, us and bytes of every operator.

    With a GPU the averages hold each kernel twice: under the operator that launched it, as its device time,
    and as a row of its own. The device's time is that of the latter (as in torch's table), which are no
    operators.

    Args:
        kind: the attribute that says an operator's own time.
    """
    rows: dict[str, dict[str, float]] = {}
    cpu = device = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            # The ranges around kernels, such as an optimiser's, lie there as well.
            device += 0.0 if event.is_user_annotation else event.self_device_time_total
            continue
        if event.is_legacy:
            # Without CUPTI there are no rows of kernels.
            device += event.self_device_time_total
        if not event.key.endswith("Synchronize"):  # cudaDeviceSynchronize and its like only wait
            cpu += event.self_cpu_time_total
        row = rows.setdefault(event.key, {"calls": 0, "us": 0.0, "bytes": 0.0})
        numbers = [shape for shape in event.input_shapes or () if _is_shape(shape)]
        row["calls"] += event.count
        row["us"] += getattr(event, kind)
        row["bytes"] += event.count * sum(4 * torch.Size(shape).numel() for shape in numbers)
    # On a GPU most only call others.
    return cpu, device, {name: row for name, row in rows.items() if row["us"] > 0}


def _flops(call: Callable[[], object], events: Sequence[Any], kind: str) -> Counter[str]:
    """FLOPs of a step by the profiler's operator.

    The profiler's own count (`with_flops`) lacks a convolution's backward pass and the engine's ops, and
    books the forward pass to `aten::conv2d`, which only calls the library. So they are counted where they
    are dispatched; of an operator that only calls another, they are the other's.
    """
    found: Counter[str] = Counter()
    for name, flops in plan.count(call).items():
        times: dict[str, list[float]] = {}
        waiting = [event for event in events if event.name == name]
        while waiting:
            event = waiting.pop()
            times.setdefault(event.name, []).append(getattr(event, kind))
            waiting += event.cpu_children
        # Medians: an operator may be stopped for another process at any of its calls.
        typical = {other: statistics.median(taken) for other, taken in times.items()}
        longest = max(typical, key=lambda other: typical[other], default=name)
        only_calls = typical.get(name, 0.0) < 0.1 * typical.get(longest, 0.0)
        found[longest if only_calls else name] += flops
    return found


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and bool(shape) and all(isinstance(n, int) for n in shape)


def _copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 64 MB, the best of five."""
    moved = 1 << 27
    copy, times = timing.several(timing.copier(moved, device), device)
    copy()
    return moved * times / min(timing.timed(copy) for _ in range(5)) / 1e9


def command(tool: str, words: Sequence[str], out: Path) -> list[str]:
    """The command that has `tool` ("nsys" or "ncu") watch `engine profile WORDS`."""
    inner = [sys.executable, "-m", "engine", "profile", *words]
    return ["env", f"{phases.WATCHED}={tool}", *_TOOLS[tool], str(out), *inner]


def run_tool(tool: str, words: Sequence[str], out: Path) -> int:
    """Run the profiler where it is installed; its exit status.

    Raises:
        EngineError: where it is not: with the command to run where it is.
    """
    words = command(tool, words, out)
    if shutil.which(tool) is None:
        raise EngineError(f"{tool} is not installed here; where it is, run: {shlex.join(words)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(words).returncode


def watched(recipe: Recipe, *, steps: int = 20) -> None:
    """Run steps between the profiler's marks, with NVTX ranges: what `run_tool` starts."""
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
    """Whether a profiler started this process to watch it."""
    return os.environ.get(phases.WATCHED) in _TOOLS and torch.cuda.is_available()
