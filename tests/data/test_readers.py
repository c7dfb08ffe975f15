"""Test that the readers accept the official formats alone, and refuse all else by EngineError."""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data import readers
from engine.errors import EngineError

from . import official

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
CIFAR, CIFAR_LABELS = official.random_arrays("cifar10", 3)
IDX = official.idx_bytes(IMAGES)
RECORDS = official.cifar_bytes(CIFAR, CIFAR_LABELS)
MEMBERS = {"a/one.bin": 4_000, "a/two.bin": 4_000}
TAR = official.tar_gz({"a/one.bin": b"1" * 3_000, "other": b"x" * 2_000, "a/two.bin": b"2" * 4_000})


def read(tmp_path, data: bytes, limit: int = 10_000) -> bytes:
    path = tmp_path / "file"
    path.write_bytes(data)
    return readers.read_file(path, "file", limit)


def read_tar(tmp_path, data: bytes, limit: int = 40_000) -> dict[str, bytes]:
    path = tmp_path / "file.tar.gz"
    path.write_bytes(data)
    return readers.read_tar_gz(path, "file.tar.gz", MEMBERS, limit)


@pytest.mark.parametrize("size", [1, 9_999, 10_000])
def test_plain_and_gzip_give_the_same_bytes(tmp_path, size):
    data = os.urandom(size)
    assert read(tmp_path, data) == data
    assert read(tmp_path, gzip.compress(data)) == data


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "the file is empty"),
        (b"x" * 10_001, "more than 10,000 bytes"),
        (b"x" * 200_000, "at most"),
        (gzip.compress(b"x" * 10_001, mtime=0), "decompresses to more than 10,000 bytes"),
        (gzip.compress(b"x" * 9_000, mtime=0)[:-9], "truncated"),
        (gzip.compress(b"x" * 9_000, mtime=0)[:-1], "truncated"),
        (gzip.compress(b"x" * 9_000, mtime=0)[:5], "truncated"),
        (gzip.compress(b"x" * 9_000, mtime=0) + b"y", "after the end"),
        (gzip.compress(b"x", mtime=0) + gzip.compress(b"y", mtime=0), "after the end"),
        (b"\x1f\x8b" + b"z" * 50, "damaged gzip data"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, data, fault):
    with pytest.raises(EngineError, match=f"^file: .*{fault}") as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_of_a_gzip_file_is_noticed_or_harmless(tmp_path):
    data = os.urandom(50)
    packed = gzip.compress(data, mtime=0)
    noticed = 0
    for i in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[i // 8] ^= 1 << i % 8
        try:
            # a header field (time, system) or the magic itself may be another and the data the same
            assert read(tmp_path, bytes(flipped)) == data or i < 16
        except EngineError:
            noticed += 1
    assert noticed > 8 * len(packed) * 0.8


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb = gzip.compress(bytes(50_000_000))
    path = tmp_path / "file"
    path.write_bytes(bomb)
    limit = len(bomb)
    reader = readers._Gunzip(io.BytesIO(bomb), "file", limit)
    seen: list[int] = []
    with pytest.raises(EngineError, match="decompresses to more"):
        seen.extend(map(len, iter(lambda: reader.read(1 << 12), b"")))
    assert 0 < sum(seen) <= limit
    with pytest.raises(EngineError, match="decompresses to more"):
        readers.read_file(path, "file", limit)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "broken link"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        EngineError, match=r"^it: (not a regular file|cannot read it: No such file)"
    ):
        readers.read_file(path, "it", 100)


def test_idx_round_trip():
    assert (readers.parse_idx(IDX, "f", (28, 28), 5) == IMAGES).all()
    labels = np.arange(7, dtype=np.uint8)
    assert (readers.parse_idx(official.idx_bytes(labels), "f", (), 9) == labels).all()


