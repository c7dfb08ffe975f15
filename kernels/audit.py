"""Audit of the machine code of every Triton kernel, without a GPU.

The ops' launch code runs on CPU tensors, at the sizes of `examples`. A driver compiles for the
wanted architecture and records the launches. So the types, the alignment, the tile and the number
of warps equal those of training. The tools in Triton's wheel then disassemble the machine code.

    python -m engine.kernels.audit [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import backends
from .examples import Example, examples
from .stand_in import Launched, standing_in

ARCHS = ("sm_80", "sm_90", "sm_100")


class Limits(NamedTuple):
    """Hold the limits of one multiprocessor.

    Source: CUDA C++ programming guide, technical specifications by compute capability.
    """

    registers: int
    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    "sm_80": Limits(65536, 64, 32, 164 * 1024),
    "sm_90": Limits(65536, 64, 32, 228 * 1024),
    "sm_100": Limits(65536, 64, 32, 228 * 1024),
}
_RESERVED_SHARED = 1024  # bytes of each block's shared memory that the system uses


class Launch(NamedTuple):
    """Hold one recorded launch."""

    cubin: bytes
    ttgir: str  # Triton's last portable form of the kernel
    programs: int
    warps: int
    shared: int  # bytes


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Compile for `arch` the kernels that the block launches; list the launches and run none."""
    launches: list[Launch] = []

    def record(launched: Launched) -> None:
        kernel, programs = launched.kernel, math.prod(launched.grid)
        launches.append(
            Launch(kernel.kernel, kernel.asm["ttgir"], programs, launched.warps, launched.shared)
        )

    with standing_in(arch, most_shared(arch), record):
        yield launches


def most_shared(arch: str) -> int:
    """Bytes of shared memory that one block may have."""
    return LIMITS[arch].shared - _RESERVED_SHARED


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.M)
_WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))(?=\.|$)")
_SCALAR_LOAD = re.compile(r"tt\.load .*: !tt\.ptr<[a-z]+(\d+)>")


def instructions(sass: str) -> list[str]:
    """Return the opcodes with their modifiers, in order, without the padding at the end."""
    opcodes = [m.group(1) for m in _INSTRUCTION.finditer(sass)]
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes.pop()
    return [opcode for opcode in opcodes if opcode != "NOP"]


def width(opcode: str) -> int:
    """Return the bits that a lane moves: 128 for LDG.E.128, 8 for LDG.E.U8, 32 for LDG.E."""
    match = _WIDTH.search(opcode)
    return int(match.group(1) or match.group(2)) if match else 32


def accesses(opcodes: list[str], kind: str) -> list[int]:
    """Return the widths in bits of all instructions of one kind, such as "LDG" or "STL"."""
    return [width(opcode) for opcode in opcodes if opcode.split(".")[0] == kind]


def scalar_loads(ttgir: str) -> list[int]:
    """Return the widths in bits of the loads of one value for a whole program: a radius, a seed."""
    return [int(bits) for bits in _SCALAR_LOAD.findall(ttgir)]


def occupancy(arch: str, registers: int, warps: int, shared: int) -> float:
    """Return the share of a multiprocessor's warps that are resident, by `LIMITS`.

    A warp gets registers in units of 256, and four warps get them at a time.
    """
    limits = LIMITS[arch]
    a_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = limits.registers // a_warp // 4 * 4 // warps
    by_shared = limits.shared // (shared + _RESERVED_SHARED)
    blocks = min(by_registers, by_shared, limits.blocks, limits.warps // warps)
    return blocks * warps / limits.warps


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> dict:
    """Return a binary's opcodes (`opcodes`), registers (`REG`), stack (`STACK`) and `LOCAL` memory.

    Triton's cache keeps the result. The binary has one kernel.
    """
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    if (kept := cache.get_file("disassembly.json")) is not None:
        return json.loads(Path(kept).read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _tool("cuobjdump", "-sass", "-res-usage", str(path))
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    code = {"opcodes": instructions(text), **usage}
    cache.put(json.dumps(code), "disassembly.json", binary=False)
    return code


def _row(example: Example, arch: str, launch: Launch) -> dict:
    code = disassemble(launch.cubin)
    opcodes, registers = code["opcodes"], code["REG"]
    loads, stores = accesses(opcodes, "LDG"), accesses(opcodes, "STG")
    # A scalar load is one transaction for a warp, for every tile size: no cost per element.
    tile = list((Counter(loads) - Counter(scalar_loads(launch.ttgir))).elements()) + stores
    if example.branches:
        tile = [bits for bits in tile if bits == max(tile)]
    lanes = launch.programs * launch.warps * 32 / example.elements
    return {
        "kernel": example.kernel,
        "op": example.op,
        "arch": arch,
        "registers": registers,
        "spill_bytes": sum(accesses(opcodes, "STL")) // 8,
        "local_bytes": code["STACK"] + code["LOCAL"],
        "shared_bytes": launch.shared,
        "threads": launch.warps * 32,
        "occupancy": round(occupancy(arch, registers, launch.warps, launch.shared), 3),
        "load_bits": max(loads, default=0),
        "store_bits": max(stores, default=0),
        "bytes_per_element": round(sum(tile) / 8 * lanes, 3) if example.counted else None,
        "min_bytes_per_element": round(example.min_bytes, 3),
        "instructions_per_element": round(len(opcodes) * lanes, 3) if example.counted else None,
        "flat": example.flat,
    }


def rows(archs: tuple[str, ...] = ARCHS) -> list[dict]:
    """Return one row for each kernel and architecture.

    Triton's cache keeps the compiled kernels. If TRITON_INTERPRET is set, Triton has interpreted
    functions in place of kernels, so a second Python without that variable does the work.

    Returns:
        kernel, op, arch; registers (a thread), spill_bytes (stored to the stack by a thread),
        local_bytes (stack and local memory of a thread), shared_bytes (of a block), threads (in a
        block);
        occupancy: resident share of the warps that `LIMITS` allows;
        load_bits, store_bits: the widest global load and store;
        bytes_per_element: bytes of the global loads and stores in the machine code, times threads,
            over elements. Masked lanes count; loads of one value for a whole program do not. None
            if inner loops repeat instructions;
        min_bytes_per_element: each operand read or written once;
        instructions_per_element: machine instructions, times threads, over elements. Each counts
            once, an upper bound if branches exclude each other. None as above;
        flat: whether 128-bit accesses and the minimum of bytes are due.
    Raises:
        ValueError: for an architecture that is not in `ARCHS`.
        RuntimeError: if Triton is missing, or its compiler failed.
    """
    for arch in archs:
        if arch not in LIMITS:
            raise ValueError(f"arch must be one of {', '.join(LIMITS)}, got {arch!r}")
    module, reason = backends.load("triton")
    if module is None:
        raise RuntimeError(f"no kernels to audit: {reason}")
    from .triton import launch

    if launch.INTERPRETING:
        return _rows_elsewhere(archs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = []
        for arch in archs:
            for example in examples():
                with recording(arch) as launches:
                    example.launch()
                pending.append(pool.submit(_row, example, arch, launches[example.position]))
        return [row.result() for row in pending]


def _rows_elsewhere(archs: tuple[str, ...]) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, "--json", "--arch", *archs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the audit failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Audit the machine code of every Triton kernel.")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS)
    options = parser.parse_args()
    table = rows(tuple(options.arch))
    if options.json:
        print(json.dumps(table))
        return
    for row in table:
        print("  ".join(f"{key}={value}" for key, value in row.items() if key != "flat"))


if __name__ == "__main__":
    _main()
