"""The benchmark of AutoAttack's two judges: a row an attack, and the share of equal verdicts."""

from engine import cli
from engine.benchmarks import evaluation, tables
from engine.evaluation.autoattack import ensemble


def test_rows_compare_both_judges(monkeypatch, capsys):
    short = {"optim.epochs": "1", "data.train_examples": "300", "validation.every": "1"}
    setting = evaluation.Setting("quickstart", short | {"threat.eps": "0.05"}, 12)
    monkeypatch.setattr(evaluation, "_QUICK", (setting,))
    monkeypatch.setattr(ensemble, "QUERIES", 20)
    assert cli.run(["bench", "evaluation", "--quick"]) == 0
    assert "ratio" in capsys.readouterr().out

    rows = evaluation.run(quick=True)
    assert [row["attack"] for row in rows] == ["apgd-ce", "apgd-t", "fab-t", "square", "all"]
    whole = rows[-1]
    assert whole["images"] == 12
    assert 0.9 <= whole["agreement"] <= 1
    assert whole["seconds_engine"] > 0
    table = tables.evaluation(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert table[-1].endswith("% |")