def with_count(count: int) -> bytes:
    return IDX[:4] + count.to_bytes(4, "big") + IDX[8:]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "begins with nothing"),
        (IDX[:3], "begins with 000008"),
        (b"\0\0\x08\x01" + IDX[4:], "begins with 00000801, not with 00000803"),
        (b"\0\0\x0d\x03" + IDX[4:], "not with 00000803"),
        (IDX[:10], "truncated: 10 bytes are less than the IDX header"),
        (IDX[:-1], "truncated: 5 items take 3,936 bytes, it has 3,935"),
        (IDX + b"\0", "bytes left over"),
        (with_count(4), "bytes left over"),
        (with_count(0), "holds 0 items; 1 to 5"),
        (with_count(6), "holds 6 items; 1 to 5"),
        (with_count(0xFFFFFFFF), "holds 4,294,967,295 items"),
        (official.idx_bytes(IMAGES[:, :, :27]), "items of 28 x 27, not 28 x 28"),
    ],
)
def test_a_bad_idx_is_one_clear_line(data, fault):
    with pytest.raises(EngineError, match=f"^f: .*{fault}"):
        readers.parse_idx(data, "f", (28, 28), 5)


def test_cifar_round_trip():
    images, labels = readers.parse_cifar(RECORDS, "f", (10,), 3)
    assert (images == CIFAR).all()
    assert (labels == CIFAR_LABELS).all()
    coarse, fine = np.array([19, 0, 3]), np.array([99, 1, 17])
    images, labels = readers.parse_cifar(
        official.cifar_bytes(CIFAR, coarse, fine), "f", (20, 100), 3
    )
    assert (images == CIFAR).all()
    assert (labels == fine).all()


@pytest.mark.parametrize(
    ("data", "ranges", "fault"),
    [
        (b"", (10,), "truncated: 1 records"),
        (RECORDS[:-1], (10,), "truncated: 3 records of 3073 bytes take 9,219 bytes, it has 9,218"),
        (RECORDS + b"\0", (10,), "4 records; at most 3"),
        (RECORDS * 2, (10,), "6 records; at most 3"),
        (official.cifar_bytes(CIFAR, np.array([0, 10, 2])), (10,), "label 10 of sample 1 .* 0..9"),
        (official.cifar_bytes(CIFAR, np.array([0, 20, 2]), CIFAR_LABELS), (20, 100), "label 20"),
        (official.cifar_bytes(CIFAR, CIFAR_LABELS, np.array([0, 1, 100])), (20, 100), "label 100"),
    ],
)
def test_bad_records_are_one_clear_line(data, ranges, fault):
    with pytest.raises(EngineError, match=f"^f: .*{fault}"):
        readers.parse_cifar(data, "f", ranges, 3)


def test_tar_gives_the_named_members_and_writes_nothing(tmp_path):
    assert read_tar(tmp_path, TAR) == {"a/one.bin": b"1" * 3_000, "a/two.bin": b"2" * 4_000}
    assert [p.name for p in tmp_path.iterdir()] == ["file.tar.gz"]


def entry(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


ONE = {"a/one.bin": b"1"}


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        (ONE, "member a/two.bin is missing"),
        (ONE | {"a/two.bin": b"2" * 4_001}, "a/two.bin has 4,001 bytes, where at most 4,000"),
        (ONE | {"../a/two.bin": b"2"}, "'../a/two.bin' points out of the archive"),
        (ONE | {"x/../../two.bin": b"2"}, "points out of the archive"),
        (ONE | {"l": entry("/etc/passwd", size=1)}, "'/etc/passwd' points out of the archive"),
        (ONE | {"d": entry("./a/one.bin", size=1)}, "a/one.bin is there twice"),
        (
            ONE | {"l": entry("a/two.bin", type=tarfile.SYMTYPE, linkname="/etc/passwd")},
            "plain file",
        ),
        (ONE | {"l": entry("a/two.bin", type=tarfile.LNKTYPE, linkname="a/one.bin")}, "plain file"),
        (ONE | {"l": entry("a/two.bin", type=tarfile.FIFOTYPE)}, "plain file"),
        (ONE | {"junk": bytes(50_000)}, "decompresses to more than 40,000 bytes"),
    ],
)
def test_a_bad_archive_is_one_clear_line(tmp_path, members, fault):
    with pytest.raises(EngineError, match=f"^file.tar.gz: .*{fault}"):
        read_tar(tmp_path, official.tar_gz(members))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (TAR[:-4], "truncated"),
        (TAR[: len(TAR) // 2], "truncated"),
        (TAR + b"x", "after the end"),
        (gzip.compress(gzip.decompress(TAR)[:3_000], mtime=0), "damaged tar data"),
        (gzip.compress(gzip.decompress(TAR)[:4_000], mtime=0), "a/two.bin is missing"),
        (gzip.compress(b"no tar at all" * 100, mtime=0), "damaged tar data"),
        (b"no gzip at all", "damaged gzip data"),
    ],
)
def test_a_damaged_archive_is_one_clear_line(tmp_path, data, fault):
    with pytest.raises(EngineError, match=f"^file.tar.gz: .*{fault}") as caught:
        read_tar(tmp_path, data)
    assert "\n" not in str(caught.value)


