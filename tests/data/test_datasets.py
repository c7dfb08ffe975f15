"""`load`, `info` and `verify` on data sets whole, damaged, absent and of the user's own."""

import gzip
import hashlib
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import cli, data
from engine.data import datasets, pickles
from engine.errors import EngineError

from . import official

# Looked up before `alone` hides them.
REAL = {
    name: datasets.home_of(datasets.find_spec(name))
    for name in ("fashion-mnist", "mnist", "cifar10", "cifar100")
}
DIGITS_TRAIN = "3b5d4b834352dc234b889424da81aabc"


def refused(*args) -> str:
    with pytest.raises(EngineError) as caught:
        data.load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_need_no_file_and_their_split_is_fixed():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert train.images.shape == (1_437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert sorted(train.labels.unique().tolist()) == list(range(10))
    # results on digits can be compared only as long as this holds
    both = train.images.numpy().tobytes() + train.labels.numpy().tobytes()
    assert hashlib.sha256(both).hexdigest().startswith(DIGITS_TRAIN)


def test_digits_splits_are_apart_and_together_all_of_them():
    from sklearn.datasets import load_digits

    sets = [data.load("digits", split) for split in ("train", "test")]
    rows = torch.cat([torch.cat([s.images.flatten(1), s.labels[:, None]], 1) for s in sets])
    bunch = load_digits()
    pixels = np.rint(bunch.data / 16 * 255)
    want = np.concatenate([pixels, bunch.target[:, None]], 1).astype(int).tolist()
    assert sorted(rows.tolist()) == sorted(want)


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "cifar100"])
def test_official_files_load_as_they_were_made(root, name):
    official.install(root, name, train=203, test=7, seed=3)
    for split, count, seed in (("train", 203, 3), ("test", 7, 4)):
        got = data.load(name, split, root)
        images, labels = official.random_arrays(name, count, seed)
        assert got.images.dtype == torch.uint8
        assert got.images.is_contiguous()
        assert got.labels.dtype == torch.int64
        assert (got.images.numpy() == images).all()
        assert (got.labels.numpy() == labels).all()
        assert (got.name, got.split) == (name, split)
        got.images.add_(1)  # the caller's own memory
    assert all(check.ok for check in data.verify(name, root))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_unpacked_files_load_the_same(root, monkeypatch, tmp_path, name):
    official.publish(monkeypatch, root, name)
    packed = data.load(name, "train", root)
    spec = datasets.find_spec(name)
    arrays = official.random_arrays(name, 30), official.random_arrays(name, 20, 1)
    for place in ("", spec.folder):
        other = tmp_path / f"other-{place}"
        official.write(other / name / place, official.part_bytes(name, *arrays))
        plain = data.load(name, "train", other)
        assert torch.equal(plain.images, packed.images)
        assert torch.equal(plain.labels, packed.labels)


def test_the_published_sizes_are_the_ones_asked_of_the_files():
    for name in ("fashion-mnist", "mnist", "cifar10", "cifar100"):
        spec = datasets.find_spec(name)
        assert len(spec.classes) == len(set(spec.classes)) == (100 if name == "cifar100" else 10)
        for split, parts in spec.parts.items():
            if spec.archive:
                record = len(spec.label_ranges) + 3_072
                assert sum(part.size for part in parts) == spec.counts[split] * record
            else:
                images, labels = parts
                assert images.size == 16 + 784 * spec.counts[split]
                assert labels.size == 8 + spec.counts[split]


@pytest.mark.skipif(REAL["fashion-mnist"] is None, reason="Fashion-MNIST is not on this machine")
def test_the_real_fashion_mnist(monkeypatch):
    monkeypatch.setattr(datasets, "system_folders", lambda spec: [REAL["fashion-mnist"]])
    start = time.perf_counter()
    train = data.load("fashion-mnist", "train")
    assert time.perf_counter() - start < 5  # 0.3 s on an idle machine
    test = data.load("fashion-mnist", "test")
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [6_000] * 10
    assert test.labels.bincount().tolist() == [1_000] * 10


