"""Test faults of the machine and of the user: each is survived, or refused in one line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import engine
from engine import Attack, EngineError, Linf, LocalBall, cli, files, recipes
from engine.runs import build
from engine.runs.folder import Run
from engine.text import printable
from engine.training.signals import Stopped, Watch, end_tidily

from ..conftest import Foreign, blobs
from .soak import SHORT, power_cuts, rows

ESCAPE = "\x1b[31m"


def train(*words):
    return cli.run(["train", *words, "--no-eval", "--json"])


def refusal(capsys, *words):
    """Run a command that must end with status 2 and one line; return the line."""
    capsys.readouterr()
    assert cli.run([*words]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("engine: ")]
    assert len(lines) == 1
    assert err.endswith(lines[0] + "\n")
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with an evaluation."""
    run = tmp_path_factory.mktemp("faults") / "run"
    words = ["train", *SHORT, "--run-dir", str(run), "--json"]
    words += ["--evaluation.examples", "20", "--evaluation.autoattack", "none"]
    assert cli.run([*words, "--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts", "1"]) == 0
    return run


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_a_power_cut_before_some_writes_loses_nothing(tmp_path):
    found = power_cuts(4, tmp_path, variants=1)
    assert found["cuts"] == 4
    assert found["identical"]
    assert found["lost_lines"] == 0


@pytest.mark.slow
def test_a_power_cut_before_every_write_loses_nothing(tmp_path):
    found = power_cuts(None, tmp_path, variants=1)
    assert found["cuts"] > 90
    assert found["resumed"] > 80
    assert found["identical"]
    assert found["lost_lines"] == 0


def test_the_simulated_disk_loses_what_is_not_synced(tmp_path, monkeypatch):
    """Rows that are written and not synced are gone, and the checkpoint counts on them."""

    def unsynced(path, data):
        with path.open("ab") as file:
            file.write(data)

    monkeypatch.setattr(files, "append", unsynced)
    with pytest.raises(RuntimeError, match="status 2"):
        power_cuts(40, tmp_path, variants=1)


def test_a_short_write_is_finished(run, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data)[:7]))
    before = (run / "metrics.jsonl").read_bytes()
    Run.open(run).log({"epoch": 3, "text": "x" * 100})
    monkeypatch.undo()
    after = (run / "metrics.jsonl").read_bytes()
    assert after == before + json.dumps({"epoch": 3, "text": "x" * 100}).encode() + b"\n"


def test_a_row_that_cannot_be_written_leaves_no_part_of_itself(run, monkeypatch):
    real, calls = os.write, iter([7])

    def full(handle, data):
        for most in calls:
            return real(handle, bytes(data)[:most])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(EngineError, match="No space left"):
        Run.open(run).log({"epoch": 3})
    monkeypatch.undo()
    assert (run / "metrics.jsonl").read_bytes() == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_in_the_weights_is_seen(run, capsys):
    flip(run / "best.safetensors")
    assert "SHA-256" in refusal(capsys, "eval", str(run))
    assert "best.safetensors is damaged" in refusal(capsys, "export", str(run))
    capsys.readouterr()
    assert cli.run(["report", str(run)]) == 0
    assert "best.safetensors is damaged" in (run / "report.html").read_text()
    flip(run / "last.safetensors")
    line = refusal(capsys, "eval", str(run), "--checkpoint", "last")
    assert "last.safetensors is damaged" in line


def test_weights_without_a_sum_are_read_with_a_warning(run, caplog):
    """Of runs that an earlier engine made."""
    files.sum_path(run / "best.safetensors").unlink()
    assert cli.run(["eval", str(run)]) == 0
    assert "best.safetensors has no SHA-256 beside it" in caplog.text


def test_exported_weights_carry_their_sums(run, tmp_path):
    assert cli.run(["export", str(run)]) == 0
    folder = run / "export"
    names = sorted(p.name for p in folder.glob("*.sha256"))
    assert names == ["model.pt.sha256", "model.safetensors.sha256"]
    subprocess.run(["sha256sum", "-c", *names], cwd=folder, check=True, capture_output=True)


