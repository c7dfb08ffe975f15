"""Momentum SGD, weight decay, Nesterov and the weights' moving average: one launch for all parameters."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import flat_tile, on_device
from .maths import number

_TL = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class _Table(NamedTuple):
    """Where the tensors lie, on the device."""

    pointers: Tensor  # int64 [T, 5]: param, grad, momentum, average (0: none), element count
    chunks: Tensor  # int64 [P, 2]: tensor and first element of each program
    decay: Tensor  # float64 [T]: weight decay
    aligned: bool  # every pointer is a multiple of 16 bytes


# Gradients that autograd allocates anew mostly land on the addresses of an earlier step, so a few
# tables serve a whole run.
_tables: OrderedDict[tuple, _Table] = OrderedDict()
_MOST_TABLES = 32
# A captured graph reads its table at every replay, long after the cache has forgotten it.
_captured: dict[tuple, _Table] = {}


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
    ema_decay: float,
) -> None:
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple]] = {}
    rest = (lr, found_inf, momentum)
    for i, (p, g, m, decay) in enumerate(zip(params, grads, momenta, weight_decay, strict=True)):
        e = averages[i] if averages else None
        if not _fits(p, m, e) or g.dtype not in _TL:
            average = [] if e is None else [e]
            reference.sgd_ema_step([p], [g], [m], average, *rest, [decay], nesterov, ema_decay)
            continue
        if g.stride() != p.stride():
            g = torch.empty_like(p, dtype=g.dtype).copy_(g)
        groups.setdefault((p.dtype, g.dtype), []).append((p, g, m, e, decay))
    with on_device(params[0]):
        for (p_type, g_type), members in groups.items():
            tile = flat_tile(max(member[0].numel() for member in members))
            flags = {"NESTEROV": nesterov, "AVERAGE": bool(averages)}
            table = _table(members, tile["BLOCK"])
            if table is not None:
                sgd_ema_kernel[(len(table.chunks),)](
                    table.pointers, table.chunks, table.decay, lr, found_inf,
                    momentum, 1.0 - ema_decay,
                    PARAM=_TL[p_type], GRAD=_TL[g_type], ALIGNED=table.aligned, **flags, **tile,
                )  # fmt: skip
                continue
            launch_one_by_one(members, lr, found_inf, momentum, 1.0 - ema_decay, {**flags, **tile})


def launch_one_by_one(
    members: list[tuple],
    lr: Tensor,
    found_inf: Tensor,
    momentum: float,
    towards: float,
    constants: dict,
) -> None:
    """One launch for each (param, grad, momentum, average or None, weight decay)."""
    for p, g, m, e, decay in members:
        sgd_ema_one_kernel[(triton.cdiv(p.numel(), constants["BLOCK"]),)](
            p, g, m, e, lr, found_inf, momentum, decay, towards, p.numel(), **constants
        )


def _fits(p: Tensor, m: Tensor, e: Tensor | None) -> bool:
    """Whether a parameter and its state are dense, of one type and in one memory order."""
    state = (m,) if e is None else (m, e)
    same = all(t.dtype == p.dtype and t.stride() == p.stride() for t in state)
    dense = p.is_contiguous() or (
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
    )
    return same and dense and p.dtype in (torch.float32, torch.float64)


def _table(members: list[tuple], block: int) -> _Table | None:
    """The table for these tensors; None while a graph is captured that meets them for the first time.

    A new table is a copy from the host, which a capture does not allow. Gradients whose buffers live on
    across steps have theirs from the warm-up.
    """
    rows = tuple(
        (p.data_ptr(), g.data_ptr(), m.data_ptr(), 0 if e is None else e.data_ptr(), p.numel())
        for p, g, m, e, _ in members
    )
    decay = tuple(member[-1] for member in members)
    device = members[0][0].device
    key = (device, rows, decay)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if capturing:
        if table is not None:
            _captured[key] = table
        return table
    if table is None:
        table = _tables[key] = _build(rows, decay, block, device)
        if len(_tables) > _MOST_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


def _build(rows: tuple, decay: tuple[float, ...], block: int, device: torch.device) -> _Table:
    chunks = [(t, at) for t, row in enumerate(rows) for at in range(0, row[-1], block)]
    return _Table(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(chunks, dtype=torch.int64, device=device).view(-1, 2),
        torch.tensor(decay, dtype=torch.float64, device=device),
        all(pointer % 16 == 0 for row in rows for pointer in row[:-1]),
    )


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, e_ptr, offsets, n, lr, momentum, decay, towards,
    NESTEROV: tl.constexpr, AVERAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step for the elements `offsets` (below n, if MASKED) of one tensor; scalars in its type."""
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
def sgd_ema_kernel(
    pointers_ptr, chunks_ptr, decay_ptr, lr_ptr, found_inf_ptr,
    momentum: tl.float64, towards: tl.float64,
    PARAM: tl.constexpr, GRAD: tl.constexpr, NESTEROV: tl.constexpr, AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i updates chunk i, BLOCK elements of one tensor. Grid: (chunks,).

    Full chunks take no mask, so their accesses are 128 bits wide whatever the tensor's size.

    Args:
        pointers_ptr: int64 [T, 5], addresses of param, grad, momentum, average and the element count.
        chunks_ptr: int64 [P, 2], tensor and first element; decay_ptr: float64 [T].
        lr_ptr, found_inf_ptr: one float each. Nothing is written where found_inf is not 0.
        towards: 1 - ema_decay.
        PARAM, GRAD: element types; momentum and average have PARAM's.
        ALIGNED: every address is a multiple of 16 bytes.
    """
    if tl.load(found_inf_ptr) == 0:
        tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
        start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1)
        row = pointers_ptr + 5 * tensor
        p_ptr = tl.load(row).to(tl.pointer_type(PARAM))
        g_ptr = tl.load(row + 1).to(tl.pointer_type(GRAD))
        m_ptr = tl.load(row + 2).to(tl.pointer_type(PARAM))
        e_ptr = tl.load(row + 3).to(tl.pointer_type(PARAM))
        n = tl.load(row + 4)
        if ALIGNED:
            p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
            m_ptr, e_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(e_ptr, 16)
        start = tl.multiple_of(start, BLOCK)
        offsets = start + tl.arange(0, BLOCK)
        lr, decay = tl.load(lr_ptr).to(PARAM), tl.load(decay_ptr + tensor).to(PARAM)
        beta, towards_ = number(momentum, PARAM), number(towards, PARAM)
        if start + BLOCK <= n:
            _update(
                p_ptr, g_ptr, m_ptr, e_ptr, offsets, n, lr, beta, decay, towards_,
                NESTEROV, AVERAGE, False,
            )  # fmt: skip
        else:
            _update(
                p_ptr, g_ptr, m_ptr, e_ptr, offsets, n, lr, beta, decay, towards_,
                NESTEROV, AVERAGE, True,
            )  # fmt: skip


@triton.jit
def sgd_ema_one_kernel(
    p_ptr, g_ptr, m_ptr, e_ptr, lr_ptr, found_inf_ptr,
    momentum: tl.float64, decay: tl.float64, towards: tl.float64, n,
    NESTEROV: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for one tensor, for a graph capture that has no table. Grid: (ceil(n / BLOCK),).

    Args:
        p_ptr, m_ptr, e_ptr: float32 or float64 [n], dense (e_ptr None without AVERAGE).
        g_ptr: any float type [n].
        The rest: as for `sgd_ema_kernel`; decay: this tensor's weight decay.
    """
    if tl.load(found_inf_ptr) == 0:
        dtype: tl.constexpr = p_ptr.dtype.element_ty
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _update(
            p_ptr, g_ptr, m_ptr, e_ptr, offsets, n, tl.load(lr_ptr).to(dtype),
            number(momentum, dtype), number(decay, dtype), number(towards, dtype),
            NESTEROV, AVERAGE, True,
        )  # fmt: skip
