"""Import the modules that `--import` names: they register networks and objectives of one's own.

Nothing else runs code for a recipe or a run folder. A run folder remembers the names of the
modules, as a hint for people.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from .errors import EngineError

_imported: list[str] = []


def load(modules: Iterable[str]) -> None:
    """Import modules by their dotted names; the current folder is the last place to look in.

    Raises:
        EngineError: for a name that is no module's, or a module that fails.
    """
    for name in modules:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            hint = f"--import {Path(name).stem}" if name.endswith(".py") else "--import mynets"
            raise EngineError(f"--import {name}: give a module's name, not a path: {hint}")
        here = str(Path.cwd())
        # Last: a file of the folder must not hide a module of Python's or of a package.
        if here not in sys.path:
            sys.path.append(here)
        try:
            importlib.import_module(name)
        except EngineError as error:
            raise EngineError(f"--import {name}: {error}") from error
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise EngineError(f"--import {name}: {error}{_place(error)}") from error
            raise EngineError(
                f"--import {name}: there is no module {error.name!r} in this folder or this Python"
            ) from None
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split())[:200]
            raise EngineError(
                f"--import {name}: {type(error).__name__}: {said}{_place(error)}"
            ) from error
        if name not in _imported:
            _imported.append(name)


def imported() -> tuple[str, ...]:
    """Return the names of the modules that `load` has imported, in order."""
    return tuple(_imported)


def words() -> list[str]:
    """Return the command line's words that import the same modules in another process."""
    return [word for name in _imported for word in ("--import", name)]


def _place(error: BaseException) -> str:
    """Return the file and the line where a module failed."""
    frames = traceback.extract_tb(error.__traceback__)
    # The import system's own frames are not the user's.
    ours = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    if not ours:
        return ""
    return f" ({Path(ours[-1].filename).name}, line {ours[-1].lineno})"
