"""A recipe's step on a batch of no data set: to price it, or to time it."""

from __future__ import annotations

import torch

from ..data.loaders import Batch
from ..recipes import Recipe
from ..training.step import Step
from . import build
from .images import facts


def step(recipe: Recipe, device: torch.device, steps: int) -> Step:
    """Return the recipe's step with a new network, in training mode.

    Args:
        device: on the meta device the step runs in float32, eagerly.
        steps: the length of the schedule.
    """
    about = facts(recipe)
    images = torch.empty((recipe.optim.batch_size, *about.shape), dtype=torch.uint8)
    with device:
        model = build.build_model(recipe, None, about.classes, images.shape[1:])
    memory = build.memory_for(recipe, images, device)
    if device.type == "meta":
        recipe = build.without_gpu(recipe, device)
    made = build.build_step(recipe, model, steps=steps, memory=memory)
    made.train()
    return made


def batch(recipe: Recipe, device: torch.device) -> Batch:
    """Return a batch of random images of the recipe's data set, with their places in it."""
    about, n = facts(recipe), recipe.optim.batch_size
    index = torch.arange(n, device=device)
    x = torch.rand((n, *about.shape), device=device)
    return Batch(
        x,
        index % about.classes,
        index,
        torch.zeros((n, 3), dtype=torch.int32, device=device),
        x.clone() if recipe.attack.start == "memory" else None,
        *((index % about.classes, torch.ones(n, device=device)) if recipe.data.cutmix else ()),
    )
