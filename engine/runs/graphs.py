"""Networks as files that need no Python class: ONNX, TorchScript, torch.export's pt2."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import EngineError

# The packages of `--format onnx`: the extra `export`.
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_INPUT, _OUTPUT = "images", "logits"

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Graph:
    """Hold one file format of a network.

    Attributes:
        file: the file's name.
        write: (network in evaluation mode on the CPU, example images [B, C, H, W], path) -> None.
        read: path -> a function from images float32 [B, C, H, W] to logits [B, K], any B >= 1.
    """

    file: str
    write: Callable[[nn.Module, Tensor, Path], None]
    read: Callable[[Path], Logits]


def check_packages(name: str) -> None:
    """Check that the packages which the format `name` needs are installed.

    Raises:
        EngineError: where one of them is missing.
    """
    missing = [p for p in _ONNX if importlib.util.find_spec(p) is None] if name == "onnx" else []
    if missing:
        raise EngineError(
            f"--format onnx needs {', '.join(missing)}: pip install 'robust-engine[export]'"
        )


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Hide warnings of the exporters: they concern PyTorch's own code, not the network."""
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)


def _any_batch() -> tuple[dict[int, object]]:
    return ({0: torch.export.Dim("batch", min=1)},)


def _write(whole: io.BytesIO, path: Path) -> None:
    """Write a file by way of Python: PyTorch's own writers hide that the disk is full."""
    path.write_bytes(whole.getbuffer())


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    with _quiet("torch.onnx._internal.exporter._registration"), torch.no_grad():
        torch.onnx.export(
            model,
            (images,),
            path,
            dynamo=True,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_shapes=_any_batch(),
            external_data=False,
            verbose=False,
        )


def _read_onnx(path: Path) -> Logits:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])


def _write_torchscript(model: nn.Module, images: Tensor, path: Path) -> None:
    # PyTorch 2.13 calls TorchScript deprecated; docs/export.md says so.
    with _quiet(), torch.no_grad():
        whole = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, images), whole)
    _write(whole, path)


def _read_torchscript(path: Path) -> Logits:
    with _quiet():
        return torch.jit.load(str(path), map_location="cpu")


def _write_pt2(model: nn.Module, images: Tensor, path: Path) -> None:
    with _quiet(), torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=_any_batch())
        whole = io.BytesIO()
        torch.export.save(program, whole)
    _write(whole, path)


def _read_pt2(path: Path) -> Logits:
    with _quiet(), path.open("rb") as file:
        return torch.export.load(file).module()


GRAPHS = {
    "onnx": Graph("model.onnx", _write_onnx, _read_onnx),
    "torchscript": Graph("model.torchscript", _write_torchscript, _read_torchscript),
    "pt2": Graph("model.pt2", _write_pt2, _read_pt2),
}
