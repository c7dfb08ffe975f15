"""Run a program's blocks in random order, and a block's warps in random order between barriers.

Lanes that stand at one instruction run it together. Of lanes that stand apart, those furthest
behind go first, so that they meet again where their paths do. A random half of the warps goes first
to its barrier or end, then the other half. Over some seeds any two warps run in either order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .decode import BARRIER, BRANCH, EXIT, Decoder, Step
from .lanes import Grid, Lanes, Mask
from .memory import WARP, Fault, GlobalMemory
from .program import parse

# Lanes side by side: an instruction costs NumPy some microseconds, however few they are.
_LANES = 4096
# A kernel of this project runs some thousands; a loop that never ends is a fault.
_MOST_STEPS = 1_000_000


@lru_cache(maxsize=16)
def _decoded(ptx: str) -> tuple[tuple[str, ...], list[Step], list[int]]:
    program = parse(ptx)
    decoder = Decoder(program)
    steps = decoder.steps()
    return program.parameters, steps, decoder.widths


def execute(
    ptx: str, arguments: Sequence[int], grid: Grid, memory: GlobalMemory, seed: int = 0
) -> None:
    """Run a kernel to its end.

    Args:
        ptx: one kernel.
        arguments: the bits of each parameter; those that are missing at the end are 0.
        memory: what the kernel may touch.
        seed: of the order of blocks and warps, and of the poison in what nobody wrote.
    Raises:
        Fault: an access out of bounds or off alignment, a race, a barrier or a shuffle that not all
            of its lanes reach, a loop without an end.
        ValueError: PTX that is not executed here.
    """
    names, steps, widths = _decoded(ptx)
    values = [*arguments, *[0] * (len(names) - len(arguments))]
    draw = np.random.default_rng(seed)
    order = draw.permutation(grid.blocks)
    together = max(_LANES // grid.threads, 1)
    for first in range(0, grid.blocks, together):
        blocks = order[first : first + together]
        lanes = Lanes(grid, blocks, widths, dict(zip(names, values, strict=True)), memory, draw)
        # Lanes that a branch leaves out compute as well, and nothing is made of it.
        with np.errstate(all="ignore"):
            _Run(steps, lanes, draw).to_the_end()
        lanes.shared.check_races()
    memory.check_races()


class _Run:
    """Steer the control flow of some blocks."""

    def __init__(self, steps: list[Step], lanes: Lanes, draw: np.random.Generator) -> None:
        self._steps, self._lanes, self._draw = steps, lanes, draw
        self._at = np.zeros(lanes.count, np.int64)  # the next step of each lane
        self._ended = np.zeros(lanes.count, bool)
        self._waiting = np.zeros(lanes.count // WARP, bool)  # warps at a barrier
        self._taken = 0

    def to_the_end(self) -> None:
        while (able := ~(self._waiting | self._ended.reshape(-1, WARP).all(1))).any():
            half = able & (self._draw.random(len(able)) < 0.5)
            for chosen in (half, able & ~half):
                self._advance(np.repeat(chosen, WARP) & ~self._ended)
            self._open_barriers()

    def _advance(self, chosen: np.ndarray) -> None:
        """Run the chosen lanes until each has ended or waits."""
        parts: dict[int, np.ndarray] = {}  # the lanes that stand at each step
        for at in np.unique(self._at[chosen]).tolist():
            parts[at] = chosen & (self._at == at)
        while parts:
            at = min(parts)
            mask = parts.pop(at)
            for where, lanes in self._straight(at, mask, min(parts, default=len(self._steps))):
                parts[where] = parts[where] | lanes if where in parts else lanes

    def _straight(self, at: int, mask: np.ndarray, meet: int) -> list[tuple[int, np.ndarray]]:
        """Run lanes from a step on, up to a branch, a barrier, the end, or the step `meet`.

        Returns:
            Where they stand now; those that have ended or wait are left out.
        """
        whole: Mask = None if mask.all() else mask
        while True:
            step = self._step(at)
            active = whole if step.guard is None else self._guarded(step, mask)
            if step.kind == BRANCH:
                taken = mask if active is None else active
                stay = mask & ~taken
                return [
                    (where, m) for where, m in ((step.target, taken), (at + 1, stay)) if m.any()
                ]
            if step.kind == EXIT:
                gone = mask if active is None else active
                self._ended |= gone
                mask = mask & ~gone
                whole = mask
                if not mask.any():
                    return []
            elif step.kind == BARRIER:
                self._wait(at, mask, step)
                return []
            elif active is None or active.any():
                step.act(self._lanes, active)  # type: ignore[misc]
            at += 1
            if at >= meet:
                return [(at, mask)]

    def _step(self, at: int) -> Step:
        if at >= len(self._steps):
            raise Fault("lanes run past the kernel's last instruction")
        self._taken += 1
        if self._taken > _MOST_STEPS:
            raise Fault(f"no end after {_MOST_STEPS} instructions")
        return self._steps[at]

    def _guarded(self, step: Step, mask: np.ndarray) -> np.ndarray:
        held = self._lanes.registers[step.guard]  # type: ignore[index]
        return mask & (~held if step.negated else held)

    def _wait(self, at: int, mask: np.ndarray, step: Step) -> None:
        if step.guard is not None:
            raise Fault(f"a barrier under a predicate: {step.text}")
        warps = mask.reshape(-1, WARP)
        here = warps.any(1)
        if (here & ~warps.all(1)).any():
            raise Fault("a barrier in divergent code: not all lanes of a warp reach it together")
        self._waiting |= here
        self._at[mask] = at + 1

    def _open_barriers(self) -> None:
        """Let the blocks go on whose warps are all at a barrier."""
        threads = self._lanes.grid.threads
        waiting = self._waiting.reshape(-1, threads // WARP)
        ended = self._ended.reshape(len(waiting), -1)
        if (waiting.any(1) & ended.any(1)).any():
            raise Fault("a barrier that some threads of the block never reach")
        at = self._at.reshape(len(waiting), -1)
        opens = waiting.all(1)
        if (at[opens] != at[opens][:, :1]).any():
            raise Fault("warps of a block wait at different barriers")
        waiting[opens] = False
        self._lanes.epoch[opens] += 1
        self._lanes.moment.reshape(len(waiting), -1)[opens] += 1
