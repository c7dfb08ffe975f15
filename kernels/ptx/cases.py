"""List the inputs that each kernel is executed on.

They take every type, ragged tails, one sample, odd sizes, and both norms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import ops

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS, ALPHA = 8 / 255, 10 / 255
# A full tile of 1024 elements and 128-bit accesses; a ragged tail; one odd sample; single pixels.
_SHAPES = [(3, 3, 8, 16), (2, 3, 7, 5), (1, 1, 29, 31), (5, 3, 1, 1)]
_CLASSES = [10, 3, 37, 1000]


class Case(NamedTuple):
    """Hold one call of an op.

    Attributes:
        kernel: its row in the audit's table.
        dtype: the type of gradients, logits or the network's input; the images are float32.
        sizes: shapes and layouts, and what else tells it from the kernel's other cases.
        op: what is called, with `args` and `options`, whose tensors it may write to.
        rounding: as for `accuracy.error`; None asks for the reference's bits.
    """

    kernel: str
    dtype: str
    sizes: str
    op: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    rounding: float | None


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, scale: float = 1.0, seed: int = 1, dtype: str = "fp32") -> Tensor:
    return (torch.randn(shape, generator=_draws(seed)) * scale).to(TYPES[dtype])


def _whole(*shape: int, seed: int) -> Tensor:
    """Draw small whole numbers, whose sums are exact in any order and so have exact signs."""
    return torch.randint(-2, 3, shape, generator=_draws(seed)).float()


def _images(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=_draws(0))


def _near(x: Tensor) -> Tensor:
    return (x + _normal(*x.shape, scale=0.05, seed=2)).clamp(0, 1)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda t: t.contiguous(),
    " channels_last": _channels_last,
}
_RNG = torch.tensor([1234567890123, (3 << 32) + 7])


Extent = Literal["kernels", "types", "all"]


def cases(extent: Extent) -> list[Case]:
    """Return all cases, or the first of each kernel, or the first of each kernel and type."""
    every = itertools.chain(
        _starts(), _steps(), _steps_in_place(), _autoattack(), _logit_gradients(), _stems(),
        _losses(), _data(), _optimisers(),
    )  # fmt: skip
    if extent == "all":
        return list(every)
    first: dict[tuple[Any, ...], Case] = {}
    for case in every:
        first.setdefault(case[: 1 if extent == "kernels" else 2], case)
    return list(first.values())


def _starts() -> Iterator[Case]:
    for shape, (layout, lay_out) in itertools.product(_SHAPES, _LAYOUTS.items()):
        args, name = (lay_out(_images(shape)), 0.3, _RNG), _name(shape) + layout
        yield Case("linf_start", "fp32", name, ops.uniform_start, args, {"stream": 5}, None)
        options = {"norm": "L2", "stream": 5}
        # Box-Muller's sine, cosine and logarithm differ by some units between libraries.
        yield Case("l2_start", "fp32", name, ops.uniform_start, args, options, 64)


def _steps() -> Iterator[Case]:
    for shape, dtype, (layout, lay_out) in itertools.product(_SHAPES, TYPES, _LAYOUTS.items()):
        x = lay_out(_images(shape))
        z, grad = lay_out(_near(x)), lay_out(_normal(*shape, seed=3, dtype=dtype))
        grad[grad.abs() < 0.2] = 0.0
        name = _name(shape) + layout
        kernel = "linf_step" if dtype == "fp32" else "linf_step_bf16_grad"
        yield Case(kernel, dtype, name, ops.attack_step, (x, z, grad, EPS, ALPHA), {}, None)
        yield Case(
            "l2_step", dtype, name, ops.attack_step, (x, z, grad, 0.5, 0.2), {"norm": "L2"}, 4
        )
    x, z, grad = (_images((2, 3, 8, 16)) for _ in range(3))
    grad[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    name = "2x3x8x16, NaN and infinite gradients"
    yield Case("linf_step", "fp32", name, ops.attack_step, (x, z, grad, EPS, ALPHA), {}, None)
    yield Case("l2_step", "fp32", name, ops.attack_step, (x, z, grad, 0.5, 0.2), {"norm": "L2"}, 4)


def _steps_in_place() -> Iterator[Case]:
    for shape, dtype, (layout, lay_out) in itertools.product(_SHAPES, TYPES, _LAYOUTS.items()):
        x, name = lay_out(_images(shape)), _name(shape) + layout
        args = (x, lay_out(_near(x)), lay_out(_normal(*shape, seed=3, dtype=dtype)))
        kernel = "linf_step_in_place"
        yield Case(kernel, dtype, name, ops.attack_step_, (*args, EPS, ALPHA), {}, None)
        l2 = f"{name}, in place"
        yield Case("l2_step", dtype, l2, ops.attack_step_, (*args, 0.5, 0.2), {"norm": "L2"}, 4)


def _autoattack() -> Iterator[Case]:
    for shape, norm in itertools.product(_SHAPES, ("Linf", "L2")):
        x, name, options = _images(shape), _name(shape), {"norm": norm}
        z, last, grad = _near(x), (x + 0.02).clamp(0, 1), _normal(*shape, seed=3)
        steps, gap = _normal(len(x), seed=4).abs(), _normal(len(x), scale=3, seed=5)
        bits = None if norm == "Linf" else 8
        args = (x, z, last, grad, steps)
        climb = {"eps": EPS, "momentum": 0.75, **options}
        yield Case(f"{norm.lower()}_apgd", "fp32", name, ops.apgd_step, args, climb, bits)
        # The sums that Newton's method solves for are rounded in another order.
        yield Case(
            f"{norm.lower()}_fab", "fp32", name, ops.fab_step, (x, z, grad, gap), options, 64
        )


def _logits(rows: int, classes: int, dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = torch.randint(0, classes, (rows,), generator=_draws(4))
    adv, ball, clean = (_normal(rows, classes, scale=3, seed=s, dtype=dtype) for s in (5, 6, 7))
    return adv, target, ball, clean


def _mixed(target: Tensor, classes: int) -> ops.MixedLabels:
    """Draw second labels, some of them the first again, and shares."""
    second = torch.randint(0, classes, target.shape, generator=_draws(14))
    second[::3] = target[::3]
    return ops.MixedLabels(target, second, torch.rand(target.shape, generator=_draws(15)))


def _logit_gradients() -> Iterator[Case]:
    for classes, rows, dtype in itertools.product(_CLASSES, (70, 1), TYPES):
        q, target, p, _ = _logits(rows, classes, dtype)
        name = f"{rows}x{classes}"
        scale = {"scale": 3.0}
        yield Case("cross_entropy_grad", dtype, name, ops.cross_entropy_grad, (q, target), scale, 4)
        mixed = (q, _mixed(target, classes))
        yield Case("cross_entropy_grad_mixed", dtype, name, ops.cross_entropy_grad, mixed, scale, 4)
        yield Case("kl_grad", dtype, name, ops.kl_grad, (p, q), {"scale": 0.5}, 4)


# What one program sums by itself, and the fewest rows that take several and a second kernel.
_MANY_ROWS = {10: 2100, 3: 8200, 37: 530, 1000: 37}


def _losses() -> Iterator[Case]:
    for classes, rows, dtype in itertools.product(_CLASSES, (7, 1), TYPES):
        yield from _loss_cases(
            ("loss",), dtype, f"{rows}x{classes}", *_logits(rows, classes, dtype)
        )
    for classes, dtype in itertools.product((1000, 10, 37, 3), TYPES):
        rows, kernels = _MANY_ROWS[classes], ("loss_partial", "loss_finish")
        yield from _loss_cases(kernels, dtype, f"{rows}x{classes}", *_logits(rows, classes, dtype))
    adv, target, ball, clean = _logits(7, 10, "fp32")
    for terms, b, c in (("local", ball, None), ("global", None, clean), ("neither", None, None)):
        yield from _loss_cases(("loss",), "fp32", f"7x10, {terms} term", adv, target, b, c)


def _loss_cases(
    kernels: tuple[str, ...], dtype: str, name: str, *logits: Tensor | None
) -> Iterator[Case]:
    options = {"lam": 2.0, "mu": 0.7, "label_smoothing": 0.1}
    for kernel in kernels:
        yield Case(kernel, dtype, name, ops.local_ball_loss, logits, options, 16)
    upstream, lam, mu = (torch.tensor(v) for v in (1.5, 2.0, 0.7))
    args = (upstream, *logits, lam, mu, 0.1)
    backward = torch.ops.engine.local_ball_loss_backward
    yield Case("loss_backward", dtype, name, backward, args, {}, 16)
    adv, target, ball, clean = logits
    assert adv is not None
    assert target is not None
    if "loss" in kernels:
        labels = _mixed(target, adv.shape[1])
        mixed = (adv, labels, ball, clean)
        yield Case("loss_mixed", dtype, name, ops.local_ball_loss, mixed, options, 16)
        args = (*args, labels.second, labels.share)
        yield Case("loss_backward_mixed", dtype, name, backward, args, {}, 16)


# Channels in and out, kernel height and width, stride, padding, image height and width.
_STEMS = [
    (3, 16, 3, 3, 1, 1, 8, 7),
    (3, 5, 3, 3, 2, 1, 9, 7),
    (1, 20, 4, 4, 2, 1, 8, 9),
    (4, 35, 2, 3, 2, 2, 6, 5),
    (1, 3, 1, 1, 1, 0, 5, 5),
]


def _stems() -> Iterator[Case]:
    types = ("bf16", "fp16", "fp32")
    for stem, batch, dtype in itertools.product(_STEMS, (2, 1), types):
        c, o, kh, kw, stride, padding, h, w = stem
        out = ((h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1)
        x = _images((batch, c, h, w))
        whole = (_whole(batch, o, *out, seed=8).to(TYPES[dtype]), _whole(o, c, kh, kw, seed=9))
        real = (
            _normal(batch, o, *out, scale=1e-3, seed=8, dtype=dtype),
            _normal(o, c, kh, kw, scale=0.2, seed=9),
        )
        for layout, lay_out in _LAYOUTS.items():
            name = f"{batch} x {_name(stem)}"
            end = "_bf16_channels_last" if layout else ""
            for norm, (grad, weight), rounding in (("Linf", whole, None), ("L2", real, 8)):
                args = (x, _near(x), lay_out(grad), lay_out(weight))
                options: dict[str, Any] = {"stride": stride, "padding": padding}
                options |= {"eps": EPS, "alpha": ALPHA, "norm": norm}
                kernel = f"{norm.lower()}_input_grad{end}"
                yield Case(kernel, dtype, name, ops.input_grad_step, args, options, rounding)


# Samples in the dataset, channels, height, width; pad; samples in the batch; cutout.
_DATA = [
    ((6, 3, 8, 16), 2, 4, 3),
    ((6, 3, 7, 5), 4, 11, 0),
    ((4, 1, 29, 31), 2, 1, 4),
    ((3, 2, 1, 1), 0, 3, 0),
]


def _changes(channels: int) -> list[dict[str, Any]]:
    """Return the options that take a second draw, together and alone."""
    colours = {"jitter": 0.4} if channels == 3 else {}
    return [{"cutmix": True, "erase": 0.5, **colours}, {"cutmix": True}, {"erase": 0.5}]


def _data() -> Iterator[Case]:
    for shape, pad, batch, cutout in _DATA:
        images = torch.randint(0, 256, shape, generator=_draws(10), dtype=torch.uint8)
        memory = torch.randint(-127, 128, shape, generator=_draws(11), dtype=torch.int8)
        index = torch.randint(0, shape[0], (batch,), generator=_draws(12))
        name = f"{batch} of {_name(shape)}"
        options: dict[str, Any] = {"pad": pad, "flip": True, "cutout": cutout, "stream": 5}
        args = (images, index, _RNG)
        yield Case("augment", "fp32", name, ops.augment, args, options, None)
        for changes in _changes(shape[1]):
            changed = {**options, **changes}
            if "erase" in changes:
                changed["cutout"] = 0
            what = f"{name}, {', '.join(changes)}"
            yield Case("augment_changed", "fp32", what, ops.augment, args, changed, None)
        started = {**options, "memory": memory, "eps": 0.3}
        yield Case("augment_linf_start", "fp32", name, ops.augment, args, started, None)
        # Each stored sample once: what two samples of a batch remember of one is in no order.
        once = torch.randperm(shape[0], generator=_draws(13))[: min(batch, shape[0])]
        x, where, *_ = ops.augment(images, once, _RNG, **options)
        for layout, lay_out in _LAYOUTS.items():
            seen = (memory, once, where, lay_out(x))
            yield Case("linf_recall", "fp32", name + layout, ops.recall, (*seen, 0.3), {}, None)
            yield Case(
                "l2_recall", "fp32", name + layout, ops.recall, (*seen, 0.3), {"norm": "L2"}, 4
            )
            reached = (*seen, lay_out(_near(x)), 0.2)
            yield Case("remember", "fp32", name + layout, ops.remember, reached, {}, None)


_PARAMETERS = [(16, 3, 4, 4), (16,), (1,), (0, 3), (), (100, 33), (7, 3, 3, 3)]
_DECAY = [5e-4, 0.0, 0.0, 1e-2, 0.1, 5e-4, 0.0]


def _optimisers() -> Iterator[Case]:
    for dtype, (layout, lay_out) in itertools.product(TYPES, _LAYOUTS.items()):
        yield from _optimiser_cases(dtype, "seven tensors" + layout, lay_out)
    yield from _optimiser_cases("fp32", "gradients off 16 bytes", shifted=True)
    yield from _optimiser_cases("fp32", "after an overflow", found_inf=1.0)
    yield from _optimiser_cases("fp32", "no average", average=False)


def _optimiser_cases(
    dtype: str,
    name: str,
    lay_out: Callable[[Tensor], Tensor] = torch.clone,
    shifted: bool = False,
    found_inf: float = 0.0,
    average: bool = True,
) -> Iterator[Case]:
    def tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
        drawn = (_normal(*s, scale=scale, seed=seed + i) for i, s in enumerate(_PARAMETERS))
        return [lay_out(t) if t.dim() == 4 else t for t in drawn]

    params, momenta, averages = tensors(100), tensors(300, 0.1), tensors(400) if average else []
    grads = [t.to(TYPES[dtype]) for t in tensors(200, 0.1)]
    if shifted:
        grads = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in grads]
    rest = {"found_inf": torch.tensor(found_inf), "weight_decay": _DECAY, "ema_decay": 0.99}
    options = {"lr": torch.tensor(0.1), "momentum": 0.9, "nesterov": True, **rest}
    lists: tuple[Any, ...] = (params, grads, momenta, averages)
    yield Case("sgd_ema", dtype, name, ops.sgd_ema_step, lists, options, 4)
    lists = (params, grads, [torch.zeros_like(p) for p in params])
    yield Case("perturb", dtype, name, ops.perturb_weights, lists, {"gamma": 0.01}, 4)
    lists = (params, grads, momenta, [m.square() for m in momenta], averages)
    options = {"lr": torch.tensor(0.01), "count": torch.tensor(3.0), **rest}
    yield Case("adamw_ema", dtype, name, ops.adamw_ema_step, lists, options, 4)
