"""Folders of pictures of any size: index, frames, loaders, damaged files."""

from __future__ import annotations

import io
import json
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from engine import cli, data, recipes
from engine.data import datasets, loaders
from engine.data.loaders import dali, streamed_dali
from engine.data.photos import Framing, Photos, decode, index_of, of_index
from engine.errors import EngineError

from .generated import SIZES, folder, photo

needs_dali = pytest.mark.skipif(dali.unavailable() is not None, reason="DALI is not installed")
NAMES = [pytest.param("dali", marks=needs_dali), "torch"]
CROPS = {"seed": 3, "scale": (0.25, 1.0), "flip": True, "jitter": 0.3}
SHIFTS = {"seed": 3, "pad": 4, "flip": True}
# DALI and Pillow decode by the same library here, and their pixels are equal. Another version of
# libjpeg-turbo may round otherwise.
TOLERANCE = 2 / 255


@pytest.fixture(autouse=True)
def _root(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("photos") / "set", classes=3, train=7, test=2)


def photos(path: Path, split="train", size=(32, 32), damaged="refuse") -> Photos:
    index = index_of(path, split, path.parent / "index")
    return of_index(index, Framing(size, round(min(size) / 0.875)), damaged, 2, split == "test")


def batches(held: Photos, name: str, options, *, size=4, epoch=1, first=0, **more):
    loader = loaders.build(name, held, held.labels, size, **options, **more)
    try:
        return [
            type(b)(*(t if t is None else t.clone() for t in b)) for b in loader.epoch(epoch, first)
        ]
    finally:
        loader.close()


