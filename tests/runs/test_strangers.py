"""Test recipes, protocols and run folders from strangers: taken, or refused in one line.

Nothing in them is run, and nothing leaves its folder. Data sets are fuzzed in
tests/data/test_fuzz.py, checkpoints in tests/training/test_checkpoint.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import EngineError, cli, recipes
from engine.compare.protocol import Job, read
from engine.runs.folder import Run, plain

from ..training.test_checkpoint import _EDITS, _mutate

SEEDS = [recipes.dump(recipes.load(name)).encode() for name in ("quickstart", "cifar10")]
SEEDS += [
    b'extends = "quickstart"\nname = "../../x"\n[optim]\nlr = 1e309\n',
    b"[attack]\nsteps = -1\nalpha = nan\n",
    b'[objective]\nname = "trades"\n',
]
# Values where a number, a word, a table is meant: whatever TOML can say.
VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(["8/255", "1/0", "1e999/1", "__import__('os')", "../..", "none"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = [name for name, *_ in recipes.options()]


def one_line(call, *args):
    """Return the call's value, or None where it refused in one line."""
    try:
        return call(*args)
    except EngineError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    return None


def fuzz_recipes(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "recipe.toml"
    options = {
        "max_examples": examples,
        "deadline": None,
        "database": None,
        "suppress_health_check": list(HealthCheck),
    }

    def check(recipe):
        if recipe is not None:
            again = recipes.dump(recipe)
            path.write_text(again, encoding="utf-8")
            assert recipes.dump(recipes.load(str(path))) == again
            assert plain(recipe.name) == Path(plain(recipe.name)).name != ".."

    @settings(**options)
    @given(seed=st.sampled_from(SEEDS), edits=_EDITS)
    def bytes_of_a_file(seed, edits):
        path.write_bytes(_mutate(seed, edits))
        check(one_line(recipes.load, str(path)))

    @settings(**options)
    @given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
    def values_of_fields(changes):
        tree = recipes.tree("quickstart")
        for dotted, value in changes.items():
            *tables, last = dotted.split(".")
            inner = tree
            for table in tables:
                inner = inner.setdefault(table, {})
            inner[last] = value
        check(one_line(recipes.parse, tree))

    @settings(**options)
    @given(key=st.sampled_from(FIELDS) | st.text(max_size=20), text=st.text(max_size=20))
    def words_of_the_command_line(key, text):
        check(one_line(recipes.load, "quickstart", {key: text}))

    bytes_of_a_file()
    values_of_fields()
    words_of_the_command_line()
    assert os.listdir(tmp_path) == ["recipe.toml"]


def test_fuzzed_recipes_are_refused_or_taken(tmp_path):
    fuzz_recipes(tmp_path, 150)


@pytest.mark.slow
def test_ten_thousand_fuzzed_recipes_are_refused_or_taken(tmp_path):
    fuzz_recipes(tmp_path, 3400)


def fuzz_protocols(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "protocol.toml"
    seed = (
        b'base = "quickstart"\nseeds = 2\nepochs = [1, 3]\n[common]\nseed = 1\n'
        b"[methods.weak]\nattack = { steps = 1 }\n[methods.strong]\nattack = { steps = 10 }\n"
    )

    def jobs():
        protocol = read([str(path)], {})
        # A stranger's numbers may ask for any amount of work; here only names matter.
        return [Job(name, recipes.parse(tree)) for name, tree in protocol.methods.items()]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(edits=_EDITS)
    def attempt(edits):
        path.write_bytes(_mutate(seed, edits))
        for job in one_line(jobs) or []:
            assert (tmp_path / job.folder).resolve().parent == tmp_path.resolve()

    attempt()


def test_fuzzed_protocols_are_refused_or_stay_in_their_folder(tmp_path):
    fuzz_protocols(tmp_path, 150)


def test_a_methods_name_cannot_leave_the_folder(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('base = "quickstart"\n[methods."../../x"]\n')
    with pytest.raises(EngineError, match="plain names"):
        read([str(path)], {})


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", ".", "", "a\0b", "~x", "é"])
def test_a_recipes_name_cannot_leave_the_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load("quickstart", {"name": name})
    run = Run.create(recipe)
    assert run.path.resolve().parent == (tmp_path / "runs").resolve()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("strangers") / "run"
    words = ["train", "quickstart", "--optim.epochs", "1", "--run-dir", str(path), "--json"]
    words += ["--evaluation.examples", "20", "--evaluation.autoattack", "none"]
    assert cli.run([*words, "--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts", "1"]) == 0
    return path


@pytest.mark.parametrize(
    "file",
    [
        "recipe.toml",
        "metrics.jsonl",
        "summary.json",
        "evaluation.json",
        "environment.json",
        "last.safetensors",
        "best.safetensors",
    ],
)
@pytest.mark.parametrize(
    "content",
    [b"", b"\0\xff" * 50, b"[" * 50_000, b"[1, 2]", b'{"a": {"b": "<script>"}}\n'],
    ids=["empty", "bytes", "deep", "list", "other"],
)
def test_a_damaged_run_folder_is_one_line_or_a_report(run_folder, tmp_path, file, content, capsys):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    (copy / file).write_bytes(content)
    status = cli.run(["report", str(copy)])
    captured = capsys.readouterr()
    assert status in (0, 2)
    if status:
        assert captured.err.startswith("engine: ")
        assert captured.err.count("\n") == 1
    else:
        assert "<script>" not in (copy / "report.html").read_text()


def test_a_file_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "recipe.toml"
    with path.open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(EngineError, match="more than"):
        recipes.load(str(path))
