"""Test that every package is pinned, and that the lock file has the hashes of the same versions."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    if metadata.version("torch").partition("+")[0] != CONSTRAINTS["torch"]:
        pytest.skip(
            "the environment has another PyTorch than constraints.txt, as `make matrix` does"
        )
    installed = {plain(d.metadata["Name"]) for d in metadata.distributions()}
    assert unpinned(installed, CONSTRAINTS) == []


def test_a_package_without_a_pin_is_seen():
    assert unpinned({"numpy", "surprise", "nvidia-cublas"}, CONSTRAINTS) == ["surprise"]


@pytest.mark.parametrize("package", ["scikit-build-core", "nanobind", "cmake", "ninja"])
def test_what_builds_the_engine_is_pinned(package):
    assert package in CONSTRAINTS
    assert package in (ROOT / "Makefile").read_text()


def needed(*names):
    """Return these packages and all that they need in turn, without extras."""
    found, left = set(), list(names)
    while left:
        name = plain(left.pop())
        if name not in found:
            found.add(name)
            asked = map(Requirement, metadata.requires(name) or ())
            left += [r.name for r in asked if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def test_the_carried_wheels_are_what_a_bare_machine_lacks():
    # The machine for which the Makefile says that it downloads them.
    bare = needed("torch", "triton", "pytest", "numpy", "scipy", "matplotlib")
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    carried = re.search(r"^GPU_WHEELS \?= (.*)$", text, re.MULTILINE)[1].split()
    ours = needed("robust-engine", "hypothesis", "pytest-xdist")
    assert sorted(carried) == sorted(ours - bare - {"robust-engine"})


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
