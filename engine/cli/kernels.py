"""`engine kernels`: show the compiled form of each Triton kernel, or execute it."""

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
    parser.add_argument(
        "--arch", action="append", help="sm_80, sm_90 or sm_100; may be repeated; default all"
    )
    parser.add_argument(
        "--run",
        dest="execute",
        action="store_true",
        help="execute the compiled kernels on the CPU and compare them with the reference",
    )
    add_output(parser)


def _kernels(arguments: argparse.Namespace) -> int:
    from ..kernels import audit, backends

    archs = tuple(arguments.arch or audit.ARCHS)
    if unknown := [a for a in archs if a not in audit.ARCHS]:
        raise EngineError(f"unknown --arch {unknown[0]}: {', '.join(audit.ARCHS)}")
    if arguments.store and arguments.execute:
        raise EngineError("--store keeps what the compiler made: drop --run")
    if arguments.store and arguments.arch:
        raise EngineError("--store keeps all architectures: drop --arch")
    module, reason = backends.load("triton")
    if module is None:
        raise EngineError(f"no kernels here: {reason}; it comes with robust-engine[gpu]")
    return _run(archs, arguments.json) if arguments.execute else _audit(archs, arguments)


def _audit(archs: tuple[str, ...], arguments: argparse.Namespace) -> int:
    """Compile the kernels and take the machine code apart."""
    from .. import results
    from ..kernels import audit

    if arguments.store:
        # A wrong place shows before anything is compiled.
        results.place("audit")
    rows = audit.rows(archs)
    print_rows(rows, arguments.json, hidden=("op", "threads", "flat"))
    if arguments.store:
        store_rows("audit", ["kernels"], rows)
    return 0


def _run(archs: tuple[str, ...], as_json: bool) -> int:
    """Execute the kernels; return 1 if one faults or computes what the reference does not."""
    from ..kernels.ptx import run

    rows = run.rows(archs)
    print_rows(rows, as_json, hidden=("launched",))
    return 0 if all(row["outcome"] == run.EXECUTED for row in rows) else 1
