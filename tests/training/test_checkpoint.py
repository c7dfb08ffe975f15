"""Checkpoints on disk: whole or not there, checked, bounded; a damaged one costs one checkpoint."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import EngineError, files
from engine.training.checkpoint import Checkpoints

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int8)}


def same(found, tensors=TENSORS):
    return found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in found)


def test_what_was_saved_is_what_is_loaded(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints")
    assert kept.latest() is None
    kept.save(12, TENSORS, {"done": 12, "x": [1, None]})
    tensors, about = kept.latest()
    assert same(tensors)
    assert about == {"done": 12, "x": [1, None]}


def test_the_last_few_are_kept(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 12):
        kept.save(step, TENSORS, {})
    assert kept.steps() == [5, 12]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{step:010d}.{kind}" for step in (5, 12) for kind in ("json", "safetensors")
    ]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path.with_suffix(".safetensors"), -1),
        lambda path: flip(path.with_suffix(".safetensors"), 3),
        lambda path: path.with_suffix(".safetensors").unlink(),
        lambda path: path.with_suffix(".safetensors").write_bytes(b""),
        lambda path: path.write_text(""),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"version": 1}'),
        lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 2')),
        lambda path: path.write_bytes(b" " * (1 << 21)),
    ],
    ids=["bit", "header", "gone", "empty", "no manifest", "deep", "short", "version", "large"],
)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(tmp_path, damage, caplog):
    kept = Checkpoints(tmp_path)
    kept.save(1, TENSORS, {"done": 1})
    kept.save(2, TENSORS, {"done": 2})
    damage(tmp_path / "0000000002.json")
    with caplog.at_level(logging.WARNING):
        _, about = kept.latest()
    assert about == {"done": 1}
    assert "0000000002" in caplog.text
    assert "set aside" in caplog.text
    assert (tmp_path / "0000000002.json.damaged").exists()
    assert kept.steps() == [1]


def test_tensors_without_a_manifest_are_no_checkpoint(tmp_path):
    """As a kill between the two writes leaves them."""
    kept = Checkpoints(tmp_path)
    kept.save(1, TENSORS, {})
    kept.save(2, TENSORS, {})
    (tmp_path / "0000000002.json").unlink()
    assert kept.steps() == [1]
    assert same(kept.latest()[0])


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_failing_disk_keeps_the_one_before(tmp_path, monkeypatch, call, caplog):
    kept = Checkpoints(tmp_path)
    kept.save(1, TENSORS, {"done": 1})
    real = {"open": os.open, "fsync": os.fsync, "replace": os.replace}[call]
    allowed = 0

    def failing(*args, **kwargs):
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    said = []
    for count in range(12):
        allowed = count
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            if call == "replace":
                patch.setattr(Path, "replace", lambda self, to: failing(self, to))
            try:
                kept.save(2, TENSORS, {"done": 2})
            except EngineError as error:
                said.append(str(error))
            else:
                break
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
        assert kept.latest()[1]["done"] in (1, 2)
    assert said
    assert all("No space left" in line and "\n" not in line for line in said)
    assert kept.latest()[1] == {"done": 2}


def test_a_full_disk_while_training_is_a_warning(tmp_path, caplog):
    """The limit on a file's size stands for the disk's: the kernel refuses the write itself."""
    kept = Checkpoints(tmp_path)
    kept.save(1, TENSORS, {"done": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with caplog.at_level(logging.WARNING):
            kept.try_save(2, {"a": torch.zeros(100_000)}, {"done": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "no checkpoint at step 2" in caplog.text
    assert kept.latest()[1] == {"done": 1}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot write"):
        files.write_text(tmp_path / "file" / "x", "")


def test_a_run_on_a_full_disk_ends_with_one_line_and_resumes(tmp_path):
    """A real small file system where it may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        command = [sys.executable, "-m", "engine", "train"]
        fields = ["--optim.epochs", "4", "--checkpoint.seconds", "0", "--no-eval"]
        done = subprocess.run(
            [*command, "quickstart", *fields, "--run-dir", str(disk / "run")],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "No space left" in done.stderr.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        again = subprocess.run(
            [*command, "--resume", str(disk / "run"), "--no-eval", "--json"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["steps"] == 76
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_run_folder_is_one_line(tmp_path):
    """A real read-only file system where it may be mounted: permissions mean nothing to root."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=100k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        words = ["train", "quickstart", "--optim.epochs", "1", "--no-eval", "--run-dir"]
        done = subprocess.run(
            [sys.executable, "-m", "engine", *words, str(tmp_path / "run")],
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == 2, done.stderr
    assert "Read-only file system" in done.stderr
    assert done.stderr.count("\n") == 1


def _mutate(data: bytes, edits) -> bytes:
    out = bytearray(data)
    for at, byte, kind in edits:
        at %= len(out) or 1
        if kind == 0 and out:
            out[at] = byte
        elif kind == 1:
            out[at:at] = bytes([byte]) * (byte % 9)
        else:
            del out[at : at + byte]
    return bytes(out)


_EDITS = st.lists(
    st.tuples(st.integers(0, 4000), st.integers(0, 255), st.integers(0, 2)), min_size=1, max_size=6
)


def fuzz_checkpoints(tmp_path: Path, examples: int) -> None:
    kept = Checkpoints(tmp_path / "base")
    kept.save(1, TENSORS, {"done": 1})
    names = ("0000000001.json", "0000000001.safetensors")
    good = {name: (kept.folder / name).read_bytes() for name in names}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(which=st.sampled_from(names), edits=_EDITS)
    def attempt(which, edits):
        folder = tmp_path / "fuzzed"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, data in good.items():
            (folder / name).write_bytes(_mutate(data, edits) if name == which else data)
        found = Checkpoints(folder).latest()
        # Refused, or the same tensors: the manifest may change where nothing depends on it.
        assert found is None or same(found[0])

    logging.getLogger("engine.training.checkpoint").setLevel(logging.ERROR)
    attempt()
    logging.getLogger("engine.training.checkpoint").setLevel(logging.NOTSET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "fuzzed"]


def test_fuzzed_checkpoints_are_refused(tmp_path):
    fuzz_checkpoints(tmp_path, 150)


@pytest.mark.slow
def test_ten_thousand_fuzzed_checkpoints_are_refused(tmp_path):
    fuzz_checkpoints(tmp_path, 10_000)
