"""README and docs: the code runs, and the tables, names and links are true."""

from __future__ import annotations

import json
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import engine
from engine import Attack, Linf, models, recipes, registers
from engine.compare import protocol
from engine.kernels import audit, backends
from engine.objectives import base

from ..conftest import Tiny, blobs

ROOT = Path(__file__).resolve().parents[2]


def code_blocks(file: str, language: str = "python") -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_readmes_python_code_runs_on_a_foreign_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = blobs(512)
    x_test, y_test = blobs(64, seed=4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 4))
    names = {
        "network": network,
        "images": images,
        "labels": labels,
        "x_test": x_test.float() / 255,
        "y_test": y_test,
    }
    first, loop = code_blocks("README.md")
    torch.manual_seed(0)
    exec(compile(first, "README.md", "exec"), names)
    assert names["report"].clean > 0.9
    assert names["report"].autoattack is not None
    assert names["adversaries"].shape == names["x_test"].shape
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    batches = list(zip(images.float().div(255).split(64), labels.split(64), strict=True))
    names |= {"optimiser": optimiser, "batches": batches}
    before = network[1].weight.clone()
    exec(compile(loop, "README.md", "exec"), names)
    assert not torch.equal(before, network[1].weight)


def test_the_example_method_works_and_declares_its_passes(batch, monkeypatch):
    (source,) = code_blocks("docs/adding-a-method.md")
    # The tests of `--import` train with the same module.
    assert source.strip() in (ROOT / "tests/plugins/mynets.py").read_text(encoding="utf-8")
    module = types.ModuleType("mynets")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(models, "_registered", {})
    for register in (registers.optimisers, registers.loaders):
        monkeypatch.setattr(register, "_makers", {})
    monkeypatch.setattr(base, "OBJECTIVES", dict(base.OBJECTIVES))
    exec(compile(source, "adding-a-method.md", "exec"), vars(module))
    objective, attack = module.Pairing(weight=0.5), Attack(steps=3)
    x, y = batch
    model = Tiny()
    outcome = objective(model, x, y, Linf(0.1), attack)
    clean, adversarial = model(x), model(outcome.adversary)
    expected = nn.functional.cross_entropy(adversarial, y) + 0.5 * nn.functional.mse_loss(
        clean, adversarial
    )
    torch.testing.assert_close(outcome.loss, expected)
    assert objective.passes(attack).total == 2 * 3 + 6


def test_evaluation_code_in_the_docs_runs_on_a_users_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluating, loading = code_blocks("docs/troubleshooting.md")
    images, labels = blobs(8)
    x_test = images.expand(-1, 3, -1, -1).float() / 255
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    names = {"network": network, "x_test": x_test, "y_test": labels}
    exec(compile(evaluating, "troubleshooting.md", "exec"), names)
    assert names["report"].examples == 8
    assert "on 8 images" in capsys.readouterr().out
    saved = models.build("tiny-cnn", in_channels=1, image_size=8, classes=10)
    (tmp_path / "RUN").mkdir()
    save_file(saved.state_dict(), tmp_path / "RUN" / "best.safetensors")
    exec(compile(loading, "troubleshooting.md", "exec"), names)
    torch.testing.assert_close(names["network"].state_dict(), saved.state_dict())


def test_baselines_in_the_docs_are_the_recipes():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = text.split("| recipe `fashion-mnist-...` |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|.*\| (\d+|the same)", table, flags=re.MULTILINE)
    assert len(rows) == 5
    steps = 0
    for name, number in rows:
        steps = int(number) if number.isdigit() else steps
        assert recipes.load(f"fashion-mnist-{name}").attack.steps == steps, name


