"""Readers of files that may be anything: every mutation is read, or refused in one line.

`corpus/` keeps an input for each way in which a reader has refused one so far, under the reader's
name; the short form replays them. `make test-all` mutates files 10,000 times more. To keep what a
longer run finds:

    python -m tests.data.test_fuzz 100000
"""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from engine.data import own, pickles, readers
from engine.errors import EngineError

from . import official

# A warning would be a line more.
pytestmark = pytest.mark.filterwarnings("error")

CORPUS = Path(__file__).parent / "corpus"
_KEPT = 4096  # bytes: what a corpus may cost


def _npz(compressed: bool) -> bytes:
    out = io.BytesIO()
    images = np.arange(4 * 4 * 4, dtype=np.uint8).reshape(4, 4, 4)
    labels = np.array([0, 1, 0, 1])
    write = np.savez_compressed if compressed else np.savez
    write(out, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return out.getvalue()


def _picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(out, kind)
    return out.getvalue()


def _tar() -> bytes:
    return official.tar_gz({"a/one.bin": bytes(range(256)) * 4, "a/readme": b"hello"})


def _read_folder(path: Path) -> None:
    folder = path.parent / f"{path.name}.folder"
    for split in own.SPLITS:
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            target = folder / split / name / "0.png"
            target.write_bytes(path.read_bytes() if name == "b" else PICTURES[0])
    own.read(folder, "train")


def _read_npz(path: Path) -> None:
    named = path.rename(path.with_suffix(".npz"))
    own.read(named, "train")


def _read_safetensors(path: Path) -> None:
    named = path.rename(path.with_suffix(".safetensors"))
    own.read(named, "train")


PICTURES = [_picture("PNG"), _picture("BMP"), _picture("JPEG"), _picture("PPM")]
_ARRAYS = {
    name: np.arange(16, dtype=np.uint8).reshape(1, 4, 4) if "images" in name else np.array([1])
    for name in ("train_images", "train_labels", "test_images", "test_labels")
}
_IDX = official.idx_bytes(np.arange(48, dtype=np.uint8).reshape(3, 4, 4))
_RECORDS = official.cifar_bytes(np.zeros((2, 3072), np.uint8), np.array([1, 2]))
_BATCH = official.python_batch(np.zeros((1, 3072), np.uint8), {"labels": np.array([1])})

# Each reader, and whole files for it.
READERS: dict[str, tuple[Callable[[Path], object], list[bytes]]] = {
    "idx": (
        lambda path: readers.parse_idx(
            readers.read_file(path, str(path), 4096), str(path), (4, 4), 9
        ),
        [_IDX, gzip.compress(_IDX, mtime=0)],
    ),
    "records": (
        lambda path: readers.parse_cifar(
            readers.read_file(path, str(path), 9000), str(path), (10,), 3
        ),
        [_RECORDS, gzip.compress(_RECORDS, mtime=0)],
    ),
    "tar": (
        lambda path: readers.read_tar_gz(path, str(path), {"a/one.bin": 2000}, 40_000),
        [_tar()],
    ),
    "pickle": (
        lambda path: pickles.parse(path.read_bytes(), str(path), (("labels", 10),), 9),
        [_BATCH],
    ),
    "npz": (_read_npz, [_npz(False), _npz(True)]),
    "safetensors": (_read_safetensors, [save(_ARRAYS)]),
    "picture": (_read_folder, PICTURES),
}


def mutated(seeds: list[bytes], draw: random.Random) -> bytes:
    """A whole file, changed in one to six places."""
    data = bytearray(draw.choice(seeds))
    # Most of a file is pixels, which may be anything: aim at its two ends.
    place = lambda: draw.choice((  # noqa: E731
        draw.randrange(len(data) + 1),
        min(len(data), draw.randrange(200)),
        max(0, len(data) - draw.randrange(1, 200)),
    ))  # fmt: skip
    for _ in range(draw.randint(1, 6)):
        kind, at = draw.randrange(7), place()
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + draw.choice((1, 4, 50))]
        elif kind == 4:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 50)))
        elif kind == 5:
            other, begin = draw.choice(seeds), draw.randrange(len(data) + 1)
            data[at:] = other[begin:]
        else:
            data[at : at + 4] = draw.choice(
                (b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80")
            )
    return bytes(data)


def attempt(name: str, content: bytes, folder: Path) -> str | None:
    """Return the reader's refusal, or None; any other exception is a fault of the reader."""
    path = folder / "file"
    path.write_bytes(content)
    read, _ = READERS[name]
    try:
        read(path)
    except EngineError as error:
        message = str(error)
        assert "\n" not in message, message
        assert message.startswith(str(folder)), message
        assert len(message) < 1000, message
        return message.replace(str(folder), "")
    return None


def campaign(count: int, folder: Path, seed: int = 0) -> dict[tuple[str, str], bytes]:
    """Mutate `count` files, the readers in turn; a smallest input for each way of refusing."""
    draw, found = random.Random(seed), dict[tuple[str, str], bytes]()
    inside = folder / "inside"
    for number in range(count):
        name = list(READERS)[number % len(READERS)]
        inside.mkdir(exist_ok=True)
        content = mutated(READERS[name][1], draw)
        said = attempt(name, content, inside)
        if said is not None:
            key = name, re.sub(r"[0-9a-f]+|'.*?'|\(.*\)", "", said)[:60]
            if len(content) < len(found.get(key, bytes(_KEPT + 1))):
                found[key] = content
    assert sorted(p.name for p in folder.iterdir()) == ["inside"]
    return found


@pytest.mark.parametrize("name", READERS)
def test_the_whole_files_are_read(name, tmp_path):
    for content in READERS[name][1]:
        assert attempt(name, content, tmp_path) is None


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda p: p.name)
def test_the_corpus_is_refused_as_before(path, tmp_path):
    assert attempt(path.name.split("-")[0], path.read_bytes(), tmp_path) is not None


def test_mutated_files(tmp_path):
    assert len(campaign(700, tmp_path, seed=1)) > 20


@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path):
    campaign(10_000, tmp_path, seed=2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for (name, _), content in campaign(int(sys.argv[1]), Path(scratch), seed=3).items():
            kept = CORPUS / f"{name}-{hashlib.sha256(content).hexdigest()[:10]}"
            kept.write_bytes(content)
        print(len(list(CORPUS.iterdir())), "files in the corpus")
