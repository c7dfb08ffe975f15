"""Momentum SGD and AdamW with the weights' moving average, in one or two launches."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..layout import same_order
from .launch import flat_tile, on_device
from .maths import number

_TL = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class _Table(NamedTuple):
    """Hold the addresses of the tensors, on the device."""

    pointers: (
        Tensor  # int64 [T, 4 + moments]: param, grad, moments, average (0: none), element count
    )
    chunks: Tensor  # int64 [P, 2]: tensor and first element of each program
    numbers: Tensor  # float64 [T]: each tensor's own number, its weight decay or its place


class _Member(NamedTuple):
    """Hold one parameter with its gradient, moments, average and own number."""

    p: Tensor
    g: Tensor
    moments: tuple[Tensor, ...]
    e: Tensor | None
    number: float


# The gradients of a step mostly have the addresses of an earlier step's, so a few tables serve a
# whole run.
_tables: OrderedDict[tuple, _Table] = OrderedDict()
_MOST_TABLES = 32


class _Capture(NamedTuple):
    """Hold the tables that the launches of a capture read in every replay.

    Attributes:
        tables: by device, rows and numbers.
        unfilled: tables that the capture allocated, each with the content to write afterwards.
    """

    tables: dict[tuple, _Table]
    unfilled: list[tuple[_Table, _Table]]


_capture: _Capture | None = None


def sgd_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    averages: list[Tensor],
    lr: Tensor,
    found_inf: Tensor,
    momentum: float,
    weight_decay: list[float],
    nesterov: bool,
    ema_decay: Tensor,
) -> None:
    rest = (lr, found_inf, momentum)

    def alone(m: _Member) -> None:
        reference.sgd_ema_step(
            [m.p], [m.g], [*m.moments], _list(m.e), *rest, [m.number], nesterov, ema_decay
        )

    def launch(table: _Table, constants: dict) -> None:
        sgd_ema_kernel[(len(table.chunks),)](
            table.pointers, table.chunks, table.numbers, lr, found_inf, ema_decay, momentum,
            NESTEROV=nesterov, **constants,
        )  # fmt: skip

    _run(_members(params, grads, (momenta,), averages, weight_decay), alone, launch)


def adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    lr: Tensor,
    count: Tensor,
    found_inf: Tensor,
    beta1: float,
    beta2: float,
    adam_eps: float,
    weight_decay: list[float],
    ema_decay: Tensor,
) -> None:
    rest = (lr, count, found_inf, beta1, beta2, adam_eps)

    def alone(m: _Member) -> None:
        first, second = m.moments
        reference.adamw_ema_step(
            [m.p], [m.g], [first], [second], _list(m.e), *rest, [m.number], ema_decay
        )

    def launch(table: _Table, constants: dict) -> None:
        adamw_ema_kernel[(len(table.chunks),)](
            table.pointers, table.chunks, table.numbers, lr, count, found_inf, ema_decay,
            beta1, beta2, math.log(beta1), math.log(beta2), adam_eps, **constants,
        )  # fmt: skip

    members = _members(params, grads, (exp_avgs, exp_avg_sqs), averages, weight_decay)
    _run(members, alone, launch)


def perturb_weights(
    params: list[Tensor], grads: list[Tensor], copies: list[Tensor], gamma: Tensor
) -> None:
    def alone(m: _Member) -> None:
        reference.perturb_weights([m.p], [m.g], [*m.moments], gamma)

    places = [float(i) for i in range(len(params))]
    members = _members(params, grads, (copies,), [], places)
    steps = _steps(params, grads, gamma)

    def launch(table: _Table, constants: dict) -> None:
        del constants["AVERAGE"]
        perturb_kernel[(len(table.chunks),)](
            table.pointers, table.chunks, table.numbers, steps, **constants
        )

    _run(members, alone, launch)


def _steps(params: list[Tensor], grads: list[Tensor], gamma: Tensor) -> Tensor:
    """Return the factor of each gradient, float64 [T]; NaN for a tensor that stays."""
    # PyTorch's norms of lists take two launches for all tensors.
    norms = torch._foreach_norm([*params, *grads], 2, dtype=torch.float64)
    weight, grad = torch.stack(norms).view(2, -1).unbind()
    steps = gamma.double() * weight / (grad + reference.TINY)
    # A step of 0 along an infinite gradient would be NaN.
    return torch.where(steps.isfinite() & grad.isfinite(), steps, torch.nan)


@contextlib.contextmanager
def capturing() -> Iterator[list[Tensor]]:
    """Allocate in the block the tables that captured launches read; write them after the block.

    A capture allows no copy from the host, and a graph reads its tables in a replay. If the block
    raises, nothing is written.

    Yields:
        A list. After the block it holds the tables, and must live as long as the graph.
    """
    global _capture
    before, capture = _capture, _Capture({}, [])
    _capture = capture
    kept: list[Tensor] = []
    try:
        yield kept
    finally:
        _capture = before
    for empty, full in capture.unfilled:
        for into, values in zip(empty, full, strict=True):
            into.copy_(values)
    for table in capture.tables.values():
        kept += table


def _members(
    params: list[Tensor],
    grads: list[Tensor],
    moments: tuple[list[Tensor], ...],
    averages: list[Tensor],
    weight_decay: list[float],
) -> list[_Member]:
    return [
        _Member(p, g, tuple(m[i] for m in moments), averages[i] if averages else None, decay)
        for i, (p, g, decay) in enumerate(zip(params, grads, weight_decay, strict=True))
    ]


def _list(t: Tensor | None) -> list[Tensor]:
    return [] if t is None else [t]


def _run(
    members: list[_Member],
    alone: Callable[[_Member], None],
    launch: Callable[[_Table, dict], None],
) -> None:
    """Launch once for each pair of types and each alignment; `alone` updates what no kernel serves.

    Under DistributedDataParallel a gradient is a view that begins at the end of the one before. So
    after a bias of ten classes, the rest of the bucket is not aligned to 16 bytes. The aligned
    tensors keep their 128-bit accesses in a separate launch.
    """
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[_Member, tuple[int, ...]]]] = {}
    for member in members:
        p, g = member.p, member.g
        if not _fits(member) or g.dtype not in _TL:
            alone(member)
            continue
        if not same_order(g, p):
            member = member._replace(g=torch.empty_like(p, dtype=g.dtype).copy_(g))
        row = _row(member)
        aligned = all(address % 16 == 0 for address in row[:-1])
        groups.setdefault((p.dtype, g.dtype, aligned), []).append((member, row))
    with on_device(members[0].p):
        for (p_type, g_type, aligned), group in groups.items():
            together, rows = zip(*group, strict=True)
            tile = flat_tile(max(member.p.numel() for member in together))
            table = _table(together, rows, tile["BLOCK"])
            types = {"PARAM": _TL[p_type], "GRAD": _TL[g_type]}
            average = together[0].e is not None
            launch(table, {**types, "AVERAGE": average, "ALIGNED": aligned, **tile})


def _fits(member: _Member) -> bool:
    """Tell whether a parameter and its state are dense, of one type and in one memory order."""
    p = member.p
    same = all(t.dtype == p.dtype and same_order(t, p) for t in (*member.moments, *_list(member.e)))
    return same and same_order(p, p) and p.dtype in (torch.float32, torch.float64)


def _row(member: _Member) -> tuple[int, ...]:
    """Return a member's row of a table: addresses, and the element count."""
    moments = (t.data_ptr() for t in member.moments)
    average = 0 if member.e is None else member.e.data_ptr()
    return member.p.data_ptr(), member.g.data_ptr(), *moments, average, member.p.numel()


