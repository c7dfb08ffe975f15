"""Properties of all ops: torch.library's checks, dispatches, errors that name the argument."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from engine import kernels
from engine.kernels import backends

from .support import (
    DECAY,
    adamw_state,
    dataset,
    images,
    indices,
    lay_out,
    logit_inputs,
    memory_inputs,
    normal,
    optimiser_state,
    rng_state,
    targets,
)


def operator_arguments(device):
    x = images((2, 3, 6, 6), device)
    xl = lay_out(x, "channels_last")
    grad, rng = normal(x.shape, device), rng_state(device)
    small = torch.tensor(0.1, device=device)
    adv, ball, clean = logit_inputs((5, 10), device)
    target = targets(5, 10, device)
    gy, weight = normal((2, 4, 6, 6), device), normal((4, 3, 3, 3), device)
    memory, index, crops, batch = memory_inputs((6, 3, 7, 5), 2, 4, device)
    data, state = dataset((6, 3, 7, 5), device), optimiser_state(device)
    mixed = (targets(5, 10, device, seed=3), torch.linspace(0, 1, 5, device=device))
    learn = [t.clone().requires_grad_() for t in (adv, ball, clean)]
    return {
        "uniform_start": [(x, small, rng, "Linf", 0), (xl, small, rng, "L2", 0)],
        "attack_step": [
            (x, x, grad, small, small, "Linf"),
            (xl, xl, lay_out(grad, "channels_last"), small, small, "L2"),
        ],
        "attack_step_": [
            (x, x.clone(), grad, small, small, "Linf"),
            (xl, xl.clone(), lay_out(grad, "channels_last"), small, small, "L2"),
        ],
        "apgd_step": [
            (x, x, x, grad, small.expand(2).clone(), small, 0.75, norm) for norm in ("Linf", "L2")
        ],
        "fab_step": [(x, x, grad, small.expand(2).clone(), norm) for norm in ("Linf", "L2")],
        "cross_entropy_grad": [(adv, target, 1.0), (adv, target, 1.0, *mixed)],
        "kl_grad": [(adv, ball, 1.0)],
        "input_grad_step": [
            (x, x, gy, weight, 1, 1, small, small, "Linf"),
            (xl, xl, gy, weight, 1, 1, small, small, "L2"),
        ],
        "stem_input_grad": [(gy, weight, *x.shape[2:], 1, 1)],
        "stem_weight_grad": [(x, gy, 3, 3, 1, 1), (xl, lay_out(gy, "channels_last"), 3, 3, 1, 1)],
        "local_ball_loss": [
            (learn[0], target, learn[1], learn[2], small, small, 0.1),
            (learn[0], target, None, None, small, small, 0.0),
            (learn[0], target, learn[1], None, small, small, 0.1, *mixed),
        ],
        "local_ball_loss_backward": [
            (small, adv, target, ball, None, small, small, 0.0),
            (small, adv, target, ball, clean, small, small, 0.1, *mixed),
        ],
        "augment": [
            (data, index, rng, 2, True, 0, 0, None, None, "Linf", False, 0, 0.0),
            (data, index, rng, 2, True, 0, 0, None, None, "Linf", True, 999, 0.4),
            (data, index, rng, 2, True, 3, 0, memory, small, "Linf", False, 0, 0.4),
            (data, index, rng, 2, True, 0, 0, memory, small, "L2", False, 0, 0.0),
        ],
        "recall": [(memory, index, crops, batch, small, "Linf")],
        "remember": [(memory, index, crops, batch, batch, small)],
        "sgd_ema_step": [(*state, small, torch.zeros_like(small), 0.9, DECAY, True, small)],
        "perturb_weights": [(*state[:3], small)],
        "adamw_ema_step": [
            (
                *adamw_state(device),
                small,
                torch.ones_like(small),
                torch.zeros_like(small),
                *(0.9, 0.999, 1e-8, DECAY, small),
            )
        ],
    }


@pytest.mark.parametrize("op", backends.OPS)
def test_opcheck(backend, device, op, monkeypatch):
    # opcheck compares with fake tensors, which poisoned memory would only slow down.
    for args in operator_arguments(device)[op]:
        torch.library.opcheck(getattr(torch.ops.engine, op).default, args)


def test_every_op_is_covered():
    assert set(operator_arguments("cpu")) == set(backends.OPS)


def bad_calls(device):
    x, rng = images((2, 3, 6, 6), device), rng_state(device)
    logits, target = logit_inputs((5, 10), device)[0], targets(5, 10, device)
    gy, weight = normal((2, 4, 6, 6), device), normal((4, 3, 3, 3), device)
    data, index = dataset((6, 3, 7, 5), device), indices(6, 4, device)
    memory, index, crops, batch = memory_inputs((6, 3, 7, 5), 2, 4, device)
    p = [x.clone()]
    k = kernels
    stem = {"stride": 1, "padding": 1, "eps": 0.1, "alpha": 0.1}
    sgd = {"lr": 0.1, "found_inf": torch.zeros((), device=device)}
    meta = torch.empty_like(x, device="meta")
    return {
        "x dtype": (TypeError, "x", lambda: k.uniform_start(x.half(), 0.1, rng)),
        "x rank": (ValueError, "x", lambda: k.uniform_start(x[0, 0, 0], 0.1, rng)),
        "x no tensor": (TypeError, "x", lambda: k.uniform_start([1.0], 0.1, rng)),
        "norm": (ValueError, "norm", lambda: k.uniform_start(x, 0.1, rng, norm="L1")),
        "rng": (TypeError, "rng", lambda: k.uniform_start(x, 0.1, rng.float())),
        "rng shape": (TypeError, "rng", lambda: k.uniform_start(x, 0.1, rng[:1])),
        "stream": (ValueError, "stream", lambda: k.uniform_start(x, 0.1, rng, stream=-1)),
        "eps shape": (
            ValueError,
            "eps",
            lambda: k.uniform_start(x, torch.ones(2, device=device), rng),
        ),
        "eps dtype": (
            TypeError,
            "eps",
            lambda: k.attack_step(x, x, x, torch.ones((), dtype=torch.int64, device=device), 0.1),
        ),
        "z shape": (ValueError, "z", lambda: k.attack_step(x, x[:1], x, 0.1, 0.1)),
        "z dtype": (TypeError, "z", lambda: k.attack_step(x, x.double(), x, 0.1, 0.1)),
        "z device": (ValueError, "z", lambda: k.attack_step(x, meta, x, 0.1, 0.1)),
        "grad shape": (ValueError, "grad", lambda: k.attack_step(x, x, x[..., :5], 0.1, 0.1)),
        "grad dtype": (TypeError, "grad", lambda: k.attack_step(x, x, x.int(), 0.1, 0.1)),
        "in place z": (TypeError, "z", lambda: k.attack_step_(x, x.double(), x, 0.1, 0.1)),
        "in place z is x": (ValueError, "z", lambda: k.attack_step_(x, x.detach(), x, 0.1, 0.1)),
        "in place grad": (TypeError, "grad", lambda: k.attack_step_(x, p[0], x.int(), 0.1, 0.1)),
        "step shape": (
            ValueError,
            "step",
            lambda: k.apgd_step(x, x, x, x, rng[:1], eps=0.1, momentum=1.0),
        ),
        "last dtype": (
            TypeError,
            "last",
            lambda: k.apgd_step(x, x, x.double(), x, x[:, 0, 0, 0], eps=0.1, momentum=1.0),
        ),
        "momentum": (
            ValueError,
            "momentum",
            lambda: k.apgd_step(x, x, x, x, x[:, 0, 0, 0], eps=0.1, momentum=1.5),
        ),
        "gap dtype": (TypeError, "gap", lambda: k.fab_step(x, x, x, rng)),
        "normal shape": (ValueError, "normal", lambda: k.fab_step(x, x, x[:1], x[:, 0, 0, 0])),
        "logits rank": (ValueError, "logits", lambda: k.cross_entropy_grad(logits[0], target)),
        "logits dtype": (TypeError, "logits", lambda: k.cross_entropy_grad(logits.int(), target)),
        "target dtype": (TypeError, "target", lambda: k.cross_entropy_grad(logits, target.int())),
        "target shape": (ValueError, "target", lambda: k.cross_entropy_grad(logits, target[:3])),
        "p_logits": (ValueError, "p_logits", lambda: k.kl_grad(logits[:3], logits)),
        "ball": (ValueError, "ball", lambda: k.local_ball_loss(logits, target, logits[:, :4])),
        "clean": (
            TypeError,
            "clean",
            lambda: k.local_ball_loss(logits, target, None, logits.int()),
        ),
        "lam": (ValueError, "lam", lambda: k.local_ball_loss(logits, target, lam=logits)),
        "label_smoothing": (
            ValueError,
            "label_smoothing",
            lambda: k.local_ball_loss(logits, target, label_smoothing=1.0),
        ),
        "stem_grad": (
            ValueError,
            "stem_grad",
            lambda: k.input_grad_step(x, x, gy[:, :3], weight, **stem),
        ),
        "weight": (
            ValueError,
            "weight",
            lambda: k.input_grad_step(x, x, gy, weight[:, :2], **stem),
        ),
        "stride": (
            ValueError,
            "stride",
            lambda: k.input_grad_step(x, x, gy, weight, **{**stem, "stride": 0}),
        ),
        "images dtype": (TypeError, "images", lambda: k.augment(data.int(), index, rng)),
        "images layout": (
            ValueError,
            "images",
            lambda: k.augment(data.transpose(2, 3), index, rng),
        ),
        "pad": (ValueError, "pad", lambda: k.augment(data, index, rng, pad=5)),
        "cutout": (ValueError, "cutout", lambda: k.augment(data, index, rng, cutout=-1)),
        "cutmix with a memory": (
            ValueError,
            "cutmix",
            lambda: k.augment(data, index, rng, cutmix=True, memory=memory, eps=0.1),
        ),
        "erase": (ValueError, "erase", lambda: k.augment(data, index, rng, erase=1.1)),
        "erase and cutout": (
            ValueError,
            "erase and cutout",
            lambda: k.augment(data, index, rng, erase=0.5, cutout=2),
        ),
        "jitter": (ValueError, "jitter", lambda: k.augment(data, index, rng, jitter=1.0)),
        "jitter of two channels": (
            ValueError,
            "3 channels",
            lambda: k.augment(data[:, :2].contiguous(), index, rng, jitter=0.5),
        ),
        "share": (
            TypeError,
            "share",
            lambda: k.cross_entropy_grad(logits, k.MixedLabels(target, target, target)),
        ),
        "second label": (
            ValueError,
            "target",
            lambda: k.cross_entropy_grad(logits, k.MixedLabels(target, target[1:], logits[:, 0])),
        ),
        "index dtype": (TypeError, "index", lambda: k.augment(data, index.int(), rng)),
        "augment memory dtype": (
            TypeError,
            "memory",
            lambda: k.augment(data, index, rng, memory=data, eps=0.1),
        ),
        "augment memory shape": (
            ValueError,
            "memory",
            lambda: k.augment(data, index, rng, memory=memory[:5], eps=0.1),
        ),
        "augment memory layout": (
            ValueError,
            "memory",
            lambda: k.augment(
                data, index, rng, memory=lay_out(memory.cpu(), "channels_last").to(device), eps=0.1
            ),
        ),
        "augment memory device": (
            ValueError,
            "memory",
            lambda: k.augment(data, index, rng, memory=memory.to("meta"), eps=0.1),
        ),
        "augment eps": (ValueError, "eps", lambda: k.augment(data, index, rng, memory=memory)),
        "augment norm": (ValueError, "norm", lambda: k.augment(data, index, rng, norm="L1")),
        "memory": (TypeError, "memory", lambda: k.recall(memory.int(), index, crops, batch, 0.1)),
        "crops": (TypeError, "crops", lambda: k.recall(memory, index, crops.long(), batch, 0.1)),
        "recall x": (ValueError, "x", lambda: k.recall(memory, index, crops, batch[:, :2], 0.1)),
        "remember z": (
            ValueError,
            "z",
            lambda: k.remember(memory, index, crops, batch, batch[:1], 0.1),
        ),
        "stem_input_grad stem_grad": (
            ValueError,
            "stem_grad",
            lambda: k.stem_input_grad(gy[:, :3], weight, size=(9, 9), stride=1, padding=1),
        ),
        "stem_input_grad weight": (
            ValueError,
            "weight",
            lambda: k.stem_input_grad(gy, weight[0], size=(9, 9), stride=1, padding=1),
        ),
        "stem_weight_grad x": (
            ValueError,
            "x",
            lambda: k.stem_weight_grad(x[0], x, kernel=(3, 3), stride=1, padding=1),
        ),
        "stem_weight_grad stem_grad": (
            ValueError,
            "stem_grad",
            lambda: k.stem_weight_grad(batch, batch[..., :2], kernel=(3, 3), stride=1, padding=1),
        ),
        "params": (
            ValueError,
            "params",
            lambda: k.sgd_ema_step([], [], [], [], weight_decay=[], **sgd),
        ),
        "grads": (
            ValueError,
            "grads",
            lambda: k.sgd_ema_step(p, [], p, [], weight_decay=[0.0], **sgd),
        ),
        "momenta": (
            ValueError,
            "momenta",
            lambda: k.sgd_ema_step(p, p, [x[:1]], [], weight_decay=[0.0], **sgd),
        ),
        "exp_avg_sqs": (
            ValueError,
            "exp_avg_sqs",
            lambda: k.adamw_ema_step(p, p, p, [x[:1]], [], count=1.0, weight_decay=[0.0], **sgd),
        ),
        "weight_decay": (
            ValueError,
            "weight_decay",
            lambda: k.sgd_ema_step(p, p, p, [], weight_decay=[], **sgd),
        ),
    }


def test_an_op_dispatches_itself_and_nothing_else(backend, device):
    """Views aside: no check reads a value back, no number is copied to the device a second time."""

    views = (torch.ops.aten.detach.default, torch.ops.aten.unbind.int)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace != "engine" and func not in views:
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, z = images((2, 3, 6, 6), device), images((2, 3, 6, 6), device)
    grad, rng = normal(x.shape, device), rng_state(device)
    gy, weight = normal((2, 4, 6, 6), device), normal((4, 3, 3, 3), device)
    (adv, ball, clean), target = logit_inputs((5, 10), device), targets(5, 10, device)
    memory, index, crops, batch = memory_inputs((6, 3, 7, 5), 2, 4, device)
    data, state, zero = (
        dataset((6, 3, 7, 5), device),
        optimiser_state(device),
        torch.zeros((), device=device),
    )
    stem = {"stride": 1, "padding": 1, "eps": 0.25, "alpha": 0.125}
    calls = [
        lambda: kernels.uniform_start(x, 0.25, rng),
        lambda: kernels.attack_step(x, z, grad, 0.25, 0.125),
        lambda: kernels.attack_step_(x, z, grad, 0.25, 0.125),
        lambda: kernels.cross_entropy_grad(adv, target),
        lambda: kernels.kl_grad(adv, ball),
        lambda: kernels.input_grad_step(x, z, gy, weight, **stem),
        lambda: kernels.stem_input_grad(gy, weight, size=tuple(x.shape[2:]), stride=1, padding=1),
        lambda: kernels.stem_weight_grad(x, gy, kernel=(3, 3), stride=1, padding=1),
        lambda: kernels.local_ball_loss(adv, target, ball, clean, lam=0.5, mu=2.0),
        lambda: kernels.augment(data, index, rng, pad=2, flip=True, memory=memory, eps=0.25),
        lambda: kernels.recall(memory, index, crops, batch, 0.25),
        lambda: kernels.remember(memory, index, crops, batch, batch, 0.25),
        lambda: kernels.sgd_ema_step(
            *state, lr=0.125, found_inf=zero, weight_decay=DECAY, ema_decay=0.5
        ),
        lambda: kernels.adamw_ema_step(
            *adamw, lr=0.125, count=zero + 1, found_inf=zero, weight_decay=DECAY, ema_decay=0.5
        ),
    ]
    adamw = adamw_state(device)
    for call in calls:
        call()
        seen: list[str] = []
        with Seen():
            call()
        assert [op for op in seen if op != "aten.add.Tensor"] == []


@pytest.mark.parametrize("case", list(bad_calls("cpu")))
def test_bad_input_names_the_argument(backend, device, case):
    error, name, call = bad_calls(device)[case]
    with pytest.raises(error, match=rf"\b{name}\b"):
        call()


def test_a_compiled_graph_copies_no_number_from_the_host():
    """As a dropout's does in a captured step: a capture allows no such copy."""
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def start(x, rng):
        return kernels.uniform_start(x, 0.5, rng)

    compiled = torch.compile(start, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    x, rng = images((2, 3, 6, 6), "cpu"), rng_state("cpu")
    assert torch.equal(compiled(x, rng), start(x, rng))
    assert any("uniform_start" in name for name in seen)
    assert not [name for name in seen if "lift_fresh" in name or "constant" in name], seen
