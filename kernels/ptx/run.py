"""Execute every kernel as compiled and hold its results against the reference.

python -m engine.kernels.ptx.run [--arch sm_90] [--extent all]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .. import audit, backends
from ..accuracy import error
from .arithmetic import Unknown
from .cases import Case, Extent, cases
from .driver import executing
from .memory import Fault

EXECUTED = "executed"


def rows(
    archs: tuple[str, ...] = audit.ARCHS, extent: Extent = "types", seeds: int = 2
) -> list[dict]:
    """Execute each kernel of the audit's table; return what `each_row` yields."""
    return list(each_row(archs, extent, seeds))


def each_row(
    archs: tuple[str, ...] = audit.ARCHS, extent: Extent = "types", seeds: int = 2
) -> Iterator[dict]:
    """Execute each kernel of the audit's table; yield a row a case and architecture, when done.

    Where TRITON_INTERPRET is set a second Python without it does the work, as for `audit.rows`.

    Args:
        extent: as for `cases.cases`.
        seeds: orders of blocks and warps that each case is executed in.
    Yields:
        kernel, dtype, sizes: see `cases.Case`; arch;
        launched: the names of the kernels that the op launched;
        difference: the largest error against the reference in float64;
        allowed: the largest error that the rule of `accuracy` allows that output;
        same_bits: whether all outputs are the reference's in the inputs' own precision; these three
            are None where nothing came out;
        outcome: EXECUTED, or what went wrong.
    Raises:
        ValueError: an architecture that is not in `audit.ARCHS`.
        RuntimeError: Triton is missing, or the second Python failed.
    """
    for arch in archs:
        if arch not in audit.ARCHS:
            raise ValueError(f"arch must be one of {', '.join(audit.ARCHS)}, got {arch!r}")
    module, reason = backends.load("triton")
    if module is None:
        raise RuntimeError(f"no kernels to execute: {reason}")
    from ..triton import launch

    if launch.INTERPRETING:
        yield from _rows_elsewhere(archs, extent, seeds)
        return
    for case in cases(extent):
        yield from rows_of(case, archs, seeds)


def rows_of(case: Case, archs: Iterable[str], seeds: int) -> list[dict]:
    """Execute one case; needs a Triton that compiles."""
    with backends.use("reference"):
        plain, exact = _call(_copied(case)), _call(_copied(_widened(case)))
    return [_row(case, arch, plain, exact, seeds) for arch in archs]


def _row(case: Case, arch: str, plain: list[Tensor], exact: list[Tensor], seeds: int) -> dict:
    row: dict[str, Any] = {"kernel": case.kernel, "dtype": case.dtype, "sizes": case.sizes}
    row |= {"arch": arch, "launched": [], "difference": None, "allowed": None, "same_bits": None}
    launches: list[str] = []
    results: list[list[Tensor]] = []
    try:
        for seed in range(seeds):
            own = _copied(case)
            with executing(arch, seed, _tensors(own.args, own.options)) as launches:
                results.append(_call(own))
    except Unknown as unknown:
        return {**row, "outcome": f"not executed: {unknown}"}
    except Fault as fault:
        return {**row, "outcome": f"fault: {fault}"}
    row["launched"] = launches
    found = results[0]
    pairs = [
        error(a, p, e, case.rounding or 0.0)
        for a, p, e in zip(found, plain, exact, strict=True)
        if a.is_floating_point()
    ]
    row["difference"], row["allowed"] = max(pairs, default=(0.0, 0.0))
    row["same_bits"] = _same(found, plain)
    row["outcome"] = _outcome(case, results, plain, pairs)
    return row


def _outcome(
    case: Case, results: list[list[Tensor]], plain: list[Tensor], pairs: list[tuple[float, float]]
) -> str:
    found = results[0]
    if not all(_same(found, other) for other in results[1:]):
        return "wrong: the result depends on the order of blocks or warps, or on what nobody wrote"
    if not all(torch.equal(a.isnan(), p.isnan()) for a, p in zip(found, plain, strict=True)):
        return "wrong: NaN where none belongs, or none"
    whole = [(a, p) for a, p in zip(found, plain, strict=True) if not a.is_floating_point()]
    if not _same(*zip(*whole, strict=True) if whole else ((), ())):
        return "wrong: whole numbers differ from the reference's"
    if case.rounding is None and not _same(found, plain):
        return "wrong: not the bits of the reference"
    if case.rounding is not None and any(difference > allowed for difference, allowed in pairs):
        return "wrong: the difference is larger than allowed"
    return EXECUTED


def _same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(*map(_without_nan, pair)) for pair in zip(a, b, strict=True))


def _without_nan(t: Tensor) -> Tensor:
    return t.nan_to_num(nan=12345.0) if t.is_floating_point() else t


def _widened(case: Case) -> Case:
    """Return the case in float64."""

    def wide(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floats else value

    args, options = tree_map(wide, (case.args, case.options))
    return case._replace(args=args, options=options)


def _copied(case: Case) -> Case:
    """Return the case with tensors of its own, to be written to."""

    def own(value: Any) -> Any:
        return _copy(value) if isinstance(value, Tensor) else value

    args, options = tree_map(own, (case.args, case.options))
    return case._replace(args=args, options=options)


def _call(case: Case) -> list[Tensor]:
    """Call the op; return its outputs, and its tensor arguments after the call."""
    with torch.no_grad():
        outputs = case.op(*case.args, **case.options)
    return _tensors(outputs, case.args, case.options)


def _tensors(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _copy(t: Tensor) -> Tensor:
    """Return a copy with the strides and the alignment of `t`."""
    copy = torch.empty(0, dtype=t.dtype)
    return copy.set_(t.untyped_storage().clone(), t.storage_offset(), t.size(), t.stride())


def _rows_elsewhere(archs: tuple[str, ...], extent: Extent, seeds: int) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, "--json", "--extent", extent, "--seeds", str(seeds)]
    command += ["--arch", *archs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the kernels were not executed: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _main() -> int:
    """Print each row when it is done, for all cases take long; return 1 if one is bad."""
    parser = argparse.ArgumentParser(description="Execute every Triton kernel as compiled.")
    parser.add_argument("--json", action="store_true", help="print a line of JSON a row; status 0")
    parser.add_argument("--arch", nargs="+", choices=audit.ARCHS, default=audit.ARCHS)
    parser.add_argument("--extent", choices=get_args(Extent), default="types")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    count = bad = 0
    for row in each_row(tuple(options.arch), options.extent, options.seeds):
        count, bad = count + 1, bad + (row["outcome"] != EXECUTED)
        text = "  ".join(f"{key}={value}" for key, value in row.items())
        print(json.dumps(row) if options.json else text, flush=True)
    if options.json:
        return 0
    print(f"{count} rows, {bad} bad")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(_main())
