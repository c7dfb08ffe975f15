"""Describe a trained network: the model card and RobustBench's claim."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

from ..recipes import Recipe
from ..threat import as_written
from . import found, images
from .folder import Run

# RobustBench's file that defines the network, and the call that builds it; RobustBench's short
# names all have ten classes.
_ARCHITECTURES = {
    "resnet18": ("architectures/resnet.py", "ResNet(BasicBlock, [2, 2, 2, 2], num_classes={})"),
    "preact-resnet18": (
        "architectures/resnet.py",
        "PreActResNet(PreActBlock, [2, 2, 2, 2], num_classes={})",
    ),
    "wide-resnet28-10": (
        "architectures/wide_resnet.py",
        "WideResNet(depth=28, widen_factor=10, num_classes={})",
    ),
    "wide-resnet34-10": (
        "architectures/wide_resnet.py",
        "WideResNet(depth=34, widen_factor=10, num_classes={})",
    ),
}
# The data sets' names on the Hugging Face Hub.
_HUB_NAMES = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}


def claim_of(run: Run, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return RobustBench's model-info fields; a run does not know link and authors: empty."""
    claim = {
        "link": "",
        "name": run.recipe.name,
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": report.get("dataset"),
        "venue": "Unpublished",
        "architecture": report.get("architecture"),
        "eps": as_written(run.recipe.threat.eps),
        "clean_acc": report.get("clean_acc"),
        "reported": report.get("reported"),
        "autoattack_acc": report.get("autoattack_acc"),
        "unreliable": bool(report.get("notes")),
    }
    few_classes = "apgd-difference" in (report.get("autoattack_attacks") or ())
    if report.get("autoattack_version") != "standard" or few_classes:
        claim["autoattack_acc"] = None
        claim["footnote"] = "AutoAttack (standard) has not been run"
    elif report.get("autoattack_judge") == "engine":
        claim["autoattack_acc"] = None
        claim["footnote"] = "AutoAttack by its authors' package has not been run"
    elif report.get("precision", "fp32") != "fp32":
        claim["footnote"] = f"attacks in {report.get('precision')}, verified in fp32"
    elif report.get("examples") != images.test_size(run.recipe):
        claim["footnote"] = f"first {report.get('examples')} test images only"
    return claim


def architecture_of(network: str, classes: int, width: int | None = None) -> tuple[str, str] | None:
    """Return RobustBench's file and the call in it that builds `network`, or None."""
    if network not in _ARCHITECTURES or width not in (None, 64):
        return None
    file, call = _ARCHITECTURES[network]
    return file, call.format(classes)


def model_card(
    run: Run,
    report: Mapping[str, Any],
    model: nn.Module,
    shape: torch.Size,
    classes: int,
    *,
    published: bool = False,
) -> str:
    """Return the model card, Markdown.

    Args:
        report: the fields of evaluation.json.
        shape: of an image, [C, H, W]; classes: the number of logits.
        published: for a hub of models: the card begins with metadata (YAML), and its code loads the
            folder in which it lies.
    """
    recipe, state = run.recipe, model.state_dict()
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    source = resources.files("engine").joinpath("templates", "card.md.j2")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        recipe=recipe,
        # A path says nothing to others.
        dataset=Path(recipe.data.name).stem,
        hub_name=_HUB_NAMES.get(recipe.data.name),
        measured=_measured(recipe, report) if published else [],
        published=published,
        found=report,
        summary=found.summary(run),
        environment=run.read_json("environment.json"),
        masking=run.read_json("masking.json"),
        eps=as_written(recipe.threat.eps),
        k=recipe.attack.steps,
        passes=recipe.passes().total,
        parameters=sum(t.numel() for t in state.values() if t.is_floating_point()),
        architecture=architecture_of(recipe.model.name, classes, recipe.model.width),
        normalised="mu" in state,
        shape=tuple(shape),
        classes=classes,
    )


def _measured(recipe: Recipe, report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (name, percent) of every accuracy in the report."""
    threat = f"{recipe.threat.norm}, eps {as_written(recipe.threat.eps)}"
    if report.get("precision", "fp32") != "fp32":
        threat += f", attacks in {report['precision']}"
    judge = ", by the engine's own" if report.get("autoattack_judge") == "engine" else ""
    names = {
        "clean_acc": "Clean accuracy",
        "pgd_acc": f"Robust accuracy: {report.get('pgd')} ({threat})",
        "autoattack_acc": (
            f"Robust accuracy: AutoAttack {report.get('autoattack_version')}{judge} ({threat})"
        ),
        "worst_case_acc": f"Robust accuracy: worst case of all attacks ({threat})",
    }
    return [(name, float(report[key])) for key, name in names.items() if report.get(key)]
