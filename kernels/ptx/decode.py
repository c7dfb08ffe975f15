"""Turn instructions into functions of the lanes, with their operands looked up once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import formats
from .arithmetic import Unknown, of_three, operation
from .formats import UNSIGNED
from .lanes import Act, Lanes, Mask, Read
from .memory import WARP, Fault, check_alignment
from .program import Instruction, Program, register_width

BRANCH, EXIT, BARRIER, STRAIGHT = "branch", "exit", "barrier", "straight"


class Step(NamedTuple):
    """Hold one instruction, ready to run.

    Attributes:
        kind: how it changes the flow of control.
        act: what a STRAIGHT step does to the lanes.
        target: where a BRANCH goes.
        guard: number of the predicate register that it needs, or None.
        negated: it needs that register to be false, not true.
    """

    kind: str
    text: str
    guard: int | None
    negated: bool
    act: Act | None = None
    target: int = 0


class Decoder:
    """Turn the instructions of one program into steps."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.widths: list[int] = []  # bits of each register, by its number
        self._numbers: dict[str, int] = {}

    def steps(self) -> list[Step]:
        return [self._step(instruction) for instruction in self.program.instructions]

    def _step(self, instruction: Instruction) -> Step:
        guard = None if instruction.guard is None else self.register(instruction.guard)
        common = (instruction.text, guard, instruction.negated)
        name = instruction.opcode.split(".")[0]
        if name == "bra":
            return Step(BRANCH, *common, target=self.program.labels[instruction.operands[0]])
        if name in ("ret", "exit"):
            return Step(EXIT, *common)
        if instruction.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned"):
            if instruction.operands != ("0",):
                raise Unknown(f"PTX instruction not known: {instruction.text}")
            return Step(BARRIER, *common)
        return Step(STRAIGHT, *common, act=_act(self, instruction))

    def register(self, name: str) -> int:
        """Return the number of a register."""
        if name not in self._numbers:
            width = register_width(name, self.program.widths)
            if width is None:
                raise Unknown(f"PTX operand not known: {name}")
            self._numbers[name] = len(self.widths)
            self.widths.append(width)
        return self._numbers[name]

    def read(self, operand: str, kind: str) -> Read:
        """Return a function for the operand of each lane, or one for all, as numbers of a type."""
        if operand.startswith("%") and ("." in operand or operand == "%laneid"):
            return lambda lanes: formats.decode(lanes.special[operand], kind)
        if register_width(operand, self.program.widths) is not None:
            number = self.register(operand)
            if kind != "bf16" and kind != "pred" and not kind.endswith("x2"):
                width, into = self.widths[number], formats.dtype(kind)
                if width == formats.bits(kind):
                    return lambda lanes: lanes.registers[number].view(into)
            return lambda lanes: formats.decode(lanes.registers[number], kind)
        constant = formats.decode(_constant(operand, kind, self.program.shared), kind)
        return lambda lanes: constant

    def write(self, operand: str, kind: str) -> Callable[[Lanes, np.ndarray, Mask], None]:
        """Return a function that sets the operand of the lanes in a mask to numbers of a type."""
        if operand == "_":
            return lambda lanes, values, mask: None
        number = self.register(operand)
        width = self.widths[number]
        return lambda lanes, values, mask: lanes.write(
            number, formats.encode(values, kind, width), mask
        )

    def address(self, operand: str) -> Read:
        """Return a function for the address in brackets, uint64 [lanes]."""
        base, _, offset = operand.strip("[] ").partition("+")
        read_base = self.read(base.strip(), "u64" if self._is_wide(base.strip()) else "u32")
        step = np.uint64(int(offset or "0", 0) & 0xFFFFFFFFFFFFFFFF)
        return lambda lanes: np.broadcast_to(read_base(lanes).astype(np.uint64) + step, lanes.count)

    def _is_wide(self, name: str) -> bool:
        return register_width(name, self.program.widths) == 64