def test_the_documented_check_of_equal_runs_gives_equal_sums(tmp_path):
    """The commands of docs/troubleshooting.md, on a shorter recipe."""
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    (check,) = [line.split("#")[0] for line in page.splitlines() if "sha256sum a/" in line]
    for name in ("a", "b"):
        assert train(*SHORT, "--run-dir", str(tmp_path / name)) == 0
    done = subprocess.run(shlex.split(check), cwd=tmp_path, check=True, capture_output=True)
    sums = {line.split()[0] for line in done.stdout.decode().splitlines()}
    assert len(sums) == 1


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("metrics.jsonl", ["resume"]),
        ("checkpoints", ["resume"]),
        ("lock", ["resume"]),
        ("best.safetensors", ["resume"]),
        ("last.safetensors", ["resume"]),
        ("environment.json", ["resume"]),
        ("summary.json", ["resume"]),
        ("evaluation.json", ["eval"]),
        ("masking.json", ["eval"]),
        ("pictures", ["report", "eval"]),
        ("report.html", ["report", "eval"]),
        ("export", ["export"]),
    ],
)
def test_a_link_out_of_a_run_folder_is_not_written_through(name, commands, run, tmp_path, capsys):
    outside = tmp_path / "outside"
    if (run / name).exists():
        (run / name).replace(outside)
    elif name == "export":
        outside.mkdir()
    else:
        outside.write_text("{}")
    (run / name).symlink_to(outside)
    everything = [outside, *outside.rglob("*")]
    before = {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in everything}
    for command in commands:
        if command == "resume":
            summary = run / "summary.json"
            if name != "summary.json":
                summary.unlink()
            else:
                outside.write_text("{}")
                before[outside] = (outside.stat().st_mtime_ns, b"{}")
            # Something is left to train.
            shutil.rmtree(run / "checkpoints") if name != "checkpoints" else None
            line = refusal(capsys, "train", "--resume", str(run), "--no-eval")
        else:
            line = refusal(capsys, command, str(run))
        assert "symbolic link" in line
    after = {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in everything}
    assert after == before
    assert sorted([outside, *outside.rglob("*")]) == sorted(everything)


def test_a_checkpoint_name_cannot_leave_the_folder(run, capsys):
    found = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**found, "checkpoint": "../best"}))
    shutil.copy(run / "best.safetensors", run.parent / "best.safetensors")
    assert cli.run(["report", str(run)]) == 0
    assert "neither best nor last" in (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["[/x]", "[bold]x", f"{ESCAPE}x", "a\nb", "\u202ex", "\udcff"])
