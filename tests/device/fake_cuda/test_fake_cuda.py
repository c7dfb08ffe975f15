"""Every recipe's training step on CUDA tensors that are not there; see the package's docstring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from . import guard
from .cases import FAULTS, LONG, cases, missing

pytestmark = pytest.mark.skipif(guard.unavailable() is not None, reason=str(guard.unavailable()))

SOUND = [
    pytest.param(name, marks=pytest.mark.slow if name.startswith(LONG) else ())
    for name in cases()
    if not name.startswith("fault: ")
]
ABSENT = {name: reason for name in cases() if (reason := missing(name)) is not None}


@pytest.fixture(scope="module")
def rows(request, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Run the selected cases in one process: what the guard registers holds for a whole process."""
    library = guard.build(tmp_path_factory.mktemp("guard"))
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    wanted = [name for name in wanted if name not in ABSENT]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.device.fake_cuda.cases", *wanted],
        capture_output=True,
        text=True,
        env={**os.environ, guard.VARIABLE: str(library), "OMP_NUM_THREADS": "1"},
        cwd=request.config.rootpath,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", SOUND)
def test_a_gpu_would_take_every_operator(rows, name):
    if name in ABSENT:
        pytest.skip(ABSENT[name])
    assert rows[name]["complaints"] == []
    assert rows[name]["operators"] > 100


@pytest.mark.parametrize("name", [f"fault: {fault}" for fault in FAULTS])
def test_a_planted_fault_is_caught(rows, name):
    complaint = FAULTS[name.removeprefix("fault: ")].complaint
    assert any(complaint in line for line in rows[name]["complaints"]), rows[name]["complaints"]
