"""Makes data sets of random pixels in the publishers' exact formats, for tests without a network.

`install` is all that most tests need: `load(name, split, root)` and a subprocess with
ENGINE_DATA=root then read the result like the real thing, which a SHA256SUMS of its own vouches
for.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

from engine.data import datasets

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, C, H, W], labels int [N]


def random_arrays(name: str, count: int, seed: int = 0) -> Arrays:
    """Random pixels; the labels go round all classes."""
    spec = datasets.find_spec(name)
    images = np.random.default_rng(seed).integers(0, 256, (count, *spec.shape), dtype=np.uint8)
    return images, np.arange(count) % len(spec.classes)


def idx_bytes(array: np.ndarray) -> bytes:
    """uint8 array as an IDX file."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def cifar_bytes(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """Records of label bytes and channels-first pixels."""
    columns = [label.astype(np.uint8)[:, None] for label in labels]
    return np.concatenate([*columns, images.reshape(len(images), -1)], axis=1).tobytes()


def part_bytes(name: str, train: Arrays, test: Arrays) -> dict[str, bytes]:
    """The decompressed bytes of every part of a data set, by the part's name."""
    spec = datasets.find_spec(name)
    contents = {}
    for split, (images, labels) in {"train": train, "test": test}.items():
        parts = spec.parts[split]
        if spec.archive is None:
            contents[parts[0].name] = idx_bytes(images[:, 0])
            contents[parts[1].name] = idx_bytes(labels)
            continue
        for part, rows in zip(
            parts, np.array_split(np.arange(len(images)), len(parts)), strict=True
        ):
            both = [labels[rows] // 5, labels[rows]][-len(spec.label_ranges) :]  # coarse, fine
            contents[part.name] = cifar_bytes(images[rows], *both)
    return contents


def tar_gz(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar.gz of files, or of whatever a TarInfo says; the same bytes whenever it is made."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content, io.BytesIO(bytes(content.size)))
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), 1, mtime=0)


def files(name: str, train: Arrays, test: Arrays) -> dict[str, bytes]:
    """The files of a data set as its publisher offers them, by name."""
    spec = datasets.find_spec(name)
    contents = part_bytes(name, train, test)
    if spec.archive is None:
        return {f"{part}.gz": gzip.compress(data, 1, mtime=0) for part, data in contents.items()}
    folder = tarfile.TarInfo(spec.folder)
    folder.type = tarfile.DIRTYPE
    members: dict[str, bytes | tarfile.TarInfo] = {spec.folder: folder}
    members |= {f"{spec.folder}/{part}": data for part, data in contents.items()}
    members |= {f"{spec.folder}/readme.html": b"<html></html>\n"}
    return {spec.archive: tar_gz(members)}


def python_batch(images: np.ndarray, labels: dict[str, np.ndarray]) -> bytes:
    """One batch of CIFAR's Python edition, instruction by instruction as Python 2 pickled it."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    rows = images.reshape(len(images), -1)
    lists = b"".join(
        text(name) + b"]q\x04(" + b"".join(map(number, map(int, values))) + b"e"
        for name, values in labels.items()
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x08cnumpy\nndarray\nq\x09K\x00\x85U\x01b\x87Rq\x0a("
        b"K\x01" + number(len(rows)) + number(rows.shape[1]) + b"\x86cnumpy\ndtype\nq\x0bU\x02u1"
        b"K\x00K\x01\x87Rq\x0c(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", rows.size)
        + rows.tobytes()
        + b"tb"
    )
    names = b"]q\x0e(" + b"".join(text(f"a_{i}.png") for i in range(len(rows))) + b"e"
    head = text("batch_label") + b"q\x02" + text("training batch 1 of 5")
    body = head + lists + text("data") + array + text("filenames") + names
    return b"\x80\x02}q\x01(" + body + b"u."


def python_files(name: str, train: Arrays, test: Arrays) -> dict[str, bytes]:
    """The members of a data set's Python edition by their path in the archive."""
    spec = datasets.find_spec(name).python
    assert spec is not None
    members = {}
    for split, (images, labels) in {"train": train, "test": test}.items():
        parts = spec.parts[split]
        for part, rows in zip(
            parts, np.array_split(np.arange(len(images)), len(parts)), strict=True
        ):
            fine = labels[rows]
            lists = [(n, fine if n != "coarse_labels" else fine // 5) for n, _ in spec.pickles]
            members[f"{spec.folder}/{part.name}"] = python_batch(images[rows], dict(lists))
    return members


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return folder


def sign(folder: Path) -> None:
    """Write the SHA256SUMS that makes the files of `folder` a data set of their own."""
    listed = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != datasets.SUMS)
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n"
        for p in listed
    ]
    (folder / datasets.SUMS).write_text("".join(lines))


def install(root: Path, name: str, train: int = 200, test: int = 100, seed: int = 0) -> Path:
    """A random data set at ROOT/NAME, ready to load."""
    arrays = random_arrays(name, train, seed), random_arrays(name, test, seed + 1)
    folder = write(root / name, files(name, *arrays))
    sign(folder)
    return folder


def publish(
    monkeypatch, mirror: Path, name: str, train: int = 30, test: int = 20
) -> dict[str, bytes]:
    """Put a random data set at MIRROR/NAME and let the engine take it for the published one.

    Returns the bytes of its files by name.
    """
    arrays = random_arrays(name, train), random_arrays(name, test, 1)
    contents = part_bytes(name, *arrays)
    spec = datasets.find_spec(name)
    parts = {
        split: tuple(
            datasets.Part(
                part.name,
                hashlib.sha256(contents[part.name]).hexdigest(),
                len(contents[part.name]),
            )
            for part in some
        )
        for split, some in spec.parts.items()
    }
    published = files(name, *arrays)
    write(mirror / name, published)
    monkeypatch.setitem(datasets.SPECS, name, dataclasses.replace(spec, parts=parts))
    return published
