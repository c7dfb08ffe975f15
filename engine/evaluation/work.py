"""The batches of an evaluation: dealt to processes, and remembered across a kill.

A batch of an attack gives the same answer in every process and at every time: its random numbers
depend on the seed alone. So the results are the same, bit for bit on one kind of machine, for any
number of processes, and whether an evaluation was stopped or not.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..device import distributed
from ..device.distributed import World

# Called with (attack, batches done, batches).
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


class Work:
    """Run the batches of attacks.

    Args:
        progress: called with (attack, batches done, batches).
        world: the processes that share the batches; each must call `fallen` for the same batches.
        journal: a folder for the answers so far; None: they are not kept.
        about: plain JSON values that decide the answers; a journal of other values is dropped.
    Attributes:
        notes: warnings of the attacks.
        part: ends the name of each attack, where the same attacks run on several parts of a set.
        seconds: the time that stopped evaluations took before this one [s].
    """

    def __init__(
        self,
        progress: Progress = silent,
        world: World | None = None,
        journal: Path | None = None,
        about: object = None,
    ) -> None:
        self.progress, self.world = progress, world or World()
        self.notes: list[str] = []
        self.part = ""
        self.seconds = 0.0
        self._journal = journal
        self._known: dict[str, list[int]] = {}
        self._began = time.perf_counter()
        if journal is not None:
            # The journals of all processes, also of more processes than now.
            header = json.loads(json.dumps({"about": about}))
            for path in sorted(journal.glob("*.jsonl")):
                self._read(path, header)
            # Every process must have read before one writes: all deal out the same batches.
            distributed.wait()
            self._own = files.within(journal, f"{self.world.rank}.jsonl")
            files.make_folder(journal)
            if next(_lines(self._own), None) != header:
                files.remove(self._own)
                self._write(header)

    def fallen(
        self, attack: str, batches: Sequence[Tensor], judge: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """Return the images that fall to one attack, int64 [F], the same in every process.

        Args:
            attack: its name, unique in a part of an evaluation.
            batches: positions of images, int64 [B] each.
            judge: from a batch's number and its positions to those that fall, int64 [F].
        """
        attack += self.part
        keys = [f"{attack} {number}" for number in range(len(batches))]
        found = [row for key in keys for row in self._known.get(key, ())]
        left = [number for number, key in enumerate(keys) if key not in self._known]
        done = len(keys) - len(left)
        mine = left[self.world.rank :: self.world.size]
        here: list[int] = []
        notes: list[str] = []
        for place, number in enumerate(mine):
            self.progress(attack, done + place * self.world.size, len(keys))
            before = len(self.notes)
            rows = judge(number, batches[number]).tolist() if len(batches[number]) else []
            here += rows
            notes += self.notes[before:]
            if self._journal is not None:
                elapsed = self.seconds + time.perf_counter() - self._began
                entry = {"key": keys[number], "fallen": rows, "notes": self.notes[before:]}
                self._write({**entry, "seconds": elapsed})
        for rows, others in distributed.gather_objects((here, notes)):
            found += rows
            self.notes += [note for note in others if note not in self.notes]
        self.progress(attack, len(keys), len(keys))
        device = batches[0].device if batches else None
        return torch.tensor(sorted(found), dtype=torch.int64, device=device)

    def finish(self) -> None:
        """Remove the journal: the evaluation's result has been written."""
        distributed.wait()
        if self._journal is not None and self.world.first:
            for path in self._journal.glob("*.jsonl"):
                files.remove(path)
            with contextlib.suppress(OSError):
                self._journal.rmdir()

    def _write(self, value: dict[str, Any]) -> None:
        files.append(self._own, (json.dumps(value) + "\n").encode())

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        lines = _lines(path)
        if next(lines, None) != header:
            return
        for entry in lines:
            rows = entry.get("fallen")
            if isinstance(rows, list) and all(type(row) is int for row in rows):
                self._known[str(entry.get("key"))] = rows
                self.notes += [n for n in entry.get("notes", []) if n not in self.notes]
                self.seconds = max(self.seconds, float(entry.get("seconds", 0.0)))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; a line that a crash cut short is left out."""
    text = files.read_text(path) if path.exists() else ""
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
