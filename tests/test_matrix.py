"""The versions that `make matrix` runs are the versions that pyproject.toml allows."""

from __future__ import annotations

import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .matrix import PAIRS, ROOT, constraints, main, version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def allowed(name: str) -> SpecifierSet:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"]]
    return next(r.specifier for r in map(Requirement, wanted) if r.name == name)


def test_every_pair_may_be_installed():
    for torch, triton in PAIRS.items():
        assert allowed("torch").contains(torch)
        assert allowed("triton").contains(triton)


def test_both_ends_of_the_range_are_run():
    minors = sorted({Version(torch).minor for torch in PAIRS})
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert not allowed("torch").contains(f"2.{minors[0] - 1}.9")
    assert not allowed("torch").contains(f"2.{minors[-1] + 1}.0")


def test_the_pinned_set_is_one_of_them():
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert PAIRS[pinned["torch"]] == pinned["triton"]


def test_a_pair_replaces_what_goes_with_pytorch_and_nothing_else():
    lines = constraints("2.12.1", "3.7.1").splitlines()
    assert {"torch==2.12.1", "triton==3.7.1"} <= set(lines)
    assert sum(line.startswith(("torch==", "triton==")) for line in lines) == 2
    assert any(line.startswith("nvidia-dali") for line in lines)
    assert any(line.startswith("numpy==") for line in lines)
    # Each PyTorch bounds its setuptools: 2.11 wants one below 82.
    assert not any(line.startswith("setuptools==") for line in lines)
    older = constraints("2.11.0", "3.6.0").splitlines()
    assert [line for line in older if line.startswith("numpy")] == ["numpy<2.4"]


def test_the_version_of_a_python_is_its_own():
    assert version(sys.executable) == "{}.{}".format(*sys.version_info)


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_a_python_that_does_not_run_is_one_line_and_bad(monkeypatch, capsys, python):
    monkeypatch.setattr(sys, "argv", ["matrix", "--torch", "2.13.0", "--python", python])
    assert main() == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{python}, torch 2.13.0, triton 3.7.1: not installed")
