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
    *outputs, start, _ = kernels.augment(*args, **options)
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


CHANGES = [
    {"cutmix": True},
    {"cutmix": True, "cutout": 1, "jitter": 0.3},
    {"erase": 0.5, "jitter": 0.4},
    {"cutmix": True, "erase": 0.7, "jitter": 0.9},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 11])
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_changed_images_have_the_reference_bits(backend, device, shape, pad, batch, changes):
    args = (dataset(shape, device), indices(shape[0], batch, device))
    args = (*args, rng_state(device, seed=-1, step=1 << 40))
    options = {"pad": pad, "flip": True, "stream": 5, **changes}
    if shape[1] != 3:
        options["jitter"] = 0.0
    found, expected = kernels.augment(*args, **options), plainly("augment", *args, **options)
    assert torch.equal(found.x.cpu(), expected.x)
    assert torch.equal(found.crops.cpu(), expected.crops)
    assert (found.share is None) == ("cutmix" not in changes)
    if found.share is not None:
        assert found.share.shape == (batch,)
        assert torch.equal(found.share.cpu(), expected.share)


def test_the_start_of_changed_images_is_the_one_that_recall_gives(backend, device):
    shape = (6, 3, 7, 5)
    memory = torch.randint(-127, 128, shape, generator=generator(23), dtype=torch.int8).to(device)
    args = dataset(shape, device), indices(6, 11, device), rng_state(device)
    options = {"pad": 2, "flip": True, "erase": 0.5, "jitter": 0.4}
    found = kernels.augment(*args, memory=memory, eps=0.3, **options)
    assert torch.equal(found.x, kernels.augment(*args, **options).x)
    assert torch.equal(found.start, kernels.recall(memory, args[1], found.crops, found.x, 0.3))


def test_cutmix_takes_a_box_of_the_next_image_and_reports_its_share(backend, device):
    b, side = 400, 8
    # Every image has one value, so a pixel tells its image.
    values = torch.arange(b, device=device) % 251 + 1
    data = values.to(torch.uint8)[:, None, None, None].expand(b, 2, side, side).contiguous()
    index = torch.arange(b, device=device)
    x, _, _, share = kernels.augment(data, index, rng_state(device), cutmix=True)
    found = (x * 255).round().long().cpu()
    own, other = values.cpu()[:, None, None, None], values.roll(-1).cpu()[:, None, None, None]
    assert ((found == own) | (found == other)).all()
    boxes = (found == other).all(dim=1)
    assert torch.equal(boxes, (found == other).any(dim=1))  # in all channels alike
    assert torch.equal(share.cpu(), 1 - boxes.float().mean((1, 2)))
    for box in boxes:
        assert box.sum() == box.any(0).sum() * box.any(1).sum()
    # The share of the area is uniform but for the part of a box that lies outside.
    assert 0.6 < share.mean() < 0.8
    assert share.min() < 0.1
    assert share.max() > 0.97


def test_erasing_clears_a_rectangle_of_a_share_of_the_images(backend, device):
    data = torch.full((1, 2, 8, 8), 255, dtype=torch.uint8, device=device)
    x, *_ = kernels.augment(data, indices(1, 400, device), rng_state(device), erase=0.25)
    holes = (x.cpu() == 0).all(dim=1)
    assert torch.equal(holes, (x.cpu() == 0).any(dim=1))
    erased = holes.flatten(1).any(1)
    assert 0.15 < erased.float().mean() < 0.35
    sides = {(int(h.any(1).sum()), int(h.any(0).sum())) for h in holes[erased]}
    assert {side for pair in sides for side in pair} == {1, 2, 3, 4}
    for h in holes[erased]:
        assert h.sum() == h.any(0).sum() * h.any(1).sum()


def test_jitter_changes_colours_by_a_factor_each(backend, device):
    data, index = dataset((5, 3, 6, 6), device), torch.arange(5, device=device)
    plain, most = kernels.augment(data, index, rng_state(device)).x.cpu().double(), 0.2
    x = kernels.augment(data, index, rng_state(device), jitter=most).x.cpu().double()
    assert not torch.equal(x, plain)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    inside = ((x > 0) & (x < 1)).all(1)
    for before, after, whole in zip(plain, x, inside, strict=True):
        # Grey is an affine map of grey: 0.5 + contrast (brightness grey - 0.5).
        old, new = (weights * before).sum(0)[whole], (weights * after).sum(0)[whole]
        slope, offset = torch.linalg.lstsq(
            torch.stack([old, torch.ones_like(old)], 1), new
        ).solution
        assert torch.allclose(slope * old + offset, new, atol=1e-5)
        contrast = 1 - 2 * offset
        brightness = slope / contrast
        # The distance from grey is scaled by all three factors.
        apart = (after - (weights * after).sum(0))[:, whole] / (
            slope * (before - (weights * before).sum(0))[:, whole]
        )
        for factor in (contrast, brightness, apart.median()):
            assert 1 - most - 1e-4 <= factor <= 1 + most + 1e-4
        assert apart.max() - apart.min() < 1e-2


def test_jitter_leaves_the_padding_black(backend, device):
    data, index = dataset((4, 3, 8, 8), device) | 1, indices(4, 20, device)
    x, crops, *_ = kernels.augment(data, index, rng_state(device), pad=3, flip=True, jitter=0.5)
    _, inside = source_pixels(crops.cpu(), 8, 8)
    outside = ~inside.view(-1, 1, 8, 8).expand(x.shape)
    assert outside.any()
    assert (x.cpu()[outside] == 0).all()


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
