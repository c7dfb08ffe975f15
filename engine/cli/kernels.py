"""`engine kernels`: show the compiled form of each Triton kernel."""

from __future__ import annotations

import argparse

from ..errors import EngineError
from .shared import Commands, add_command, add_output, print_rows, store_rows


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "kernels",
        _kernels,
        "show the compiled form of each Triton kernel: registers, spills, occupancy; no GPU needed",
    )
    parser.add_argument("--arch", action="append", help="sm_80, sm_90 or sm_100; may be repeated")
    add_output(parser)


def _kernels(arguments: argparse.Namespace) -> int:
    from .. import results
    from ..kernels import audit

    archs = tuple(arguments.arch or audit.ARCHS)
    if unknown := [a for a in archs if a not in audit.ARCHS]:
        raise EngineError(f"unknown --arch {unknown[0]}: {', '.join(audit.ARCHS)}")
    if arguments.store:
        if arguments.arch:
            raise EngineError("--store keeps all architectures: drop --arch")
        # A wrong place shows before anything is compiled.
        results.place("audit")
    rows = audit.rows(archs)
    print_rows(rows, arguments.json, hidden=("op", "threads", "flat"))
    if arguments.store:
        store_rows("audit", ["kernels"], rows)
    return 0