def _constant(operand: str, kind: str, shared: tuple[str, ...]) -> np.ndarray:
    """Return a literal (0f3F800000, 0d..., -5, 0x7770U) or the address of shared memory."""
    width = formats.bits(kind)
    if operand in shared:
        value = 0
    elif operand[:2] in ("0f", "0d", "0F", "0D"):
        value = int(operand[2:], 16)
    elif re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", operand):
        value = int(operand.rstrip("U"), 0)
    else:
        raise Unknown(f"PTX operand not known: {operand}")
    if kind == "pred":
        return np.array(bool(value))
    # One element, not none: pairs of floats need an axis to be split along.
    return np.array([value & ((1 << width) - 1)], UNSIGNED[width])


def _act(decoder: Decoder, instruction: Instruction) -> Act:
    """Return what an instruction does, of those that leave the flow of control alone."""
    name, *modifiers = instruction.opcode.split(".")
    if name in ("ld", "st"):
        return _access(decoder, instruction, name, modifiers)
    if name in ("ldmatrix", "stmatrix"):
        return _matrix(decoder, instruction, name)
    if name == "shfl":
        return _shuffle(decoder, instruction, modifiers)
    if instruction.opcode == "bar.warp.sync":
        return _warp_barrier(decoder, instruction)
    if name == "redux":
        return _reduce(decoder, instruction, modifiers)
    if name == "mov" and any(operand[0] == "{" for operand in instruction.operands):
        return _halves(decoder, instruction.operands, modifiers[-1])
    if name == "setp" and modifiers[-1] in ("bf16x2", "f16x2"):
        return _compare_pairs(decoder, instruction)
    return _compute(decoder, instruction)


def _compare_pairs(decoder: Decoder, instruction: Instruction) -> Act:
    """Return setp on pairs of 16 bits: one predicate for the lower ones, one for the upper ones."""
    one = operation(instruction.opcode.removesuffix("x2"))
    kind = one.operands[0]
    into, *operands = instruction.operands
    writes = [decoder.write(name, "pred") for name in into.split("|")]
    if len(writes) != 2 or len(operands) != 2:
        raise Unknown(f"PTX instruction not known: {instruction.text}")
    reads = [decoder.read(operand, "b32") for operand in operands]

    def act(lanes: Lanes, mask: Mask) -> None:
        pairs = [read(lanes) for read in reads]
        for write, shift in zip(writes, (np.uint32(0), np.uint32(16)), strict=True):
            halves = ((pair >> shift).astype(np.uint16) for pair in pairs)
            write(lanes, one.function(*(formats.decode(half, kind) for half in halves)), mask)

    return act


def _compute(decoder: Decoder, instruction: Instruction) -> Act:
    found = operation(instruction.opcode)
    into, *operands = instruction.operands
    if instruction.opcode[:4] in ("min.", "max.") and len(operands) == 3:
        found = of_three(found)
    if len(operands) != len(found.operands) or "|" in into:
        raise Unknown(f"PTX instruction not known: {instruction.text}")
    reads = [decoder.read(o, kind) for o, kind in zip(operands, found.operands, strict=True)]
    write, function = decoder.write(into, found.result), found.function

    def act(lanes: Lanes, mask: Mask) -> None:
        write(lanes, function(*[read(lanes) for read in reads]), mask)

    return act


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _halves(decoder: Decoder, operands: tuple[str, ...], kind: str) -> Act:
    """Return mov between one register and the several that make it up, lowest bits first."""
    whole_width = formats.bits(kind)
    whole = UNSIGNED[whole_width]
    apart = operands[0][0] == "{"
    names = _names(operands[0] if apart else operands[1])
    part_width = whole_width // len(names)
    part = f"b{part_width}"
    shifts = [whole(i * part_width) for i in range(len(names))]
    if apart:
        read = decoder.read(operands[1], kind)
        writes = [decoder.write(name, part) for name in names]

        def split(lanes: Lanes, mask: Mask) -> None:
            value = read(lanes)
            for write, shift in zip(writes, shifts, strict=True):
                write(lanes, (value >> shift).astype(UNSIGNED[part_width]), mask)

        return split
    reads = [decoder.read(name, part) for name in names]
    write = decoder.write(operands[0], kind)

    def join(lanes: Lanes, mask: Mask) -> None:
        value: np.ndarray = whole(0)
        for read, shift in zip(reads, shifts, strict=True):
            value = value | (read(lanes).astype(whole) << shift)
        write(lanes, value, mask)

    return join


def _active(lanes: Lanes, mask: Mask) -> np.ndarray | slice:
    return slice(None) if mask is None else np.flatnonzero(mask)


