"""CIFAR's Python edition: pickles, read without unpickling.

A pickle is a program. `pickletools` takes it apart into instructions and runs none of them; what follows
interprets the few that the published files are made of, on plain values only. Nothing is imported and
nothing is called: the two callables that such a file names, an array's and a dtype's constructor, are
recognised by name and stand for a uint8 array, whatever else it says.
"""

from __future__ import annotations

import pickletools
import warnings
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
    """An array being built: first empty, then with its shape and bytes."""

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
    """The only dtype there is: uint8."""

    def fill(self, state: Any) -> None:
        """Byte order and alignment: a byte has neither."""


def parse(
    data: bytes, where: str, labels: tuple[tuple[str, int], ...], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, 32, 32] and labels uint8 [N] of one batch file, 1 <= N <= `most`.

    `labels` has the name and the number of classes of each list of labels; the last one's are returned.
    EngineError, which begins with `where`: whatever is wrong with the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in a hostile name
            found = _plain(data)
    except (ValueError, IndexError, TypeError, KeyError, OverflowError, RecursionError) as e:
        reason = " ".join(str(e).split())[:120]
        raise EngineError(f"{where}: not a CIFAR batch of the Python edition ({reason})") from None
    if not isinstance(found, dict):
        raise EngineError(f"{where}: not a CIFAR batch of the Python edition (no dictionary)")
    images = found.get(b"data")
    if not (isinstance(images, np.ndarray) and images.shape[1:] == (readers.CIFAR_PIXELS,)):
        raise EngineError(f"{where}: has no data of {readers.CIFAR_PIXELS} bytes an image")
    count = len(images)
    if not 1 <= count <= most:
        raise EngineError(f"{where}: {count:,} images; 1 to {most:,} are possible")
    values = np.empty(0, np.uint8)
    for name, classes in labels:
        listed = found.get(name.encode())
        if not (isinstance(listed, list) and all(type(label) is int for label in listed)):
            raise EngineError(f"{where}: has no list of whole numbers called {name}")
        if len(listed) != count:
            raise EngineError(f"{where}: {count:,} images, but {len(listed):,} {name}")
        bad = next((i for i, label in enumerate(listed) if not 0 <= label < classes), None)
        if bad is not None:
            raise EngineError(
                f"{where}: label {listed[bad]} of sample {bad:,} is not in 0..{classes - 1}"
            )
        values = np.array(listed, np.uint8)
    return images.reshape(count, 3, 32, 32), values


def _plain(data: bytes) -> Any:
    """What a pickle of dictionaries, lists, tuples, numbers, strings and uint8 arrays holds."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                items = stack[at + 1 :]
                del stack[at:]
                return items
        raise ValueError("a mark is missing")

    argument: Any
    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        if name in _PUSHED:
            stack.append(argument.encode("latin-1") if name.endswith("STRING") else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            continue
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            if len(stack) < size:
                raise ValueError("a tuple of too few")
            stack[-size:] = [tuple(stack[-size:])]
        elif name == "GLOBAL":
            if argument not in _NAMES:
                raise ValueError(f"it names {argument.replace(' ', '.')}, and may name arrays only")
            stack.append(_NAMES[argument])
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_construct(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], _Array | _Dtype):
                raise ValueError("it builds something that is no array")
            stack[-1].fill(state)
        elif name in ("SETITEM", "SETITEMS"):
            items = to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if not isinstance(stack[-1], dict) or len(items) % 2:
                raise ValueError("items for what is no dictionary")
            # Other keys have no use, and hashing deeply nested ones is no safe thing to do.
            if not all(isinstance(key, bytes | str) for key in items[::2]):
                raise ValueError("a key that is no string")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = to_mark() if name == "APPENDS" else [stack.pop()]
            if not isinstance(stack[-1], list):
                raise ValueError("items for what is no list")
            stack[-1].extend(items)
        elif name == "STOP":
            if position != len(data) - 1:
                raise ValueError("bytes left over at the end")
            (value,) = stack
            return _finished(value)
        else:
            raise ValueError(f"it has the instruction {name}, which data have no use for")
    raise ValueError("it ends too early")


def _construct(function: Any, arguments: Any) -> Any:
    if function is _NEW_ARRAY and isinstance(arguments, tuple) and arguments[:1] == (_ARRAY,):
        return _Array()
    if function is _DTYPE and isinstance(arguments, tuple) and arguments[:1] in ((b"u1",), ("u1",)):
        return _Dtype()
    raise ValueError("it calls something, and may make uint8 arrays only")


def _finished(value: Any) -> Any:
    """The top dictionary with its arrays in place; keys as bytes, as Python 2 wrote them."""
    if not isinstance(value, dict):
        return None
    return {
        key.encode() if isinstance(key, str) else key: item.value
        if isinstance(item, _Array)
        else item
        for key, item in value.items()
    }
