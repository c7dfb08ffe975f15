"""What the compiler made of each Triton kernel, with no GPU needed.

Every op's own launch code runs on ordinary CPU tensors, at the sizes of `examples`, under a driver that
compiles for the wanted architecture and records in place of launching. So the types, the alignment
facts, the tile and the number of warps are those of real training. The machine code is then taken apart
with the tools that come inside Triton's wheel.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from . import backends, ops
from .stand_in import Launched, standing_in

ARCHS = ("sm_80", "sm_90", "sm_100")


class Limits(NamedTuple):
    """What one multiprocessor holds (CUDA C++ programming guide, technical specifications by compute capability)."""

    registers: int
    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    "sm_80": Limits(65536, 64, 32, 164 * 1024),
    "sm_90": Limits(65536, 64, 32, 228 * 1024),
    "sm_100": Limits(65536, 64, 32, 228 * 1024),
}
_RESERVED_SHARED = 1024  # bytes that the system takes of each block's shared memory


@dataclass(frozen=True)
class Example:
    """One kernel at one size.

    Attributes:
        kernel: name of the row.
        op: the op that it serves.
        launch: runs that op; the kernel is the first of its launches unless `position` says otherwise.
        elements: what the launch as a whole computes (outputs; for the loss, logits of one network).
        min_bytes: read and written for each element if every operand passes through memory once.
        flat: one element a lane and no gather: 128-bit accesses and `min_bytes` are due.
        branches: a narrow path for the tail stands beside the wide one; only the widest accesses count.
        counted: a static count of instructions says what runs; False where inner loops repeat them.
    """

    kernel: str
    op: str
    launch: Callable[[], object]
    elements: int
    min_bytes: float
    flat: bool = False
    branches: bool = False
    counted: bool = True
    position: int = 0


def examples() -> list[Example]:
    """Every kernel at CIFAR-10's size: batch 128 of 3x32x32, 10 classes, a 64-channel 3x3 stem."""
    b, c, h, w, k, o = 128, 3, 32, 32, 10, 64
    d, many = c * h * w, 4096
    pixels, logits = b * d, b * k
    x = torch.zeros(b, c, h, w)
    z, half = torch.zeros_like(x), x.bfloat16()
    half_last = half.contiguous(memory_format=torch.channels_last)
    p, target = torch.zeros(b, k), torch.zeros(b, dtype=torch.int64)
    many_p, many_target = torch.zeros(many, k), torch.zeros(many, dtype=torch.int64)
    rng, index = torch.zeros(2, dtype=torch.int64), torch.zeros(b, dtype=torch.int64)
    one = torch.ones(())
    images = torch.zeros(b, c, h, w, dtype=torch.uint8)
    memory, crops = images.to(torch.int8), torch.zeros(b, 3, dtype=torch.int32)
    stem_grad, weight = torch.zeros(b, o, h, w), torch.zeros(o, c, 3, 3)
    # What a channels_last network hands over under bf16: weight in its order too, images as the loader has them.
    half_stem_grad = stem_grad.bfloat16().contiguous(memory_format=torch.channels_last)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    flat_parameter = torch.zeros(b * d)

    def backward():
        return torch.ops.engine.local_ball_loss_backward(one, p, target, p, p, one, one, 0.0)

    def sgd():
        # Parameter, gradient, momentum, average: one tensor serves, as nothing runs.
        state = [flat_parameter]
        ops.sgd_ema_step(
            state, state, state, state, lr=one, found_inf=one, weight_decay=[5e-4], ema_decay=one
        )

    def adamw():
        state = [flat_parameter]
        ops.adamw_ema_step(
            state, state, state, state, state, lr=one, count=one, found_inf=one, weight_decay=[5e-4], ema_decay=one
        )  # fmt: skip

    def stem(norm, grad, weight):
        return ops.input_grad_step(
            x, x, grad, weight, stride=1, padding=1, eps=one, alpha=one, norm=norm
        )

    stem_bytes = 4 * stem_grad.numel() / pixels
    half_bytes = stem_bytes / 2
    crop_bytes = (8 + 12) / d
    return [
        Example("linf_start", "uniform_start", lambda: ops.uniform_start(x, one, rng), pixels, 8, flat=True),
        Example("l2_start", "uniform_start", lambda: ops.uniform_start(x, one, rng, norm="L2"), pixels, 8, counted=False),
        Example("linf_step", "attack_step", lambda: ops.attack_step(x, x, x, one, one), pixels, 16, flat=True),
        Example("linf_step_bf16_grad", "attack_step", lambda: ops.attack_step(x, x, half, one, one), pixels, 14, flat=True),
        Example("l2_step", "attack_step", lambda: ops.attack_step(x, x, x, one, one, norm="L2"), pixels, 16),
        Example("linf_step_in_place", "attack_step_", lambda: ops.attack_step_(x, z, x, one, one), pixels, 16, flat=True),
        Example("linf_step_bf16_input", "attack_step_", lambda: ops.attack_step_(x, z, x, one, one, network_input=half), pixels, 18, flat=True),
        Example("linf_step_channels_last_input", "attack_step_", lambda: ops.attack_step_(x, z, x, one, one, network_input=half_last), pixels, 18),
        Example("l2_step_bf16_input", "attack_step_", lambda: ops.attack_step_(x, z, x, one, one, norm="L2", network_input=half), pixels, 18),
        Example("cross_entropy_grad", "cross_entropy_grad", lambda: ops.cross_entropy_grad(p, target), logits, 8 + 8 / k),
        Example("kl_grad", "kl_grad", lambda: ops.kl_grad(p, p), logits, 12),
        Example("linf_input_grad", "input_grad_step", lambda: stem("Linf", stem_grad, weight), pixels, 12 + stem_bytes, counted=False),
        Example("l2_input_grad", "input_grad_step", lambda: stem("L2", stem_grad, weight), pixels, 4 + stem_bytes, counted=False),
        Example("linf_input_grad_bf16_channels_last", "input_grad_step", lambda: stem("Linf", half_stem_grad, weight_last), pixels, 12 + half_bytes, counted=False),
        Example("l2_input_grad_bf16_channels_last", "input_grad_step", lambda: stem("L2", half_stem_grad, weight_last), pixels, 4 + half_bytes, counted=False),
        Example("loss", "local_ball_loss", lambda: ops.local_ball_loss(p, target, p, p), logits, 12 + 8 / k),
        Example("loss_partial", "local_ball_loss", lambda: ops.local_ball_loss(many_p, many_target, many_p, many_p), many * k, 12 + 8 / k),
        Example("loss_finish", "local_ball_loss", lambda: ops.local_ball_loss(many_p, many_target, many_p, many_p), many * k, 0, position=1),
        Example("loss_backward", "local_ball_loss_backward", backward, logits, 24 + 8 / k),
        Example("augment", "augment", lambda: ops.augment(images, index, rng, pad=4, flip=True), pixels, 5 + crop_bytes),
        Example("augment_linf_start", "augment", lambda: ops.augment(images, index, rng, pad=4, flip=True, memory=memory, eps=one), pixels, 10 + crop_bytes),
        Example("linf_recall", "recall", lambda: ops.recall(memory, index, crops, x, one), pixels, 9 + crop_bytes),
        Example("l2_recall", "recall", lambda: ops.recall(memory, index, crops, x, one, norm="L2"), pixels, 9 + crop_bytes),
        Example("remember", "remember", lambda: ops.remember(memory, index, crops, x, x, one), pixels, 9 + crop_bytes),
        Example("sgd_ema", "sgd_ema_step", sgd, pixels, 28, flat=True, branches=True),
        Example("adamw_ema", "adamw_ema_step", adamw, pixels, 36, flat=True, branches=True),
    ]  # fmt: skip


