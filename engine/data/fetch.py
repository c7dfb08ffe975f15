"""Get a data set onto this machine: from an installed copy, from Debian, from its publisher.

A file from any source is written under a temporary name beside its place, read and checked there
(see `datasets`: the SHA-256 is of its content), and only then renamed. A download that is cut short
leaves its beginning as .FILE.part, locked by the process that writes it, and the next download goes
on from there. Any other interrupt or fault leaves nothing behind.
`$ENGINE_MIRROR` (http://, https:// or file://) stands in for apt and the publisher; a file is
looked for at MIRROR/NAME/FILE.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..errors import EngineError
from ..files import atomic
from ..progress import stderr
from . import readers
from .datasets import (
    SUMS,
    Spec,
    data_root,
    edition_in,
    find_spec,
    home_of,
    present,
    read_parts,
    size_limit,
    system_folders,
)
from .download import ConnectionCut, Sink, append, await_answer, locked
from .folders import KNOWN

_APT_SECONDS = 60
# The cost of a network that swallows packets: apt counts its time twice.
_APT_CONNECT_SECONDS = 2


def _refuse_pictures(name: str, root: Path | str | None) -> None:
    """Raise an EngineError for a known folder of pictures: the line says what to place where."""
    if name in KNOWN:
        raise EngineError(
            f"{name}: not fetched by the engine: get it from {KNOWN[name].homepage} and put it "
            f"into {data_root(root) / name} as train/CLASS and val/CLASS (docs/data.md)"
        )


def fetch(name: str, root: Path | str | None = None, progress: bool = True) -> Path:
    """Get the files of a data set, unless they are there, and return the folder that holds them.

    Sources, in this order: whole files in ROOT/NAME; files that a package of the system has
    installed (used in place); Debian's package through apt, which needs no root; the publisher's
    site. `progress` shows bars on stderr. EngineError: unknown name; no source works, and the line
    then says which files to place in which folder.
    """
    _refuse_pictures(name, root)
    spec = find_spec(name)
    if not spec.files:
        folder = home_of(spec)
        assert folder is not None
        return folder
    folder = data_root(root) / spec.name
    held = edition_in(spec, folder)
    if held is not spec and all(_is_whole(held, folder, file) for file in held.files):
        return folder
    missing = [file for file in spec.files if not _is_whole(spec, folder, file)]
    if not missing:
        return folder
    if os.path.lexists(folder / SUMS):
        raise EngineError(
            f"{folder}: has a {SUMS} of its own, and {missing[0]} is missing or differs from it:"
            f" restore that file, or remove {SUMS} to fetch the published data"
        )
    systems = [f for f in system_folders(spec) if all(_is_whole(spec, f, n) for n in spec.files)]
    if systems and not present(spec, folder, spec.all_parts):
        return systems[0]
    _need_writable(folder)

    sources: list[Callable[[Spec, Path, list[str], bool], None]] = []
    if systems:
        sources.append(lambda *args: _from_folder(systems[0], *args))
    mirror = os.environ.get("ENGINE_MIRROR")
    if mirror:
        base = f"{mirror.rstrip('/')}/{spec.name}"
        sources.append(lambda *args: _from_url(base, *args))
    else:
        if spec.debian and shutil.which("apt-get"):
            sources.append(_from_apt)
        sources.append(lambda *args: _from_url(spec.url.rstrip("/"), *args))

    reasons = []
    for source in sources:
        try:
            source(spec, folder, missing, progress)
            return folder
        except EngineError as e:
            reasons.append(str(e))
        missing = [file for file in missing if not _is_whole(spec, folder, file)]
        if not missing:  # another process has got them meanwhile
            return folder
    raise EngineError(
        f"cannot fetch {spec.name} ({'; '.join(reasons)}): place {', '.join(missing)} in {folder}"
        f" (see {spec.homepage}), or set ENGINE_MIRROR to a copy"
    )


def _is_whole(spec: Spec, folder: Path, file: str) -> bool:
    parts = spec.files[file]
    found = present(spec, folder, parts)
    if sum(map(len, found.values())) < len(parts):
        return False
    try:
        for path, held in found.items():
            read_parts(spec, path, held)
    except EngineError:
        return False
    return True


def _from_folder(source: Path, spec: Spec, folder: Path, files: list[str], progress: bool) -> None:
    for file in files:
        for path in present(spec, source, spec.files[file]):
            limit = _packed_limit(spec, file)
            with (
                readers.open_file(path, str(path), limit) as data,
                _landing(spec, folder, file, str(path)) as out,
            ):
                shutil.copyfileobj(data, out)


def _from_apt(spec: Spec, folder: Path, files: list[str], progress: bool) -> None:
    members = {f"usr/share/datasets/{spec.name}/{f}": _packed_limit(spec, f) for f in files}
    try:
        with tempfile.TemporaryDirectory(prefix="robust-engine-") as scratch:
            with _spinner(f"{spec.debian} from Debian, by apt", progress):
                package = _apt_download(str(spec.debian), Path(scratch))
            contents = _read_deb(package, members)
    except OSError as e:
        raise EngineError(f"{spec.debian} by apt-get: {e.strerror or e}") from None
    for member, data in contents.items():
        file = Path(member).name
        with _landing(spec, folder, file, f"{package.name}: {file}") as out:
            out.write(data)


def _from_url(base: str, spec: Spec, folder: Path, files: list[str], progress: bool) -> None:
    try:
        parts = urlsplit(base)
    except ValueError as e:
        raise EngineError(f"{base!r} is no address: {e}") from None
    if parts.scheme not in ("http", "https", "file"):
        raise EngineError(f"{base!r} begins with none of http://, https://, file://")
    if parts.scheme != "file":
        await_answer(f"{base}/{files[0]}")
    for file in files:
        url, limit = f"{base}/{file}", _packed_limit(spec, file)
        if parts.scheme == "file":
            path = Path(url2pathname(parts.path)) / file
            with (
                _landing(spec, folder, file, url) as out,
                Sink(out, file, limit, progress) as sink,
                readers.open_file(path, str(path), limit) as data,
            ):
                sink.expect(path.stat().st_size)
                shutil.copyfileobj(data, sink)
        else:
            _download(url, spec, folder, file, progress)


def _packed_limit(spec: Spec, file: str) -> int:
    return readers.packed_limit(size_limit(spec.files[file]))


def _apt_download(package: str, scratch: Path) -> Path:
    """Download the .deb of a package; apt checks it against the archive's signed lists."""
    timeout = f"Timeout={_APT_CONNECT_SECONDS}"
    command = ["apt-get", "-q", "-o", "Acquire::Retries=0", "-o", f"Acquire::http::{timeout}"]
    command += ["-o", f"Acquire::https::{timeout}", "download", package]
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_APT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"apt-get: no {package} within {_APT_SECONDS} s") from None
    if packages := sorted(scratch.glob(f"{package}_*.deb")):
        return packages[0]
    complaints = [line[3:].split() for line in done.stderr.splitlines() if line.startswith("E: ")]
    raise EngineError(f"apt-get: {' '.join(complaints[0]) if complaints else f'no {package}'}")