@pytest.mark.parametrize("name", REAL)
def test_the_published_bytes_pass_verify(name, monkeypatch, capsys):
    """`engine data verify` holds the files of this machine to the publishers' checksums."""
    if REAL[name] is None:
        pytest.skip(f"{name} is not on this machine")
    monkeypatch.setattr(datasets, "system_folders", lambda spec: [REAL[name]])
    assert not data.info(name).own_sums
    assert cli.run(["data", "verify", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(data.info(name).files)
    assert all(line.startswith("ok ") and line.endswith(": whole") for line in lines)


def test_the_root(monkeypatch, tmp_path):
    assert datasets.data_root("x") == Path.cwd() / "x"
    assert datasets.data_root() == tmp_path / "cache" / "robust-engine"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert datasets.data_root() == tmp_path / "home" / ".cache" / "robust-engine"
    monkeypatch.setenv("ENGINE_DATA", "~/a b")
    assert datasets.data_root() == tmp_path / "home" / "a b"
    official.install(tmp_path / "home" / "a b", "mnist")
    assert len(data.load("mnist", "test").images) == 100


def test_debians_files_are_read_where_they_lie(monkeypatch, tmp_path, root):
    official.publish(monkeypatch, tmp_path / "share" / "datasets", "fashion-mnist")
    assert len(data.load("fashion-mnist", "train", root).images) == 30
    assert data.info("fashion-mnist", root).folder == tmp_path / "share/datasets/fashion-mnist"
    assert all(check.ok for check in data.verify("fashion-mnist", root))
    assert [p.name for p in root.iterdir()] == ["cache"]  # the parsed copy, and nothing else
    # but a file of the user's own comes first
    official.install(root, "fashion-mnist", train=11)
    assert len(data.load("fashion-mnist", "train", root).images) == 11


def test_unknown_names():
    assert "did you mean fashion-mnist?" in refused("fashionmnist", "train")
    assert "did you mean imagenet?" in refused("imagenet-21k", "train")
    known = refused("flowers", "train").removeprefix("unknown data set 'flowers': known are ")
    assert known.split(", ") == list(data.names())
    assert "unknown data set" in refused("a" * 300, "train")
    assert "it is train or test" in refused("digits", "val")
    for call in (data.info, data.verify, data.fetch):
        with pytest.raises(EngineError, match=r"did you mean cifar10\?"):
            call("CIFAR-10")


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "cifar100"])
def test_absent(root, name):
    assert refused(name, "train", root).endswith(f"run `engine data fetch {name}`")
    info = data.info(name, root)
    assert info.folder is None
    checks = data.verify(name, root)
    assert [Path(c.file).name for c in checks] == list(info.files)
    assert {c.detail for c in checks} == {"missing"}
    assert not root.exists()


