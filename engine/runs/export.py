"""Export a finished run: plain weights, RobustBench's claim, a model card."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch

from .. import files
from ..errors import EngineError
from ..text import printable
from ..threat import as_written
from ..training.checkpoint import save_tensors
from . import evaluate, images
from .folder import Run

# RobustBench's file that defines the network, and the call that builds it; RobustBench's short
# names all have ten classes.
_ARCHITECTURES = {
    "resnet18": ("architectures/resnet.py", "ResNet(BasicBlock, [2, 2, 2, 2], num_classes={})"),
    "preact-resnet18": (
        "architectures/resnet.py",
        "PreActResNet(PreActBlock, [2, 2, 2, 2], num_classes={})",
    ),
    "wide-resnet34-10": (
        "architectures/wide_resnet.py",
        "WideResNet(depth=34, widen_factor=10, num_classes={})",
    ),
}


def export(run: Run, out: Path | None = None) -> list[Path]:
    """Write the evaluated checkpoint of `run` for others.

    `model.safetensors` and `model.pt` hold the state dict, tensors only, under RobustBench's names
    (and `mu`, `sigma` where the network normalises: its Wong2020Fast has buffers of these names),
    each with its SHA-256 beside it for `sha256sum -c`; `claim.json` holds the fields of a
    RobustBench model-info file; `README.md` is the model card.

    Args:
        out: default RUN/export.
    Returns:
        The files written; the sums beside the weights are not among them.
    Raises:
        EngineError: for a run without an evaluation or a checkpoint, or a folder that cannot be
            written.
    """
    found = run.read_json("evaluation.json")
    if not found:
        raise EngineError(f"{run.path} has not been evaluated: engine eval {run.path}")
    checkpoint = str(found.get("checkpoint", "best"))
    model = evaluate.load_model(run, checkpoint if checkpoint in ("best", "last") else "best")
    tensors = {name: t.cpu().contiguous() for name, t in model.state_dict().items()}
    names = ("model.safetensors", "model.pt", "claim.json", "README.md")
    weights, pickled, claim, card = (
        run.place(f"export/{name}") if out is None else out / name for name in names
    )
    with files.summed(weights) as temporary:
        save_tensors(tensors, temporary, {"format": "pt"})
    with files.summed(pickled) as temporary:
        torch.save(tensors, temporary)
    files.write_json(claim, claim_of(run, found))
    files.write_text(card, printable(_card(run, found, tensors), "\n\t"))
    return [weights, pickled, claim, card]


def claim_of(run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return RobustBench's model-info fields; a run does not know link and authors: empty."""
    claim = {
        "link": "",
        "name": run.recipe.name,
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": found.get("dataset"),
        "venue": "Unpublished",
        "architecture": found.get("architecture"),
        "eps": as_written(run.recipe.threat.eps),
        "clean_acc": found.get("clean_acc"),
        "reported": found.get("reported"),
        "autoattack_acc": found.get("autoattack_acc"),
        "unreliable": bool(found.get("notes")),
    }
    few_classes = "apgd-difference" in (found.get("autoattack_attacks") or ())
    if found.get("autoattack_version") != "standard" or few_classes:
        claim["autoattack_acc"] = None
        claim["footnote"] = "AutoAttack (standard) has not been run"
    elif found.get("autoattack_judge") == "engine":
        claim["autoattack_acc"] = None
        claim["footnote"] = "AutoAttack by its authors' package has not been run"
    elif found.get("examples") != images.test_size(run.recipe):
        claim["footnote"] = f"first {found.get('examples')} test images only"
    return claim


def architecture_of(network: str, classes: int, width: int | None = None) -> tuple[str, str] | None:
    """Return RobustBench's file and the call in it that builds `network`, or None."""
    if network not in _ARCHITECTURES or width not in (None, 64):
        return None
    file, call = _ARCHITECTURES[network]
    return file, call.format(classes)


def _card(run: Run, found: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    recipe = run.recipe
    passes = recipe.passes()
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    source = resources.files("engine").joinpath("templates", "card.md.j2")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        recipe=recipe,
        found=found,
        summary=run.read_json("summary.json"),
        environment=run.read_json("environment.json"),
        masking=run.read_json("masking.json"),
        eps=as_written(recipe.threat.eps),
        k=recipe.attack.steps,
        passes=passes.total,
        parameters=sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        architecture=architecture_of(
            recipe.model.name, len(images.classes(recipe)), recipe.model.width
        ),
        normalised="mu" in tensors,
        shape=tuple(images.shape_of(recipe)),
        classes=len(images.classes(recipe)),
    )
