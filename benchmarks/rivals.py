"""Write training loops as people use them: their structure, in new code.

Each function returns `step(x, y, start=None)`, which does one training step with momentum SGD. A
step computes what the named code computes, in the same mode, and reads back the same values, so
that the engine is compared with the code that users have now. `start` is the first point of the
attack; left out, it is drawn as in the named code. Tests pass one in to compare results.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[..., None]

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


def plain(model: nn.Module) -> nn.Module:
    """Turn a network of the engine into an ordinary one, in place.

    Its first convolution then uses the library alone, without the engine's stem gradients, which
    other people's networks lack.
    """
    if model.mu is not None:
        raise ValueError("a network that normalises is not made plain")
    model.stem = model.stem_conv.forward
    return model


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Return the optimiser of every rival."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def fast_adversarial(model: nn.Module, eps: float, alpha: float, k: int) -> Step:
    """Train by PGD as in the code of "Fast is better than free" (arXiv 2001.03994).

    The attack calls backward on the loss, so each of its steps computes and accumulates weight
    gradients, which the training step then discards. The network stays in training mode. Loss and
    accuracy are read back every step.
    """
    opt = sgd(model)
    totals = [0.0, 0.0]

    def step(x: Tensor, y: Tensor, start: Tensor | None = None) -> None:
        model.train()
        if start is None:
            delta = torch.zeros_like(x)
            for channel in range(x.shape[1]):
                delta[:, channel].uniform_(-eps, eps)
            delta.data = torch.max(torch.min(delta, 1 - x), 0 - x)
        else:
            delta = start - x
        delta.requires_grad = True
        for _ in range(k):
            F.cross_entropy(model(x + delta), y).backward()
            assert delta.grad is not None
            gradient = delta.grad.detach()
            moved = torch.clamp(delta + alpha * torch.sign(gradient), -eps, eps)
            delta.data = torch.max(torch.min(moved, 1 - x), 0 - x)
            delta.grad.zero_()
        delta = delta.detach()
        output = model(x + delta)
        loss = F.cross_entropy(output, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        totals[0] += loss.item() * len(y)
        totals[1] += (output.max(1)[1] == y).sum().item()

    return step


def trades(model: nn.Module, eps: float, alpha: float, k: int, beta: float = 6.0) -> Step:
    """Train by TRADES as in its authors' code (arXiv 1901.08573).

    The clean logits are computed again at every attack step, with their graph, and twice more for
    the loss.
    """
    opt = sgd(model)
    divergence = nn.KLDivLoss(reduction="sum")

    def step(x: Tensor, y: Tensor, start: Tensor | None = None) -> None:
        model.eval()
        adversary = x + 0.001 * torch.randn_like(x) if start is None else start
        for _ in range(k):
            adversary = adversary.detach().requires_grad_()
            loss = divergence(F.log_softmax(model(adversary), dim=1), F.softmax(model(x), dim=1))
            gradient = torch.autograd.grad(loss, [adversary])[0]
            adversary = adversary.detach() + alpha * torch.sign(gradient.detach())
            adversary = torch.min(torch.max(adversary, x - eps), x + eps)
            adversary = torch.clamp(adversary, 0.0, 1.0)
        model.train()
        opt.zero_grad()
        natural = F.cross_entropy(model(x), y)
        robust = divergence(F.log_softmax(model(adversary), dim=1), F.softmax(model(x), dim=1))
        (natural + beta * robust / len(x)).backward()
        opt.step()

    return step


def torchattacks_pgd(model: nn.Module, eps: float, alpha: float, k: int) -> Step:
    """Train around torchattacks' PGD. Raises ImportError without the package."""
    import torchattacks

    attack = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=k, random_start=True)
    opt = sgd(model)

    def step(x: Tensor, y: Tensor) -> None:
        adversary = attack(x, y)
        opt.zero_grad()
        F.cross_entropy(model(adversary), y).backward()
        opt.step()

    return step


def foolbox_pgd(model: nn.Module, eps: float, alpha: float, k: int) -> Step:
    """Train around foolbox's LinfPGD. Raises ImportError without the package."""
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=k, random_start=True)
    opt = sgd(model)
    # foolbox warns of a network in training mode, and would move one to the first GPU.
    device = next(model.parameters()).device
    attacked = foolbox.PyTorchModel(model.eval(), bounds=(0.0, 1.0), device=device)

    def step(x: Tensor, y: Tensor) -> None:
        model.eval()
        _, adversary, _ = attack(attacked, x, y, epsilons=eps)
        model.train()
        opt.zero_grad()
        F.cross_entropy(model(adversary), y).backward()
        opt.step()

    return step


def toolbox(
    model: nn.Module, eps: float, alpha: float, k: int, shape: tuple[int, ...], classes: int
) -> Step:
    """Train by the Madry trainer of the adversarial-robustness-toolbox.

    Raises ImportError without the package.
    """
    from art.defences.trainer import AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd(model),
        input_shape=shape[1:],
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        # The package's "gpu" is the current GPU, if there is one.
        device_type="cpu" if next(model.parameters()).device.type == "cpu" else "gpu",
    )
    trainer = AdversarialTrainerMadryPGD(
        classifier,
        nb_epochs=1,
        batch_size=shape[0],
        eps=eps,
        eps_step=alpha,
        max_iter=k,
        num_random_init=1,
    )

    def step(x: Tensor, y: Tensor) -> None:
        # The trainer takes arrays on the host; one epoch over one batch is one step. Progress bars
        # are off.
        images, labels = x.cpu().numpy(), np.eye(classes, dtype=np.float32)[y.cpu().numpy()]
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(images, labels, validation_data=None)

    return step
