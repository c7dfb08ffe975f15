"""A user's own data set: folders and arrays, whole and damaged."""

from __future__ import annotations

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engine import cli, data
from engine.data import own
from engine.data.photos.listing import fixed_order
from engine.errors import EngineError


@pytest.fixture(autouse=True)
def _root(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "data"))


def pixels(n, channels=1, side=8, seed=0):
    draw = np.random.default_rng(seed)
    shape = (n, side, side + 2, channels) if channels > 1 else (n, side, side + 2)
    return draw.integers(0, 256, shape, dtype=np.uint8)


def folder(path, channels=1, per_class=3, classes=("cat", "dog")):
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for i, image in enumerate(pixels(per_class, channels, seed=number)):
                Image.fromarray(image).save(path / split / name / f"{i}.png")
    return path


def arrays(n=12, channels=3, names=("train_images", "train_labels", "test_images", "test_labels")):
    labels = np.arange(n) % 3
    return dict(
        zip(
            names,
            (pixels(n, channels), labels, pixels(6, channels, seed=1), labels[:6]),
            strict=True,
        )
    )


def refused(path, split="train") -> str:
    with pytest.raises(EngineError) as caught:
        data.load(str(path), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images(tmp_path, channels):
    path = folder(tmp_path / "pets", channels)
    (path / "train" / "cat" / ".hidden.png").write_bytes(b"no image")
    (path / "train" / "notes.txt").write_text("not an image")
    train, test = (data.load(str(path), split) for split in ("train", "test"))
    assert train.images.shape == (6, channels, 8, 10)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = pixels(3, channels, seed=1)[2]
    expected = expected[None] if channels == 1 else expected.transpose(2, 0, 1)
    last = fixed_order(6).tolist().index(5)
    assert np.array_equal(test.images[last].numpy(), expected)
    about = data.info(str(path))
    assert (about.shape, about.train, about.test) == ((channels, 8, 10), 6, 6)


def test_the_first_test_images_of_a_folder_are_of_all_classes(tmp_path):
    """A share of the test images would be of one class, if they came as the folder lists them."""
    path = folder(tmp_path / "pets", 1, per_class=30)
    labels = data.load(str(path), "test").labels
    assert labels.bincount().tolist() == [30, 30]
    assert set(labels[:10].tolist()) == {0, 1}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
    ],
)
def test_arrays(tmp_path, suffix, names):
    path, held = tmp_path / f"set{suffix}", arrays(names=names)
    held[names[1]] = held[names[1]][:, None]  # as MedMNIST has them
    np.savez(path, **held) if suffix == ".npz" else save_file(held, path)
    train, test = (data.load(str(path), split) for split in ("train", "test"))
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), held[names[0]])
    assert train.labels.tolist() == held[names[1]][:, 0].tolist()
    assert test.labels.tolist() == held[names[3]].tolist()
    assert train.classes == test.classes == ("0", "1", "2")
    assert all(check.ok for check in data.verify(str(path)))


