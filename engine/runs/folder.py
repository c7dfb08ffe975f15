"""A run folder: the recipe, the environment, the log, the checkpoints, the evaluation, the report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .. import files, recipes
from ..device.machine import environment
from ..errors import EngineError
from ..recipes import Recipe
from ..training.checkpoint import save_tensors


class Run:
    """One run folder.

    Files: `recipe.toml` (every field), `environment.json`, `metrics.jsonl` (a row an epoch),
    `best.safetensors` and `last.safetensors` (plain state dicts), `checkpoints/` to go on from,
    `evaluation.json`, `summary.json` (its presence says that the run is finished), `report.html` with
    its pictures in `pictures/`.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe

    @classmethod
    def create(cls, recipe: Recipe, path: Path | None = None) -> Run:
        """Make a new folder: `path`, or runs/NAME-DATE-TIME.

        Raises:
            EngineError: if it holds a run already or cannot be written.
        """
        path = path or cls.new_path(recipe)
        if (path / "recipe.toml").exists():
            raise EngineError(f"{path} holds a run already: choose another --run-dir")
        if path.exists() and not path.is_dir():
            raise EngineError(f"{path} is a file: choose another --run-dir")
        run = cls(path, recipe)
        files.write_text(path / "recipe.toml", recipes.dump(recipe))
        files.write_json(path / "environment.json", environment())
        return run

    @staticmethod
    def new_path(recipe: Recipe) -> Path:
        """runs/NAME-DATE-TIME, not there yet."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path("runs") / f"{plain(recipe.name)}-{stamp}"
        number = 2
        while path.exists():
            path = path.with_name(f"{plain(recipe.name)}-{stamp}-{number}")
            number += 1
        return path

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run folder.

        Raises:
            EngineError: if it is none, or its recipe is damaged.
        """
        if not (path / "recipe.toml").is_file():
            raise EngineError(f"{path} is not a run folder: it has no recipe.toml")
        return cls(path, recipes.load(str(path / "recipe.toml")))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into this folder.

        Raises:
            EngineError: where one is at it, or the folder cannot be written.
        """
        path = self.path / "lock"
        try:
            held = path.open("a+")
        except OSError as error:
            raise EngineError(f"cannot write {path}: {error.strerror}") from error
        with held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EngineError(
                    f"{self.path} is in use by another process: wait for it, or choose another --run-dir"
                ) from None
            yield

    # ---- log -----------------------------------------------------------------------------

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl, in one write."""
        line = (json.dumps(row) + "\n").encode()
        try:
            handle = os.open(
                self.path / "metrics.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
            )
            try:
                os.write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            raise EngineError(
                f"cannot write {self.path}/metrics.jsonl: {error.strerror}"
            ) from error

    def logged(self) -> int:
        """Bytes of metrics.jsonl so far: what `cut_log` takes."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_log(self, size: int) -> None:
        """Drop what was logged after the first `size` bytes: it will be logged again.

        Raises:
            EngineError: if rows are missing from before, or the log cannot be written.
        """
        path = self.path / "metrics.jsonl"
        if self.logged() < size:
            raise EngineError(
                f"{path} has lost rows: {self.logged()} bytes, the checkpoint knows {size}"
            )
        if self.logged() > size:
            try:
                os.truncate(path, size)
            except OSError as error:
                raise EngineError(f"cannot write {path}: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The logged rows; a line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        text = files.read_text(path) if path.exists() else ""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run, or {} where it is not there."""
        path = self.path / name
        try:
            found = json.loads(files.read_text(path)) if path.exists() else {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise EngineError(f"{path} is damaged: {error}") from None
        if not isinstance(found, dict):
            raise EngineError(f"{path} is damaged: it holds no fields")
        return found

    def write_json(self, name: str, value: object) -> None:
        files.write_json(self.path / name, value)

    # ---- checkpoints ---------------------------------------------------------------------

    def save(self, name: str, model: nn.Module, **about: object) -> None:
        """Write `name`.safetensors atomically; `about` goes into its metadata as text."""
        with files.atomic(self.path / f"{name}.safetensors") as temporary:
            save_tensors(model.state_dict(), temporary, {k: str(v) for k, v in about.items()})

    def load_into(self, model: nn.Module, name: str = "best") -> None:
        """Load a checkpoint of this run into `model`.

        Raises:
            EngineError: if it is missing, damaged, or of another network.
        """
        load_weights(model, self.path / f"{name}.safetensors")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors state dict into `model`; EngineError in one line where that cannot be."""
    if not path.is_file():
        raise EngineError(f"no checkpoint at {path}")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path} is damaged: {error}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(f"{path} does not fit the network: {reason}") from None


def plain(name: str) -> str:
    """A recipe's name as a folder's: no separators, nothing hidden."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-") or "run"
