"""The parsed copy of a data set: made once, mapped, checked, made again, never in the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from engine import data
from engine.data import cache, datasets
from engine.errors import EngineError

from . import official


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "data"))
    official.install(tmp_path / "data", "cifar10")
    return tmp_path / "data"


@pytest.fixture
def parses(monkeypatch):
    """How often the files were parsed."""
    seen = []
    read = datasets._read_split
    monkeypatch.setattr(datasets, "_read_split", lambda *a: seen.append(a[1]) or read(*a))
    return seen


def kept(root):
    return sorted(p.name for p in (root / "cache").iterdir())


def same(a, b):
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and a.classes == b.classes
    )


def test_files_are_parsed_once(root, parses):
    first = data.load("cifar10", "train")
    again = data.load("cifar10", "train")
    assert parses == ["train"]
    assert same(first, again)
    assert again.images.is_contiguous()
    data.load("cifar10", "test")
    assert parses == ["train", "test"]
    assert len(kept(root)) == 2


def test_it_is_mapped_not_read(root):
    """What is written to one reader's pages is seen by no other, nor by the file."""
    data.load("cifar10", "train")
    one, two = data.load("cifar10", "train"), data.load("cifar10", "train")
    one.images.zero_()
    assert two.images.any()
    assert same(two, data.load("cifar10", "train"))


def test_other_files_are_parsed_anew_and_the_old_copy_goes(root, parses):
    first = data.load("cifar10", "train")
    (name,) = kept(root)
    official.install(root, "cifar10", seed=5)
    second = data.load("cifar10", "train")
    assert parses == ["train"] * 2
    assert not same(first, second)
    assert len(kept(root)) == 1
    assert kept(root) != [name]


def test_another_version_of_the_format_is_parsed_anew(root, parses, monkeypatch):
    data.load("cifar10", "train")
    monkeypatch.setattr(cache, "VERSION", 2)
    data.load("cifar10", "train")
    assert parses == ["train"] * 2


@pytest.mark.parametrize("at", [0, 40, -1, -1000, 20_000])
def test_a_damaged_copy_is_announced_and_made_again(root, parses, caplog, at):
    good = data.load("cifar10", "train")
    (path,) = (root / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
    assert same(good, data.load("cifar10", "train"))
    assert parses == ["train"] * 2
    assert "is damaged" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    caplog.clear()
    assert same(good, data.load("cifar10", "train"))
    assert caplog.text == ""


@pytest.mark.parametrize("size", [0, 7, 100, 10_000])
def test_a_copy_cut_short_is_made_again(root, parses, size):
    good = data.load("cifar10", "train")
    (path,) = (root / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:size])
    assert same(good, data.load("cifar10", "train"))


def test_a_full_disk_costs_the_copy_only(root, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(data.load("cifar10", "train").images) == 200
    assert "no parsed copy is kept" in caplog.text
    assert "No space left" in caplog.text
    assert kept(root) == []


def test_a_disk_that_fills_up_while_writing(root, monkeypatch, caplog):
    from safetensors import SafetensorError

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cache, "save_file", full)
    assert len(data.load("cifar10", "train").images) == 200
    assert "No space left" in caplog.text
    assert kept(root) == []


def test_where_nothing_may_be_written_it_reads_all_the_same(root, monkeypatch, caplog):
    (root / "cache").write_text("a file where the folder should be")
    assert len(data.load("cifar10", "train").images) == 200
    assert "no parsed copy is kept" in caplog.text


def test_two_processes_at_once_leave_one_whole_copy(root):
    code = "from engine import data; d = data.load('cifar10', 'train'); print(int(d.images.sum()))"
    environment = {**os.environ, "ENGINE_DATA": str(root)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert said[0] == said[1]
    assert int(said[0]) == int(data.load("cifar10", "train").images.sum())
    assert len(kept(root)) == 1


def test_a_fault_of_the_files_is_not_kept(root):
    archive = root / "cifar10" / "cifar-10-binary.tar.gz"
    content = bytearray(archive.read_bytes())
    content[1000] ^= 1
    archive.write_bytes(content)
    for _ in range(2):
        with pytest.raises(EngineError):
            data.load("cifar10", "train")
    assert not (root / "cache").exists()
