"""Checkpoints: all that a run needs to resume as if it had never stopped.

A checkpoint is a safetensors file and a JSON manifest with the file's SHA-256. They are written in
this order, each atomically: a checkpoint exists once its manifest does. Reading one executes
nothing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from .. import files
from ..errors import EngineError

log = logging.getLogger(__name__)

VERSION = 1
# A manifest holds a few numbers and as many file names.
_MANIFEST_BYTES = 1 << 20


class Checkpoints:
    """Hold the checkpoints of one run, RUN/checkpoints/STEP.safetensors and STEP.json.

    Args:
        keep: the number of checkpoints to keep [count]; older ones are removed.
        seconds: the time between checkpoints, see `due`.
    """

    def __init__(self, folder: Path, *, keep: int = 2, seconds: float = 60.0) -> None:
        self.folder, self.keep, self.seconds = folder, keep, seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether `seconds` have passed since the last checkpoint, or since the start."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, then remove the oldest ones.

        Args:
            tensors: on any device; copied to the CPU. about: plain JSON values.
        Raises:
            EngineError: where it cannot be written; older checkpoints stay.
        """
        with files.atomic(self._path(step)) as temporary:
            save_tensors(tensors, temporary)
            manifest = {
                "version": VERSION,
                "step": step,
                "sha256": files.digest(temporary, temporary.stat().st_size),
                "about": about,
            }
        files.write_json(self._path(step, ".json"), manifest)
        self._last = time.monotonic()
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def try_save(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Do as `save` does, but warn where the checkpoint cannot be written: training goes on."""
        try:
            self.save(step, tensors, about)
        except EngineError as error:
            self._last = time.monotonic()
            log.warning("no checkpoint at step %d: %s", step, error)

    def latest(self, limit: int = 1 << 50) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest checkpoint that is whole, as `save` had it; None: there is none.

        A damaged one is named in a warning and set aside (`.damaged`), and the one before it is
        used.

        Args:
            limit: the most bytes that a checkpoint of this run may have, see `most_bytes`.
        """
        for step in reversed(self.steps()):
            try:
                return self._load(step, limit)
            except EngineError as error:
                log.warning("%s; set aside, the one before it is used", error)
                for suffix in (".json", ".safetensors"):
                    path = self._path(step, suffix)
                    if path.exists():
                        path.replace(path.with_name(path.name + ".damaged"))
        return None

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order."""
        return sorted(int(p.stem) for p in self.folder.glob("*.json") if p.stem.isdecimal())

    def _load(self, step: int, limit: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self._path(step)
        manifest = _manifest(self._path(step, ".json"))
        try:
            if files.digest(path, limit, "checkpoint ") != manifest["sha256"]:
                raise EngineError(
                    f"checkpoint {path} is damaged: its SHA-256 is not the manifest's"
                )
            return load_tensors(path, limit), manifest["about"]
        except (OSError, SafetensorError) as error:
            raise EngineError(f"checkpoint {path} is damaged: {error}") from None

    def _remove(self, step: int) -> None:
        # The manifest goes first: a removal that is cut short leaves no checkpoint.
        for suffix in (".json", ".safetensors"):
            self._path(step, suffix).unlink(missing_ok=True)

    def _path(self, step: int, suffix: str = ".safetensors") -> Path:
        return self.folder / f"{step:010d}{suffix}"


def most_bytes(tensors: Iterable[Tensor]) -> int:
    """Return a generous bound on the size [bytes] of a safetensors file of `tensors`.

    A larger file is not read: hashing a sparse one of 100 GB takes minutes.
    """
    return 2 * sum(t.numel() * t.element_size() for t in tensors) + (1 << 28)


def load_tensors(path: Path, limit: int) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of at most `limit` bytes.

    Raises:
        EngineError: as `files.opened` does.
        SafetensorError: for a damaged file.
    """
    with files.opened(path, limit) as file:
        try:
            os.fsencode(path).decode("utf-8")
        except UnicodeDecodeError:
            # safetensors opens no such path.
            return load(file.read())
        return load_file(path)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None
) -> None:
    """Write tensors from any device as a safetensors file.

    Raises:
        OSError: where it cannot be written; safetensors has an exception of another kind.
    """
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(held, path, metadata=about)
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def _manifest(path: Path) -> dict[str, Any]:
    """Return a manifest's fields, checked."""
    try:
        found = json.loads(files.read_text(path, _MANIFEST_BYTES, "checkpoint "))
    except (ValueError, RecursionError) as error:
        raise EngineError(f"checkpoint {path} is damaged: {error}") from None
    fits = (
        isinstance(found, dict)
        and isinstance(found.get("sha256"), str)
        and isinstance(found.get("about"), dict)
    )
    if not fits:
        raise EngineError(f"checkpoint {path} is damaged: fields are missing")
    if found.get("version") != VERSION:
        raise EngineError(
            f"checkpoint {path} is of version {found.get('version')!r}, this engine reads {VERSION}"
        )
    return found