def _access(decoder: Decoder, instruction: Instruction, name: str, modifiers: list[str]) -> Act:
    """Return a load or store of one value or a vector."""
    space, kind = modifiers[0], modifiers[-1]
    vector = [word for word in modifiers[1:-1] if re.fullmatch(r"v[248]", word)]
    # What steers caches changes no value.
    rest = set(modifiers[1:-1]) - set(vector) - {"L1::evict_last", "L1::evict_first", "nc"}
    if rest or space not in ("global", "shared", "param"):
        raise Unknown(f"PTX instruction not known: {instruction.text}")
    at, data = instruction.operands if name == "st" else reversed(instruction.operands)
    if space == "param":
        return _parameter(decoder, data, at, kind)
    width, address = formats.bits(kind), decoder.address(at)
    # ld.b32 { %r1 } is a vector of one.
    names = _names(data)
    if name == "st":
        return _store(space, width, address, [decoder.read(n, f"b{width}") for n in names])
    targets = [None if n == "_" else decoder.register(n) for n in names]

    def load(lanes: Lanes, mask: Mask) -> None:
        active = _active(lanes, mask)
        where, who = address(lanes)[active], lanes.who(active)
        if space == "global":
            found = lanes.memory.load(where, len(names), width, who)
        else:
            found = lanes.shared.load(where, len(names), width, lanes.place[active], who)
        for values, number in zip(found.T, targets, strict=True):
            if number is not None:
                # A wider register is filled with zeros, or with the sign of a signed type.
                raw = formats.encode(_signed(values, kind), kind, decoder.widths[number])
                lanes.put(number, raw, active)

    return load


def _signed(values: np.ndarray, kind: str) -> np.ndarray:
    return values.view(formats.dtype(kind)) if kind[0] == "s" else values


def _store(space: str, width: int, address: Read, reads: list[Read]) -> Act:
    def store(lanes: Lanes, mask: Mask) -> None:
        active = _active(lanes, mask)
        columns = [np.broadcast_to(read(lanes), lanes.count)[active] for read in reads]
        values = np.stack(columns, axis=1)
        where, who = address(lanes)[active], lanes.who(active)
        if space == "global":
            lanes.memory.store(where, values, who)
        else:
            lanes.shared.store(where, values, lanes.place[active], who)

    return store


def _parameter(decoder: Decoder, into: str, at: str, kind: str) -> Act:
    name = at.strip("[] ")
    write, unsigned = decoder.write(into, kind), UNSIGNED[formats.bits(kind)]

    def load(lanes: Lanes, mask: Mask) -> None:
        raw = np.array(lanes.arguments[name] & int(np.iinfo(unsigned).max), unsigned)
        write(lanes, _signed(raw, kind), mask)

    return load


