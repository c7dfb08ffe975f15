"""The optimiser and the moving average of the weights, stepped together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..device import apex
from ..device.capture import WARM_UP
from ..device.phases import BOOKKEEPING, phase
from ..device.precision import LossScale
from ..registers import optimisers
from .registered import Registered

# The names of a registered optimiser's state begin with it.
_REGISTERED = "registered."
_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-8


class Optimiser:
    """Step momentum SGD or AdamW, and an average of the weights.

    All changing numbers lie on the device.

    `sgd` and `adamw` are ours: one op updates weights and average in one pass over memory.
    `torch-*` are torch's fused optimisers; `apex-*` are NVIDIA's, where apex is built (in a
    captured step Adam alone). Any other name is a registered optimiser's.

    Args:
        model: the network; its parameters that require gradients are trained.
        lr: learning rate of every step of the run, [T].
        momentum: momentum of the SGDs, [0, 1).
        weight_decay: added to the gradient by SGD; decoupled in AdamW, Adam and LAMB.
        ema: decay of the moving average, 0 for none. Early on the decay is lower,
            (1 + step) / (10 + step), so that the average forgets its random start.
    Attributes:
        average: the averaged model, or the model itself without averaging; this one is evaluated.
    Raises:
        EngineError: for apex's optimisers without a CUDA device or without apex.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: Sequence[float],
        name: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ema: float = 0.0,
    ) -> None:
        self.name, self.momentum, self.weight_decay, self.ema = name, momentum, weight_decay, ema
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.average = copy.deepcopy(model).requires_grad_(False) if ema > 0 else model
        self.rates = [float(rate) for rate in lr]
        self.steps = 0

        device = self.params[0].device
        decays = [min(ema, (1 + t) / (10 + t)) for t in range(len(self.rates))]
        rows = list(zip(self.rates, decays, (1 - d for d in decays), strict=True))
        # Warm-up for a capture runs past the end of a short schedule.
        rows += rows[-1:] * WARM_UP
        self._plan = torch.tensor(rows, device=device).view(-1, 3)
        # This step's row of the plan, looked up on the device.
        self._now = torch.zeros(1, 3, device=device)
        self.lr, self._decay, self._towards = self._now[0].unbind()
        self._count = torch.zeros((), device=device)
        self._never = torch.zeros((), device=device)

        trained = {id(p) for p in self.params}
        pairs = list(zip(model.parameters(), self.average.parameters(), strict=True))
        self._averages: list[Tensor] = [e for p, e in pairs if id(p) in trained] if ema > 0 else []
        buffers = list(zip(model.buffers(), self.average.buffers(), strict=True)) if ema > 0 else []
        self._floating = _columns([pair for pair in buffers if pair[0].is_floating_point()])
        self._counting = _columns([pair for pair in buffers if not pair[0].is_floating_point()])

        moments = {"sgd": 1, "adamw": 2}.get(name, 0)
        self._moments = [[torch.zeros_like(p) for p in self.params] for _ in range(moments)]
        self._registered = self._external = None
        if (make := optimisers.maker(name)) is not None:
            rate = self.rates[0]
            options = {"momentum": momentum, "weight_decay": weight_decay}
            self._registered = Registered(make, name, self.params, rate, **options)
        elif not moments:
            self._external = self._foreign(name)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @property
    def uncapturable(self) -> str | None:
        """Return why a step with this optimiser cannot be captured in a CUDA graph, or None."""
        if self.name in ("apex-sgd", "apex-lamb"):
            return f"optim.name = {self.name} takes its learning rate from the host"
        if self._registered is not None:
            return f"optim.name = {self.name} is registered: its state may move or grow"
        return None

    @torch.no_grad()
    def step(self, at: Tensor, scale: LossScale | None = None) -> None:
        """Apply the gradients in place; a parameter without a gradient does not change.

        Args:
            at: int64 [1] on the device, the number of this step from 0, below T.
            scale: the scale of the loss; where a gradient is not finite nothing changes (apex's
                optimisers cannot skip a step, so their gradients are not searched).
        """
        used = [i for i, p in enumerate(self.params) if p.grad is not None]
        grads: list[Tensor] = [self.params[i].grad for i in used]  # type: ignore[misc]
        with phase(BOOKKEEPING):
            torch.index_select(self._plan, 0, at, out=self._now)
            self._count.add_(1)
            if scale is not None and not self.name.startswith("apex"):
                scale.unscale_(grads)
                self._count.sub_(scale.found_inf)
        if self._registered is not None:
            found_inf = None if scale is None else scale.found_inf
            self._registered.step(self.rates[self.steps], found_inf)
            self._average_by_hand(scale)
        elif self._external is None:
            self._ours(used, grads, self._never if scale is None else scale.found_inf)
        else:
            self._others(scale)
        with phase(BOOKKEEPING):
            if self._averages:
                _follow(*self._floating, self._towards)
                if self._counting[0]:
                    torch._foreach_copy_(self._counting[1], self._counting[0])
            if scale is not None:
                scale.update()
        self.steps += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Clear momentum and moments, after the weights were replaced."""
        if self._registered is not None:
            self._registered.clear()
        for name, t in self.tensors().items():
            if not name.startswith(("plan", "now", "never", "average.", _REGISTERED)):
                t.zero_()

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the state of a registered optimiser that a checkpoint holds, see `tensors`."""
        if self._registered is not None:
            cut = len(_REGISTERED)
            own = {k[cut:]: t for k, t in tensors.items() if k.startswith(_REGISTERED)}
            self._registered.adopt(own)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that change, without the model's own."""
        found = {"plan": self._plan, "now": self._now, "count": self._count, "never": self._never}
        for number, moments in enumerate(self._moments):
            found |= {f"moment{number}.{i}": m for i, m in enumerate(moments)}
        if self._registered is not None:
            found |= {f"{_REGISTERED}{k}": t for k, t in self._registered.tensors().items()}
        if self._external is not None:
            for i, p in enumerate(self.params):
                for key, value in self._external.state[p].items():
                    if isinstance(value, Tensor):
                        found[f"{key}.{i}"] = value
            for i, group in enumerate(self._external.param_groups):
                if isinstance(group.get("step"), Tensor):
                    found[f"step.{i}"] = group["step"]
        if self._averages:
            found |= {f"average.{name}": t for name, t in self.average.named_parameters()}
            found |= {f"average.{name}": t for name, t in self.average.named_buffers()}
        return found

    def _ours(self, used: list[int], grads: list[Tensor], found_inf: Tensor) -> None:
        def pick(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in used] if tensors else []

        update: Any = kernels.sgd_ema_step
        special: dict[str, Any] = {"momentum": self.momentum}
        if self.name == "adamw":
            update = kernels.adamw_ema_step
            special = {"count": self._count, "betas": _BETAS, "adam_eps": _ADAM_EPS}
        update(
            pick(self.params),
            grads,
            *map(pick, self._moments),
            pick(self._averages),
            lr=self.lr,
            found_inf=found_inf,
            weight_decay=[self.weight_decay] * len(used),
            ema_decay=self._decay,
            **special,
        )

    def _foreign(self, name: str) -> torch.optim.Optimizer:
        """Return an optimiser of torch's or apex's with its state at a fixed place, for graphs.

        For torch's fused SGD this also mends a fault: if its first step overflows, it leaves an
        uninitialised momentum.
        """
        on_gpu = self.params[0].is_cuda
        decay: dict[str, Any] = {"weight_decay": self.weight_decay}
        sgd: dict[str, Any] = {"momentum": self.momentum, **decay}
        adam: dict[str, Any] = {"betas": _BETAS, "eps": _ADAM_EPS, **decay}
        if name == "torch-sgd":
            external: Any = torch.optim.SGD(self.params, lr=self.lr, fused=True, **sgd)
            for p in self.params:
                external.state[p]["momentum_buffer"] = torch.zeros_like(p)
        elif name == "torch-adamw":
            external = torch.optim.AdamW(
                self.params, lr=self.lr, fused=True, capturable=on_gpu, **adam
            )
            for p in self.params:
                external.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        else:
            apex.check(name, self.params[0].device)
            external = apex.build(
                name, self.params, self.lr, **(sgd if name == "apex-sgd" else adam)
            )
        return external

    def _others(self, scale: LossScale | None) -> None:
        assert self._external is not None
        if not self.name.startswith("apex"):
            self._external.found_inf = None if scale is None else scale.found_inf  # type: ignore[attr-defined]
        if self.uncapturable:
            for group in self._external.param_groups:
                group |= {"lr": self.rates[self.steps], "step": self.steps}
        self._external.step()
        self._average_by_hand(scale)

    def _average_by_hand(self, scale: LossScale | None) -> None:
        """Move the average towards the weights, unless the step was skipped."""
        if self._averages:
            towards = self._towards
            if scale is not None:
                towards = towards * (1.0 - scale.found_inf)
            _follow(self.params, self._averages, towards)


def _follow(sources: list[Tensor], averages: list[Tensor], towards: Tensor) -> None:
    """Do average += towards (source - average) in place; `towards` is read on the device."""
    if sources:
        difference = list(torch._foreach_sub(sources, averages))
        torch._foreach_mul_(difference, towards)
        torch._foreach_add_(averages, difference)


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]