def test_a_name_is_shown_as_text(name, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*SHORT, "--run-dir", str(run)]
    recipe = recipes.load("quickstart")
    status = train(*words, "--name", name)
    captured = capsys.readouterr()
    if name == "\udcff":
        # TOML has no such character.
        assert status == 2
        assert captured.err.count("\n") == 1
        return
    assert status == 0
    assert "\x1b" not in captured.err
    assert printable(name, "\n") in captured.err
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "recipe": name}))
    assert cli.run(["train", "--resume", str(run)]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert recipe.name != name


def test_a_path_and_an_error_line_are_shown_as_text(tmp_path, capsys):
    path = tmp_path / f"[/x]{ESCAPE}\n"
    assert train(*SHORT, "--run-dir", str(path)) == 0
    assert "\x1b" not in capsys.readouterr().err
    assert cli.run(["report", str(path)]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out
    assert captured.out.count("\n") == 1
    line = refusal(capsys, "report", str(path / "x"))
    assert "\\x1b[31m\\n" in line
    assert "\x1b" not in line


def test_printable_leaves_ordinary_text_alone():
    for text in ("plain", "ε = 8/255", "no\u00a0break", "日本語", ""):
        assert printable(text) == text
    assert printable("a\nb\tc", "\n") == "a\nb\\tc"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--threads", "100000000"], "threads"),
        (["--optim.batch_size", "1e20"], "batch_size"),
        (["--optim.batch_size", "9" * 30], "batch_size"),
        (["--seed", "9" * 900_000], "seed"),
        (["--optim.epochs", "2000000000"], "at most 10,000,000"),
        (["--optim.lr", "1e300"], "too large"),
        (["--data.workers", "1000000"], "workers"),
        (["--" + "a." * 400_000 + "a", "1"], "unknown option"),
        (["--objective.name", "x" * 1_000_000], "unknown objective"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_number_out_of_bounds_is_one_short_line(words, text, capsys):
    line = refusal(capsys, "train", "quickstart", *words)
    assert text in line
    assert len(line) < 500


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("seed = " + "9" * 900_000, "not valid TOML"),
        ("seed = 0x" + "f" * 900_000, "seed"),
        ("optim.batch_size = 1e20", "batch_size"),
        (".".join("a" * 400_000) + " = 1", "parts"),
        ("[" + ".".join("a" * 400_000) + "]", "parts"),
        ("x = {" + ".".join("a" * 400_000) + " = 1}", "parts"),
        (".".join(["'a'"] * 200_000) + " = 1", "parts"),
        ("x = " + "[" * 300 + "]" * 300, "unknown field"),
        ("name = " + "[" * 300 + "]" * 300, "name"),
        ("a" * 900_000 + " = 1", "unknown field"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_recipe_that_takes_for_ever_is_one_short_line(content, text, tmp_path, capsys):
    path = tmp_path / "r.toml"
    path.write_text(content)
    began = time.process_time()
    line = refusal(capsys, "train", str(path))
    assert text in line
    assert len(line) < 600 + len(str(path))
    assert time.process_time() - began < 2


def test_only_regular_files_are_read(run, tmp_path, capsys):
    os.mkfifo(tmp_path / "r.toml")
    assert "regular file" in refusal(capsys, "train", str(tmp_path / "r.toml"))
    for name in ("evaluation.json", "metrics.jsonl", "best.safetensors"):
        copy = shutil.copytree(run, tmp_path / name)
        (copy / name).unlink()
        os.mkfifo(copy / name)
        capsys.readouterr()
        if name == "best.safetensors":
            assert "regular file" in refusal(capsys, "eval", str(copy))
        else:
            assert "regular file" in refusal(capsys, "report", str(copy))
        (copy / name).unlink()
        (copy / name).symlink_to("/dev/zero")
        assert "symbolic link" in refusal(capsys, "report", str(copy))
    with pytest.raises(EngineError, match="regular file"):
        files.read_text(Path("/dev/zero"))


def test_an_image_that_is_a_fifo_is_refused(tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            os.mkfifo(tmp_path / "set" / split / name / "1.png")
    line = refusal(capsys, "train", *SHORT, "--data.name", str(tmp_path / "set"))
    assert "not a regular file" in line


def test_a_sparse_file_of_100_gb_is_not_read(run, capsys):
    for name in ("last.safetensors", "checkpoints/0000000004.safetensors"):
        with (run / name).open("wb") as file:
            file.truncate(100 << 30)
    began = time.process_time()
    assert "more than" in refusal(capsys, "eval", str(run), "--checkpoint", "last")
    (run / "summary.json").unlink()
    # The checkpoint before it is used.
    assert train("--resume", str(run)) == 0
    assert time.process_time() - began < 20


def started(*words, **options):
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "engine", *words],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        env=environment,
        **options,
    )


@pytest.mark.parametrize("name", ["r\u00fcn", os.fsdecode(b"r\xff")], ids=["umlaut", "bytes"])
def test_a_path_that_is_not_ascii_in_a_process_that_is(name, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    run = tmp_path / name
    words = ["train", *SHORT, "--evaluation.examples", "8", "--evaluation.autoattack", "none"]
    words += ["--evaluation.pgd_steps", "1", "--evaluation.pgd_restarts", "1"]
    process = started(*words, "--run-dir", str(run), env={"LC_ALL": "C", "PYTHONUTF8": "0"})
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode(errors="replace")
    assert b"Traceback" not in err
    assert b"run folder" in out
    assert (run / "report.html").is_file()
    assert list(run.glob("events.out.tfevents.*"))


def test_a_second_creator_of_a_run_is_refused(tmp_path, capsys):
    recipe = recipes.load("quickstart", {"seed": "5"})
    first = Run.create(recipe, tmp_path / "run")
    line = refusal(capsys, "train", *SHORT, "--run-dir", str(tmp_path / "run"))
    assert "holds a run already" in line
    # As it is between the folder's making and its first file.
    (tmp_path / "run" / "recipe.toml").unlink()
    line = refusal(capsys, "train", *SHORT, "--run-dir", str(tmp_path / "run"))
    assert "in use by another process" in line
    assert not (tmp_path / "run" / "recipe.toml").exists()
    with first.locked():
        pass
    # Released: the folder can be used.
    Run.create(recipe, tmp_path / "run")


def test_many_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load("quickstart")
    stamp = Run.new_path(recipe)
    # Another process is faster than this one, twice.
    taken = iter([stamp, stamp.with_name(stamp.name + "-2"), stamp.with_name(stamp.name + "-3")])
    stamp.mkdir(parents=True)
    stamp.with_name(stamp.name + "-2").mkdir()
    monkeypatch.setattr(Run, "new_path", staticmethod(lambda _: next(taken)))
    assert Run.create(recipe).path.name.endswith("-3")


def test_a_folder_that_cannot_be_locked_is_named_with_its_fault(run, monkeypatch, capsys):
    def no_locks(handle, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    (run / "summary.json").unlink()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    line = refusal(capsys, "train", "--resume", str(run))
    assert "No locks available" in line
    assert "local disk" in line
    assert "in use" not in line


def test_another_number_of_processes_is_said_and_recorded(run, caplog):
    from engine.training.checkpoint import Checkpoints

    (run / "summary.json").unlink()
    kept = Checkpoints(run / "checkpoints", keep=1)
    tensors, about = kept.latest()
    assert about["processes"] == 1
    kept.save(4, tensors, {**about, "processes": 2})
    assert train("--resume", str(run)) == 0
    assert "trained by 2 process(es) up to step 4 and goes on with 1" in caplog.text
    recorded = json.loads((run / "environment.json").read_text())["processes_changed"]
    assert recorded == [{"step": 4, "before": 2, "after": 1}]


def test_a_reader_that_goes_does_not_end_the_training(tmp_path):
    command = shlex.join([sys.executable, "-m", "engine", "train", *SHORT, "--run-dir", "run"])
    done = subprocess.run(
        ["bash", "-c", f"{command} --optim.epochs 6 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done
    assert len(done.stdout.splitlines()) == 1
    assert (tmp_path / "run" / "summary.json").is_file()
    assert len(rows(tmp_path / "run")) == 6


def test_a_full_disk_under_stdout_is_one_line(run):
    with Path("/dev/full").open("w") as full:
        process = started("train", "--resume", str(run), "--json", stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.decode().splitlines()[-1] == (
        "engine: cannot write standard output: No space left on device"
    )
    assert b"Traceback" not in err


def test_a_hang_up_saves_like_sigterm(tmp_path):
    words = ["train", *SHORT, "--optim.epochs", "4000", "--checkpoint.seconds", "1000"]
    # A test run under nohup would hand down its ignored SIGHUP.
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = started(*words, "--run-dir", "run", cwd=tmp_path, preexec_fn=heard)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "last.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Its terminal has gone with it.
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 129
    assert list((tmp_path / "run" / "checkpoints").glob("*.json"))
    assert load_file(tmp_path / "run" / "last.safetensors")


def test_an_ignored_hang_up_stays_ignored():
    before = signal.getsignal(signal.SIGHUP)
    term = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        end_tidily()
        with Watch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.stop is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        end_tidily()
        with Watch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.stop == signal.SIGHUP
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, term)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5, 255.0])
def test_pixels_outside_the_box_are_refused_at_the_first_batch(value):
    images, labels = blobs(64)
    x = images.float() / 255
    x[3, 0, 2, 2] = value
    loader = DataLoader(TensorDataset(x, labels), batch_size=64)
    calls = {
        "pair": lambda: engine.train(Foreign(), (x, labels), Linf(0.1), epochs=1, batch_size=32),
        "loader": lambda: engine.train(Foreign(), loader, Linf(0.1), epochs=1),
        "validation": lambda: engine.train(
            Foreign(), (images, labels), Linf(0.1), epochs=1, batch_size=32, validation=(x, labels)
        ),
        "attack": lambda: engine.attack(Foreign(), x, labels, Linf(0.1)),
        "objective": lambda: LocalBall()(Foreign(), x, labels, Linf(0.1), Attack()),
    }
    for name, call in calls.items():
        with pytest.raises(EngineError, match=r"finite and in \[0, 1\]") as caught:
            call()
        assert "\n" not in str(caught.value), name


def test_pixels_inside_the_box_are_taken():
    images, labels = blobs(64)
    x = images.float() / 255
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.0, 1.0 + 1e-6
    engine.attack(Foreign(), x, labels, Linf(0.1), steps=1)
    model = Foreign()
    LocalBall()(model, x, labels, Linf(0.1), Attack(steps=1))
    # Later batches are not looked at: a look makes the host wait for the device.
    LocalBall()(model, x * float("nan"), labels, Linf(0.1), Attack(steps=1))
    assert build.steps_per_epoch(recipes.load("quickstart")) > 0
    assert torch.isfinite(x).all()