LABELS = official.idx_bytes(np.arange(5))


@st.composite
def damaged(draw):
    """A valid file of some kind with some bytes changed, cut, repeated or added; or any bytes."""
    kind = draw(st.sampled_from(["images", "labels", "cifar10", "cifar100", "tar"]))
    whole = {"images": IDX, "labels": LABELS, "cifar10": RECORDS, "cifar100": RECORDS}
    inner = bytearray(whole[kind] if kind != "tar" else gzip.decompress(TAR))

    def damage(data: bytearray) -> bytearray:
        for _ in range(draw(st.integers(0, 4))):
            # the headers come first: most of the damage belongs there
            at = draw(st.integers(0, min(len(data), draw(st.sampled_from([20, 600, 1 << 20])))))
            match draw(st.sampled_from(["change", "cut", "insert", "repeat", "replace"])):
                case "change" if at < len(data):
                    data[at] = draw(st.integers(0, 255))
                case "cut":
                    del data[at:]
                case "insert":
                    data[at:at] = draw(st.binary(max_size=20))
                case "repeat":
                    data[at:at] = data[at : at + 512]
                case "replace":
                    data[at : at + 12] = draw(st.binary(min_size=12, max_size=12))
        return data

    inner = damage(inner)
    if kind == "tar" or draw(st.booleans()):
        outer = bytearray(gzip.compress(bytes(inner), 1, mtime=0))
        return kind, bytes(damage(outer) if draw(st.integers(0, 3)) == 0 else outer)
    return kind, bytes(inner) if draw(st.integers(0, 9)) else draw(st.binary(max_size=200))


def check(folder, kind: str, data: bytes) -> None:
    """Read `data` and hold what comes of it to its form."""
    if kind == "tar":
        found = read_tar(folder, data)
        assert found.keys() == MEMBERS.keys()
        assert all(len(found[name]) <= size for name, size in MEMBERS.items())
        return
    content = read(folder, data)
    assert len(content) <= 10_000
    if kind == "images":
        array = readers.parse_idx(content, "file", (28, 28), 6)
        assert array.shape[1:] == (28, 28)
        assert 1 <= len(array) <= 6
    elif kind == "labels":
        array = readers.parse_idx(content, "file", (), 6)
        readers.check_labels(array, "file", 5)
        assert array.max() < 5
    else:
        ranges = (10,) if kind == "cifar10" else (20, 100)
        images, labels = readers.parse_cifar(content, "file", ranges, 4)
        assert images.shape == (len(labels), 3, 32, 32)
        assert labels.max() < ranges[-1]


def survive(folder, case: tuple[str, bytes]) -> bool:
    """Whether it is read; if not, it is an EngineError of one line. No file appears either way."""
    message = None
    try:
        check(folder, *case)
    except EngineError as e:
        message = str(e)
    assert message is None or (message.startswith("file") and "\n" not in message), message
    assert {p.name for p in folder.iterdir()} <= {"file", "file.tar.gz"}
    return message is None


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=300, **FUZZ)
@given(case=damaged())
def test_fuzz(fuzz_folder, case):
    survive(fuzz_folder, case)


@pytest.mark.slow
@settings(max_examples=10_000, **FUZZ)
@given(case=damaged())
def test_fuzz_long(fuzz_folder, case):
    survive(fuzz_folder, case)


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")
