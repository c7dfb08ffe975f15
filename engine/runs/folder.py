"""A run folder: the recipe, the environment, the log, the weights, the evaluation, the report."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from .. import files, models, plugins, recipes, registers
from ..device.machine import environment
from ..errors import EngineError
from ..recipes import Recipe
from ..text import shown
from ..training.checkpoint import load_tensors, most_bytes, save_tensors

log = logging.getLogger(__name__)

# What a run writes: a stranger's folder may have links by these names that lead elsewhere.
_NAMES = (
    *("recipe.toml", "environment.json", "metrics.jsonl", "checkpoints", "lock", "summary.json"),
    *("best.safetensors", "last.safetensors", "evaluation.json", "masking.json", "report.html"),
    *("pictures", "export", "loggers.json", "wandb", "mlflow.db", "evaluation"),
)
# Sections that stand in every written recipe, since the first version.
_SECTIONS = ("data", "model", "threat", "attack", "objective", "optim")
# Characters of a recipe's name in the name of a folder, which may have 255 bytes.
_LONGEST_NAME = 60
# The name of a module, as `--import` takes it.
_MODULE = re.compile(r"[A-Za-z_][\w.]{0,99}")


class Run:
    """Hold one run folder; every file of the run is written by way of `place`.

    Files: `recipe.toml` (every field), `environment.json`, `metrics.jsonl` (a row an epoch),
    `best.safetensors` and `last.safetensors` (plain state dicts, each with its SHA-256 beside it),
    `checkpoints/` to go on from, `evaluation/` (the answers of an evaluation that was stopped),
    `evaluation.json`, `summary.json` (present: the run is finished),
    `report.html` with its pictures in `pictures/`, `lock` (held while a process trains).
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        self._held: int | None = None

    @classmethod
    def create(cls, recipe: Recipe, path: Path | None = None) -> Run:
        """Make a new run in `path`, or in runs/NAME-DATE-TIME.

        The folder is locked before its first file is written, and stays locked until `locked` ends
        or the object goes: a second process that creates the same run is refused.

        Raises:
            EngineError: if the folder holds a run already, is in use, or cannot be written.
        """
        run = cls(_new_folder(recipe) if path is None else _folder(path), recipe)
        run._refuse_second()
        run._lock()
        run._refuse_second()
        files.write_text(run.place("recipe.toml"), recipes.dump(recipe))
        # A hint for `_check_known`; nothing imports a module because a run names it.
        run.write_json("environment.json", {**environment(), "imports": plugins.imported()})
        return run

    @staticmethod
    def new_path(recipe: Recipe) -> Path:
        """Return runs/NAME-DATE-TIME, a path where nothing is yet."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path("runs") / f"{plain(recipe.name)}-{stamp}"
        number = 2
        while path.exists():
            path = path.with_name(f"{plain(recipe.name)}-{stamp}-{number}")
            number += 1
        return path

    @classmethod
    def open(cls, path: Path) -> Run:
        """Return the run in an existing folder.

        Raises:
            EngineError: if the folder holds no run, or the run's recipe is damaged, or one of the
                run's files is a symbolic link (`place`), or the run's network or objective came
                from a module that is not imported here.
        """
        if not (path / "recipe.toml").is_file():
            raise EngineError(f"{path} is not a run folder: it has no recipe.toml")
        for name in _NAMES:
            files.within(path, name)
        _check_known(path)
        return cls(path, recipes.load(str(path / "recipe.toml")))

    def place(self, name: str) -> Path:
        """Return RUN/`name` as a place to write.

        Raises:
            EngineError: where a symbolic link on the way leads out of the folder.
        """
        return files.within(self.path, name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into this folder.

        Raises:
            EngineError: where another process trains into it, or the folder cannot be locked.
        """
        if self._held is None:
            self._lock()
        try:
            yield
        finally:
            self._unlock()

    def __del__(self) -> None:
        self._unlock()

    def _lock(self) -> None:
        path = self.place("lock")
        try:
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise EngineError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(held)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise EngineError(
                    f"{self.path} is in use by another process: wait for it, or choose another "
                    "--run-dir"
                ) from None
            raise EngineError(
                f"cannot lock {path}: {error.strerror}: put the run on a file system with locks, a "
                "local disk for one (--run-dir; a run that exists can be copied there)"
            ) from None
        self._held = held

    def _unlock(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _refuse_second(self) -> None:
        if os.path.lexists(self.path / "recipe.toml"):
            raise EngineError(f"{self.path} holds a run already: choose another --run-dir")

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl, whole or not at all; a power cut does not lose it."""
        files.append(self.place("metrics.jsonl"), (json.dumps(row) + "\n").encode())

    def logged(self) -> int:
        """Return the size of metrics.jsonl so far [bytes], for `cut_log`."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_log(self, size: int) -> None:
        """Drop the rows after the first `size` bytes: they will be logged again.

        Raises:
            EngineError: if earlier rows are missing, or the log cannot be written.
        """
        path = self.place("metrics.jsonl")
        if self.logged() < size:
            raise EngineError(
                f"{path} has lost rows: {self.logged()} bytes, the checkpoint knows {size}"
            )
        if self.logged() > size:
            files.truncate(path, size)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged rows; a line that a crash cut short is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        text = files.read_text(path) if path.exists() else ""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the run, or {} where there is none."""
        path = self.path / name
        try:
            found = json.loads(files.read_text(path)) if path.exists() else {}
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{path} is damaged: {error}") from None
        if not isinstance(found, dict):
            raise EngineError(f"{path} is damaged: it holds no fields")
        return found

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file of the run."""
        files.write_json(self.place(name), value)

    def save(self, name: str, model: nn.Module, **about: object) -> None:
        """Write `name`.safetensors atomically, with its SHA-256 beside it.

        Args:
            about: plain JSON values for the file's metadata.
        """
        # One entry: safetensors writes several in an order that differs from call to call.
        metadata = {"about": json.dumps(about, sort_keys=True)}
        with files.summed(self.place(f"{name}.safetensors")) as temporary:
            save_tensors(model.state_dict(), temporary, metadata)

    def load_into(self, model: nn.Module, name: str = "best") -> None:
        """Load weights of this run into `model`.

        Args:
            name: "best" or "last".
        Raises:
            EngineError: if they are missing, damaged, or of another network.
        """
        if name not in ("best", "last"):
            raise EngineError(f"{self.path}: checkpoint {name!r} is neither best nor last")
        load_weights(model, self.path / f"{name}.safetensors")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors state dict into `model`; check the SHA-256 beside it, if there is one.

    Raises:
        EngineError: where there is none, or it is damaged or of another network.
    """
    if not os.path.lexists(path):
        raise EngineError(f"no checkpoint at {path}")
    limit = most_bytes(model.state_dict().values())
    try:
        if not files.check_sum(path, limit):
            log.warning("%s has no SHA-256 beside it: damage to it would not be seen", path)
        model.load_state_dict(load_tensors(path, limit))
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path} is damaged: {error}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(f"{path} does not fit the network: {reason}") from None


def _check_known(path: Path) -> None:
    """Refuse a run with a name that is not known here, and say where it came from.

    A run's recipe has every section, so one that lacks a section is damaged.
    """
    tree = recipes.tree(str(path / "recipe.toml"))
    if missing := [section for section in _SECTIONS if section not in tree]:
        raise EngineError(f"{path}/recipe.toml is damaged: it has no [{missing[0]}]")
    for section, key, title, known in (
        ("objective", "name", "objective", recipes.objectives().__contains__),
        ("model", "name", "network", models.is_known),
        ("optim", "name", "optimiser", registers.optimisers.__contains__),
        ("data", "loader", "loader", registers.loaders.__contains__),
    ):
        table = tree.get(section)
        name = table.get(key) if isinstance(table, dict) else None
        if not isinstance(name, str) or known(name):
            continue
        if hints := _imports_of(path):
            flags = " ".join(f"--import {hint}" for hint in hints)
            raise EngineError(
                f"{title} {shown(name)} is not known: it came from {flags}; pass that option again"
            )


def _imports_of(path: Path) -> list[str]:
    """Return the modules that a run folder names; a stranger's folder may hold anything."""
    try:
        found = json.loads(files.read_text(path / "environment.json"))["imports"]
    except (EngineError, OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    names = found if isinstance(found, list) else []
    return [name for name in names if isinstance(name, str) and _MODULE.fullmatch(name)]


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise EngineError(f"{path} is a file: choose another --run-dir")
    try:
        files.make_folder(path)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}") from error
    return path


def _new_folder(recipe: Recipe) -> Path:
    """Make a folder that no other process has made."""
    _folder(Path("runs"))
    while True:
        path = Run.new_path(recipe)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise EngineError(f"cannot write {path}: {error.strerror}") from error
        return path


def plain(name: str) -> str:
    """Return a recipe's name as the name of a folder: no separators, nothing hidden."""
    return (
        "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:_LONGEST_NAME].strip(".-")
        or "run"
    )
