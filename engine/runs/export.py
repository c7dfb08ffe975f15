"""Export a finished run in the formats that other tools read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import files
from ..errors import EngineError
from ..text import printable
from ..training.checkpoint import save_tensors
from . import evaluate, found, graphs, hub
from .build import build_model
from .card import claim_of, model_card
from .folder import Run

Format = Literal["robustbench", "hub", "onnx", "torchscript", "pt2"]
FORMATS: tuple[Format, ...] = get_args(Format)
# Logits of a written file may differ by this much from the network's: absolute, and relative.
_TOLERANCE = 1e-4
# Images in the batches that are compared: other numbers than in the exporters' example.
_BATCHES = (1, 5)
_METADATA = {"format": "pt"}


def export(run: Run, out: Path | None = None, format: Format = "robustbench") -> list[Path]:
    """Write the evaluated checkpoint of `run` for others.

    - `robustbench`: `model.safetensors` and `model.pt` hold the state dict, tensors only, under
      RobustBench's names (and `mu`, `sigma` where the network normalises: its Wong2020Fast has
      buffers of these names); `claim.json` holds the fields of a RobustBench model-info file;
      `README.md` is the model card.
    - `hub`: a folder for a hub of models: `model.safetensors`, `config.json`, from which
      `engine.load` builds the network, and `README.md`, the model card with its metadata.
    - `onnx`, `torchscript`, `pt2`: one file with the graph of the network, for any batch size.

    Each file of weights has its SHA-256 beside it for `sha256sum -c`. The written files are loaded
    again and must give the network's logits; then all of them appear at once. Files of an earlier
    export are replaced.

    Args:
        out: default RUN/export; for `hub` RUN/export/hub.
    Returns:
        The files written; the sums beside the weights are not among them.
    Raises:
        EngineError: for a run without an evaluation or a checkpoint, a package that is missing, a
            network that the format cannot hold, written files that give other logits, or a folder
            that cannot be written.
    """
    graphs.check_packages(format)
    job = _Job.of(run)
    if out is None:
        out = run.place("export/hub" if format == "hub" else "export")
    with files.staged(out) as folder:
        if format == "robustbench":
            names = _write_robustbench(job, folder)
        elif format == "hub":
            names = _write_hub(job, folder)
        else:
            names = _write_graph(job, folder, format)
    return [out / name for name in names]


@dataclass(frozen=True)
class _Job:
    """Hold the network to export, and what was measured of it.

    Attributes:
        model: on the CPU, in evaluation mode.
        shape: of an image, [C, H, W]; classes: the number of logits.
        report: the fields of evaluation.json.
    """

    run: Run
    model: nn.Module
    shape: torch.Size
    classes: int
    report: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> _Job:
        report = found.evaluation(run)
        if not report:
            raise EngineError(f"{run.path} has not been evaluated: engine eval {run.path}")
        checkpoint = "last" if report.get("checkpoint") == "last" else "best"
        model = evaluate.load(run.path, checkpoint).to(memory_format=torch.contiguous_format)
        shape, classes = evaluate.dimensions(run, checkpoint)
        return cls(run, model, shape, classes, report)

    def images(self, count: int) -> Tensor:
        """Return random images [count, C, H, W], the same in every process."""
        return torch.rand(count, *self.shape, generator=torch.Generator().manual_seed(0))

    def check(self, path: Path, written: graphs.Logits) -> None:
        """Compare the logits of a written file with the network's.

        Raises:
            EngineError: where they differ, or the file cannot be run.
        """
        for count in _BATCHES:
            images = self.images(count)
            with torch.no_grad():
                wanted = self.model(images)
                try:
                    got = written(images)
                # The runtimes raise exceptions of many types.
                except Exception as error:
                    raise EngineError(f"{path.name} cannot be run: {_reason(error)}") from None
            if not torch.allclose(got, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
                difference = float((got - wanted).abs().max())
                raise EngineError(
                    f"{path.name} gives other logits than the network, by up to {difference:.2g}: "
                    "nothing was exported; choose another --format"
                )


def _write_robustbench(job: _Job, folder: Path) -> list[str]:
    weights, pickled = folder / hub.WEIGHTS, folder / "model.pt"
    tensors = {name: t.contiguous() for name, t in job.model.state_dict().items()}
    with files.summed(weights) as temporary:
        save_tensors(tensors, temporary, _METADATA)
    # torch.save to a path ends in a RuntimeError on a full disk; this write ends in an OSError.
    whole = io.BytesIO()
    torch.save(tensors, whole)
    with files.summed(pickled) as temporary:
        temporary.write_bytes(whole.getbuffer())
    files.write_json(folder / "claim.json", claim_of(job.run, job.report))
    _write_card(job, folder)
    copy = build_model(job.run.recipe, None, job.classes, job.shape).eval()
    for path, state in (
        (weights, load_file(weights)),
        (pickled, torch.load(pickled, weights_only=True)),
    ):
        copy.load_state_dict(state)
        job.check(path, copy)
    return [weights.name, pickled.name, "claim.json", "README.md"]


def _write_hub(job: _Job, folder: Path) -> list[str]:
    with files.summed(folder / hub.WEIGHTS) as temporary:
        save_tensors(job.model.state_dict(), temporary, _METADATA)
    config = hub.config_of(job.run.recipe, job.shape, job.classes)
    files.write_json(folder / hub.CONFIG, config)
    _write_card(job, folder, published=True)
    job.check(folder / hub.CONFIG, hub.load(folder))
    return [hub.WEIGHTS, hub.CONFIG, "README.md"]


def _write_graph(job: _Job, folder: Path, format: Format) -> list[str]:
    graph = graphs.GRAPHS[format]
    path = folder / graph.file
    with files.summed(path) as temporary:
        try:
            graph.write(job.model, job.images(2), temporary)
        except OSError:
            # `files.summed` reports it as a write that failed.
            raise
        # The exporters raise exceptions of many types where they cannot follow a network.
        except Exception as error:
            raise EngineError(
                f"{format} cannot hold the network {job.run.recipe.model.name}: {_reason(error)}"
            ) from None
    job.check(path, graph.read(path))
    return [graph.file]


def _write_card(job: _Job, folder: Path, *, published: bool = False) -> None:
    # The card also reads summary.json, environment.json and masking.json.
    with found.foreign_files(job.run):
        card = model_card(
            job.run, job.report, job.model, job.shape, job.classes, published=published
        )
    files.write_text(folder / "README.md", printable(card, "\n\t"))


def _reason(error: Exception) -> str:
    """Return an exception as the end of an error line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
