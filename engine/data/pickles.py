"""CIFAR's Python edition: pickles, read without unpickling.

A pickle is a program. `pickletools` takes it apart into instructions and runs none of them. This
module interprets the few instructions that the published files use, on plain values only. It
imports nothing and calls nothing: such a file names two callables, the constructors of an array and
of a dtype, and both are recognised by name and stand for a uint8 array.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from ..errors import EngineError
from . import readers

_MARK, _NEW_ARRAY, _ARRAY, _DTYPE = object(), object(), object(), object()
_NAMES = {
    "numpy.core.multiarray _reconstruct": _NEW_ARRAY,
    "numpy._core.multiarray _reconstruct": _NEW_ARRAY,
    "numpy ndarray": _ARRAY,
    "numpy dtype": _DTYPE,
}
_PUSHED = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "SHORT_BINUNICODE"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Array:
    """Hold an array that is being built: first empty, then with its shape and bytes."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def fill(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        sized = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not (sized and isinstance(data, bytes) and isinstance(dtype, _Dtype)):
            raise ValueError("an array that is not of bytes")
        if fortran or prod(shape) != len(data):
            raise ValueError("an array whose shape and bytes do not agree")
        self.value = np.frombuffer(data, np.uint8).reshape(shape)


class _Dtype:
    """Stand for uint8, the only dtype here."""

    def fill(self, state: Any) -> None:
        """Ignore byte order and alignment: a byte has neither."""


def parse(
    data: bytes, title: str, labels: tuple[tuple[str, int], ...], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, 3, 32, 32] and labels uint8 [N] of one batch file, 1 <= N <= `most`.

    `labels` has the name and the number of classes of each list of labels; the last list is
    returned. EngineError, which begins with `title`: for any fault of the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in a hostile name
            found = _plain(data)
    except (ValueError, IndexError, TypeError, KeyError, OverflowError, RecursionError) as e:
        reason = " ".join(str(e).split())[:120]
        raise EngineError(f"{title}: not a CIFAR batch of the Python edition ({reason})") from None
    if not isinstance(found, dict):
        raise EngineError(f"{title}: not a CIFAR batch of the Python edition (no dictionary)")
    images = found.get(b"data")
    if not (isinstance(images, np.ndarray) and images.shape[1:] == (readers.CIFAR_PIXELS,)):
        raise EngineError(f"{title}: has no data of {readers.CIFAR_PIXELS} bytes an image")
    count = len(images)
    if not 1 <= count <= most:
        raise EngineError(f"{title}: {count:,} images; 1 to {most:,} are possible")
    values = np.empty(0, np.uint8)
    for name, classes in labels:
        listed = found.get(name.encode())
        if not (isinstance(listed, list) and all(type(label) is int for label in listed)):
            raise EngineError(f"{title}: has no list of whole numbers called {name}")
        if len(listed) != count:
            raise EngineError(f"{title}: {count:,} images, but {len(listed):,} {name}")
        bad = next((i for i, label in enumerate(listed) if not 0 <= label < classes), None)
        if bad is not None:
            raise EngineError(
                f"{title}: label {listed[bad]} of sample {bad:,} is not in 0..{classes - 1}"
            )
        values = np.array(listed, np.uint8)
    return images.reshape(count, 3, 32, 32), values


def _plain(data: bytes) -> Any:
    """Return the value of a pickle of dictionaries, lists, tuples, numbers, strings, uint8 arrays.

    Raises:
        ValueError, IndexError, TypeError, KeyError, OverflowError: for any other pickle.
    """
    machine = _Machine()
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name == "STOP":
            if position != len(data) - 1:
                raise ValueError("bytes left over at the end")
            (value,) = machine.stack
            return _finished(value)
        machine.execute(opcode.name, argument)
    raise ValueError("it ends too early")


class _Machine:
    """Interpret a pickle's instructions on plain values.

    Attributes:
        stack: the values so far, the top one last; memo: values that later instructions fetch
            again.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        """Execute one instruction; ValueError for one that data have no use for."""
        if name in _PUSHED:
            self.stack.append(argument.encode("latin-1") if name.endswith("STRING") else argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        else:
            raise ValueError(f"it has the instruction {name}, which data have no use for")

    def _to_mark(self) -> list[Any]:
        """Take the values above the topmost mark, and the mark, off the stack."""
        stack = self.stack
        for position in range(len(stack) - 1, -1, -1):
            if stack[position] is _MARK:
                items = stack[position + 1 :]
                del stack[position:]
                return items
        raise ValueError("a mark is missing")

    def _memoize(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def _tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise ValueError("a tuple of too few")
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def _global(self, name: str) -> None:
        if name not in _NAMES:
            raise ValueError(f"it names {name.replace(' ', '.')}, and may name arrays only")
        self.stack.append(_NAMES[name])

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_construct(function, arguments))

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise ValueError("it builds something that is no array")
        self.stack[-1].fill(state)

    def _set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise ValueError("items for what is no dictionary")
        # Other keys have no use, and hashing deeply nested ones is not safe.
        if not all(isinstance(key, bytes | str) for key in items[::2]):
            raise ValueError("a key that is no string")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for what is no list")
        self.stack[-1].extend(items)


# By the name of an instruction, its effect on the machine, given the instruction's argument.
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "BINPUT": lambda machine, key: machine._memoize(key),
    "LONG_BINPUT": lambda machine, key: machine._memoize(key),
    "MEMOIZE": lambda machine, _: machine._memoize(len(machine.memo)),
    "BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "LONG_BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine._to_mark())),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "GLOBAL": lambda machine, name: machine._global(name),
    "REDUCE": lambda machine, _: machine._reduce(),
    "BUILD": lambda machine, _: machine._build(),
    "SETITEM": lambda machine, _: machine._set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine._set_items(machine._to_mark()),
    "APPEND": lambda machine, _: machine._append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._to_mark()),
}


def _construct(function: Any, arguments: Any) -> Any:
    if function is _NEW_ARRAY and isinstance(arguments, tuple) and arguments[:1] == (_ARRAY,):
        return _Array()
    if function is _DTYPE and isinstance(arguments, tuple) and arguments[:1] in ((b"u1",), ("u1",)):
        return _Dtype()
    raise ValueError("it calls something, and may make uint8 arrays only")


def _finished(value: Any) -> Any:
    """Return the top dictionary with its arrays in place; keys as bytes, as Python 2 wrote them."""
    if not isinstance(value, dict):
        return None
    return {
        key.encode() if isinstance(key, str) else key: item.value
        if isinstance(item, _Array)
        else item
        for key, item in value.items()
    }
