"""Test that every package is pinned, and that the lock file has the hashes of the same versions."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The tool itself, the project, and what PyTorch's wheel for CUDA pins by itself, version by
# version.
NOT_PINNED = re.compile(r"pip|robust-engine|(nvidia|cuda)-.*")
# `make rivals` pins these in its own line.
RIVALS = re.findall(r"([\w-]+)==", (ROOT / "Makefile").read_text())


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text):
    """Versions by package name; without local parts such as +cpu."""
    found = re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    return {plain(name): version for name, version in found}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text())
LOCK = (ROOT / "requirements.lock").read_text()


def unpinned(installed, constraints):
    rivals = {*map(plain, RIVALS), "six", "tqdm"}
    return sorted(
        name
        for name in installed
        if name not in constraints and name not in rivals and not NOT_PINNED.fullmatch(name)
    )


def test_constraints_name_all_that_is_installed():
    installed = {plain(d.metadata["Name"]) for d in metadata.distributions()}
    assert unpinned(installed, CONSTRAINTS) == []


def test_a_package_without_a_pin_is_seen():
    assert unpinned({"numpy", "surprise", "nvidia-cublas"}, CONSTRAINTS) == ["surprise"]


@pytest.mark.parametrize("package", ["scikit-build-core", "nanobind", "cmake", "ninja"])
def test_what_builds_the_engine_is_pinned(package):
    assert package in CONSTRAINTS
    assert package in (ROOT / "Makefile").read_text()


def test_the_lock_has_the_versions_of_the_constraints_and_a_hash_for_each():
    locked = pins(LOCK)
    different = {
        name: (locked[name], version)
        for name, version in CONSTRAINTS.items()
        if name in locked and locked[name] != version
    }
    assert different == {}
    assert {name for name in locked if not NOT_PINNED.fullmatch(name)} <= CONSTRAINTS.keys()
    for entry in re.split(r"\n(?=\S)", LOCK):
        if "==" in entry.split("\n")[0] and not entry.startswith("#"):
            assert "--hash=sha256:" in entry, entry.split("\n")[0]
