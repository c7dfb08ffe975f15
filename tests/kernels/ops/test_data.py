"""Batches and the adversary memory, on every backend."""

import pytest
import torch

from engine import kernels
from engine.kernels.reference.data import source_pixels

from .support import (
    LAYOUTS,
    check,
    dataset,
    generator,
    indices,
    memory_inputs,
    normal,
    plainly,
    rng_state,
)

DATA = [((9, 1, 28, 28), 2), ((6, 3, 7, 5), 4), ((4, 3, 8, 67), 0), ((3, 2, 1, 1), 0)]


@pytest.mark.parametrize(("flip", "cutout"), [(False, 0), (True, 3), (True, 4)])
@pytest.mark.parametrize("batch", [0, 1, 11])
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_augment_has_the_reference_bits(backend, device, shape, pad, batch, flip, cutout):
    args = (dataset(shape, device), indices(shape[0], batch, device))
    args = (*args, rng_state(device, seed=-1, step=1 << 40))
    options = {"pad": pad, "flip": flip, "cutout": min(cutout, shape[2]), "stream": 5}
    *outputs, start, share = kernels.augment(*args, **options)
    for out, expected in zip(outputs, plainly("augment", *args, **options)[:2], strict=True):
        assert torch.equal(out.cpu(), expected)
    assert start is None


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("batch", [0, 1, 11])
@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_augment_forms_the_start_that_recall_gives(backend, device, shape, pad, eps, batch, norm):
    memory = torch.randint(-127, 128, shape, generator=generator(23), dtype=torch.int8).to(device)
    # Twice the same sample under two crops is no rarity here.
    data, index = dataset(shape, device), indices(shape[0], batch, device)
    options = {"pad": pad, "flip": True, "cutout": min(3, shape[2]), "stream": 5}
    x, crops, start, _ = kernels.augment(
        data, index, rng_state(device), memory=memory, eps=eps, norm=norm, **options
    )
    alone = kernels.augment(data, index, rng_state(device), **options)
    assert torch.equal(x, alone[0])
    assert torch.equal(crops, alone[1])
    assert torch.equal(start, kernels.recall(memory, index, crops, x, eps, norm=norm))


def test_augment_draws_every_shift_and_both_mirrors(backend, device):
    data, index = dataset((4, 1, 8, 8), device), indices(4, 256, device)
    _, crops, *_ = kernels.augment(data, index, rng_state(device), pad=1, flip=True)
    crops = crops.cpu()
    assert {tuple(w) for w in crops[:, :2].tolist()} == {
        (dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    }
    assert 0.3 < crops[:, 2].float().mean() < 0.7


def test_cutout_is_a_square_that_lies_anywhere(backend, device):
    data, index = (
        torch.full((1, 2, 8, 8), 255, dtype=torch.uint8, device=device),
        indices(1, 400, device),
    )
    x, *_ = kernels.augment(data, index, rng_state(device), cutout=3)
    holes = (x.cpu() == 0).all(dim=1)
    assert torch.equal(holes, (x.cpu() == 0).any(dim=1))  # in all channels alike
    sizes = holes.flatten(1).sum(1)
    assert {int(n) for n in sizes} == {4, 6, 9}  # cut at a corner, at an edge, whole
    # Every pixel is as likely the centre: 1 in 64, over 400 draws.
    centres = {
        (int(h.any(1).nonzero().float().mean() * 2), int(h.any(0).nonzero().float().mean() * 2))
        for h in holes
    }
    assert len(centres) > 45


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_recall(backend, device, shape, pad, norm, layout):
    check("recall", *memory_inputs(shape, pad, 3, device, layout), 0.3, norm=norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_remember(backend, device, shape, pad, layout):
    memory, index, crops, x = memory_inputs(shape, pad, 3, device, layout)
    z = (x + normal(x.shape, device, 0.1)).clamp(0, 1)
    expected = memory.cpu().clone()
    plainly("remember", expected, index, crops, x, z, 0.2)
    kernels.remember(memory, index, crops, x, z, 0.2)
    gap = (memory.cpu().int() - expected.int()).abs()
    # A division that is not IEEE's may round a tie the other way.
    assert gap.max() <= 1
    assert (gap > 0).float().mean() < 0.01


@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_what_is_remembered_is_recalled(backend, device, shape, pad):
    memory, index, crops, x = memory_inputs(shape, pad, 3, device)
    eps = 0.3
    z = kernels.uniform_start(x, eps, rng_state(device))
    before = memory.clone()
    kernels.remember(memory, index, crops, x, z, eps)
    again = kernels.recall(memory, index, crops, x, eps)
    # What the crop shows of the padding is not stored, and comes back as x.
    h, w = shape[2:]
    _, inside = source_pixels(crops.cpu(), h, w)
    inside = inside.view(-1, 1, h, w).expand(x.shape)
    again, x, z = again.cpu(), x.cpu(), z.cpu()
    assert ((again - z).abs()[inside] <= 0.51 * eps / 127).all()
    assert torch.equal(again[~inside], x[~inside])
    untouched = [i for i in range(shape[0]) if i not in index.tolist()]
    assert torch.equal(memory[untouched], before[untouched])


def test_remember_and_recall_with_no_radius(backend, device):
    memory, index, crops, x = memory_inputs((6, 3, 7, 5), 2, 4, device)
    kernels.remember(memory, index, crops, x, x, 0.0)
    assert torch.equal(kernels.recall(memory, index, crops, x, 0.0), x)


def test_memory_of_an_empty_batch(backend, device):
    memory, index, crops, x = memory_inputs((6, 3, 7, 5), 2, 0, device)
    before = memory.clone()
    kernels.remember(memory, index, crops, x, x, 0.1)
    assert torch.equal(memory, before)
    assert kernels.recall(memory, index, crops, x, 0.1).shape == x.shape


def test_an_index_outside_the_dataset_is_refused(backend, device):
    if backend == "triton":
        pytest.skip("a device-held index is not read by the host")
    data, rng = dataset((6, 3, 7, 5), device), rng_state(device)
    for value in (-1, 6):
        with pytest.raises(IndexError, match="index"):
            kernels.augment(data, torch.tensor([0, value]), rng)
