"""Evaluate a run's checkpoints and write what was found into its folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import files
from ..device.distributed import World
from ..device.machine import device, environment, peak_memory_mb
from ..device.precision import arithmetic
from ..errors import EngineError
from ..evaluation import masking, robust_accuracy, robustbench
from ..evaluation.work import Work
from ..progress import EvaluationBar, bar
from ..training.trainer import Result
from . import hub
from .build import ALONE, build_model
from .folder import Run
from .images import classes, first_test_images, part_size, parts, shape_of, test_images

# Enough for differences of five points, and affordable.
_MASKING_EXAMPLES = 500
# The versions of AutoAttack, from the weakest on.
_STRENGTH = ("none", "apgd", "standard")
log = logging.getLogger(__name__)


def load(run: str | Path, checkpoint: str = "best") -> Any:
    """Return the network of a run folder or an exported one, in evaluation mode, on the CPU.

    Args:
        run: the folder that `engine train` wrote, or `engine export --format hub`.
        checkpoint: "best", the epoch with the best validation accuracy, or "last"; an exported
            folder has one checkpoint, and `checkpoint` changes nothing there.
    Returns:
        A module from images float32 [B, C, H, W] in [0, 1] to logits [B, K].
    Raises:
        EngineError: if the folder is neither, or its weights are missing or damaged.
    """
    folder = Path(run)
    return hub.load(folder) if hub.is_exported(folder) else _network(Run.open(folder), checkpoint)


def load_model(run: Run, checkpoint: str = "best") -> Any:
    """Return the run's network with a checkpoint's weights, in evaluation mode, on the device."""
    return _network(run, checkpoint).to(device())


def _network(run: Run, checkpoint: str) -> Any:
    shape, count = dimensions(run, checkpoint)
    model = build_model(run.recipe, None, count, shape)
    run.load_into(model, checkpoint)
    return model.eval()


def dimensions(run: Run, checkpoint: str = "best") -> tuple[torch.Size, int]:
    """Return the shape [C, H, W] of a checkpoint's images and the number of its classes.

    Files of weights have held them since `engine.load` exists; for older ones the data set is read.
    """
    return _of_weights(run, checkpoint) or (shape_of(run.recipe), len(classes(run.recipe)))


def _of_weights(run: Run, checkpoint: str) -> tuple[torch.Size, int] | None:
    """The image shape and the classes that stand in a file of weights; None in an older run's."""
    path = run.path / f"{checkpoint}.safetensors"
    if not path.is_file():
        return None  # `load_into` names the fault
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
        shape = [int(n) for n in about["shape"].split("x")]
        count = int(about["classes"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError):
        return None
    if len(shape) != 3 or not all(0 < n <= 1 << 16 for n in (*shape, count)):
        raise EngineError(f"{path} is damaged: its shape is {about['shape'][:40]}")
    return torch.Size(shape), count


def evaluate_run(
    run: Run, checkpoint: str = "best", world: World = ALONE
) -> robust_accuracy.Report:
    """Evaluate a checkpoint on the test images and write evaluation.json.

    The answers so far lie in RUN/evaluation: an evaluation that was stopped goes on with the
    batches that are left.

    Args:
        world: the processes that share the batches; the first alone writes evaluation.json.
    """
    recipe = run.recipe
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    size = recipe.evaluation.batch_size
    images, labels = test_images(recipe)
    held = parts(images, labels, device(), part_size(images, size))
    model = load_model(run, checkpoint)
    with bar() as progress:
        work = Work(
            EvaluationBar(progress), world, run.place("evaluation"), _about(run, checkpoint, labels)
        )
        report = robust_accuracy.evaluate_parts(
            model,
            held,
            recipe.threat,
            pgd_steps=recipe.evaluation.pgd_steps,
            pgd_restarts=recipe.evaluation.pgd_restarts,
            autoattack_version=recipe.evaluation.autoattack,
            judge=recipe.evaluation.judge,
            batch_size=size,
            seed=recipe.seed,
            precision=recipe.evaluation.precision,
            work=work,
        )
    if world.first:
        _write(run, checkpoint, report)
    work.finish()
    return report


def _about(run: Run, checkpoint: str, labels: Tensor) -> dict[str, Any]:
    """Return the plain values that decide the answers of an evaluation."""
    recipe = run.recipe
    weights = run.path / f"{checkpoint}.safetensors"
    return {
        "weights": files.digest(weights, weights.stat().st_size),
        "threat": [recipe.threat.norm, recipe.threat.eps],
        "evaluation": dataclasses.asdict(recipe.evaluation),
        "data": [recipe.data.name, len(labels)],
        "seed": recipe.seed,
        "engine": environment()["engine"],
        "device": device().type,
    }


def _write(run: Run, checkpoint: str, report: robust_accuracy.Report) -> None:
    recipe = run.recipe
    width = "" if recipe.model.width is None else f", width {recipe.model.width}"
    fields = robustbench.fields(
        report,
        name=recipe.name,
        architecture=recipe.model.name + width,
        dataset=recipe.data.name,
    )
    _keep_larger(run, fields)
    run.write_json("evaluation.json", {**fields, "checkpoint": checkpoint})


def _keep_larger(run: Run, fields: Mapping[str, Any]) -> None:
    """Keep an earlier evaluation that says more under another name, and announce it.

    It says more with more images, with more attacks, or with the authors' package as the judge.
    """
    try:
        earlier = json.loads(files.read_text(run.path / "evaluation.json"))
        examples, version = int(earlier["examples"]), _STRENGTH.index(earlier["autoattack_version"])
    except (EngineError, OSError, ValueError, RecursionError, KeyError, TypeError):
        return  # there is none, or none that can be read
    judges = earlier.get("autoattack_judge"), fields["autoattack_judge"]
    if (
        examples <= fields["examples"]
        and version <= _STRENGTH.index(fields["autoattack_version"])
        and judges != ("pyautoattack", "engine")
    ):
        return
    name = f"evaluation.{time.strftime('%Y%m%d-%H%M%S')}.json"
    run.write_json(name, earlier)
    log.warning(
        "the earlier evaluation (%d images, AutoAttack %s) says more than this one: it is kept as "
        "%s",
        examples,
        _STRENGTH[version],
        run.path / name,
    )


def check_masking(
    run: Run, checkpoint: str = "best", surrogate: Run | None = None
) -> dict[str, Any]:
    """Look for masked gradients on the first test images; writes and returns masking.json.

    Args:
        surrogate: a run on the same dataset, whose adversaries are transferred to this one.
    Raises:
        EngineError: for a surrogate of another dataset.
    """
    recipe = run.recipe
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if surrogate is not None and surrogate.recipe.data.name != recipe.data.name:
        raise EngineError(
            f"{surrogate.path} is of {surrogate.recipe.data.name}: transfer needs one dataset"
        )
    x, y = first_test_images(recipe, _MASKING_EXAMPLES)
    other = None if surrogate is None else load_model(surrogate)
    model = load_model(run, checkpoint)
    with (
        bar() as progress,
        arithmetic("fp32", x.device),
        robust_accuracy.evaluation_mode(model),
    ):
        found = masking.checks(
            model,
            x,
            y,
            recipe.threat,
            surrogate=other,
            seed=recipe.seed,
            progress=EvaluationBar(progress),
        )
    report = {**masking.report(found, len(x)), "checkpoint": checkpoint}
    if surrogate is not None:
        report["surrogate"] = surrogate.recipe.name
    run.write_json("masking.json", report)
    return report


def accuracies(report: robust_accuracy.Report) -> dict[str, Any]:
    """Return the part of the closing row that an evaluation fills; accuracies in [0, 1]."""
    return {
        "clean": report.clean,
        "pgd": report.pgd,
        "autoattack": report.autoattack,
        "autoattack_attacks": list(report.attacks),
        "precision": report.precision,
        "examples": report.examples,
        "eval_seconds": round(report.seconds, 2),
    }


def summary(run: Run, result: Result, report: robust_accuracy.Report | None) -> dict[str, Any]:
    """Write summary.json, the closing table of a run, and return it."""
    recipe = run.recipe
    row: dict[str, Any] = {"recipe": recipe.name, **(accuracies(report) if report else {})}
    row |= {
        "train_seconds": round(result.train_seconds, 2),
        "passes_per_step": recipe.passes().total,
        "steps": result.steps,
        "best_epoch": result.best_epoch,
        "rolled_back": result.rolled_back,
        "peak_memory_mb": peak_memory_mb(),
        "run_dir": str(run.path),
    }
    run.write_json("summary.json", row)
    return row
