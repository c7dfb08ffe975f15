"""The optimiser and the moving average of the weights, stepped together."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from . import kernels


class Optimiser:
    """Momentum SGD (ours, one pass over memory with the average) or AdamW (torch's fused one).

    Args:
        model: its parameters that require gradients are trained.
        name: "sgd" or "adamw".
        ema: decay of the moving average, 0 for none. Early on the decay is lower,
            (1 + step) / (10 + step), so that the average does not drag its random start along.
    Attributes:
        average: the averaged model, or the model itself without averaging; what is evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ema: float = 0.0,
    ) -> None:
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.average = copy.deepcopy(model).requires_grad_(False) if ema > 0 else model
        self.momentum, self.weight_decay, self.ema = momentum, weight_decay, ema
        self.steps = 0
        trained = {id(p) for p in self.params}
        pairs = list(zip(model.parameters(), self.average.parameters(), strict=True))
        self._averages: list[Tensor] = [e for p, e in pairs if id(p) in trained] if ema > 0 else []
        buffers = zip(model.buffers(), self.average.buffers(), strict=True)
        self._buffers = [(b, e) for b, e in buffers if ema > 0]
        device = self.params[0].device
        self._found_inf = torch.zeros((), device=device)
        self._lr = torch.zeros((), device=device)
        self._momenta: list[Tensor] = (
            [torch.zeros_like(p) for p in self.params] if name == "sgd" else []
        )
        self._adamw = (
            torch.optim.AdamW(self.params, lr=self._lr, weight_decay=weight_decay, fused=True)
            if name == "adamw"
            else None
        )

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients in place at learning rate `lr`; a parameter without one keeps still."""
        self._lr.fill_(lr)
        decay = min(self.ema, (1 + self.steps) / (10 + self.steps)) if self.ema else 0.0
        if self._adamw is not None:
            self._adamw.step()
            if self.ema:
                torch._foreach_lerp_(self._averages, self.params, 1.0 - decay)
        else:
            self._sgd(decay)
        for source, target in self._buffers:
            if target.is_floating_point():
                target.lerp_(source, 1.0 - decay)
            else:
                target.copy_(source)
        self.steps += 1

    def _sgd(self, decay: float) -> None:
        used = [i for i, p in enumerate(self.params) if p.grad is not None]

        def pick(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in used] if tensors else []

        kernels.sgd_ema_step(
            pick(self.params),
            [self.params[i].grad for i in used],  # type: ignore[misc]
            pick(self._momenta),
            pick(self._averages),
            lr=self._lr,
            found_inf=self._found_inf,
            momentum=self.momentum,
            weight_decay=[self.weight_decay] * len(used),
            ema_decay=decay,
        )