def test_it_trains_from_any_folder(tmp_path, monkeypatch, capsys):
    held = arrays(40, 1)
    np.savez_compressed(tmp_path / "oblong.npz", **held)
    held |= {name: held[name][:, :, :8] for name in ("train_images", "test_images")}
    np.savez_compressed(tmp_path / "mine.npz", **held)
    monkeypatch.chdir(tmp_path)
    words = ["train", "quickstart", "--data.name", "./mine.npz", "--data.validation", "8"]
    words += ["--evaluation.examples", "6"]
    words += ["--optim.epochs", "1", "--optim.batch_size", "16", "--validation.steps", "1"]
    assert cli.run([*words, "--no-eval", "--json", "--run-dir", "run", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    words[words.index("./mine.npz")] = "oblong.npz"
    assert cli.run([*words, "--no-eval", "--json", "--run-dir", "other", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    # The run remembers where its data lie.
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    again = ["eval", "../run", "--evaluation.autoattack", "none", "--evaluation.pgd_steps", "1"]
    assert cli.run([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 6


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda p: (p / "train/dog/1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing"),
            "dog/1.png: cannot",
        ),
        (lambda p: (p / "train/dog/1.png").write_bytes(b""), "dog/1.png: cannot"),
        (lambda p: cut(p / "train/dog/1.png", 90), "dog/1.png: "),
        (
            lambda p: Image.new("L", (9, 9)).save(p / "train/cat/2.png"),
            "cat/2.png: 9x9 pixels, where",
        ),
        (lambda p: Image.new("L", (5000, 4000)).save(p / "train/cat/2.png"), "too large"),
        (
            lambda p: (p / "train/cat/2.png").unlink() or (p / "train/cat/2.png").mkdir(),
            "cat/2.png: ",
        ),
        (lambda p: [f.unlink() for f in p.glob("train/*/*")], "train/cat: holds no image: images"),
        (
            lambda p: [f.unlink() for f in p.glob("train/dog/*")],
            "train/dog: holds no image: images",
        ),
        (
            lambda p: [shutil.rmtree(f) for f in p.glob("train/*")],
            "train: no images in class folders (.jpg",
        ),
        (lambda p: (p / "train").rename(p / "training"), "train: missing"),
        (lambda p: (p / "train/cat").rename(p / "train/cow"), "test/cat: a class that"),
    ],
)
def test_faults_of_a_folder_name_the_file(tmp_path, spoil, said):
    path = folder(tmp_path / "pets")
    spoil(path)
    assert said in refused(path, "test" if "class that" in said else "train")


def to_tiff(path, names):
    """Save images anew as TIFF, which is not read."""
    for file in path.glob(names):
        Image.open(file).save(file.with_suffix(".tiff"))
        file.unlink()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_of_an_unread_format_is_refused(tmp_path, split, capsys):
    """Such a class would train or be judged with no image, and nobody would be told."""
    path = folder(tmp_path / "pets", classes=("cat", "cow", "dog"))
    to_tiff(path, f"{split}/dog/*.png")
    (path / split / "dog" / ".hidden").write_text("")
    message = refused(path, split)
    assert message.startswith(
        f"{path / split / 'dog'}: holds no image, but 3 other files (3 .tiff)"
    )
    assert ".jpg, .jpeg, .png" in message
    assert cli.run(["data", "verify", str(path)]) == 2
    assert f"{split}/dog: holds no image, but 3 other files (3 .tiff)" in capsys.readouterr().out
    words = ["train", "quickstart", "--data.name", str(path), "--optim.epochs", "1"]
    assert cli.run([*words, "--run-dir", str(tmp_path / "run"), "--no-eval"]) == 2
    assert "dog: holds no image" in capsys.readouterr().err


def test_files_beside_images_are_counted_once_and_labels_are_not(tmp_path, caplog):
    path = folder(tmp_path / "pets", per_class=4)
    to_tiff(path, "train/dog/[12].png")
    to_tiff(path, "train/cat/0.png")
    for name in ("Thumbs.db", "notes.txt", ".DS_Store", "0.gif", "README"):
        (path / "train" / "dog" / name).write_text("")
    assert data.load(str(path), "train").labels.tolist() == [0, 0, 0, 1, 1]
    assert [check.ok for check in data.verify(str(path))] == [True, True]
    lines = [r.getMessage() for r in caplog.records if "does not read" in r.getMessage()]
    said = "does not read 5 other files (3 .tiff, 1 .gif, 1 without a suffix) in its class folders"
    assert len(lines) == 1
    assert lines[0].startswith(f"{path / 'train'}: the engine {said}: images end in .jpg")


def test_the_test_images_in_memory_may_lack_a_class(tmp_path):
    path = folder(tmp_path / "pets")
    shutil.rmtree(path / "test" / "dog")
    assert data.load(str(path), "test").labels.tolist() == [0, 0, 0]


def test_images_in_folders_below_a_class_are_met_with_how_to_read_them(tmp_path):
    path = folder(tmp_path / "pets")
    (path / "train/dog").rename(tmp_path / "below")
    (path / "train/dog").mkdir()
    (tmp_path / "below").rename(path / "train/dog/below")
    assert refused(path).endswith("; folders below a class are read with data.size = 224")


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def npy(array=None, **header) -> bytes:
    out = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(out, array)
    else:
        np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue()


def packed(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


GOOD = {f"{name}.npy": npy(value) for name, value in arrays().items()}
OBJECTS = np.array([{"a": 1}] * 12, dtype=object)


def objects() -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, OBJECTS, allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 nothing of a zip", "damaged .npz"),
        (packed(GOOD)[:-30], "damaged .npz"),
        (packed({**GOOD, "../evil.npy": b"x"}), "points out of the archive"),
        (packed({**GOOD, "/etc/passwd": b"x"}), "points out of the archive"),
        (packed({"train_images.npy": GOOD["train_images.npy"]}), "no array train_labels"),
        (packed({**GOOD, "train_images.npy": objects()}), "not whole numbers"),
        (packed({**GOOD, "train_labels.npy": npy(np.zeros(12))}), "holds float64"),
        (packed({**GOOD, "train_images.npy": npy(pixels(12).astype(np.int16))}), "not uint8"),
        (
            packed({**GOOD, "train_images.npy": npy(pixels(11, 3))}),
            "11 images, but labels are [12]",
        ),
        (packed({**GOOD, "train_images.npy": npy(pixels(12, 2))}), "images are [12, 8, 10, 2]"),
        (packed({**GOOD, "train_labels.npy": npy(np.zeros(12, int))}), "at least two classes"),
        (packed({**GOOD, "train_labels.npy": npy(np.full(12, 1 << 40))}), "highest training label"),
        (packed({**GOOD, "train_labels.npy": npy(np.arange(12) - 1)}), "label -1 of sample 0"),
        (packed({**GOOD, "train_images.npy": GOOD["train_images.npy"][:-1]}), "its length"),
        (packed({**GOOD, "train_images.npy": GOOD["train_images.npy"] + b"x"}), "its length"),
        (
            packed(
                {
                    **GOOD,
                    "train_images.npy": npy(shape=(1 << 40,), fortran_order=False, descr="|u1"),
                }
            ),
            "fit",
        ),
        (packed({**GOOD, "train_images.npy": b"\x93NUMPY\x09\x00"}), "version 9.0"),
    ],
)
def test_faults_of_an_npz_name_it(tmp_path, content, said):
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    message = refused(path)
    assert message.startswith(str(path))
    assert said in message


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("train_labels", np.zeros(12), "holds float64, not whole numbers: save labels as int64"),
        ("train_labels", np.eye(3)[np.arange(12) % 3], "labels.argmax(1)"),
        ("train_labels", OBJECTS, "holds object, not whole numbers: save labels as int64"),
        ("train_labels", np.array(["cat"] * 12), "save labels as int64"),
        (
            "train_labels",
            np.eye(3, dtype=int)[np.arange(12) % 3],
            "labels are [12, 3]: save one-hot labels as labels.argmax(1)",
        ),
        ("train_images", np.zeros((12, 8, 8)), "holds float64, not whole numbers: save images as"),
    ],
)
@pytest.mark.parametrize("keras", [False, True])
def test_the_advice_is_about_the_array_at_fault(tmp_path, name, array, said, keras):
    held = {**arrays(), name: array}
    if keras:
        names = dict(zip(held, ("x_train", "y_train", "x_test", "y_test"), strict=True))
        held = {names[key]: value for key, value in held.items()}
    np.savez(tmp_path / "set.npz", **held)
    message = refused(tmp_path / "set.npz")
    assert said in message
    assert ("images as uint8" in message) == (name == "train_images")


