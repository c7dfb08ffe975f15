"""Hold the memory that lanes load from and store to, check every access, and find races.

Two accesses to one byte race if one of them writes and nothing orders them. Nothing orders two
blocks of a launch. Barriers order the threads of a block. Threads of a block may write one value to
one place: the compiler lets lanes that hold the same value do so. Notes of who touched what between
which barriers show a race, whichever access came first.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from .formats import UNSIGNED


class Fault(Exception):
    """Say that a kernel did what a device forbids or leaves undefined."""


class Threads(NamedTuple):
    """Say who accesses memory, an entry a lane."""

    block: np.ndarray  # int64, the block's number in the grid
    thread: np.ndarray  # int64, its number in the block
    epoch: np.ndarray  # int64, barriers that its block has passed
    moment: np.ndarray  # int64, barriers that its warp has passed, the block's and its own


WARP = 32


class _Note(NamedTuple):
    at: np.ndarray  # first byte of each access
    size: int
    who: Threads
    values: np.ndarray | None  # what a store writes, [lanes, words]; None: a load


class Region:
    """Hold bytes that belong together: a tensor's storage, or some blocks' shared memory."""

    def __init__(self, name: str, content: np.ndarray) -> None:
        self.name = name
        self._content = content
        self._notes: list[_Note] = []

    @property
    def size(self) -> int:
        return len(self._content)

    def load(self, at: np.ndarray, words: int, width: int, who: Threads) -> np.ndarray:
        """Return `words` values of `width` bits from each byte offset in `at`: [lanes, words]."""
        self._notes.append(_Note(at, words * width // 8, who, None))
        return self._view(width)[_spread(at, words, width)]

    def store(self, at: np.ndarray, values: np.ndarray, who: Threads) -> None:
        """Write values [lanes, words] to the byte offsets `at`."""
        width = values.dtype.itemsize * 8
        self._notes.append(_Note(at, values.shape[1] * width // 8, who, values))
        self._view(width)[_spread(at, values.shape[1], width)] = values

    def _view(self, width: int) -> np.ndarray:
        whole = self.size - self.size % (width // 8)
        return self._content[:whole].view(UNSIGNED[width])

    def check_races(self) -> None:
        """Raise a Fault if two of the accesses since the last call race."""
        notes, self._notes = self._notes, []
        if all(note.values is None for note in notes):
            return
        grain = min([8, *(note.size for note in notes)])
        unit, value, writes, block, thread, epoch, moment = (
            np.concatenate(column)
            for column in zip(*(_units(note, grain) for note in notes), strict=True)
        )
        warp, unlike = thread // WARP, (np.where(writes, 0, 1), value)
        for access in _shared_places((unit,), block, writes):
            raise Fault(
                f"race: two blocks touch byte {unit[access] * grain} of {self.name} and one writes"
            )
        # Barriers of a block order its warps; in a warp, its own barriers order the lanes as well.
        for access in (
            *_shared_places((unit, block, epoch), warp, writes, *unlike),
            *_shared_places((unit, block, warp, moment), thread, writes, *unlike),
        ):
            raise Fault(
                f"race: two threads of block {block[access]} touch byte {unit[access] * grain} of "
                f"{self.name}, one writes, and no barrier is between them"
            )


def _spread(at: np.ndarray, words: int, width: int) -> np.ndarray:
    first = at // (width // 8)
    return first[:, None] + np.arange(words)


def _units(note: _Note, grain: int) -> tuple[np.ndarray, ...]:
    """Split accesses into units of `grain` bytes: unit, value, whether it writes, and who."""
    count = note.size // grain
    unit = (note.at[:, None] // grain + np.arange(count)).ravel()
    if note.values is None:
        value = np.zeros(len(unit), np.uint64)
    else:
        value = np.ascontiguousarray(note.values).view(UNSIGNED[8 * grain]).ravel()
    who = (np.repeat(column, count) for column in note.who)
    return unit, value.astype(np.uint64), np.full(len(unit), note.values is not None), *who


def _shared_places(
    place: tuple[np.ndarray, ...], who: np.ndarray, writes: np.ndarray, *differ: np.ndarray
) -> list[int]:
    """Return accesses, one for each place that several touch and one of them writes.

    Args:
        place: columns that are equal for accesses of one place; who: who makes each access.
        differ: if any are given, only places where one of these columns is not the same throughout.
    """
    order = np.lexsort(place)
    begins = np.ones(len(order), bool)
    begins[1:] = False
    for column in place:
        ordered = column[order]
        begins[1:] |= ordered[1:] != ordered[:-1]
    first = np.flatnonzero(begins)

    def several(column: np.ndarray) -> np.ndarray:
        ordered = column[order]
        return np.minimum.reduceat(ordered, first) != np.maximum.reduceat(ordered, first)

    found = several(who) & np.logical_or.reduceat(writes[order], first)
    if differ:
        found &= np.logical_or.reduce([several(column) for column in differ])
    return order[first[found]].tolist()


class GlobalMemory:
    """Hold the storages that a launch may touch, at the addresses of the host."""

    def __init__(self, storages: list[tuple[str, int, int]]) -> None:
        """Take the name, the address and the size in bytes of each; one may come twice."""
        distinct = {address: (name, size) for name, address, size in storages if size > 0}
        self._starts = np.array(sorted(distinct), dtype=np.int64)
        self._regions = []
        for address in self._starts.tolist():
            name, size = distinct[address]
            content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            self._regions.append(Region(name, content))

    def load(self, address: np.ndarray, words: int, width: int, who: Threads) -> np.ndarray:
        """Load as `Region.load` does, from addresses; raise a Fault where that is not allowed."""
        found = np.empty((len(address), words), UNSIGNED[width])
        for region, lanes, at in self._places(address, words * width // 8):
            found[lanes] = region.load(at, words, width, _of(who, lanes))
        return found

    def store(self, address: np.ndarray, values: np.ndarray, who: Threads) -> None:
        size = values.shape[1] * values.dtype.itemsize
        for region, lanes, at in self._places(address, size):
            region.store(at, values[lanes], _of(who, lanes))

    def _places(self, address: np.ndarray, size: int):
        """Yield each region that is touched, the lanes that touch it, and where."""
        check_alignment(address, size)
        address = address.view(np.int64)
        number = np.searchsorted(self._starts, address, side="right") - 1
        for i in np.unique(number).tolist():
            if i < 0:
                raise Fault(f"out of bounds: address {address.min():#x} belongs to no tensor")
            region, lanes = self._regions[i], number == i
            at = address[lanes] - self._starts[i]
            if (at + size > region.size).any():
                raise Fault(
                    f"out of bounds: {size} bytes at byte {at.max()} of {region.name}, "
                    f"which has {region.size}"
                )
            yield region, slice(None) if lanes.all() else lanes, at

    def check_races(self) -> None:
        for region in self._regions:
            region.check_races()


def _of(who: Threads, lanes: np.ndarray | slice) -> Threads:
    return Threads(*(column[lanes] for column in who))


class SharedMemory:
    """Hold the shared memory of several blocks, each of which sees its own from address 0."""

    def __init__(self, content: np.ndarray) -> None:
        """Take what it holds at first, uint8 [blocks, bytes]."""
        self._bytes = content.shape[1]
        self._region = Region("shared memory", content.reshape(-1))

    def load(
        self, address: np.ndarray, words: int, width: int, place: np.ndarray, who: Threads
    ) -> np.ndarray:
        """Load as `Region.load` does; `place` is the row of each lane's block."""
        at = self._at(address, words * width // 8, place)
        return self._region.load(at, words, width, who)

    def store(
        self, address: np.ndarray, values: np.ndarray, place: np.ndarray, who: Threads
    ) -> None:
        at = self._at(address, values.shape[1] * values.dtype.itemsize, place)
        self._region.store(at, values, who)

    def _at(self, address: np.ndarray, size: int, place: np.ndarray) -> np.ndarray:
        check_alignment(address, size)
        # A negative offset is a large address.
        if (address + np.uint64(size) > self._bytes).any():
            raise Fault(
                f"out of bounds: {size} bytes at byte {address.max()} of a block's shared memory, "
                f"which has {self._bytes}"
            )
        return place * self._bytes + address.view(np.int64)

    def check_races(self) -> None:
        self._region.check_races()


def check_alignment(address: np.ndarray, size: int) -> None:
    """Raise a Fault unless every address is a multiple of `size` bytes."""
    if (address % np.uint64(size)).any():
        raise Fault(f"misaligned: {size} bytes at an address that is no multiple of {size}")