def _whole_warps(lanes: Lanes, mask: Mask, text: str) -> np.ndarray:
    """Return the warps whose lanes are in `mask`; raise a Fault if it holds a part of one."""
    if mask is None:
        return np.arange(lanes.count // WARP)
    warps = mask.reshape(-1, WARP)
    if (warps.any(1) != warps.all(1)).any():
        raise Fault(f"divergent code: not all lanes of a warp take part in {text}")
    return np.flatnonzero(warps.all(1))


_MATRIX = re.compile(
    r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16"
)


def _matrix(decoder: Decoder, instruction: Instruction, name: str) -> Act:
    """Return ldmatrix or stmatrix: 8x8 matrices of 16 bits, rows at eight lanes' addresses."""
    match = _MATRIX.fullmatch(instruction.opcode)
    if match is None:
        raise Unknown(f"PTX instruction not known: {instruction.text}")
    first, second = instruction.operands
    at, data = (first, second) if name == "stmatrix" else (second, first)
    address, lane = decoder.address(at), np.arange(WARP)
    registers = [decoder.register(n) for n in _names(data)]
    # Lane L has two elements: of row L / 4 side by side, or of column L / 4 one below the other.
    if match.group(2):
        halves = [(2 * (lane % 4) + i, 2 * (lane // 4)) for i in range(2)]
    else:
        halves = [(lane // 4, 4 * (lane % 4) + 2 * i) for i in range(2)]

    def act(lanes: Lanes, mask: Mask) -> None:
        warps = _whole_warps(lanes, mask, instruction.text)
        rows = address(lanes).reshape(-1, WARP)[warps]
        check_alignment(rows[:, : 8 * len(registers)], 16)
        active = (warps[:, None] * WARP + lane).ravel()
        who, place = lanes.who(active), lanes.place[active]
        for i, register in enumerate(registers):
            where = [(rows[:, 8 * i + r] + c.astype(np.uint64)).ravel() for r, c in halves]
            if name == "stmatrix":
                pair = lanes.registers[register][active].view(np.uint16).reshape(-1, 2)
                for j in range(2):
                    lanes.shared.store(where[j], pair[:, j : j + 1], place, who)
            else:
                pair = np.hstack([lanes.shared.load(at, 1, 16, place, who) for at in where])
                lanes.put(register, pair.view(np.uint32)[:, 0], active)

    return act


_REDUCTIONS: dict[str, Callable] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def _reduce(decoder: Decoder, instruction: Instruction, modifiers: list[str]) -> Act:
    """Return redux.sync: one value from those of all lanes of a warp."""
    into, operand, members = instruction.operands
    if modifiers[0] != "sync" or modifiers[1] not in _REDUCTIONS:
        raise Unknown(f"PTX instruction not known: {instruction.text}")
    reduce, kind = _REDUCTIONS[modifiers[1]], modifiers[2]
    read, write = decoder.read(operand, kind), decoder.write(into, kind)
    check = _members_check(decoder, instruction, members)

    def act(lanes: Lanes, mask: Mask) -> None:
        check(lanes, mask)
        values = np.broadcast_to(read(lanes), lanes.count).reshape(-1, WARP)
        write(lanes, np.repeat(reduce(values, axis=1, dtype=values.dtype), WARP), mask)

    return act


def _warp_barrier(decoder: Decoder, instruction: Instruction) -> Act:
    check = _members_check(decoder, instruction, *instruction.operands)

    def act(lanes: Lanes, mask: Mask) -> None:
        check(lanes, mask)
        lanes.moment[_whole_warps(lanes, mask, instruction.text)] += 1

    return act


_SOURCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "bfly": lambda lane, by: lane ^ by,
    "down": lambda lane, by: lane + by,
    "up": lambda lane, by: lane - by,
    "idx": lambda lane, by: by,
}


def _shuffle(decoder: Decoder, instruction: Instruction, modifiers: list[str]) -> Act:
    """Return shfl.sync over a whole warp: another lane's value, or one's own past the end."""
    into, operand, by, clamp, members = instruction.operands
    if modifiers[0] != "sync" or modifiers[1] not in _SOURCES or "|" in into:
        raise Unknown(f"PTX instruction not known: {instruction.text}")
    if clamp != ("0" if modifiers[1] == "up" else "31"):
        raise Unknown(f"PTX instruction not known, of a part of a warp: {instruction.text}")
    read, write = decoder.read(operand, "b32"), decoder.write(into, "b32")
    read_by, find = decoder.read(by, "u32"), _SOURCES[modifiers[1]]
    check = _members_check(decoder, instruction, members)
    lane = np.arange(WARP)

    def act(lanes: Lanes, mask: Mask) -> None:
        check(lanes, mask)
        values = np.broadcast_to(read(lanes), lanes.count).reshape(-1, WARP)
        distance = read_by(lanes)
        if len(distance) > 1:
            distance = distance.reshape(-1, WARP)
        source = find(lane, distance.astype(np.int64) & 31)
        source = np.where((source >= 0) & (source < WARP), source, lane)
        if source.ndim == 1:
            found = values[:, source]
        else:
            found = np.take_along_axis(values, source, axis=1)
        write(lanes, found.reshape(-1), mask)

    return act


def _members_check(decoder: Decoder, instruction: Instruction, members: str) -> Act:
    """Return a check that raises a Fault if lanes that an instruction names are not active."""
    read = decoder.read(members, "s32")

    def check(lanes: Lanes, mask: Mask) -> None:
        warps = _whole_warps(lanes, mask, instruction.text)
        named = np.broadcast_to(read(lanes), lanes.count).reshape(-1, WARP)[warps]
        if (named != -1).any():
            raise Unknown(f"PTX instruction not known, of a part of a warp: {instruction.text}")

    return check