def test_docs_name_real_commands_and_recipes():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^    |, )make ([a-z0-9-]+)", text, flags=re.MULTILINE))
    assert {"train", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    command = r"(?:`|^    |/)engine (?:train|compare|plan|profile) ([a-z][a-z0-9-]+)(?![\w./-])"
    named = set(re.findall(command, text, flags=re.MULTILINE))
    assert {"quickstart", "fashion-mnist"} <= named
    for name in named:
        assert name in recipes.names(), name


@pytest.mark.parametrize(
    "file", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_documents_have_targets(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert ((ROOT / file).parent / target).exists(), target


def test_architecture_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text()
    for path in (ROOT / "engine").iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in text or path.name == "errors.py", path.name
        if (path / "__init__.py").exists():
            assert f"{path.name}/" in text, path.name
    assert engine.__doc__


def test_every_page_is_in_the_sites_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, page.name


def test_files_named_in_the_docs_exist():
    named = re.compile(r"`((?:engine|kernels|benchmarks|tests|docs)/[\w./-]*)`")
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    dead = [
        f"{page.name}: {path}"
        for page in pages
        for path in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    ]
    assert dead == []


@pytest.mark.slow
def test_full_scale_recipes_in_the_docs_are_those_of_engine_plan():
    from engine.benchmarks import predictions

    assert predictions.full_scale() in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_every_full_scale_recipe_is_in_the_docs():
    """Check names, networks and budgets; the slow test above checks the predictions."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in recipes.names():
        loaded = recipes.load(name)
        if loaded.data.name in ("mnist", "cifar10", "cifar100"):
            (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
            passes = loaded.passes().total
            assert f"| {loaded.model.name} |" in row
            assert f"| {passes} | {loaded.optim.epochs} |" in row


def test_predictions_in_the_docs_are_those_of_engine_plan():
    # Another PyTorch dispatches other operators, and the prices differ by some thousandths.
    pinned = f"torch=={torch.__version__.partition('+')[0]}\n"
    if pinned not in (ROOT / "constraints.txt").read_text(encoding="utf-8"):
        pytest.skip("the docs' predictions are those of the PyTorch in constraints.txt")
    from engine.benchmarks import predictions

    assert predictions.plans() in (ROOT / "docs/plan.md").read_text(encoding="utf-8")


def test_tables_in_the_docs_are_the_stored_results():
    from engine.benchmarks import tables

    stored = tables.stored()
    assert stored
    for name, (document, table) in stored.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        assert table in text, f"{document} does not show {name} as it is stored"


def stored_audit():
    return json.loads((ROOT / "benchmarks" / "results" / "audit.json").read_text(encoding="utf-8"))


def test_the_kernels_page_has_every_op_and_every_kernel():
    """Check that the rows exist; the slow test below checks the compiler's numbers."""
    ops, table = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("<!-- audit -->")
    examples = {example.kernel: example.op for example in audit.examples()}
    for op in backends.OPS:
        assert f"\n| `{op}` | " in ops, op
    for kernel, op in examples.items():
        name = f"`{kernel}`" if kernel == op else f"`{kernel}` of `{op}`"
        assert f"\n| {name} | " in table, kernel
    stored = stored_audit()["rows"]
    assert {(row["kernel"], row["arch"]) for row in stored} == {
        (kernel, arch) for kernel in examples for arch in audit.ARCHS
    }


@pytest.mark.slow
def test_the_audit_in_the_docs_is_the_compilers():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    stored = stored_audit()
    assert stored["environment"]["triton"] == triton.__version__, (
        "another compiler: engine kernels --store"
    )
    assert stored["rows"] == audit.rows()


def table_under(file: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, the table's header left out."""
    section = (ROOT / file).read_text(encoding="utf-8").split(f"# {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_advice_in_the_results_is_what_the_store_says():
    rows = table_under("docs/results.md", "When to use what")
    assert len(rows) >= 6
    in_short = [row[2:] for row in table_under("README.md", "Which method?")]
    assert len(in_short) == 3
    assert all(numbers in [row[3:] for row in rows] for numbers in in_short)
    for _, use, study, accuracy, of_pgd10, share in rows:
        name, epochs = re.fullmatch(r"`(\S+)`, (\d+) epochs", study).groups()
        path = ROOT / "benchmarks" / "results" / f"compare-{name}.json"
        stored = {
            row["method"]: row
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
            if row["epochs"] == int(epochs)
        }
        # Where the strong method is not PGD-10, its name stands beside its number.
        number, other = re.fullmatch(r"([\d.]+)(?: \((PGD-\d+)\))?", of_pgd10).groups()
        chosen = stored[re.search(r"`(\S+)`$", use)[1]]
        strong = stored[(other or "PGD-10").lower()]
        assert accuracy == f"{100 * chosen['autoattack_mean']:.1f}", use
        assert number == f"{100 * strong['autoattack_mean']:.1f}", use
        ratio = chosen["train_seconds_mean"] / strong["train_seconds_mean"]
        assert share == f"{ratio:.0%}", use


@pytest.mark.parametrize("base", ["fashion-mnist", "cifar10", "quickstart"])
def test_settings_in_the_results_are_the_studies_methods(base, tmp_path):
    """Check that the shown settings give the study's attack and objective on every recipe."""
    studies = {"memory-1": "curves", "ball-1": "few", "random-1-ball": "rivals"}
    blocks = code_blocks("docs/results.md", "toml")
    assert len(blocks) == len(studies)
    for text, (method, study) in zip(blocks, studies.items(), strict=True):
        assert text.startswith(f"# {method}")
        (tmp_path / "mine.toml").write_text(f'extends = "{base}"\n{text}', encoding="utf-8")
        mine = recipes.load(str(tmp_path / "mine.toml"))
        study_file = ROOT / "benchmarks" / "studies" / f"{study}.toml"
        theirs = recipes.parse(protocol.read([str(study_file)], {}).methods[method])
        assert (mine.attack, mine.objective) == (theirs.attack, theirs.objective), method


def test_names_on_the_api_page_can_be_imported():
    shown = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    for name in shown:
        if name.startswith("kernels."):
            name = f"engine.{name}"
        assert pkgutil.resolve_name(name) is not None


def test_every_public_name_is_on_the_api_page():
    """Check the names; tests/docs/test_site.py (slow) checks the docstrings in the built site."""
    shown = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    # Of these modules and registers the page shows the functions.
    names = set(engine.__all__) - {"models", "objectives", "optimisers", "loaders"}
    assert {f"engine.{name}" for name in names} <= set(shown)
    assert {"engine.models.register", "engine.objectives.register"} <= set(shown)
    assert "engine.registers.Register.register" in shown
    assert len(shown) == len(set(shown))
