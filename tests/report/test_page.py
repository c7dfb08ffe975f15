"""The report: whole without a network, whole without its parts, and nothing in it unescaped."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch

from engine import pictures, recipes, rng
from engine.adversary.attack import Attack
from engine.errors import EngineError
from engine.report import robustness, views
from engine.report.page import build as build_page
from engine.runs import build, evaluate, images
from engine.runs.folder import Run
from engine.threat import ThreatModel, as_written

PICTURES = ("curves", "eps", "grid", "surface")
VOID = {"meta", "img", "br", "link", "input", "hr"}
FETCHING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}

EVALUATION = {
    "clean_acc": "97.00",
    "pgd_acc": "76.00",
    "autoattack_acc": "75.00",
    "worst_case_acc": "74.50",
    "pgd": "PGD-50-10",
    "autoattack_version": "standard",
    "after_each_attack": {
        "apgd-ce": "78.00",
        "apgd-t": "75.00",
        "fab-t": "75.00",
        "square": "75.00",
    },
    "examples": 200,
    "notes": [],
    "checkpoint": "best",
}


RESOLUTION = {name: getattr(views, name) for name in ("_SURFACE_POINTS", "_SWEEP_RADII")}


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Coarser pictures: what is tested here does not hang on their resolution."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "_SURFACE_POINTS", 9)
        patch.setattr(views, "_SWEEP_RADII", 4)
        yield


class Page(HTMLParser):
    """A page's tags in order; fails on a tag that is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        # Sentences and SVG text; the style sheet is no text of the page.
        if "style" not in self.open:
            self.pieces.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def make_run(path: Path, epochs: int = 2, checkpoint: bool = True, **overrides: str) -> Run:
    """A run folder as training leaves it, with an untrained network in it."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    recipe = recipes.load("quickstart", {"optim.epochs": str(epochs), **keys})
    run = Run.create(recipe, path)
    for epoch in range(1, epochs + 1):
        run.log(
            {
                "epoch": epoch,
                "step": 20 * epoch,
                "lr": 1e-3,
                "train_seconds": 1.5 * epoch,
                "images_per_second": 900.0,
                "loss": 2.0 / epoch,
                "ce": 1.7 / epoch,
                "local": 0.1 / epoch,
                "adv_accuracy": 0.3,
                "val_clean": 0.9,
                "val_pgd": 0.5,
            }
        )
    if checkpoint:
        torch.manual_seed(0)
        run.save("best", network(recipe))
    return run


def network(recipe: recipes.Recipe) -> torch.nn.Module:
    x, y = images.test_set(recipe)
    return build.build_model(recipe, x.mul(255).byte(), int(y.max()) + 1, x.shape[1:])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Run, Page]:
    """A report with all its parts."""
    run = make_run(tmp_path_factory.mktemp("report") / "run", 3, evaluation__examples="40")
    run.write_json("evaluation.json", EVALUATION)
    run.write_json("summary.json", {"train_seconds": 12.5, "best_epoch": 2})
    return run, Page(build_page(run).read_text())


def test_the_page_fetches_nothing(evaluated):
    _, page = evaluated
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in FETCHING & attrs.keys():
            assert attrs[name].startswith(("data:image/png;base64,", "#")), (tag, attrs[name])
    style = "".join(
        re.findall(r"<style.*?</style>", (evaluated[0].path / "report.html").read_text(), re.S)
    )
    assert "@import" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", style))


def test_every_picture_is_embedded_and_not_blank(evaluated):
    run, page = evaluated
    images = page.all("img") + page.all("image")
    assert len(page.all("img")) == 4 * views._GRID_EXAMPLES
    for attrs in images:
        source = attrs.get("src") or attrs["xlink:href"]
        data = base64.b64decode(source.split(",", 1)[1], validate=False)
        assert np.ptp(matplotlib.image.imread(io.BytesIO(data), format="png")) > 0
    charts = re.findall(r"<svg.*?</svg>", (run.path / "report.html").read_text(), re.S)
    assert len(charts) == 5
    assert all(chart.count("<path") > 10 for chart in charts)
    for name in PICTURES:
        pixels = matplotlib.image.imread(run.path / "pictures" / f"{name}.png")
        assert pixels.shape[1] > 600
        assert np.ptp(pixels) > 0.5
    assert sorted(p.name for p in run.path.glob(".*")) == []


def test_ids_are_unique_and_references_resolve(evaluated):
    _, page = evaluated
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for value in attrs.values():
            for target in re.findall(r"(?:url\(|^)#([\w-]+)", value or ""):
                assert target in ids


def test_pictures_follow_the_page_into_the_dark(evaluated):
    text = (evaluated[0].path / "report.html").read_text()
    body = text[text.index("<body") :]
    for name, (light, dark) in pictures.COLOURS.items():
        assert light not in body
        assert text.count(f"--{name}: {light};") == text.count(f"--{name}: {dark};") == 1


def test_the_numbers_are_those_measured(evaluated):
    text = evaluated[1].text
    # sqrt(0.97 * 0.03 / 200) and sqrt(0.75 * 0.25 / 200)
    for shown in ("97.0% ± 1.2", "76.0% ± 3.0", "75.0% ± 3.1", "12.5 s", "50 steps, 10 restarts"):
        assert shown in text
    assert "74.5% withstood both attacks" in text
    assert "best epoch by validation PGD accuracy 2 of 3" in text
    for attack in ("APGD, cross-entropy 78.0%", "FAB, targeted 75.0%", "Square 75.0%"):
        assert attack in text


def test_the_same_run_gives_the_same_page(evaluated):
    run, _ = evaluated
    first = (run.path / "report.html").read_bytes()
    assert build_page(run).read_bytes() == first


def test_before_evaluation_and_without_a_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", checkpoint=False)
    stale = run.path / "pictures" / "grid.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an older checkpoint")
    page = Page(build_page(run).read_text())
    assert "has not been evaluated yet" in page.text
    assert "no checkpoint best.safetensors yet" in page.text
    assert "AutoAttack has not been run" in page.text
    assert not page.all("img")
    assert not stale.exists()
    assert (run.path / "pictures" / "curves.png").exists()


def test_balls_for_a_part_of_the_batch_are_spoken_of(tmp_path):
    whole = Page(build_page(make_run(tmp_path / "whole", checkpoint=False)).read_text())
    assert "of each batch" not in whole.text
    part = make_run(tmp_path / "part", checkpoint=False, objective__local_share="0.5")
    text = Page(build_page(part).read_text()).text
    assert "balls for 0.5 of each batch" in text
    assert "Local balls for 0.5 of each batch" in text


def test_an_empty_run_folder(tmp_path):
    run = make_run(tmp_path / "run", checkpoint=False)
    (run.path / "metrics.jsonl").unlink()
    (run.path / "environment.json").unlink()
    page = Page(build_page(run).read_text())
    assert "No epoch has been logged" in page.text
    assert "environment.json is missing" in page.text


def test_one_epoch_without_validation(tmp_path):
    run = make_run(tmp_path / "run", epochs=1, checkpoint=False)
    row = json.loads((run.path / "metrics.jsonl").read_text())
    for key in ("val_clean", "val_pgd"):
        del row[key]
    (run.path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page = Page(build_page(run).read_text())
    assert "1 epoch of local-ball training" in page.text
    assert len(page.all("svg")) == 2
    assert "best epoch" not in page.text


def test_everything_shown_is_escaped(tmp_path):
    evil = "<script>alert('$x$')</script>"
    run = make_run(tmp_path / "a&b", checkpoint=False)
    run = Run(run.path, replace(run.recipe, name=evil))
    run.write_json("environment.json", {"cpu": evil, "command": "engine <b> & co", "commit": "ab+"})
    run.write_json("evaluation.json", {**EVALUATION, "notes": [evil], "pgd": "PGD-5-1"})
    text = build_page(run).read_text()
    page = Page(text)
    assert "<script" not in text
    assert page.text.count(evil) >= 4  # title, heading, environment, note
    assert "engine <b> & co" in page.text
    assert "a&b" in page.text


def test_autoattack_left_out(tmp_path):
    run = make_run(tmp_path / "run", checkpoint=False)
    left_out = {"autoattack_acc": None, "after_each_attack": {}, "autoattack_version": "none"}
    run.write_json("evaluation.json", {**EVALUATION, **left_out})
    page = Page(build_page(run).read_text())
    assert "not run" in page.text
    assert "AutoAttack has not been run" in page.text


def test_damaged_files_are_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "best.safetensors").write_bytes(b"\0" * 40)
    assert "best.safetensors is damaged" in Page(build_page(run).read_text()).text
    (run.path / "evaluation.json").write_text("{")
    with pytest.raises(EngineError, match=r"evaluation\.json is damaged"):
        build_page(run)


def test_absent_data_is_named(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    data = replace(run.recipe.data, name="cifar100")
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "nothing"))
    run = Run(run.path, replace(run.recipe, data=data))
    page = Page(build_page(run).read_text())
    assert page.text.count("This picture is missing: cifar100: not found") == 3


def test_a_network_too_large_for_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "_BUDGET", {"cpu": 1.0, "cuda": 1.0})
    run = make_run(tmp_path / "run")
    page = Page(build_page(run).read_text())
    assert page.text.count("the network is too large for it on this device") == 2
    assert page.all("img"), "the grid is cheap and stays"


@pytest.fixture
def colour_data(tmp_path, monkeypatch):
    """CIFAR-10's format with 12 images a file, under a checksum list of its own."""
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    sums = []
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = draw.integers(0, 256, (12, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(12) % 10
        (folder / name).write_bytes(records.tobytes())
        sums.append(f"{hashlib.sha256(records.tobytes()).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(sums))
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "data"))
    images._images.cache_clear()
    yield
    images._images.cache_clear()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_colour_images(tmp_path, colour_data, norm):
    run = make_run(
        tmp_path / "run",
        data__name="cifar10",
        data__validation="4",
        evaluation__examples="12",
        threat__norm=norm,
        threat__eps="8/255" if norm == "Linf" else "0.5",
        objective__name="pgd",
    )
    page = Page(build_page(run).read_text())
    assert len(page.all("img")) == 4 * 8
    first = base64.b64decode(page.all("img")[0]["src"].split(",")[1])
    pixels = matplotlib.image.imread(io.BytesIO(first), format="png")[..., :3]
    x, _ = images.test_set(run.recipe)
    np.testing.assert_allclose(pixels, x[0].permute(1, 2, 0), atol=1 / 255)
    assert "this recipe did not train on such balls" in page.text


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_sweep_and_surface_pass_through_known_points(tmp_path, monkeypatch, norm):
    """At eps 0 the sweep is the clean accuracy; the plane holds the images at 0 and the adversaries
    at 1.
    """
    for name, value in RESOLUTION.items():
        monkeypatch.setattr(views, name, value)
    drawn = {}
    for name in ("draw_sweep", "draw_plane"):
        monkeypatch.setattr(
            robustness, name, lambda ax, what, *rest: drawn.update({type(what): what})
        )
    run = make_run(tmp_path / "run", evaluation__examples="32", threat__norm=norm)
    build_page(run)

    model = evaluate.load_model(run)
    x, y = images.test_set(run.recipe)
    state = rng.state(run.recipe.seed)
    adversary, _ = Attack(steps=views._STEPS)(model, x, y, run.recipe.threat, state=state)
    with torch.no_grad():
        clean, attacked = model(x), model(adversary)

    sweep = drawn[robustness.Sweep]
    assert sweep.accuracy[0] == pytest.approx(float((clean.argmax(1) == y).double().mean()))
    assert any(sweep.eps == run.recipe.threat.eps)
    assert sweep.accuracy[-1] <= sweep.accuracy[0]
    surface = drawn[robustness.Surface]
    middle, one = len(surface.steps) // 2, int(np.argmin(abs(surface.steps - 1)))
    assert surface.steps[middle] == 0
    assert surface.steps[one] == 1
    for column, logits in ((middle, clean), (one, attacked)):
        loss = float(torch.nn.functional.cross_entropy(logits, y))
        assert surface.loss[middle, column] == pytest.approx(loss, rel=1e-4)
        right = float((logits.argmax(1) == y).double().mean())
        assert surface.right[middle, column] == pytest.approx(right, abs=1e-9)
    assert surface.loss[middle, one] > surface.loss[middle, middle]


def test_the_style_leaves_the_users_settings_alone():
    before = dict(matplotlib.rcParams)
    with pictures.style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("eps", "shown"),
    [(8 / 255, "8/255"), (0.1, "0.1"), (0.5, "0.5"), (0.0, "0"), (1.0, "1"), (0.2, "0.2")],
)
def test_radii_read_as_people_write_them(eps, shown):
    assert as_written(eps) == shown


def test_points_shown_lie_in_their_balls_and_move_the_prediction():
    recipe = recipes.load("quickstart", {"evaluation.examples": "20"})
    torch.manual_seed(0)
    model = network(recipe).eval()
    x, _ = images.test_set(recipe)
    for norm, order in (("Linf", torch.inf), ("L2", 2)):
        ball = ThreatModel(norm, 0.2)
        found = views._worst_of_ball(model, x, ball, torch.tensor([0, 0]))
        assert found.min() >= 0
        assert found.max() <= 1
        distance = (found - x).flatten(1).norm(p=order, dim=1)
        assert distance.max() <= 0.2 + 1e-5
        with torch.no_grad():
            p, q = model(x).log_softmax(1), model(found).log_softmax(1)
            near = model((x + 0.01 * torch.randn_like(x)).clamp(0, 1)).log_softmax(1)
        divergence = (p.exp() * (p - q)).sum(1).mean()
        assert divergence > 5 * (p.exp() * (p - near)).sum(1).mean()