def refused(path: Path, split="train", **options) -> str:
    with pytest.raises(EngineError) as caught:
        photos(path, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_the_index_holds_labels_and_sizes_and_is_kept(tmp_path, shared, monkeypatch):
    held = photos(shared)
    assert len(held) == 21
    assert held.shape == (21, 3, 32, 32)
    assert held.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert held.index.classes == ("class0", "class1", "class2")
    assert [tuple(s) for s in held.index.sizes[:5].tolist()] == list(SIZES)
    assert held.index.plain.all()
    # A second reading opens no picture.
    monkeypatch.setattr(decode, "header", None)
    again = photos(shared)
    assert again.index.names == held.index.names
    assert torch.equal(again.index.sizes, held.index.sizes)


def test_a_changed_folder_is_indexed_again_and_a_damaged_index_too(tmp_path, caplog):
    path = folder(tmp_path / "set", classes=2, train=3, test=1)
    assert len(photos(path)) == 6
    (path / "train/class0/0.jpg").unlink()
    assert len(photos(path)) == 5
    (kept,) = (path.parent / "index").glob("pictures-*-train-*")
    kept.write_bytes(kept.read_bytes()[:-3] + b"xyz")
    assert len(photos(path)) == 5
    assert "indexing again" in caplog.text


def test_classes_may_have_folders_and_val_serves_beside_a_test_without_classes(tmp_path):
    path = folder(tmp_path / "set", classes=2, train=3, test=2)
    (path / "train/class0/images").mkdir()
    (path / "train/class0/0.jpg").rename(path / "train/class0/images/0.JPEG")
    (path / "test").mkdir()
    (path / "test/unlabelled.jpg").write_bytes(b"x")
    assert len(photos(path)) == 6
    assert len(photos(path, "test")) == 4


def test_test_pictures_are_shuffled_once_so_the_first_stand_for_all(shared):
    labels = photos(shared, "test").labels
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert labels.tolist() != sorted(labels.tolist())
    assert torch.equal(labels, photos(shared, "test").labels)


def test_a_frame_depends_on_seed_epoch_and_position_alone():
    framing = Framing((32, 48), 40, seed=5, scale=(0.1, 1.0), flip=True, jitter=0.2)
    positions, sizes = torch.arange(500), torch.tensor(SIZES * 100, dtype=torch.int32)
    drawn = framing.draw(3, positions, sizes)
    part = torch.tensor([77, 3, 401])
    alone = framing.draw(3, part, sizes[part])
    assert torch.equal(alone.windows, drawn.windows[part])
    assert torch.equal(alone.crops, drawn.crops[part])
    for other in (
        framing.draw(4, positions, sizes),
        replace(framing, seed=6).draw(3, positions, sizes),
    ):
        assert (other.windows != drawn.windows).any(1).float().mean() > 0.95
    top, left, height, width = drawn.windows.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    share = (height * width) / sizes.prod(1)
    assert 0.09 < share.min() < 0.2
    assert 0.8 < share.max() <= 1.0
    assert 0.4 < drawn.crops[:, 2].float().mean() < 0.6
    # The aspect ratio is the network's, within 4 / 3, and rounding.
    ratio = (width / height) / 1.5
    assert 0.7 < ratio.min() < 0.85
    assert 1.2 < ratio.max() < 1.45


def test_a_picture_that_no_random_window_fits_gets_its_centre():
    framing = Framing((32, 32), 37, scale=(1.0, 1.0))
    windows = framing.draw(0, torch.arange(2), torch.tensor([[10, 200], [3, 3]], dtype=torch.int32))
    assert windows.windows.tolist()[0] == [0, 94, 10, 13]
    framing = Framing((32, 32), 37)
    assert framing.centre(torch.tensor([[1, 1], [1, 900]], dtype=torch.int32))[:, 2:].min() == 1


def test_the_centre_window_is_a_resize_and_a_centre_crop():
    image = photo(1, 2, (150, 201))
    framing = Framing((56, 56), 64)
    (window,) = framing.centre(torch.tensor([[150, 201]], dtype=torch.int32)).tolist()
    ours = decode.pixels(encoded(image, "PNG"), window, (56, 56)).astype(int)
    scaled = image.resize((round(201 * 64 / 150), 64), Image.Resampling.BILINEAR)
    left = round((scaled.width - 56) / 2)
    theirs = np.asarray(scaled.crop((left, 4, left + 56, 60))).astype(int)
    assert np.abs(ours - theirs).mean() < 2
    assert np.corrcoef(ours.flatten(), theirs.flatten())[0, 1] > 0.999


def test_colours_are_brightness_contrast_and_saturation():
    framing = Framing((8, 8), 9, jitter=0.4)
    matrix, offset = framing.colours(2, torch.arange(64))
    x = torch.rand(64, 3, 10)
    changed = torch.baddbmm(offset, matrix, x)
    grey = torch.full((64, 3, 1), 0.5)
    # Grey stays grey, whatever the saturation.
    moved = torch.baddbmm(offset, matrix, grey)
    torch.testing.assert_close(moved[:, :1].expand(-1, 3, -1), moved)
    assert (changed - x).abs().max() > 0.1
    none, zero = replace(framing, jitter=0.0).colours(2, torch.arange(4))
    torch.testing.assert_close(none, torch.eye(3).expand(4, 3, 3))
    assert not zero.any()


@needs_dali
@pytest.mark.parametrize("options", [CROPS, SHIFTS], ids=["crops", "shifts"])
def test_dali_and_pillow_give_the_same_batches(shared, options):
    held = photos(shared, size=(32, 40))
    ours, theirs = (batches(held, name, options, workers=0) for name in ("dali", "torch"))
    assert len(ours) == len(theirs) == 5
    for a, b in zip(ours, theirs, strict=True):
        assert a.x.shape == (4, 3, 32, 40)
        assert a.x.is_contiguous()
        torch.testing.assert_close(a.x, b.x, atol=TOLERANCE, rtol=0)
        assert (a.x - b.x).abs().mean() < TOLERANCE / 4
        for field in ("y", "samples", "crops"):
            assert torch.equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_pictures_in_their_frames(shared, name):
    held = photos(shared)
    framing = replace(held.framing, seed=9, pad=5, flip=True)
    for batch in batches(held, name, {"seed": 9, "pad": 5, "flip": True}, workers=0):
        sizes = held.sizes_of(batch.samples)
        windows, crops = framing.draw(1, batch.samples, sizes)
        assert torch.equal(batch.crops, crops)
        assert torch.equal(batch.y, held.labels[batch.samples])
        for i, position in enumerate(batch.samples.tolist()):
            file = held.index.path(int(held.rows[position])).read_bytes()
            plain = torch.from_numpy(decode.pixels(file, windows[i].tolist(), (32, 32)).copy())
            plain = torch.nn.functional.pad(plain.permute(2, 0, 1), (5, 5, 5, 5)) / 255
            dy, dx, mirrored = crops[i].tolist()
            wanted = plain[:, 5 + dy : 37 + dy, 5 + dx : 37 + dx]
            wanted = wanted.flip(2) if mirrored else wanted
            torch.testing.assert_close(batch.x[i], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_goes_on_in_its_middle(shared, name):
    held = photos(shared)
    whole = batches(held, name, CROPS, workers=0)
    rest = batches(held, name, CROPS, first=2, workers=0)
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.samples, b.samples)


def test_worker_processes_give_the_same_batches(shared):
    held = photos(shared)
    loader = loaders.build("torch", held, held.labels, 4, workers=2, **CROPS)
    for epoch in (0, 1):
        alone = batches(held, "torch", CROPS, epoch=epoch, workers=0)
        for a, b in zip(loader.epoch(epoch), alone, strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.crops, b.crops)
    loader.close()


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_see_each_file_once_an_epoch(shared, name):
    held = photos(shared)[:20]
    ranks = [batches(held, name, CROPS, size=2, rank=rank, world=2, workers=0) for rank in (0, 1)]
    seen = [b.samples for rank in ranks for b in rank]
    assert torch.cat(seen).sort().values.tolist() == list(range(20))
    # Two ranks and one draw the same frames, because a frame does not depend on the batch.
    alone = {
        int(position): x
        for b in batches(held, name, CROPS, workers=0)
        for position, x in zip(b.samples, b.x, strict=True)
    }
    assert all(
        torch.equal(x, alone[int(position)])
        for rank in ranks
        for b in rank
        for position, x in zip(b.samples, b.x, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_replays_repeat_a_batch(shared, name):
    found = batches(photos(shared), name, CROPS, workers=0, replays=2)
    assert len(found) == 10
    assert torch.equal(found[0].x, found[1].x)
    assert not torch.equal(found[1].x, found[2].x)


def test_the_resident_loader_takes_no_pictures(shared):
    held = photos(shared)
    with pytest.raises(EngineError, match="streamed"):
        loaders.build("resident", held, held.labels, 4)
    with pytest.raises(EngineError, match="batch of 64 is larger"):
        loaders.build("torch", held, held.labels, 64)


def test_auto_is_dali_and_says_so_where_it_is_missing(shared, monkeypatch, caplog):
    held = photos(shared)
    monkeypatch.setattr(dali, "unavailable", lambda: "NVIDIA DALI is not installed")
    loader = loaders.build("auto", held, held.labels, 4)
    assert isinstance(loader, loaders.WorkerPhotoLoader)
    assert "torch's DataLoader reads the pictures: NVIDIA DALI is not" in caplog.text
    loader.close()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(1, 1, (60, 90)), "JPEG", exif=exif)


def transparent() -> Image.Image:
    image = photo(3, 1, (60, 90)).convert("RGBA")
    image.putalpha(128)
    return image


KINDS = {
    "rgb.png": encoded(photo(1, 1, (60, 90)), "PNG"),
    "grey.jpg": encoded(photo(1, 1, (60, 90)).convert("L"), "JPEG"),
    "grey.png": encoded(photo(1, 1, (60, 90)).convert("L"), "PNG"),
    "cmyk.jpg": encoded(photo(1, 1, (60, 90)).convert("CMYK"), "JPEG"),
    "alpha.png": encoded(transparent(), "PNG"),
    "palette.png": encoded(photo(1, 1, (60, 90)).convert("P"), "PNG"),
    "lossy.webp": encoded(photo(1, 1, (60, 90)), "WEBP"),
    "alpha.webp": encoded(transparent(), "WEBP"),
    "turned.jpg": turned(),
    "progressive.jpg": encoded(photo(1, 1, (60, 90)), "JPEG", progressive=True),
    "deep.png": encoded(
        Image.fromarray((np.arange(5400).reshape(60, 90) * 12).astype(np.uint16)), "PNG"
    ),
}


@needs_dali
def test_every_kind_of_picture_comes_upright_and_rgb_through_both(tmp_path):
    path = folder(tmp_path / "set", classes=2, train=1, test=1)
    for name, content in KINDS.items():
        (path / "train/class0" / name).write_bytes(content)
    held = photos(path)
    sizes = dict(
        zip((Path(n).name for n in held.index.names), held.index.sizes.tolist(), strict=True)
    )
    assert sizes["turned.jpg"] == [90, 60]
    assert sizes["deep.png"] == [60, 90]
    ours, theirs = (
        batches(held, name, CROPS, size=len(held), workers=0)[0] for name in ("dali", "torch")
    )
    torch.testing.assert_close(ours.x, theirs.x, atol=TOLERANCE, rtol=0)
    assert not torch.isnan(ours.x).any()
    # Against Pillow's own functions.
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(KINDS["turned.jpg"]))).convert("RGB")
    whole = decode.pixels(KINDS["turned.jpg"], (0, 0, 90, 60), (90, 60))
    assert np.array_equal(whole, np.asarray(upright))
    deep = decode.pixels(KINDS["deep.png"], (0, 0, 60, 90), (60, 90))
    assert deep.max() > 240
    assert len(np.unique(deep)) > 100


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 20,000 x 20,000 pixels."""
    content = bytearray(encoded(Image.new("L", (16, 16)), "PNG"))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def jpeg_bomb() -> bytes:
    """A JPEG whose header says 60,000 x 60,000 pixels."""
    content = bytearray(encoded(Image.new("L", (16, 16)), "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    return bytes(content)


def whole() -> bytes:
    return encoded(photo(9, 0, (96, 128)), "JPEG")


BAD = {
    "empty": (lambda file: file.write_bytes(b""), "an empty file"),
    "a bomb": (lambda file: file.write_bytes(bomb()), "too large"),
    "a JPEG bomb": (lambda file: file.write_bytes(jpeg_bomb()), "too large"),
    "text": (lambda file: file.write_text("no picture"), "no picture in it"),
    "cut": (lambda file: file.write_bytes(whole()[:-400]), "damaged picture"),
    "a pipe": (lambda file: os.mkfifo(file), "not a regular file"),
    "a link out": (
        lambda file: file.symlink_to("/etc/hostname"),
        "a symbolic link that leads out of the folder",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_file_is_refused_by_name_or_skipped_and_named_once(tmp_path, kind, caplog):
    path = folder(tmp_path / "set", classes=2, train=4, test=1)
    spoil, said = BAD[kind]
    (path / "train/class1/2.jpg").unlink()
    spoil(path / "train/class1/2.jpg")
    message = refused(path)
    assert message.startswith(str(path / "train/class1/2.jpg"))
    assert said in message
    assert "data.damaged = skip" in message
    caplog.clear()
    held = photos(path, damaged="skip")
    assert len(held) == 7
    held.admit(held.index.faults)
    assert caplog.text.count("2.jpg") == 1
    assert batches(held, "torch", CROPS, size=7, workers=0)[0].x.shape == (7, 3, 32, 32)


def hidden_damage(path: Path) -> None:
    """Damage a JPEG so that only decoding shows it: its end marker stays."""
    content = path.read_bytes()
    middle = content.index(b"\xff\xda")
    # A Huffman table that no decoder accepts, in front of the scan.
    table = b"\xff\xc4\x00\x15\x00" + b"\xff" * 16 + b"\x00\x00"
    path.write_bytes(content[:middle] + table + content[middle:])


@pytest.mark.parametrize("name", NAMES)
def test_damage_that_decoding_finds_is_replaced_by_the_next_picture(tmp_path, name, caplog):
    path = folder(tmp_path / "set", classes=2, train=4, test=1)
    hidden_damage(path / "train/class0/2.jpg")
    held = photos(path, damaged="skip")
    assert len(held) == 8
    found = batches(held, name, CROPS, size=4, workers=0)
    seen = torch.cat([b.samples for b in found]).sort().values.tolist()
    assert seen == [0, 1, 3, 3, 4, 5, 6, 7]
    if dali.unavailable() is None:
        other = batches(held, "torch", CROPS, size=4, workers=0)
        for a, b in zip(found, other, strict=True):
            torch.testing.assert_close(a.x, b.x, atol=TOLERANCE, rtol=0)
            assert torch.equal(a.crops, b.crops)
            assert torch.equal(a.y, b.y)
    assert caplog.text.count("class0/2.jpg") == 1
    with pytest.raises(EngineError, match=r"class0/2.jpg: damaged picture.*data.damaged = skip"):
        batches(photos(path), name, CROPS, size=4, workers=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_changes_after_indexing_is_damaged(tmp_path, name, caplog):
    path = folder(tmp_path / "set", classes=2, train=4, test=1)
    held = photos(path, damaged="skip")
    (path / "train/class0/1.jpg").write_bytes(bomb())
    (path / "train/class1/3.jpg").unlink()
    seen = torch.cat([b.samples for b in batches(held, name, CROPS, workers=0)])
    assert seen.sort().values.tolist() == [0, 0, 2, 2, 3, 4, 5, 6]
    assert "its length is not what it was" in caplog.text
    assert "No such file" in caplog.text


def test_only_damaged_files_are_no_set(tmp_path):
    path = folder(tmp_path / "set", classes=2, train=1, test=1)
    for file in path.glob("train/*/*"):
        file.write_bytes(b"")
    assert "no other file is a whole picture" in refused(path, damaged="skip")


def move(source: Path, target: Path) -> None:
    source.rename(target)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: move(p / "val/class1", p / "val/classX"), "train has the class folder class1"),
        (lambda p: (p / "val/more").mkdir(), "val has the class folder more and train has not"),
        (lambda p: move(p / "train", p / "training"), "train: missing"),
        (lambda p: move(p / "val", p / "valid"), "val: missing"),
        (lambda p: [f.unlink() for f in p.glob("train/*/*")], "train/class0: holds no image: "),
        (
            lambda p: [move(f, f.with_suffix(".tiff")) for f in p.glob("train/class1/*")],
            "train/class1: holds no image, but 2 other files (2 .tiff): images end in .jpg",
        ),
        (
            lambda p: (
                move(p / "train/class1", p.parent / "else"),
                (p / "train/class1").symlink_to(p.parent / "else"),
            ),
            "train/class1: a symbolic link that leads out",
        ),
    ],
)
def test_faults_of_a_folder_are_one_line(tmp_path, spoil, said):
    path = folder(tmp_path / "set", classes=2, train=2, test=1)
    spoil(path)
    assert said in refused(path)


def test_pictures_come_in_batches_in_order(shared):
    held = photos(shared, "test")
    x, y = held.read(torch.arange(6))
    parts = list(held.batches(4, torch.device("cpu")))
    assert [len(part) for part, _ in parts] == [4, 2]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), x.float() / 255)
    assert torch.equal(torch.cat([labels for _, labels in parts]), y)
    mean, deviation = held.statistics()
    scaled = x.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert deviation == pytest.approx(scaled.std((0, 2, 3)).tolist(), abs=1e-5)


def test_info_and_verify_of_a_folder(tmp_path, shared, capsys):
    assert cli.run(["data", "info", str(shared)]) == 0
    out, err = capsys.readouterr()
    about = json.loads(out)
    assert (about["train"], about["test"], about["shape"]) == (21, 6, None)
    assert about["pictures"]["train"]["height"] == {"min": 80, "median": 128, "max": 240}
    assert about["pictures"]["train"]["damaged"] == 0
    assert "--data.size 224" in err
    assert cli.run(["data", "verify", str(shared)]) == 0
    assert "21 pictures of 3 classes are whole" in capsys.readouterr().out

    path = folder(tmp_path / "set", classes=2, train=4, test=1)
    hidden_damage(path / "train/class0/2.jpg")
    (path / "train/class1/0.jpg").write_bytes(b"")
    assert cli.run(["data", "info", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"]["train"]["damaged"] == 1
    assert cli.run(["data", "verify", str(path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines] == ["BAD", "BAD", "ok "]
    assert "class0/2.jpg: damaged picture" in lines[0] + lines[1]
    assert "class1/0.jpg: an empty file" in lines[0] + lines[1]


def test_a_known_folder_is_described_without_its_files(capsys):
    about = data.info("imagenet")
    assert (about.train, about.test, len(about.classes)) == (1_281_167, 50_000, 1000)
    assert about.folder is None
    assert {"imagenet", "imagenette", "tiny-imagenet"} <= set(data.names())
    assert cli.run(["data", "list"]) == 0
    assert "any size" in capsys.readouterr().out
    assert cli.run(["data", "fetch", "imagenet"]) == 2
    assert "train/CLASS and val/CLASS" in capsys.readouterr().err
    with pytest.raises(EngineError, match=r"set data.size"):
        data.load("imagenet", "train")
    with pytest.raises(EngineError, match="imagenette: not found: put it into"):
        datasets.photos(
            "imagenette", "train", size=(64, 64), resize=73, damaged="refuse", threads=1
        )


def test_the_list_folds_no_path(tmp_path, monkeypatch, capsys):
    """A path of several lines cannot be copied, and no script can read it."""
    root = tmp_path / "a folder of a long name" / ("deep" * 30)
    (root / "imagenette").mkdir(parents=True)
    monkeypatch.setenv("ENGINE_DATA", str(root))
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["data", "list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(data.names())
    place = head.index("lies in")
    held = dict(zip(data.names(), rows, strict=True))
    assert held["imagenette"][place:] == str(root / "imagenette")
    assert held["imagenet"][place:] == "not fetched"


def test_files_beside_pictures_are_counted_once(tmp_path, caplog):
    path = folder(tmp_path / "set", classes=2, train=3, test=1)
    move(path / "train/class1/0.jpg", path / "train/class1/0.heic")
    (path / "train/class0/below").mkdir()
    move(path / "train/class0/0.jpg", path / "train/class0/below/0.TIFF")
    (path / "train/class0/boxes.txt").write_text("0 0 1 1")
    assert len(photos(path)) == len(photos(path)) == 4
    lines = [r.getMessage() for r in caplog.records if "does not read" in r.getMessage()]
    assert len(lines) == 1
    assert "train: the engine does not read 2 other files (1 .tiff, 1 .heic)" in lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--data.scale", "0.25,1", "--attack.start", "memory"],
            "does not follow a random",
        ),
        (["--data.scale", "0.9,0.5"], "the smaller share comes first"),
        (["--data.scale", "0.25,1", "--data.pad", "4"], "drop one"),
        (["--data.resize", "32"], "is less than data.size"),
        (["--data.cutout", "8"], "data.cutout is for images in memory"),
        (["--data.loader", "resident"], "streamed by dali or torch"),
        (["--data.size", "0"], "data.size"),
        (["--data.size", "64x64x64"], "data.size"),
        (["--data.size", "none", "--data.resize", "80"], "set data.size"),
        (["--data.name", "digits"], "data.size streams folders of pictures, and digits is none"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(shared, words, said, capsys):
    start = ["train", "quickstart", "--data.name", str(shared), "--data.size", "64"]
    assert cli.run([*start, "--attack.start", "random", *words, "--run-dir", "none"]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert not Path("none").exists()


def test_a_folder_of_several_sizes_without_a_size_says_how_to_stream_it(shared, capsys):
    assert cli.run(["train", "quickstart", "--data.name", str(shared)]) == 2
    assert "data.size = 224" in capsys.readouterr().err


def test_a_size_is_one_side_or_two():
    for text, wanted in (("224", (224, 224)), ("224x160", (224, 160)), ("96,64", (96, 64))):
        assert recipes.load("quickstart", {"data.size": text}).data.size == wanted
    written = recipes.parse({"data": {"name": "./a", "size": 224}})
    assert written.data.size == (224, 224)
    assert written.data.resized == 256
    assert recipes.parse({"data": {"name": "./a", "size": [64, 96], "scale": [0.2, 1]}}).data.scale


def test_an_array_is_given_again_only_when_nobody_holds_it():
    outputs = streamed_dali._Recycled()
    first = torch.from_numpy(outputs.take((2, 3)))
    place, view = first.data_ptr(), first[1:]
    second = outputs.take((2, 3))
    assert second.ctypes.data != place
    del first
    # A view of the tensor still holds the array.
    assert torch.from_numpy(outputs.take((2, 3))).data_ptr() not in (place, second.ctypes.data)
    del view
    assert outputs.take((2, 3)).ctypes.data == place
    assert outputs.take((3, 3)).shape == (3, 3)