def _read_deb(package: Path, members: dict[str, int]) -> dict[str, bytes]:
    """Return the named files of a .deb, in memory."""
    with tempfile.TemporaryFile() as tar:
        if shutil.which("dpkg-deb"):  # dpkg-deb reads every compression of a .deb
            command = ["dpkg-deb", "--fsys-tarfile", str(package)]
            done = subprocess.run(command, stdout=tar, stderr=subprocess.DEVNULL)
            if done.returncode:
                raise EngineError(f"{package.name}: dpkg-deb cannot unpack it")
        else:
            _unpack_deb(package, tar)
        tar.seek(0)
        return readers.read_tar(tar, package.name, members)


def _unpack_deb(package: Path, tar: BinaryIO) -> None:
    """Write the data.tar of a .deb (an ar archive; see deb(5)) to `tar`."""
    with package.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise EngineError(f"{package.name}: not a .deb")
        while header := file.read(60):
            name, size = header[:16].strip().rstrip(b"/"), header[48:58].strip()
            if len(header) < 60 or not size.isdigit():
                raise EngineError(f"{package.name}: damaged")
            if name.startswith(b"data.tar"):
                break
            file.seek(int(size) + int(size) % 2, os.SEEK_CUR)
        else:
            raise EngineError(f"{package.name}: no data in it")
        if name != b"data.tar.xz":  # the one that Debian's own packages have
            raise EngineError(f"{package.name}: its data need dpkg-deb, which is missing")
        try:
            with lzma.open(io.BytesIO(file.read(int(size)))) as data:
                shutil.copyfileobj(data, tar)
        except (lzma.LZMAError, EOFError) as e:
            raise EngineError(f"{package.name}: damaged ({e})") from None


def _download(url: str, spec: Spec, folder: Path, file: str, progress: bool) -> None:
    """Get FOLDER/FILE, going on where an earlier download was cut short."""
    part = folder / f".{file}.part"
    try:
        with locked(part) as out:
            if _is_whole(spec, folder, file):  # another process has got it meanwhile
                part.unlink(missing_ok=True)
                return
            resumed = out.seek(0, os.SEEK_END) > 0
            try:
                append(url, out, file, _packed_limit(spec, file), progress)
                read_parts(spec, part, spec.files[file], title=url)
            except ConnectionCut:
                raise
            except EngineError:
                # The bytes are not the beginning of this file; perhaps of an earlier release.
                out.truncate(0)
                if not resumed:
                    part.unlink(missing_ok=True)
                    raise
                _download_afresh(url, spec, part, out, file, progress)
            os.fsync(out.fileno())
            part.chmod(0o644)
            part.replace(folder / file)
    except OSError as e:
        raise EngineError(f"cannot write {part}: {e.strerror or e}") from None


def _download_afresh(
    url: str, spec: Spec, part: Path, out: BinaryIO, file: str, progress: bool
) -> None:
    try:
        append(url, out, file, _packed_limit(spec, file), progress)
        read_parts(spec, part, spec.files[file], title=url)
    except ConnectionCut:
        raise
    except EngineError:
        part.unlink(missing_ok=True)
        raise


def _spinner(text: str, show: bool) -> AbstractContextManager[object]:
    return stderr.status(text) if show else nullcontext()


def _need_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EngineError(f"cannot make the folder {folder}: {e.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EngineError(f"cannot write into the folder {folder}: set ENGINE_DATA to another one")


@contextmanager
def _landing(spec: Spec, folder: Path, file: str, origin: str) -> Iterator[BinaryIO]:
    """Give a file that becomes FOLDER/FILE if the block ends well and the content is right."""
    with atomic(folder / file) as draft:
        with draft.open("wb") as out:
            yield out
        read_parts(spec, draft, spec.files[file], title=origin)