def test_one_file_missing(root):
    folder = official.install(root, "mnist")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte: missing: run `engine data fetch mnist`" in refused(
        "mnist", "test", root
    )
    assert len(data.load("mnist", "train", root).images) == 200
    assert [c.ok for c in data.verify("mnist", root)] == [True, True, True, False]
    assert data.info("mnist", root).folder is None


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("signed", [True, False])
def test_a_flipped_bit_anywhere_in_a_packed_file_is_found(root, monkeypatch, name, signed):
    official.publish(monkeypatch, root, name)
    path = next(iter(datasets.present(s := datasets.find_spec(name), root / name, s.all_parts)))
    if signed:
        official.sign(root / name)
    size = path.stat().st_size
    for at in (20, size // 3, size // 2, size - 2):
        flip(path, at)
        assert str(path) in refused(name, "train", root)
        assert not data.verify(name, root)[0].ok
        flip(path, at)
    assert data.load(name, "train", root)


def test_a_flipped_bit_of_a_plain_file_is_found_by_its_checksum(root, monkeypatch):
    official.publish(monkeypatch, root, "mnist")
    packed = root / "mnist" / "train-images-idx3-ubyte.gz"
    plain = packed.with_suffix("")
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    data.load("mnist", "train", root)
    flip(plain, 5_000)
    message = refused("mnist", "train", root)
    assert str(plain) in message
    assert "its content has SHA-256" in message
    assert message.endswith("`engine data fetch mnist` replaces it")


def test_random_data_are_not_taken_for_the_published(root):
    folder = official.install(root, "cifar10")
    (folder / datasets.SUMS).unlink()
    assert "data_batch_1.bin: its content has SHA-256" in refused("cifar10", "train", root)


def test_own_sums(root):
    folder = official.install(root, "mnist", train=12)
    assert data.info("mnist", root).own_sums
    assert data.verify("mnist", root)[0].detail == "whole, by the folder's own SHA256SUMS"
    sums = folder / datasets.SUMS
    listed = sums.read_text()
    sums.write_text(listed.replace("train-images", "other"))
    assert "not listed in the folder's own SHA256SUMS" in refused("mnist", "train", root)
    for junk in (b"", b"\xff\x00" * 99, b"x" * 3_000_000):
        sums.write_bytes(junk)
        assert "SHA256SUMS" in refused("mnist", "train", root)
    sums.unlink()
    sums.symlink_to("nowhere")
    assert "SHA256SUMS: cannot read it" in refused("mnist", "train", root)


def test_images_and_labels_of_different_number(root):
    folder = official.install(root, "mnist")
    labels = gzip.compress(official.idx_bytes(np.zeros(199)))
    official.write(folder, {"train-labels-idx1-ubyte.gz": labels})
    official.sign(folder)
    assert "200 train images, but 199 train labels" in refused("mnist", "train", root)


def test_a_label_out_of_range(root):
    folder = official.install(root, "mnist", train=3)
    labels = gzip.compress(official.idx_bytes(np.array([0, 10, 1])))
    official.write(folder, {"train-labels-idx1-ubyte.gz": labels})
    official.sign(folder)
    assert "train-labels-idx1-ubyte.gz: label 10 of sample 1 is not in 0..9" in refused(
        "mnist", "train", root
    )


@pytest.mark.parametrize("content", [b"", b"x" * 60_000_000, b"no idx"])
def test_junk_in_place_of_a_file(root, content):
    folder = official.install(root, "mnist")
    (folder / datasets.SUMS).unlink()
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    assert refused("mnist", "train", root).startswith(f"{path}: ")


def test_what_is_no_plain_file(root):
    folder = official.install(root, "mnist")
    (folder / datasets.SUMS).unlink()
    path = folder / "train-images-idx3-ubyte.gz"
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        make()
        assert f"{path}: not a regular file" in refused("mnist", "train", root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(root):
    path = official.install(root, "mnist") / "train-images-idx3-ubyte.gz"
    path.chmod(0)
    assert f"{path}: cannot read it: Permission denied" in refused("mnist", "train", root)


class Bomb:
    """A pickle that would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_python_edition_holds_the_same_images(root, name, packed):
    arrays = [official.random_arrays(name, n, seed) for seed, n in enumerate((40, 20))]
    spec, members = datasets.find_spec(name).python, official.python_files(name, *arrays)
    # What Python itself reads of it: the stand-in is a pickle as good as the published ones.
    first = pickle.loads(members[f"{spec.folder}/{spec.parts['train'][0].name}"], encoding="bytes")
    assert np.array_equal(first[b"data"], arrays[0][0][: len(first[b"data"])].reshape(-1, 3072))
    official.write(root / name, {spec.archive: official.tar_gz(members)} if packed else members)
    official.sign(root / name)
    for split, (images, labels) in zip(("train", "test"), arrays, strict=True):
        read = datasets.load(name, split, root)
        assert np.array_equal(read.images.numpy(), images)
        assert read.labels.tolist() == labels.tolist()
    assert datasets.info(name, root).folder == root / name
    assert all(check.ok for check in datasets.verify(name, root))


def test_the_python_edition_is_held_to_its_published_sums(root):
    arrays = [official.random_arrays("cifar10", 20, s) for s in (0, 1)]
    official.write(root / "cifar10", official.python_files("cifar10", *arrays))
    assert "MD5" in refused("cifar10", "train", root)


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_1"])
def test_a_pickle_that_would_run_code_does_not(root, tmp_path, name):
    bomb = pickle.dumps(Bomb(tmp_path / "executed"), protocol=2)
    arrays = [official.random_arrays("cifar10", 20, s) for s in (0, 1)]
    members = official.python_files("cifar10", *arrays)
    members["cifar-10-batches-py/data_batch_1"] = bomb
    packed = {"cifar-10-python.tar.gz": official.tar_gz(members)}
    official.write(root / "cifar10", packed if name.endswith(".gz") else members)
    official.sign(root / "cifar10")
    message = refused("cifar10", "train", root)
    assert "data_batch_1: not a CIFAR batch" in message
    assert "mkdir" in message
    # nor when it bears the name of the binary archive
    shutil.rmtree(root)
    official.write(root / "cifar10", {"cifar-10-binary.tar.gz": official.tar_gz(members)})
    assert "data_batch_1.bin is missing" in refused("cifar10", "train", root)
    assert not (tmp_path / "executed").exists()


def _batch(**changes):
    images = np.zeros((4, 3072), np.uint8)
    return official.python_batch(images, {"labels": np.arange(4), **changes})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_batch()[:-1], "exhausted"),
        (_batch()[:200], "not enough data"),
        (_batch() + b"x", "left over"),
        (b"", "exhausted"),
        (_batch(labels=np.arange(3)), "4 images, but 3 labels"),
        (_batch(labels=np.array([0, 1, 2, 10])), "label 10 of sample 3"),
        (_batch().replace(b"U\x06labels", b"U\x06lapels"), "no list of whole numbers"),
        (_batch().replace(b"U\x02u1", b"U\x02O1"), "may make uint8 arrays only"),
        (_batch().replace(b"numpy\nndarray", b"numpy\nmatrixx"), "names numpy.matrixx"),
        (_batch().replace(b"K\x01K\x04M\x00\x0c", b"K\x01K\x05M\x00\x0c"), "do not agree"),
        (b"\x80\x02]q\x01.", "no dictionary"),
        (b"\x80\x02}(U\x01aU\x01bu.", "no data"),
        (b"\x80\x02cos\nsystem\nU\x02id\x85R.", "names os.system"),
        (b"\x80\x02c__builtin__\neval\nU\x011\x85R.", "names __builtin__.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "STACK_GLOBAL"),
        (b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"U\x01bu.", "a key that is no string"),
    ],
)
def test_a_bad_python_batch_is_one_clear_line(data, said):
    with pytest.raises(EngineError) as caught:
        pickles.parse(data, "here", (("labels", 10),), 10)
    assert str(caught.value).startswith("here: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