def test_test_labels_lie_within_the_training_sets(tmp_path):
    held = arrays()
    held["test_labels"] = held["test_labels"] + 1
    np.savez(tmp_path / "set.npz", **held)
    assert "label 3 of sample 2" in refused(tmp_path / "set.npz", "test")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"x" * 100, "damaged"), (b"\xff" * 8, "damaged"), (b"", "empty")],
)
def test_faults_of_a_safetensors_file(tmp_path, content, said):
    (tmp_path / "set.safetensors").write_bytes(content)
    assert said in refused(tmp_path / "set.safetensors")
    held = arrays()
    held["train_labels"] = held["train_labels"].astype(np.float32)
    save_file(held, tmp_path / "set.safetensors")
    assert "train_labels: holds float32" in refused(tmp_path / "set.safetensors")


def test_what_is_no_data_set(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nothing.npz")
    (tmp_path / "set.csv").write_text("1,2")
    assert "a folder, an .npz or a .safetensors" in refused(tmp_path / "set.csv")
    assert own.is_path("./flowers")
    assert own.is_path("flowers.npz")
    assert not own.is_path("fashion-mnist")
    with pytest.raises(EngineError, match="unknown data set"):
        data.load("flowers", "train")


@pytest.mark.parametrize("action", ["verify", "info"])
def test_a_path_where_nothing_lies(tmp_path, monkeypatch, capsys, action):
    monkeypatch.chdir(tmp_path)
    for name in ("./none", "none.npz"):
        assert cli.run(["data", action, name]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.endswith("none: no such file or folder\n" if name == "./none" else "folder\n")


@pytest.mark.parametrize("action", ["verify", "info", "fetch"])
def test_a_folder_without_its_dot_is_met_with_how_to_give_it(tmp_path, monkeypatch, capsys, action):
    folder(tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["data", action, "docs"]) == 2
    err = capsys.readouterr().err
    assert "unknown data set 'docs': the folder of that name is given as ./docs" in err
    assert err.count("\n") == 1


def test_verify_names_what_is_wrong(tmp_path, capsys):
    path = folder(tmp_path / "pets")
    assert cli.run(["data", "verify", str(path)]) == 0
    cut(path / "test/dog/0.png", 90)
    capsys.readouterr()
    assert cli.run(["data", "verify", str(path)]) == 2
    good, bad = capsys.readouterr().out.splitlines()
    assert good.startswith("ok ")
    assert bad.startswith("BAD")
    assert "test/dog/0.png" in bad
