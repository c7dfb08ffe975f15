"""`engine profile`: measure a training step by phase and by operator."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import EngineError
from .shared import Commands, add_command, add_import, parse_overrides, path_of


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "profile",
        _profile,
        "measure a training step by phase and by operator, or run it under nsys or ncu",
        overridable=True,
    )
    parser.add_argument("recipe", help="a recipe by name, or a .toml file")
    parser.add_argument(
        "--tool",
        choices=("torch", "nsys", "ncu"),
        default="torch",
        help="profiler: PyTorch's (torch, the default), or NVIDIA's nsys or ncu",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="steps to measure; default %(default)s [count]"
    )
    parser.add_argument("--out", type=path_of, help="folder; default runs/profile-RECIPE")
    add_import(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _profile(arguments: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import asdict

    from .. import plugins, recipes
    from ..device.machine import keep_freed_memory
    from ..performance import profile
    from ..progress import stdout
    from ..runs import build
    from ..runs.folder import plain

    if arguments.steps < 1:
        raise EngineError(f"--steps must be at least 1, got {arguments.steps}")
    recipe = recipes.load(arguments.recipe, parse_overrides(rest))
    keep_freed_memory()
    build.check(recipe, evaluated=False)
    out = arguments.out or Path("runs") / f"profile-{plain(recipe.name)}"
    if profile.is_watched():
        profile.watched(recipe, steps=arguments.steps)
        return 0
    if arguments.tool != "torch":
        words = [arguments.recipe, *plugins.words(), *rest, "--steps", str(arguments.steps)]
        return profile.run_tool(arguments.tool, words, out / arguments.tool)
    profiled = profile.profile(recipe, out, steps=arguments.steps)
    if arguments.json:
        print(json.dumps(asdict(profiled)))
        return 0
    p20, p50, p80 = profiled.step_ms
    machine = profiled.environment
    device = "no GPU" if profiled.device_ms is None else f"{profiled.device_ms:.3g} ms"
    lines = {
        "machine": f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}, commit {machine['commit']}",
        "step": f"p20 {p20:.3g}  p50 {p50:.3g}  p80 {p80:.3g} ms, batch {profiled.batch}, "
        f"{profiled.images_per_second:,.0f} images a second",
        "arithmetic": f"{profiled.gflop:.3g} GFLOP a step, {profiled.gflop_per_s:.3g} GFLOP/s: "
        f"{profiled.share_of_peak:.0%} of the {profiled.peak_gflop_per_s:.3g} that a large matrix "
        "product reaches here",
        "operators": f"{profiled.ops_per_step} a step, {profiled.host_syncs} reads of the device "
        "by the host"
        + (f"; counted with {profiled.stand_in} in place of apex's" if profiled.stand_in else ""),
        "time": f"CPU {profiled.cpu_ms:.3g} ms in operators, device {device}",
        "memory": "unknown"
        if profiled.peak_memory_mb is None
        else f"{profiled.peak_memory_mb} MB at most",
    }
    for name, text in lines.items():
        stdout.print(f"{name:10} {text}", highlight=False, soft_wrap=True)
    print()
    for name, share in profiled.phases.items():
        print(f"{name:16} {share:6.1%}  {'#' * round(50 * share)}")
    columns = f"{'GB/s':>6} {'of copy':>7} {'GFLOP/s':>7} {'of peak':>7}"
    print(f"\n{'operator':34} {'calls':>6} {'ms':>8} {'share':>6} {columns}")
    for row in profiled.top_ops:
        traffic = _rate(row["gb_per_s"], row["share_of_copy"], 6)
        arithmetic = _rate(row["gflop_per_s"], row["share_of_peak"], 7)
        line = f"{row['op'][:34]:34} {row['calls']:6.4g} {row['ms']:8.3f} {row['share']:6.1%}"
        print(f"{line} {traffic} {arithmetic}".rstrip())
    print()
    for name in ("page", "trace", "picture", "next"):
        stdout.print(f"{name:10} {getattr(profiled, name)}", highlight=False, soft_wrap=True)
    return 0


def _rate(value: float | None, share: float | None, width: int) -> str:
    """Write a rate and its share of the machine's best; dashes where they are unknown."""
    if value is None or share is None:
        return f"{'-':>{width}} {'-':>7}"
    return f"{value:{width}.3g} {share:7.0%}"