# ---- compiling -------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One recorded launch."""

    cubin: bytes
    ttgir: str  # Triton's last portable form of the kernel
    programs: int
    warps: int
    shared: int  # bytes


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Compile for `arch` every Triton kernel launched in the block and list the launches; nothing runs."""
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


# ---- reading machine code --------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.M)
_WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))(?=\.|$)")
_SCALAR_LOAD = re.compile(r"tt\.load .*: !tt\.ptr<[a-z]+(\d+)>")


def instructions(sass: str) -> list[str]:
    """Opcodes with their modifiers, in order, without the padding behind the last of them."""
    found = [m.group(1) for m in _INSTRUCTION.finditer(sass)]
    while found and found[-1] in ("NOP", "BRA"):
        found.pop()
    return [opcode for opcode in found if opcode != "NOP"]


def width(opcode: str) -> int:
    """Bits that one lane of a load or store moves: LDG.E.128 is 128, LDG.E.U8 is 8, LDG.E is 32."""
    match = _WIDTH.search(opcode)
    return int(match.group(1) or match.group(2)) if match else 32


def accesses(opcodes: list[str], kind: str) -> list[int]:
    """Widths in bits of all instructions of one kind, such as "LDG" or "STL"."""
    return [width(opcode) for opcode in opcodes if opcode.split(".")[0] == kind]


def scalar_loads(ttgir: str) -> list[int]:
    """Widths in bits of the loads that fetch one value for a whole program: a radius, a seed."""
    return [int(bits) for bits in _SCALAR_LOAD.findall(ttgir)]


def occupancy(arch: str, registers: int, warps: int, shared: int) -> float:
    """Share of a multiprocessor's warps that are resident, by `LIMITS`.

    Registers are handed out to a warp 256 at a time and to warps four at a time.
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
    """Opcodes of a binary's one kernel, and its registers, stack and local memory; kept in Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    if (kept := cache.get_file("disassembly.json")) is not None:
        return json.loads(Path(kept).read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _tool("cuobjdump", "-sass", "-res-usage", str(path))
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    found = {"opcodes": instructions(text), **usage}
    cache.put(json.dumps(found), "disassembly.json", binary=False)
    return found


def _row(example: Example, arch: str, launch: Launch) -> dict:
    found = disassemble(launch.cubin)
    opcodes, registers = found["opcodes"], found["REG"]
    loads, stores = accesses(opcodes, "LDG"), accesses(opcodes, "STG")
    # One transaction for a whole warp, and the same for every tile size: not a cost per element.
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
        "local_bytes": found["STACK"] + found["LOCAL"],
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
    """One row for each kernel and architecture.

    Compiled kernels are kept in Triton's own cache. Where TRITON_INTERPRET is set, Triton holds
    interpreted functions in place of kernels, so a second Python without it does the work.

    Returns:
        kernel, op, arch; registers (a thread), spill_bytes (stored to the stack by a thread),
        local_bytes (stack and local memory of a thread), shared_bytes (of a block), threads (in a block);
        occupancy: resident share of the warps that `LIMITS` allows;
        load_bits, store_bits: the widest global load and store;
        bytes_per_element: what the global loads and stores in the machine code move, times threads,
            over elements. Lanes that a mask turns off count; values fetched once for a whole program do
            not. None where inner loops repeat the instructions;
        min_bytes_per_element: each operand read or written once;
        instructions_per_element: machine instructions, times threads, over elements: each counted once,
            so an upper bound where branches exclude each other. None as above;
        flat: 128-bit accesses and the minimum of bytes are due.
    Raises:
        ValueError: an architecture that is not in `ARCHS`.
        RuntimeError: Triton is missing, or its compiler failed.
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
        found = []
        for arch in archs:
            for example in examples():
                with recording(arch) as launches:
                    example.launch()
                found.append(pool.submit(_row, example, arch, launches[example.position]))
        return [row.result() for row in found]


def _rows_elsewhere(archs: tuple[str, ...]) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, "--json", "--arch", *archs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the audit failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def _main() -> None:
    parser = argparse.ArgumentParser(description="What the compiler made of each Triton kernel.")
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