def _table(members: tuple[_Member, ...], rows: tuple[tuple[int, ...], ...], block: int) -> _Table:
    """Return the table for these tensors; in a capture, allocate a missing one without content.

    Raises:
        RuntimeError: in a capture outside `capturing`, where nothing keeps the table for replays.
    """
    numbers = tuple(m.number for m in members)
    device = members[0].p.device
    key = (device, rows, numbers)
    table = _tables.get(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if _capture is None:
            raise RuntimeError("capture optimiser ops within `kernels.capturing()` only")
        table = table or _capture.tables.get(key)
        if table is None:
            full = _build(rows, numbers, block, torch.device("cpu"))
            table = _Table(*(torch.empty_like(t, device=device) for t in full))
            _capture.unfilled.append((table, full))
        _capture.tables[key] = table
        return table
    if table is None:
        table = _tables[key] = _build(rows, numbers, block, device)
        if len(_tables) > _MOST_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


def _build(rows: tuple, numbers: tuple[float, ...], block: int, device: torch.device) -> _Table:
    chunks = [(t, at) for t, row in enumerate(rows) for at in range(0, row[-1], block)]
    return _Table(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(chunks, dtype=torch.int64, device=device).view(-1, 2),
        torch.tensor(numbers, dtype=torch.float64, device=device),
    )


@triton.jit
def _sgd(
    p_ptr, g_ptr, m_ptr, e_ptr, offsets, n, lr, momentum, decay, towards,
    NESTEROV: tl.constexpr, AVERAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update the elements `offsets` (below n, if MASKED) of one tensor; scalars in its type."""
    mask = offsets < n if MASKED else None
    p = tl.load(p_ptr + offsets, mask=mask)
    m = tl.load(m_ptr + offsets, mask=mask)
    d = tl.load(g_ptr + offsets, mask=mask).to(p.dtype) + decay * p
    m = momentum * m + d
    p -= lr * (d + momentum * m if NESTEROV else m)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(p_ptr + offsets, p, mask=mask)
    if AVERAGE:
        e = tl.load(e_ptr + offsets, mask=mask)
        tl.store(e_ptr + offsets, e + towards * (p - e), mask=mask)


@triton.jit
def _adamw(
    p_ptr, g_ptr, m_ptr, v_ptr, e_ptr, offsets, n,
    keep, rate, root, towards_m, beta2, towards_v, eps, towards,
    AVERAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update the elements `offsets` (below n, if MASKED) of one tensor; scalars in its type."""
    mask = offsets < n if MASKED else None
    p = tl.load(p_ptr + offsets, mask=mask)
    m = tl.load(m_ptr + offsets, mask=mask)
    v = tl.load(v_ptr + offsets, mask=mask)
    d = tl.load(g_ptr + offsets, mask=mask).to(p.dtype)
    m += towards_m * (d - m)
    v = beta2 * v + towards_v * d * d
    p = keep * p - rate * m / (tl.sqrt(v) / root + eps)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    tl.store(p_ptr + offsets, p, mask=mask)
    if AVERAGE:
        e = tl.load(e_ptr + offsets, mask=mask)
        tl.store(e_ptr + offsets, e + towards * (p - e), mask=mask)


@triton.jit
def _perturb(p_ptr, g_ptr, copy_ptr, offsets, n, step, MASKED: tl.constexpr):
    """Move the elements `offsets` (below n, if MASKED) of one tensor; `step` in its type."""
    mask = offsets < n if MASKED else None
    p = tl.load(p_ptr + offsets, mask=mask)
    g = tl.load(g_ptr + offsets, mask=mask).to(p.dtype)
    tl.store(copy_ptr + offsets, p, mask=mask)
    tl.store(p_ptr + offsets, tl.where(step == step, p + step * g, p), mask=mask)


@triton.jit
def _address(row, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load the address at `row` of the table."""
    pointer = tl.load(row).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def sgd_ema_kernel(
    pointers_ptr, chunks_ptr, decay_ptr, lr_ptr, found_inf_ptr, ema_ptr, momentum: tl.float64,
    PARAM: tl.constexpr, GRAD: tl.constexpr, NESTEROV: tl.constexpr, AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update chunk i, BLOCK elements of one tensor, in program i. Grid: (chunks,).

    A full chunk needs no mask, so its accesses are 128 bits wide for any size of the tensor.

    Args:
        pointers_ptr: int64 [T, 5], addresses of param, grad, momentum and average, and the element
            count.
        chunks_ptr: int64 [P, 2], tensor and first element; decay_ptr: float64 [T].
        lr_ptr, found_inf_ptr, ema_ptr: one float each: learning rate, overflow flag (if it is not
            0, nothing is written), decay of the average.
        PARAM, GRAD: element types; momentum and average have the type PARAM.
        ALIGNED: every address is a multiple of 16 bytes.
    """
    if tl.load(found_inf_ptr) == 0:
        tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
        start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1)
        row = pointers_ptr + 5 * tensor
        p_ptr, g_ptr = _address(row, PARAM, ALIGNED), _address(row + 1, GRAD, ALIGNED)
        m_ptr, e_ptr = _address(row + 2, PARAM, ALIGNED), _address(row + 3, PARAM, ALIGNED)
        n = tl.load(row + 4)
        start = tl.multiple_of(start, BLOCK)
        offsets = start + tl.arange(0, BLOCK)
        lr, decay = tl.load(lr_ptr).to(PARAM), tl.load(decay_ptr + tensor).to(PARAM)
        beta, towards = number(momentum, PARAM), 1.0 - tl.load(ema_ptr).to(PARAM)
        if start + BLOCK <= n:
            _sgd(
                p_ptr, g_ptr, m_ptr, e_ptr, offsets, n, lr, beta, decay, towards,
                NESTEROV, AVERAGE, False,
            )  # fmt: skip
        else:
            _sgd(
                p_ptr, g_ptr, m_ptr, e_ptr, offsets, n, lr, beta, decay, towards,
                NESTEROV, AVERAGE, True,
            )  # fmt: skip


@triton.jit
def adamw_ema_kernel(
    pointers_ptr, chunks_ptr, decay_ptr, lr_ptr, count_ptr, found_inf_ptr, ema_ptr,
    beta1: tl.float64, beta2: tl.float64, log_beta1: tl.float64, log_beta2: tl.float64,
    eps: tl.float64,
    PARAM: tl.constexpr, GRAD: tl.constexpr, AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update chunk i by AdamW, in program i, as `sgd_ema_kernel` does by SGD. Grid: (chunks,).

    Args:
        pointers_ptr: int64 [T, 6], addresses of param, grad, first and second moment and average,
            and the element count.
        count_ptr: one float, the number of this update from 1.
        log_beta1, log_beta2: natural logarithms of the betas.
    """
    if tl.load(found_inf_ptr) == 0:
        tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
        start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1)
        row = pointers_ptr + 6 * tensor
        p_ptr, g_ptr = _address(row, PARAM, ALIGNED), _address(row + 1, GRAD, ALIGNED)
        m_ptr, v_ptr = _address(row + 2, PARAM, ALIGNED), _address(row + 3, PARAM, ALIGNED)
        e_ptr = _address(row + 4, PARAM, ALIGNED)
        n = tl.load(row + 5)
        start = tl.multiple_of(start, BLOCK)
        offsets = start + tl.arange(0, BLOCK)
        # Use float64 for the bias corrections: 1 - beta^n cancels digits.
        count, lr = tl.load(count_ptr).to(tl.float64), tl.load(lr_ptr).to(tl.float64)
        decay = tl.load(decay_ptr + tensor)
        rate = (lr / (1.0 - tl.exp(count * log_beta1))).to(PARAM)
        root = tl.sqrt(1.0 - tl.exp(count * log_beta2)).to(PARAM)
        keep = (1.0 - lr * decay).to(PARAM)
        towards_m, towards_v = number(1.0 - beta1, PARAM), number(1.0 - beta2, PARAM)
        second, small = number(beta2, PARAM), number(eps, PARAM)
        towards = 1.0 - tl.load(ema_ptr).to(PARAM)
        if start + BLOCK <= n:
            _adamw(
                p_ptr, g_ptr, m_ptr, v_ptr, e_ptr, offsets, n,
                keep, rate, root, towards_m, second, towards_v, small, towards, AVERAGE, False,
            )  # fmt: skip
        else:
            _adamw(
                p_ptr, g_ptr, m_ptr, v_ptr, e_ptr, offsets, n,
                keep, rate, root, towards_m, second, towards_v, small, towards, AVERAGE, True,
            )  # fmt: skip


@triton.jit
def perturb_kernel(
    pointers_ptr, chunks_ptr, places_ptr, steps_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy chunk i of one tensor and move it along its gradient, in program i. Grid: (chunks,).

    Args:
        pointers_ptr: int64 [T, 5], addresses of param, grad, copy, 0, and the element count.
        places_ptr: float64 [T], the tensor's place in `steps_ptr`.
        steps_ptr: float64, the factor of each gradient; NaN: the tensor stays.
    """
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1)
    row = pointers_ptr + 5 * tensor
    p_ptr, g_ptr = _address(row, PARAM, ALIGNED), _address(row + 1, GRAD, ALIGNED)
    copy_ptr = _address(row + 2, PARAM, ALIGNED)
    n = tl.load(row + 4)
    start = tl.multiple_of(start, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    place = tl.load(places_ptr + tensor).to(tl.int32)
    step = tl.load(steps_ptr + place).to(PARAM)
    if start + BLOCK <= n:
        _perturb(p_ptr, g_ptr, copy_ptr, offsets, n, step, False)
    else:
        _perturb(p_ptr, g_ptr, copy_ptr, offsets, n, step, True)
