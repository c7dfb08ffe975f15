"""RobustBench's model-info file, filled from an evaluation."""

from __future__ import annotations

from typing import Any

from .robust_accuracy import Report


def fields(report: Report, *, name: str, architecture: str, dataset: str) -> dict[str, Any]:
    """Return the fields of a RobustBench model-info file, and further results of the evaluation."""

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{100 * value:.2f}"

    return {
        "name": name,
        "dataset": dataset,
        "architecture": architecture,
        "threat_model": report.threat.norm,
        "eps": report.threat.eps,
        "clean_acc": percent(report.clean),
        "reported": percent(report.worst_case),
        "autoattack_acc": percent(report.autoattack),
        "additional_data": False,
        "number_forward_passes": "1",
        "footnote": f"first {report.examples} test images",
        "pgd_acc": percent(report.pgd),
        "pgd": f"PGD-{report.pgd_steps}-{report.pgd_restarts}",
        "autoattack_version": report.autoattack_version,
        "autoattack_attacks": list(report.attacks),
        "autoattack_judge": None if report.autoattack is None else report.judge,
        "precision": report.precision,
        "after_each_attack": {k: percent(v) for k, v in report.after.items()},
        "worst_case_acc": percent(report.worst_case),
        "standard_error": percent(report.standard_error(report.worst_case)),
        "examples": report.examples,
        "eval_seconds": round(report.seconds, 2),
        "notes": report.notes,
    }
