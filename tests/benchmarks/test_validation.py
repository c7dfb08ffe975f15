"""The benchmark of validation attacks: its rows, on images of a second."""

from __future__ import annotations

from engine.benchmarks import validation


def test_rows_hold_every_attack_on_the_same_images(monkeypatch):
    monkeypatch.setattr(validation, "COMMON", {"data.name": "digits", "threads": "1"})
    small = {"model.name": "tiny-cnn", "threat.eps": "0.1", "data.validation": "64"}
    rows = validation.run("memory-1", epochs=2, every=1, examples=24, **small)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["examples"] == 24
        assert row["apgd"] <= row["clean"]
        for loss in ("ce", "margin"):
            # The step is eps / 4 at either length: more steps of the same walk break no fewer.
            assert row[f"{loss}_50"] <= row[f"{loss}_10"] <= row["clean"]
