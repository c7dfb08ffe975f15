"""Hold the state of the threads that run side by side, an entry of every array a lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .formats import UNSIGNED
from .memory import WARP, GlobalMemory, SharedMemory, Threads

# Registers are never written in place, so that one array may stand for many.
Mask = np.ndarray | None  # None: all lanes


class Grid(NamedTuple):
    """Hold a launch's programs along x, y and z, and the threads and shared bytes of each."""

    x: int
    y: int
    z: int
    threads: int
    shared: int

    @property
    def blocks(self) -> int:
        return self.x * self.y * self.z


class Lanes:
    """Hold whole blocks of one launch.

    Attributes:
        count: lanes; registers: their values, an unsigned or bool array each.
        place: the row of each lane's block among `blocks`.
        epoch: barriers that each block has passed.
        moment: barriers that each warp has passed, its block's and its own.
        special: %tid.x and its like.
    """

    def __init__(
        self,
        grid: Grid,
        blocks: np.ndarray,
        widths: list[int],
        arguments: dict[str, int],
        memory: GlobalMemory,
        draw: np.random.Generator,
    ) -> None:
        self.grid, self.blocks = grid, blocks
        self.arguments = arguments
        self.memory = memory
        self.count = len(blocks) * grid.threads
        self.place = np.repeat(np.arange(len(blocks)), grid.threads)
        self.thread = np.tile(np.arange(grid.threads), len(blocks))
        self.epoch = np.zeros(len(blocks), np.int64)
        self.moment = np.zeros(self.count // WARP, np.int64)
        # What nobody wrote is poison: half the words NaN (and -1), half random bits.
        poison = {width: _poison(draw, self.count, width) for width in (1, 16, 32, 64)}
        self.registers = [poison[width] for width in widths]
        words = _poison(draw, len(blocks) * -(-grid.shared // 4), 32)
        content = words.view(np.uint8).reshape(len(blocks), -1)[:, : grid.shared]
        self.shared = SharedMemory(np.ascontiguousarray(content))
        self.special = self._special()

    def _special(self) -> dict[str, np.ndarray]:
        grid, block = self.grid, self.blocks[self.place]
        number = {
            "x": block % grid.x,
            "y": block // grid.x % grid.y,
            "z": block // grid.x // grid.y,
        }
        zero = np.zeros(self.count, np.uint32)
        found = {f"%ctaid.{axis}": value.astype(np.uint32) for axis, value in number.items()}
        for axis, size in zip("xyz", grid[:3], strict=True):
            found[f"%nctaid.{axis}"] = zero + np.uint32(size)
            found[f"%ntid.{axis}"] = zero + np.uint32(grid.threads if axis == "x" else 1)
            found[f"%tid.{axis}"] = self.thread.astype(np.uint32) if axis == "x" else zero
        found["%laneid"] = found["%tid.x"] % np.uint32(WARP)
        return found

    def write(self, register: int, raw: np.ndarray, mask: Mask) -> None:
        """Set a register of the lanes in `mask`."""
        if mask is not None:
            raw = np.where(mask, raw, self.registers[register])
        elif raw.shape != (self.count,):
            raw = np.broadcast_to(raw, self.count)
        self.registers[register] = raw

    def put(self, register: int, raw: np.ndarray, lanes: np.ndarray | slice) -> None:
        """Set a register of some lanes to a value for each of them."""
        whole = np.array(self.registers[register])
        whole[lanes] = raw
        self.registers[register] = whole

    def who(self, lanes: np.ndarray | slice) -> Threads:
        place = self.place[lanes]
        moment = np.repeat(self.moment, WARP)[lanes]
        return Threads(self.blocks[place], self.thread[lanes], self.epoch[place], moment)


def _poison(draw: np.random.Generator, count: int, width: int) -> np.ndarray:
    if width == 1:
        return draw.random(count) < 0.5
    kind = UNSIGNED[width]
    noise = draw.integers(0, np.iinfo(kind).max, count, dtype=kind, endpoint=True)
    return np.where(draw.random(count) < 0.5, noise, np.iinfo(kind).max)


Read = Callable[[Lanes], np.ndarray]
Act = Callable[[Lanes, Mask], None]
