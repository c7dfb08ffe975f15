"""Read and write files: a reader sees the old file or the new one, never half of either.

Every write of a run goes through this module. What a function here has written survives a power cut
once the function returns: the file is synced, then the folder that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from .errors import EngineError

# A sum file holds one line.
_SUM_BYTES = 1 << 12


def within(folder: Path, *names: str) -> Path:
    """Return FOLDER/NAMES as a place to write.

    Raises:
        EngineError: where a symbolic link stands on the way, which may lead out of the folder.
    """
    path = folder
    for part in Path(*names).parts:
        path = path / part
        if path.is_symlink():
            raise EngineError(
                f"{path} is a symbolic link, and files of {folder} are written into that folder "
                "alone: replace the link"
            )
    return path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it onto `path` if the block ends well.

    A block that raises leaves `path` as it was and no temporary file.

    Raises:
        EngineError: where the folder cannot be written.
    """
    try:
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give an empty temporary folder; move its files into `folder` if the block ends well.

    A new folder appears with all its files at once. In a folder that exists, each file is replaced
    whole, old sums go first, and other files stay. A block that raises leaves `folder` as it was.

    Raises:
        EngineError: where the folder cannot be written.
    """
    folder = folder.absolute()
    existed = folder.is_dir()
    try:
        make_folder(folder.parent)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder if existed else folder.parent)
        )
    except OSError as error:
        raise EngineError(f"cannot write {folder}: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if existed:
            paths = sorted(temporary.iterdir())
            for path in paths:
                remove(sum_path(folder / path.name))
            for path in paths:
                os.replace(path, folder / path.name)
            _sync(folder)
        else:
            os.replace(temporary, folder)
            _sync(folder.parent)
    except OSError as error:
        raise EngineError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and the folders above it that are missing."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync(path.parent)


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing, and write a file in it that goes at once.

    Raises:
        EngineError: where the folder cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise EngineError(f"cannot write {folder}: it is a file, not a folder")
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise EngineError(f"cannot write {folder}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        EngineError: where it cannot be removed.
    """
    try:
        path.unlink()
        _sync(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise EngineError(f"cannot remove {path}: {error.strerror}") from error


def append(path: Path, data: bytes) -> None:
    """Append `data` to a file, whole or not at all, and make the file if it is missing.

    Raises:
        EngineError: where `data` cannot be written.
    """
    try:
        handle = _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            before = os.fstat(handle).st_size
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(handle, rest) :]
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
        if before == 0:
            _sync(path.parent)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}") from error


def truncate(path: Path, size: int) -> None:
    """Cut a file to its first `size` bytes.

    Raises:
        EngineError: where it cannot be written.
    """
    try:
        handle = _open(path, os.O_WRONLY)
        try:
            os.ftruncate(handle, size)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}") from error


def _open(path: Path, flags: int) -> int:
    """Open a regular file for writing; a symbolic link is not followed, a FIFO not waited for."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(None, "not a regular file")
    return handle


def _sync(folder: Path) -> None:
    """Make names in `folder` survive a power cut, where the system lets a folder be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def opened(path: Path, limit: int, title: str = "") -> Iterator[BufferedReader]:
    """Open a regular file of at most `limit` bytes for reading.

    Args:
        title: names the kind of the file in a message, with a space at its end.
    Raises:
        EngineError: for a FIFO, a device or a folder; for a larger file; where the file cannot be
            read.
    """
    try:
        # Without O_NONBLOCK opening a FIFO waits for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise EngineError(f"cannot read {title}{path}: it is not a regular file")
            if status.st_size > limit:
                raise EngineError(
                    f"cannot read {title}{path}: it has {status.st_size:,} bytes, more than "
                    f"{limit:,}: not what it should be"
                )
            yield file
    except OSError as error:
        raise EngineError(f"cannot read {title}{path}: {error.strerror or error}") from None


def read_text(path: Path, limit: int = 64 << 20, title: str = "") -> str:
    """Return the text of a regular file of at most `limit` bytes; `title` as for `opened`.

    Raises:
        EngineError: where it cannot be read, is larger, or is not UTF-8.
    """
    with opened(path, limit, title) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise EngineError(f"cannot read {title}{path}: it has more than {limit:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise EngineError(f"cannot read {title}{path}: it is not UTF-8 text") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file as `atomic` does.

    Raises:
        EngineError: where it cannot be written, or holds characters that UTF-8 has not.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise EngineError(f"cannot write {path}: {character!r} is no character of UTF-8") from None
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as `atomic` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def digest(path: Path, limit: int, title: str = "") -> str:
    """Return the SHA-256 of a regular file in hexadecimal; arguments and errors as for `opened`."""
    with opened(path, limit, title) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sum_path(path: Path) -> Path:
    """Return the path of the sum beside a file: PATH.sha256, as `sha256sum` writes it."""
    return path.with_name(path.name + ".sha256")


@contextlib.contextmanager
def summed(path: Path) -> Iterator[Path]:
    """Do as `atomic` does, and write the file's SHA-256 beside it.

    The old sum goes first: a crash in between leaves a file without a sum, never one with
    another's.
    """
    remove(sum_path(path))
    with atomic(path) as temporary:
        yield temporary
        found = digest(temporary, temporary.stat().st_size)
    write_text(sum_path(path), f"{found}  {path.name}\n")


def check_sum(path: Path, limit: int) -> bool:
    """Compare a file with the SHA-256 beside it; return whether there is one.

    Args:
        limit: the most bytes that the file may have.
    Raises:
        EngineError: where they differ, or one of the two cannot be read.
    """
    beside = sum_path(path)
    if not os.path.lexists(beside):
        return False
    wanted = read_text(beside, _SUM_BYTES).partition(" ")[0]
    if digest(path, limit) != wanted:
        raise EngineError(f"{path} is damaged: its SHA-256 is not the one in {beside.name}")
    return True
