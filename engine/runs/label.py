"""Label images by a trained network, as extra training data for other runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import datasets, own
from ..device.machine import device
from ..errors import EngineError
from ..files import atomic
from .evaluate import load_model
from .folder import Run
from .images import as_floats, unused

_BATCH = 500


@torch.inference_mode()
def label(run: Run, name: str, out: Path) -> tuple[int, list[int]]:
    """Write images with a run's predictions as labels: .npz, `image` [N, H, W, C] and `label` [N].

    Args:
        name: a data set, of which the training images are labelled, or an .npz or .safetensors file
            with `image`. Of the run's own data set, only the images are taken that the run neither
            trained on nor validated on.
    Returns:
        The number of images, and the number of each class.
    Raises:
        EngineError: for images of another shape than the network's; where no image is left.
    """
    if out.suffix != ".npz":
        raise EngineError(f"{out}: the file must end in .npz")
    images, model, target = _images(run, name), load_model(run), device()
    model.to(target).eval()
    labels = [
        model(as_floats(part, part, target)[0]).argmax(1).cpu() for part in images.split(_BATCH)
    ]
    found = torch.cat(labels)
    with atomic(out) as draft, draft.open("wb") as file:
        np.savez(file, image=images.permute(0, 2, 3, 1).numpy(), label=found.numpy())
    return len(images), torch.bincount(found).tolist()


def _images(run: Run, name: str) -> Tensor:
    name = own.absolute(name)
    if name == run.recipe.data.name:
        images = unused(run.recipe)
        if len(images) == 0:
            raise EngineError(
                f"{name}: the run trained or validated on every image: lower data.train_examples"
            )
        return images
    path = Path(name)
    if own.is_path(name) and path.suffix in own.FILES and not own.has_splits(path):
        images = torch.from_numpy(own.read_images(path))
    else:
        held = datasets.load(name, "train").images
        assert isinstance(held, Tensor)
        images = held
    shape = datasets.load(run.recipe.data.name, "train").images.shape[1:]
    if images.shape[1:] != shape:
        raise EngineError(
            f"{name}: images of {'x'.join(map(str, images.shape[1:]))}, where the run's network "
            f"takes {'x'.join(map(str, shape))}"
        )
    return images
