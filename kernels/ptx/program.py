"""Read PTX, the text that Triton hands to the vendor's assembler, as a list of instructions.

The language is that of NVIDIA's "Parallel Thread Execution ISA". A text holds one kernel, without
functions, without variables of its own and without local memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
# Notes for a debugger end with their line, not with a semicolon.
_NOTE = re.compile(r"^\s*\.(?:loc|file|pragma)\b[^\n]*$", re.M)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", re.S)
_PARAMETER = re.compile(r"\.param\b[^,]*?(\w+)\s*(?:,|$)")
_LABEL = re.compile(r"([$\w]+):\s*")
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z]\w*(?:\.\w+|::\w+)*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+")
_SHARED = re.compile(r"\.extern\s+\.shared\b[^;]*?(\w+)\[\s*\]\s*;")


class Instruction(NamedTuple):
    """Hold one instruction.

    Attributes:
        opcode: "fma.rn.f32".
        operands: as written: "%r1", "0f3F800000", "{%r1, %r2}", "[%rd1 + 16]", a label.
        guard: the predicate register that it needs, or None.
        negated: it needs that register to be false, not true.
        text: the whole, for messages.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str


@dataclass(frozen=True)
class Program:
    """Hold one kernel.

    Attributes:
        parameters: names, in the order of the launch's arguments.
        widths: bits of each register, by its name without its number ("%rd"); 1 for predicates.
        labels: the number of the instruction behind each label.
        shared: names of the block's dynamic shared memory, which begins at address 0.
    """

    name: str
    parameters: tuple[str, ...]
    widths: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: tuple[str, ...]


def parse(ptx: str) -> Program:
    """Read the one kernel in `ptx`.

    Raises:
        ValueError: there is none, or it holds a statement that is not read here.
    """
    text = _NOTE.sub("", _COMMENT.sub("", ptx))
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("no .entry in this PTX")
    widths: dict[str, int] = {}
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for statement in _body(text, entry.end()).split(";"):
        rest = _unlabelled(statement, labels, len(instructions))
        if rest.startswith(".reg"):
            _declare(rest, widths)
        elif rest:
            instructions.append(_instruction(rest))
    return Program(
        entry.group(1),
        tuple(_PARAMETER.findall(entry.group(2))),
        widths,
        tuple(instructions),
        labels,
        tuple(_SHARED.findall(text)),
    )


def _body(text: str, start: int) -> str:
    """Return what stands between the kernel's braces, the first of which ends at `start`."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    raise ValueError("a brace is never closed in this PTX")


def _unlabelled(statement: str, labels: dict[str, int], position: int) -> str:
    """Take labels, which are noted, and a scope's braces off the beginning of a statement."""
    rest = statement.strip()
    while rest:
        if rest[0] in "{}":
            rest = rest[1:].lstrip()
        elif label := _LABEL.match(rest):
            labels[label.group(1)] = position
            rest = rest[label.end() :]
        else:
            break
    return rest


def _declare(statement: str, widths: dict[str, int]) -> None:
    match = _DECLARATION.match(statement)
    if match is None:
        raise ValueError(f"PTX not understood: {statement}")
    kind, names = match.groups()
    width = 1 if kind == "pred" else int(kind.lstrip("busf"))
    for name in names.split(","):
        widths[re.sub(r"<\d+>", "", name.strip())] = width


def _instruction(statement: str) -> Instruction:
    match = _INSTRUCTION.fullmatch(statement)
    if match is None:
        raise ValueError(f"PTX not understood: {statement}")
    negated, guard, opcode, operands = match.groups()
    text = re.sub(r"\s+", " ", statement)
    return Instruction(opcode, tuple(_OPERAND.findall(operands)), guard, negated == "!", text)


def register_width(name: str, widths: dict[str, int]) -> int | None:
    """Return the bits of the register `name`, or None if there is none."""
    return widths.get(name, widths.get(name.rstrip("0123456789")))
