"""The ops of the hot path: one definition each, three backends (see `backends`).

Every function checks its arguments, then calls a `torch.library` operator in the namespace `engine`.
Shapes: B samples, N samples in a dataset, C channels, H x W pixels, K classes. Images are float
tensors in [0, 1], [B, C, H, W] (or [B, ...] for data that is not images), contiguous or channels_last;
other strides are made contiguous first. `eps`, `alpha`, `lam`, `mu` and `lr` may be Python floats; pass
0-d tensors on the device where a value changes during training or a CUDA graph is captured.
`rng` is an int64 [2] device tensor (seed, step); see `reference` for how it is used.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .backends import dispatch, load
from .layout import same_order

Scalar = float | Tensor
NORMS = ("Linf", "L2")
_FLOATS = (torch.float32, torch.float64)
_LOGITS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


_library = torch.library.Library("engine", "DEF")


def _define(name: str, schema: str):
    """Define `engine::name` and serve it, on every device, by the backend that `backends` picks.

    The low-level registration costs about a quarter of `torch.library.custom_op` a call.
    """
    position = 1 if name == "local_ball_loss_backward" else 0

    def run(*args):
        first = args[position]
        device = (first[0] if isinstance(first, list) else first).device.type
        return dispatch(name, device)(*args)

    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.engine, name).default


# ---- checks ----------------------------------------------------------------------------------


def _check_like(name: str, t: Tensor, like: Tensor, like_name: str) -> Tensor:
    """Same shape and device; brought to the layout of `like` where it differs."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, {like_name} has {tuple(like.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, {like_name} on {like.device}")
    if t.stride() == like.stride():
        return t
    if same_order(t, like):
        # With one channel, contiguous and channels_last are one layout under two sets of strides.
        return t.as_strided(like.shape, like.stride())
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def _check_images(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32 (or float64), got {x.dtype}")
    if not (x.dim() >= 2):
        raise ValueError(f"{name} must be [B, ...], got shape {tuple(x.shape)}")
    return x if same_order(x, x) else x.contiguous()


def _check_logits(name: str, t: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _LOGITS:
        raise TypeError(f"{name} must be a float tensor, got {t.dtype}")
    if not (t.dim() == 2 and t.shape[1] >= 1):
        raise ValueError(f"{name} must be [B, K], got {tuple(t.shape)}")
    return t.contiguous()


def _check_target(target: Tensor, logits: Tensor) -> Tensor:
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"target must have shape ({logits.shape[0]},), got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, not {logits.device}")
    return target.contiguous()


@lru_cache(maxsize=1024)
def _cached(value: float, device: torch.device) -> Tensor:
    # Not an inference tensor, whoever asks first: autograd will have to save it.
    with torch.inference_mode(False):
        made = torch.tensor(value, dtype=torch.float32, device=device)
    made.is_constant = True  # type: ignore[attr-defined]
    return made


# A captured graph reads its constants at every replay, long after the cache has forgotten them.
_pinned: dict[int, Tensor] = {}


def constant(value: float, device: torch.device) -> Tensor:
    """A float32 0-d tensor that nobody may write to, the same one for the same number; it says `is_constant`.

    Made anew it would be a copy from the host, which a graph capture does not allow; so it must have
    been asked for once before a capture begins.
    """
    if torch.compiler.is_compiling() or isinstance(_get_current_dispatch_mode(), FakeTensorMode):
        return torch.tensor(value, dtype=torch.float32, device=device)
    found = _cached(value, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _pinned[id(found)] = found
    return found


def _check_scalar(name: str, value: Scalar, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return constant(float(value), like.device)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, not {like.device}")
    return value if value.dim() == 0 else value.reshape(())


def _check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be 'Linf' or 'L2', got {norm!r}")


def _check_rng(rng: Tensor, like: Tensor) -> None:
    if not (isinstance(rng, Tensor) and rng.dtype == torch.int64 and rng.shape == (2,)):
        raise TypeError("rng must be an int64 tensor (seed, step)")
    if rng.device != like.device:
        raise ValueError(f"rng is on {rng.device}, not {like.device}")


def _check_index(index: Tensor, images: Tensor, name: str) -> Tensor:
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index must be [B], got {tuple(index.shape)}")
    if index.device != images.device:
        raise ValueError(f"index is on {index.device}, {name} on {images.device}")
    return index.contiguous()


# ---- attack ----------------------------------------------------------------------------------


_uniform_start = _define(
    "uniform_start",
    "(Tensor x, Tensor eps, Tensor rng, str norm, int stream) -> Tensor",
)


@torch.library.register_fake("engine::uniform_start")
def _(x, eps, rng, norm, stream):
    return torch.empty_like(x)


def uniform_start(
    x: Tensor, eps: Scalar, rng: Tensor, *, norm: str = "Linf", stream: int = 0
) -> Tensor:
    """A uniform random point of the ball of radius `eps` around `x`, clipped to [0, 1].

    Args:
        x: [B, ...] in [0, 1].
        eps: radius in pixel units, >= 0.
        rng: int64 [2], (seed, step). Not advanced.
        norm: "Linf" or "L2".
        stream: keeps draws within one step apart, in [0, 2^31).
    Returns:
        Shape, dtype and layout of `x`.
    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    x = _check_images("x", x)
    _check_norm(norm)
    _check_rng(rng, x)
    if not (0 <= stream < 1 << 31):
        raise ValueError(f"stream must lie in [0, 2^31), got {stream}")
    return _uniform_start(x, _check_scalar("eps", eps, x), rng, norm, stream)


_attack_step = _define(
    "attack_step",
    "(Tensor x, Tensor z, Tensor grad, Tensor eps, Tensor alpha, str norm) -> Tensor",
)


@torch.library.register_fake("engine::attack_step")
def _(x, z, grad, eps, alpha, norm):
    return torch.empty_like(x)


def attack_step(
    x: Tensor, z: Tensor, grad: Tensor, eps: Scalar, alpha: Scalar, *, norm: str = "Linf"
) -> Tensor:
    """One projected ascent step: from `z` along `grad`, back into the ball around `x` and into [0, 1].

    Linf: clip(z + alpha sign(grad)) to [x - eps, x + eps]; L2: z + alpha grad / ||grad||, projected
    radially (Madry et al., arXiv 1706.06083). A gradient value of NaN counts as 0; under L2 a
    sample whose gradient is zero, infinite or NaN does not move.

    Args:
        x: [B, ...] float32, centre of the ball, in [0, 1].
        z: like `x`, the current iterate.
        grad: shape of `x`, any float dtype.
        eps, alpha: radius and step size in pixel units, >= 0.
    Returns:
        The next iterate, shape, dtype and layout of `x`.
    """
    x = _check_images("x", x)
    z, grad = _check_like("z", z, x, "x"), _check_like("grad", grad, x, "x")
    if z.dtype != x.dtype:
        raise TypeError(f"z is {z.dtype}, x is {x.dtype}")
    if not grad.is_floating_point():
        raise TypeError(f"grad must be a float tensor, got {grad.dtype}")
    _check_norm(norm)
    return _attack_step(
        x, z, grad, _check_scalar("eps", eps, x), _check_scalar("alpha", alpha, x), norm
    )


_attack_step_ = _define(
    "attack_step_",
    "(Tensor x, Tensor(a!) z, Tensor grad, Tensor eps, Tensor alpha, str norm, Tensor(b!)? network_input) -> ()",
)


@torch.library.register_fake("engine::attack_step_")
def _(x, z, grad, eps, alpha, norm, network_input):
    return None


def _check_network_input(t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"network_input must be a tensor, got {type(t).__name__}")
    if t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"network_input must be float16, bfloat16 or float32, got {t.dtype}")
    if t.shape != x.shape:
        raise ValueError(f"network_input has shape {tuple(t.shape)}, x has {tuple(x.shape)}")
    if t.device != x.device:
        raise ValueError(f"network_input is on {t.device}, x on {x.device}")
    if not same_order(t, t):
        raise ValueError(f"network_input must be contiguous or channels_last, strides {t.stride()}")


def attack_step_(
    x: Tensor,
    z: Tensor,
    grad: Tensor,
    eps: Scalar,
    alpha: Scalar,
    *,
    norm: str = "Linf",
    network_input: Tensor | None = None,
) -> None:
    """`attack_step` in place, writing the network's next input in the same pass over memory.

    `z` stays float32 over all steps, whatever the network computes in: steps in 16 bits would be lost
    to rounding.

    Args:
        x, grad, eps, alpha, norm: as for `attack_step`.
        z: the current iterate, replaced by the next; dtype and memory order of `x`. Must share no
            memory with `x`.
        network_input: takes the same values, rounded to its dtype: shape of `x`, float16, bfloat16
            or float32, contiguous or channels_last whatever `x` is. Must share no memory with the
            other tensors.
    """
    x = _check_images("x", x)
    if isinstance(z, Tensor) and z.shape == x.shape and not same_order(x, z):
        raise ValueError(f"z must lie in memory as x does, {x.stride()}: strides {z.stride()}")
    z, grad = _check_like("z", z, x, "x"), _check_like("grad", grad, x, "x")
    if z.dtype != x.dtype:
        raise TypeError(f"z is {z.dtype}, x is {x.dtype}")
    if z.data_ptr() == x.data_ptr() and z.numel() > 0:
        raise ValueError("z is x itself: the step would move the centre of the ball")
    if not grad.is_floating_point():
        raise TypeError(f"grad must be a float tensor, got {grad.dtype}")
    _check_norm(norm)
    if network_input is not None:
        _check_network_input(network_input, x)
    eps, alpha = _check_scalar("eps", eps, x), _check_scalar("alpha", alpha, x)
    _attack_step_(x, z, grad, eps, alpha, norm, network_input)
    written = [t for t in (z, network_input) if t is not None and not t.is_inference()]
    # A backward pass that still needs the old values then fails, where it would be wrong in silence.
    torch.autograd.graph.increment_version(written)


_cross_entropy_grad = _define(
    "cross_entropy_grad",
    "(Tensor logits, Tensor target, float scale) -> Tensor",
)


@torch.library.register_fake("engine::cross_entropy_grad")
def _(logits, target, scale):
    return torch.empty_like(logits)


def cross_entropy_grad(logits: Tensor, target: Tensor, *, scale: float = 1.0) -> Tensor:
    """`scale` times the gradient of the summed cross-entropy: softmax(logits) - onehot(target).

    Handing this to autograd as the output gradient starts an attack's backward pass without forming
    a loss. The step only uses the gradient's sign or direction, so `scale` matters only for range
    in 16 bits.

    Args:
        logits: [B, K], float; mathematics in float32 at least.
        target: int64 [B], in [0, K).
    Returns:
        [B, K], dtype of `logits`.
    """
    logits = _check_logits("logits", logits)
    return _cross_entropy_grad(logits, _check_target(target, logits), float(scale))


_kl_grad = _define(
    "kl_grad",
    "(Tensor p_logits, Tensor q_logits, float scale) -> Tensor",
)


@torch.library.register_fake("engine::kl_grad")
def _(p_logits, q_logits, scale):
    return torch.empty_like(q_logits)


def kl_grad(p_logits: Tensor, q_logits: Tensor, *, scale: float = 1.0) -> Tensor:
    """`scale` times the gradient of sum KL(softmax(p) || softmax(q)) with respect to `q_logits`.

    Args:
        p_logits, q_logits: [B, K], float; mathematics in float32 at least.
    Returns:
        softmax(q) - softmax(p), [B, K], dtype of `q_logits`.
    """
    q_logits = _check_logits("q_logits", q_logits)
    p_logits = _check_like("p_logits", _check_logits("p_logits", p_logits), q_logits, "q_logits")
    return _kl_grad(p_logits, q_logits, float(scale))


_input_grad_step = _define(
    "input_grad_step",
    "(Tensor x, Tensor z, Tensor stem_grad, Tensor weight, int stride, int padding, Tensor eps, Tensor alpha, str norm) -> Tensor",
)


@torch.library.register_fake("engine::input_grad_step")
def _(x, z, stem_grad, weight, stride, padding, eps, alpha, norm):
    return torch.empty_like(x)


def input_grad_step(
    x: Tensor,
    z: Tensor,
    stem_grad: Tensor,
    weight: Tensor,
    *,
    stride: int,
    padding: int,
    eps: Scalar,
    alpha: Scalar,
    norm: str = "Linf",
) -> Tensor:
    """The input gradient of a network's first convolution and the attack step, in one op.

    Equals `attack_step(x, z, conv2d_input_gradient(stem_grad, weight), ...)`.

    Args:
        x, z: [B, C, H, W] float32.
        stem_grad: [B, O, H', W'], gradient at the convolution's output.
        weight: [O, C, kh, kw], its weight (groups 1, dilation 1). Where a normalisation by standard
            deviation precedes the convolution, divide the weight by it.
        stride, padding: of the convolution, the same in both directions.
        eps, alpha, norm: as for `attack_step`.
    Returns:
        The next iterate, shape, dtype and layout of `x`.
    """
    x = _check_images("x", x)
    z = _check_like("z", z, x, "x")
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [O, C, kh, kw], got {tuple(weight.shape)}")
    out_channels, channels, kh, kw = weight.shape
    b, c, h, w = x.shape
    if channels != c:
        raise ValueError(f"weight takes {channels} channels, x has {c}")
    _check_stem_grad(stem_grad, x, (out_channels, *_sides((h, w), (kh, kw), stride, padding)), b)
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}")
    _check_norm(norm)
    eps, alpha = _check_scalar("eps", eps, x), _check_scalar("alpha", alpha, x)
    return _input_grad_step(x, z, stem_grad, weight, stride, padding, eps, alpha, norm)


_stem_input_grad = _define(
    "stem_input_grad",
    "(Tensor stem_grad, Tensor weight, int h, int w, int stride, int padding) -> Tensor",
)


@torch.library.register_fake("engine::stem_input_grad")
def _(stem_grad, weight, h, w, stride, padding):
    return weight.new_empty(len(stem_grad), weight.shape[1], h, w)


def stem_input_grad(
    stem_grad: Tensor, weight: Tensor, *, size: tuple[int, int], stride: int, padding: int
) -> Tensor:
    """The input gradient of a network's first convolution; differentiable in both tensors.

    Where no attack step follows that `input_grad_step` could take along: attacks by other people's
    code, and gradients of gradients. On a GPU the vendor's library is fast at it, and serves.

    Args:
        stem_grad: [B, O, H', W'] float, gradient at the convolution's output.
        weight: [O, C, kh, kw] float32 or float64, its weight (groups 1, dilation 1).
        size: (H, W) of its input; stride, padding: the same in both directions.
    Returns:
        [B, C, H, W], dtype of `weight`.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight must be [O, C, kh, kw], got {tuple(weight.shape)}")
    if weight.dtype not in _FLOATS:
        raise TypeError(f"weight must be float32 (or float64), got {weight.dtype}")
    out, _, kh, kw = weight.shape
    _check_stem_grad(stem_grad, weight, (out, *_sides(size, (kh, kw), stride, padding)))
    return _stem_input_grad(stem_grad, weight, *size, stride, padding)


_stem_weight_grad = _define(
    "stem_weight_grad",
    "(Tensor x, Tensor stem_grad, int kh, int kw, int stride, int padding) -> (Tensor, Tensor)",
)


@torch.library.register_fake("engine::stem_weight_grad")
def _(x, stem_grad, kh, kw, stride, padding):
    out = stem_grad.shape[1]
    return stem_grad.new_empty(out, x.shape[1], kh, kw), stem_grad.new_empty(out)


def stem_weight_grad(
    x: Tensor, stem_grad: Tensor, *, kernel: tuple[int, int], stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """The weight and bias gradients of a network's first convolution; differentiable in both tensors.

    Vendor libraries are slow at it on the CPU where the image has few channels. On a GPU theirs is
    fast, and serves.

    Args:
        x: [B, C, H, W] float, the convolution's input.
        stem_grad: [B, O, H', W'] float, gradient at its output.
        kernel: (kh, kw); stride, padding: the same in both directions (groups 1, dilation 1).
    Returns:
        [O, C, kh, kw] and [O], dtype of `stem_grad`.
    """
    x = _check_images("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {tuple(x.shape)}")
    sides = _sides(x.shape[2:], kernel, stride, padding)
    _check_stem_grad(
        stem_grad, x, (stem_grad.shape[1] if stem_grad.dim() > 1 else 0, *sides), len(x)
    )
    return _stem_weight_grad(x, stem_grad, *kernel, stride, padding)


def _sides(size, kernel, stride: int, padding: int) -> tuple[int, int]:
    """(H', W') of a convolution's output."""
    if not (stride >= 1 and padding >= 0):
        raise ValueError(f"stride {stride} or padding {padding} out of range")
    h, w = ((n + 2 * padding - k) // stride + 1 for n, k in zip(size, kernel, strict=True))
    return h, w


def _check_stem_grad(stem_grad: Tensor, like: Tensor, shape, batch: int | None = None) -> None:
    """A float tensor [B, *shape] on the device of `like`, of `batch` samples where that is known."""
    if not stem_grad.is_floating_point():
        raise TypeError(f"stem_grad must be a float tensor, got {stem_grad.dtype}")
    expected = (len(stem_grad) if batch is None else batch, *shape)
    if stem_grad.shape != expected:
        raise ValueError(f"stem_grad has shape {tuple(stem_grad.shape)}, expected {expected}")
    if stem_grad.device != like.device:
        raise ValueError(f"stem_grad is on {stem_grad.device}, not {like.device}")


# The two are the parts of one bilinear form, <conv(x; weight), stem_grad>: each one's derivative is made
# of the other and the convolution.


def _input_grad_setup(ctx, inputs, output) -> None:
    stem_grad, weight, _, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(stem_grad, weight)


def _input_grad_backward(ctx, towards):
    stem_grad, weight = ctx.saved_tensors
    on_grad = on_weight = None
    if ctx.needs_input_grad[0]:
        on_grad = torch.conv2d(towards, weight, None, ctx.stride, ctx.padding).to(stem_grad.dtype)
    if ctx.needs_input_grad[1]:
        kernel = weight.shape[2:]
        on_weight, _ = _stem_weight_grad(
            towards, stem_grad.to(weight.dtype), *kernel, ctx.stride, ctx.padding
        )
    return on_grad, on_weight, None, None, None, None


def _weight_grad_setup(ctx, inputs, output) -> None:
    x, stem_grad, _, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, stem_grad)


def _weight_grad_backward(ctx, towards, towards_bias):
    x, stem_grad = ctx.saved_tensors
    on_x = on_grad = None
    if ctx.needs_input_grad[0]:
        on_x = _stem_input_grad(
            stem_grad, towards.contiguous(), *x.shape[2:], ctx.stride, ctx.padding
        ).to(x.dtype)
    if ctx.needs_input_grad[1]:
        on_grad = torch.conv2d(x.to(towards.dtype), towards, towards_bias, ctx.stride, ctx.padding)
    return on_x, on_grad, None, None, None, None


torch.library.register_autograd(
    "engine::stem_input_grad", _input_grad_backward, setup_context=_input_grad_setup, lib=_library
)
torch.library.register_autograd(
    "engine::stem_weight_grad",
    _weight_grad_backward,
    setup_context=_weight_grad_setup,
    lib=_library,
)


# ---- loss ------------------------------------------------------------------------------------


_local_ball_loss = _define(
    "local_ball_loss",
    "(Tensor adv, Tensor target, Tensor? ball, Tensor? clean, Tensor lam, Tensor mu, float label_smoothing) -> (Tensor, Tensor)",
)


@torch.library.register_fake("engine::local_ball_loss")
def _(adv, target, ball, clean, lam, mu, label_smoothing):
    dtype = torch.float64 if adv.dtype == torch.float64 else torch.float32
    return adv.new_empty((), dtype=dtype), adv.new_empty(6, dtype=dtype)


_local_ball_loss_backward = _define(
    "local_ball_loss_backward",
    "(Tensor grad_loss, Tensor adv, Tensor target, Tensor? ball, Tensor? clean, Tensor lam, Tensor mu, float label_smoothing) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("engine::local_ball_loss_backward")
def _(grad_loss, adv, target, ball, clean, lam, mu, label_smoothing):
    def like(t):
        return adv.new_empty(0) if t is None else torch.empty_like(t)

    return torch.empty_like(adv), like(ball), like(clean)


def _loss_setup(ctx, inputs, output) -> None:
    adv, target, ball, clean, lam, mu, ctx.label_smoothing = inputs
    ctx.save_for_backward(adv, target, ball, clean, lam, mu)
    ctx.mark_non_differentiable(output[1])


def _loss_backward(ctx, grad_loss, _grad_stats):
    adv, target, ball, clean, lam, mu = ctx.saved_tensors
    grad_adv, grad_ball, grad_clean = _local_ball_loss_backward(
        grad_loss, adv, target, ball, clean, lam, mu, ctx.label_smoothing
    )
    return (
        grad_adv,
        None,
        None if ball is None else grad_ball,
        None if clean is None else grad_clean,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "engine::local_ball_loss", _loss_backward, setup_context=_loss_setup
)


def local_ball_loss(
    adv: Tensor,
    target: Tensor,
    ball: Tensor | None = None,
    clean: Tensor | None = None,
    *,
    lam: Scalar = 1.0,
    mu: Scalar = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """CE(adv, target) + lam KL(adv || ball) + mu KL(clean || adv), batch means, in one pass.

    The project's own formula, written to the abstract of arXiv 2110.14030 (docs/method.md). With
    neither `ball` nor `clean` it is plain (label-smoothed) cross-entropy. Differentiable once, in
    all three sets of logits.

    Args:
        adv, ball, clean: logits [B, K], float; mathematics in float32 at least.
        target: int64 [B], in [0, K).
        lam, mu: weights >= 0.
        label_smoothing: in [0, 1), applied to the cross-entropy only.
    Returns:
        loss: 0-d; 0 for an empty batch.
        stats: [6], without gradient: mean cross-entropy, mean local KL, mean global KL, then the
            number of correct predictions of adv, ball and clean.
    """
    adv = _check_logits("adv", adv)
    target = _check_target(target, adv)
    if not (0.0 <= label_smoothing < 1.0):
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    others = {"ball": ball, "clean": clean}
    for name, t in others.items():
        if t is not None:
            others[name] = _check_like(name, _check_logits(name, t), adv, "adv")
    lam, mu = _check_scalar("lam", lam, adv), _check_scalar("mu", mu, adv)
    return _local_ball_loss(
        adv, target, others["ball"], others["clean"], lam, mu, float(label_smoothing)
    )


# ---- data ------------------------------------------------------------------------------------


_augment = _define(
    "augment",
    "(Tensor images, Tensor index, Tensor rng, int pad, bool flip, int cutout, int stream, Tensor? memory, Tensor? eps, str norm) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("engine::augment")
def _(images, index, rng, pad, flip, cutout, stream, memory, eps, norm):
    b = index.shape[0]
    x = images.new_empty((b, *images.shape[1:]), dtype=torch.float32)
    where = images.new_empty((b, 3), dtype=torch.int32)
    return x, where, x.new_empty(0) if memory is None else torch.empty_like(x)


def augment(
    images: Tensor,
    index: Tensor,
    rng: Tensor,
    *,
    pad: int = 0,
    flip: bool = False,
    cutout: int = 0,
    stream: int = 2,
    memory: Tensor | None = None,
    eps: Scalar | None = None,
    norm: str = "Linf",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A training batch from a resident uint8 dataset: gather, zero-pad and crop, mirror, scale to [0, 1].

    With an adversary memory, the attack's start comes with it (Linf: from the same pass over memory).

    Args:
        images: uint8 [N, C, H, W], contiguous.
        index: int64 [B], in [0, N).
        rng: int64 [2], (seed, step).
        pad: crops start within `pad` pixels of the image's corner, in [0, min(H, W)).
        flip: mirror half of the samples left to right.
        cutout: side of a square that is set to 0, its centre anywhere in the image (DeVries & Taylor,
            arXiv 1708.04552); in [0, 2 min(H, W)], 0: none.
        memory: int8 [N, C, H, W], contiguous, as `recall` takes it; needs eps, the radius in pixel
            units, >= 0.
        norm: "Linf" or "L2", of the ball that the start lies in.
    Returns:
        x: float32 [B, C, H, W] in [0, 1].
        where: int32 [B, 3], (dy, dx, mirrored) of every sample, as `recall` and `remember` take it.
        start: float32 [B, C, H, W], `recall(memory, index, where, x, eps, norm=norm)` bit for bit;
            None without a memory.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got {tuple(images.shape)}")
    if not images.is_contiguous():
        raise ValueError("images must be contiguous")
    if not (0 <= pad < min(images.shape[2:])):
        raise ValueError(f"pad must be in [0, {min(images.shape[2:])}): {pad}")
    if not (0 <= cutout <= 2 * min(images.shape[2:])):
        raise ValueError(f"cutout must be in [0, {2 * min(images.shape[2:])}]: {cutout}")
    _check_rng(rng, images)
    _check_norm(norm)
    index = _check_index(index, images, "images")
    radius = None
    if memory is not None:
        _check_memory_tensor(memory)
        if memory.shape != images.shape:
            raise ValueError(f"memory is {tuple(memory.shape)}, images {tuple(images.shape)}")
        if memory.device != images.device:
            raise ValueError(f"memory is on {memory.device}, images on {images.device}")
        if eps is None:
            raise ValueError("eps is missing: memory holds steps of eps / 127")
        radius = _check_scalar("eps", eps, images)
    x, where, start = _augment(
        images, index, rng, int(pad), bool(flip), int(cutout), stream, memory, radius, norm
    )
    return x, where, None if memory is None else start


_recall = _define(
    "recall",
    "(Tensor memory, Tensor index, Tensor where, Tensor x, Tensor eps, str norm) -> Tensor",
)


@torch.library.register_fake("engine::recall")
def _(memory, index, where, x, eps, norm):
    return torch.empty_like(x)


def _check_memory_tensor(memory: Tensor) -> None:
    if memory.dtype != torch.int8:
        raise TypeError(f"memory must be int8, got {memory.dtype}")
    if not (memory.dim() == 4 and memory.is_contiguous()):
        raise ValueError("memory must be a contiguous [N, C, H, W]")


def _check_memory(memory: Tensor, index: Tensor, where: Tensor, x: Tensor) -> Tensor:
    _check_memory_tensor(memory)
    if x.shape[1:] != memory.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} does not fit the memory's images")
    index = _check_index(index, memory, "memory")
    if len(index) != len(x):
        raise ValueError(f"index has {len(index)} entries for {len(x)} images")
    if not (where.dtype == torch.int32 and where.shape == (len(x), 3)):
        raise TypeError(f"where must be int32 [{len(x)}, 3]")
    for name, t in (("where", where), ("x", x)):
        if t.device != memory.device:
            raise ValueError(f"{name} is on {t.device}, memory on {memory.device}")
    return index


def recall(
    memory: Tensor,
    index: Tensor,
    where: Tensor,
    x: Tensor,
    eps: Scalar,
    *,
    norm: str = "Linf",
) -> Tensor:
    """The attack's start from the adversary memory: `x` plus each sample's stored perturbation.

    For batches made elsewhere; `augment` forms the start along with its own.

    The perturbation takes the same crop and mirror as the image did, is zero where the crop shows
    padding, and is projected into the ball and [0, 1].

    Args:
        memory: int8 [N, C, H, W], in steps of eps / 127.
        index: int64 [B]; where: int32 [B, 3] as from `augment`.
        x: float32 [B, C, H, W], the augmented batch.
    Returns:
        Like `x`.
    """
    x = _check_images("x", x)
    _check_norm(norm)
    index = _check_memory(memory, index, where, x)
    return _recall(memory, index, where.contiguous(), x, _check_scalar("eps", eps, x), norm)


_remember = _define(
    "remember",
    "(Tensor(a!) memory, Tensor index, Tensor where, Tensor x, Tensor z, Tensor eps) -> ()",
)


@torch.library.register_fake("engine::remember")
def _(memory, index, where, x, z, eps):
    return None


def remember(
    memory: Tensor, index: Tensor, where: Tensor, x: Tensor, z: Tensor, eps: Scalar
) -> None:
    """Write the perturbation z - x back into `memory`, in place, through the inverse crop and mirror.

    Pixels that the crop cut away keep what they had. Arguments as for `recall`; an index that occurs
    twice keeps one of the two perturbations.
    """
    x = _check_images("x", x)
    z = _check_like("z", z, x, "x")
    index = _check_memory(memory, index, where, x)
    _remember(memory, index, where.contiguous(), x, z, _check_scalar("eps", eps, x))


# ---- optimiser -------------------------------------------------------------------------------


_sgd_ema_step = _define(
    "sgd_ema_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] averages, Tensor lr, Tensor found_inf, float momentum, float[] weight_decay, bool nesterov, Tensor ema_decay) -> ()",
)
_adamw_ema_step = _define(
    "adamw_ema_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] averages, Tensor lr, Tensor count, Tensor found_inf, float beta1, float beta2, float adam_eps, float[] weight_decay, Tensor ema_decay) -> ()",
)


@torch.library.register_fake("engine::sgd_ema_step")
@torch.library.register_fake("engine::adamw_ema_step")
def _(*args):
    return None


def sgd_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    averages: list[Tensor],
    *,
    lr: Scalar,
    found_inf: Tensor,
    momentum: float = 0.9,
    weight_decay: list[float],
    nesterov: bool = False,
    ema_decay: Scalar = 0.0,
) -> None:
    """Momentum SGD with weight decay and the weights' moving average, in place, in one pass.

    d = g + wd p;  m = momentum m + d;  p -= lr (d + momentum m if nesterov else m);
    e += (1 - ema_decay) (p - e). Nothing changes where `found_inf` is not 0.

    Args:
        params, momenta: float32 tensors; grads: the same shapes, any float dtype. At least one.
        averages: like `params`, or empty for no moving average.
        lr: learning rate; found_inf: float32 0-d or [1], device-held overflow flag.
        weight_decay: one number per parameter.
        ema_decay: in [0, 1).
    """
    _check_lists(params, weight_decay, averages, grads=grads, momenta=momenta)
    _sgd_ema_step(
        params,
        grads,
        momenta,
        averages,
        _check_scalar("lr", lr, params[0]),
        _check_scalar("found_inf", found_inf, params[0]),
        float(momentum),
        [float(d) for d in weight_decay],
        bool(nesterov),
        _check_scalar("ema_decay", ema_decay, params[0]),
    )


def adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    *,
    lr: Scalar,
    count: Tensor,
    found_inf: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    weight_decay: list[float],
    ema_decay: Scalar = 0.0,
) -> None:
    """AdamW and the weights' moving average, in place, in one pass (Loshchilov & Hutter, arXiv 1711.05101).

    m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;
    p = (1 - lr wd) p - lr / (1 - beta1^n) m / (sqrt(v) / sqrt(1 - beta2^n) + adam_eps);
    e += (1 - ema_decay) (p - e). Nothing changes where `found_inf` is not 0.

    Args:
        params, exp_avgs (m), exp_avg_sqs (v), averages, grads: as for `sgd_ema_step`.
        count: float32 0-d on the device: n, the number of this update, from 1; only read.
    """
    _check_lists(
        params, weight_decay, averages, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs
    )
    first = params[0]
    _adamw_ema_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        averages,
        _check_scalar("lr", lr, first),
        _check_scalar("count", count, first),
        _check_scalar("found_inf", found_inf, first),
        float(betas[0]),
        float(betas[1]),
        float(adam_eps),
        [float(d) for d in weight_decay],
        _check_scalar("ema_decay", ema_decay, first),
    )


def _check_lists(
    params: list[Tensor],
    weight_decay: list[float],
    averages: list[Tensor],
    **tensors: list[Tensor],
) -> None:
    if not (len(params) > 0):
        raise ValueError("params is empty")
    if averages:
        tensors["averages"] = averages
    for name, values in (*tensors.items(), ("weight_decay", weight_decay)):
        if len(values) != len(params):
            raise ValueError(f"{name} has {len(values)} for {len(params)} params")
    for name, values in tensors.items():
        for p, t in zip(params, values, strict=True):
            if t.shape != p.shape:
                raise ValueError(f"{name}: {tuple(t.shape)} for a {tuple(p.shape)} parameter")
            if t.device != p.device:
                raise ValueError(f"{name}: on {t.device}, parameter on {p.device}")


def finish_capture() -> None:
    """Complete what a capture of ops had to leave open; call it before the first replay."""
    module, _ = load("triton")
    if module is not None:
        module.finish_capture()
