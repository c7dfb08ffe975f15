"""`engine kernels`: what the compiler makes of each Triton kernel."""

from __future__ import annotations

import argparse

from ..errors import EngineError
from .shared import Commands, add_command, print_rows


def add(commands: Commands) -> None:
    parser = add_command(
        commands, "kernels", _kernels, "what the compiler makes of each Triton kernel, with no GPU"
    )
    parser.add_argument("--arch", action="append", help="sm_80, sm_90 or sm_100; may be repeated")
    parser.add_argument("--json", action="store_true")


def _kernels(arguments: argparse.Namespace) -> int:
    from ..kernels import audit

    archs = tuple(arguments.arch or audit.ARCHS)
    if unknown := [a for a in archs if a not in audit.ARCHS]:
        raise EngineError(f"unknown --arch {unknown[0]}: {', '.join(audit.ARCHS)}")
    print_rows(audit.rows(archs), arguments.json, hidden=("op", "threads", "flat"))
    return 0
