"""The table of layers in docs/architecture.md: imports point downwards, and never in a circle.

An import inside a function or for type checking counts like any other.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rows of the table: `| 3 | `files` |`. A room may import from rows below its own, and from no
# other.
ROWS = re.findall(
    r"^\| (\d+) \| (.*) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
)
LEVEL = {room: int(number) for number, rooms in ROWS for room in re.findall(r"`(\w+)`", rooms)}
# `engine bench` runs a benchmark; no other module of the engine knows the benchmarks.
MEASURES = "engine.cli.bench"


def modules(root: Path) -> dict[str, Path]:
    """Every module by its name when installed: `kernels/` is `engine.kernels`."""
    found = {}
    for folder, name in (("engine", ""), ("kernels", "engine."), ("benchmarks", "engine.")):
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[(name + ".".join(parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the project that a module imports, wherever in its text."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            # What is no module is a name of its package; the compiled `_native` is neither.
            names = [n if n in known or n.endswith("._native") else base for n in names]
        else:
            continue
        yield from (n for n in names if n in known and n != name)


def room(module: str) -> str:
    """The part after `engine.`; the public names of `engine` itself come from api and below."""
    return f"{module}.".split(".")[1] or "api"


def complaints(root: Path) -> list[str]:
    known = modules(root)
    graph = {name: set(imports(name, path, known)) for name, path in known.items()}
    found = []
    for name, targets in sorted(graph.items()):
        for target in sorted(targets):
            here, there = room(name), room(target)
            if name in ("engine", "engine.__main__") or here == there:
                continue
            if LEVEL[there] >= LEVEL[here] or (there == "benchmarks" and name != MEASURES):
                found.append(f"{name} imports {target}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("in a circle: " + " <- ".join(error.args[1]))
    return found


def test_imports_point_downwards_and_never_in_a_circle():
    assert len(modules(ROOT)) > 100
    assert complaints(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("engine/data/own.py", "    from ..training import step", "engine.data.own imports"),
        ("engine/data/own.py", "    from ..adversary.memory import slow", None),
        ("kernels/layout.py", "    import engine.files", "engine.kernels.layout imports"),
        ("engine/cli/train.py", "    from ..benchmarks import tables", "engine.cli.train imports"),
        ("benchmarks/loaders.py", "    from engine.cli import run", "engine.benchmarks.loaders"),
        ("engine/threat.py", "    from . import rng", "engine.threat imports engine.rng"),
        ("engine/data/readers.py", "    from .datasets import load", "in a circle"),
    ],
)
def test_an_import_that_points_upwards_is_seen(module, line, complaint, tmp_path):
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        if str(path.relative_to(ROOT)) == module:
            copy.write_text(copy.read_text() + f"\n\ndef late():\n{line}\n")
    found = complaints(tmp_path)
    assert any(complaint in each for each in found) if complaint else not found


def test_every_room_has_its_layer():
    rooms = {room(name) for name in modules(ROOT)} - {"__main__"}
    assert rooms == LEVEL.keys()
