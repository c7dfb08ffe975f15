"""The loader benchmark: rows that say what was measured."""

import json
from dataclasses import replace

from engine import cli
from engine.benchmarks import loaders, tables
from engine.data.loaders.dali import unavailable
from engine.models import sources


def test_rows_compare_every_loader_with_torchs(monkeypatch, capsys):
    monkeypatch.setattr(loaders, "SETTINGS", (loaders.Setting((1, 8, 8), "quickstart"),))
    monkeypatch.setattr(loaders, "_SAMPLES", 400)
    jpegs = loaders.Jpegs(count=16, size=(60, 80), side=32, batch=8, stretch=2)
    monkeypatch.setattr(loaders, "JPEGS", jpegs)
    assert cli.run(["bench", "loaders", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["loader"]: row for row in found if not row["shape"].startswith("JPEG")}
    names = {"null", "resident", "resident, with the attack's start"}
    names.add("resident, memory on the host")
    names |= {"torch, 0 workers", "torch, 2 workers"}
    if unavailable() is None:
        names.add("dali")
    assert rows.keys() == names
    for row in rows.values():
        assert row["shape"] == "8x8x1"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["images_per_s"] > 0
        assert row["share_of_step"] > 0
    assert rows["null"]["speedup_vs_torch"] > rows["resident"]["speedup_vs_torch"] > 1
    # One of torch's own two is what all are measured against.
    assert 1 in [rows[f"torch, {n} workers"]["speedup_vs_torch"] for n in (0, 2)]
    assert "| 8x8x1, batch" in tables.loaders(list(rows.values()))
    jpeg = {row["loader"]: row for row in found[len(rows) :]}
    assert {row["shape"] for row in jpeg.values()} == {"JPEG 80x60 to 32x32x3"}
    assert jpeg.keys() == {
        *([] if unavailable() else ["dali"]),
        *(f"torch and Pillow, {n} workers" for n in (0, 2)),
    }
    assert all(row["images_per_s"] > 0 and row["share_of_step"] is None for row in jpeg.values())
    assert "| JPEG 80x60 to 32x32x3, batch 8" in tables.loaders(found)


def test_the_share_of_a_step_on_a_batch_of_jpegs():
    jpegs = loaders.Jpegs(count=1, size=(8, 8), side=16, batch=6, stretch=1, step="tiny-imagenet")
    step_ms, name = loaders._jpeg_step(jpegs)
    assert name == "tiny-imagenet"
    assert step_ms > 0
    assert loaders._jpeg_step(replace(jpegs, step=None)) == (None, "")
    if sources.unavailable("torchvision/resnet50"):
        assert loaders._jpeg_step(replace(jpegs, step="imagenet-resnet50")) == (None, "")
