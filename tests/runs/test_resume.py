"""Test stopping and resuming: a run that was cut short ends as an unbroken one, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from engine import PGD, Attack, EngineError, Linf, LocalBall, Schedule, cli, recipes
from engine.adversary.memory import AdversaryMemory
from engine.data import loaders
from engine.data.loaders import dali
from engine.device.capture import WARM_UP
from engine.objectives import Clean
from engine.performance.capture_audit import Tape
from engine.runs.folder import Run
from engine.training.checkpoint import Checkpoints
from engine.training.optimiser import Optimiser
from engine.training.signals import Stopped
from engine.training.step import Step
from engine.training.trainer import Hooks, Trainer

from ..conftest import Tiny, blobs
from .soak import differing, rows, soak

EPOCHS = 4


class Cut(Exception):
    """Stand for a power cut."""


def build(
    objective,
    *,
    loader="resident",
    workers=0,
    optimiser="sgd",
    precision="fp32",
    replays=1,
    eps_warmup=0.0,
    recorder=None,
    hooks=None,
    validated=True,
):
    torch.manual_seed(0)
    images, labels = blobs(64)
    model = Tiny(batch_norm=True)
    # LIET makes its own start and takes none from a memory.
    remembers = objective.name != "liet"
    memory = AdversaryMemory(64, (1, 6, 6), Linf(0.1)) if remembers else None
    feed = loaders.build(
        loader,
        images,
        labels,
        16,
        memory=memory,
        workers=workers,
        seed=2,
        pad=1,
        flip=True,
        replays=replays,
    )
    step = Step(
        model,
        objective=objective,
        threat=Linf(0.1),
        attack=Attack(steps=2, start="memory" if remembers else "random"),
        optimiser=Optimiser(
            model, lr=Schedule().rates(0.1, EPOCHS * len(feed)), name=optimiser, ema=0.9
        ),
        memory=memory,
        take=feed.take,
        radii=Schedule(eps_warmup=eps_warmup).radii(0.1, EPOCHS * len(feed)),
        precision=precision,
        seed=2,
        recorder=recorder,
    )
    x, y = blobs(32, seed=9)
    return Trainer(
        step,
        feed,
        epochs=EPOCHS,
        validation=(x.float() / 255, y) if validated else None,
        validation_steps=2,
        hooks=hooks,
    )


def ending(trainer):
    tensors, about = trainer.state()
    row = {k: v for k, v in trainer.result.rows[-1].items() if "second" not in k}
    return tensors, {**about, "seconds": 0}, row


def cut_and_resume(folder, stops, **options):
    """Save at each of `stops`, die some steps later, go on in a new trainer; the last one's end."""
    kept = Checkpoints(folder)
    for stop in [*stops, None]:
        held: dict[str, Trainer] = {}

        def safe_point(stop=stop, held=held):
            trainer = held["it"]
            done = trainer.step.done
            if done == stop:
                kept.save(done, *trainer.state())
            if stop is not None and done == stop + 2:
                raise Cut

        held["it"] = trainer = build(**options, hooks=Hooks(safe_point=safe_point))
        if (found := kept.latest()) is not None:
            trainer.load(*found)
        try:
            trainer.run()
        except Cut:
            continue
        finally:
            trainer.loader.close()
    return ending(trainer)


def check_resume(folder, stops, **options):
    whole = build(**options)
    whole.run()
    whole.loader.close()
    tensors, about, row = ending(whole)
    ours, our_about, our_row = cut_and_resume(folder, stops, **options)
    assert our_about == about
    assert our_row == row
    assert ours.keys() == tensors.keys()
    for name, t in tensors.items():
        assert torch.equal(t, ours[name]), name


@pytest.mark.parametrize("objective", sorted(recipes.objectives()))
def test_every_objective_resumes_bit_for_bit(objective, tmp_path):
    # In the middle of an epoch, at its end, and the step before it.
    check_resume(tmp_path, [1, 4, 7], objective=recipes.objectives()[objective]())


@pytest.mark.parametrize(
    ("loader", "workers"),
    [
        pytest.param(
            "dali",
            1,
            marks=pytest.mark.skipif(
                dali.unavailable() is not None, reason=str(dali.unavailable())
            ),
        ),
        ("torch", 0),
        ("torch", 1),
        ("null", 0),
    ],
)
def test_every_loader_resumes_bit_for_bit(loader, workers, tmp_path):
    check_resume(tmp_path, [1, 4, 7], objective=LocalBall(), loader=loader, workers=workers)


@pytest.mark.parametrize(
    "options",
    [
        {"optimiser": "adamw"},
        {"optimiser": "torch-sgd"},
        {"optimiser": "torch-adamw"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"replays": 2},
        {"eps_warmup": 0.8},
    ],
    ids=str,
)
def test_every_part_of_the_step_resumes_bit_for_bit(options, tmp_path):
    check_resume(tmp_path, [3, 5], objective=PGD(), **options)


def test_a_captured_step_resumes_bit_for_bit(tmp_path):
    """Loaded into a step that is then recorded: graphs remember addresses."""
    whole = build(LocalBall())
    whole.run()
    kept = Checkpoints(tmp_path)

    def safe_point():
        if part.step.done == 6:
            kept.save(6, *part.state())
            raise Cut

    part = build(LocalBall(), recorder=Tape(), hooks=Hooks(safe_point=safe_point))
    with pytest.raises(Cut):
        part.run()
    again = build(LocalBall(), recorder=Tape())
    again.load(*kept.latest())
    again.run()
    for name, t in whole.step.tensors().items():
        assert torch.equal(t, again.step.tensors()[name]), name


class Warm(Tape):
    """Warms up as often as CUDA graphs do, and tells when it records."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def warm_up(self, run):
        self.told.append("warm-up")
        for _ in range(WARM_UP):
            run()

    def record(self, run):
        self.told.append("capture")
        return super().record(run)


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_a_finished_run_resumes_without_a_capture(tmp_path, loader):
    """All that was left is evaluation; warming up would read past the table of radii."""
    options = {"loader": loader, "eps_warmup": 0.5}
    whole = build(PGD(), **options)
    whole.run()
    kept = Checkpoints(tmp_path)
    kept.save(whole.step.done, *whole.state())
    told = []
    again = build(PGD(), recorder=Warm(told), **options)
    again.load(*kept.latest())
    again.run()
    assert told == []
    assert again.step.why_eager is None


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_the_first_epoch_is_timed_without_the_capture(monkeypatch, loader):
    told = []
    trainer = build(PGD(), loader=loader, recorder=Warm(told))
    epoch = trainer._train_epoch
    monkeypatch.setattr(trainer, "_train_epoch", lambda n: told.append(f"epoch {n}") or epoch(n))
    trainer.run()
    assert told == ["warm-up", "capture", *(f"epoch {n}" for n in range(EPOCHS))]
    plain = build(PGD(), loader=loader)
    plain.run()
    for name, t in plain.step.tensors().items():
        assert torch.equal(t, trainer.step.tensors()[name]), name


def test_another_runs_checkpoint_is_refused(tmp_path):
    trainer = build(PGD())
    tensors, about = trainer.state()
    other = build(PGD(), optimiser="adamw")
    with pytest.raises(EngineError, match="another recipe"):
        other.load(tensors, about)
    for key in about:
        damaged = {k: v for k, v in about.items() if k != key}
        with pytest.raises(EngineError, match="whole"):
            build(PGD()).load(tensors, damaged)


class Poisoned(PGD):
    """A loss that is no number at the steps `at`."""

    def compute(self, model, x, y, threat, attack, start, state):
        outcome = super().compute(model, x, y, threat, attack, start, state)
        bad = torch.isin(state[1], torch.tensor(self.at))
        return type(outcome)(
            outcome.loss * torch.where(bad, float("nan"), 1.0),
            outcome.adversary,
            outcome.stats,
            outcome.correct,
        )


def poisoned(*at):
    objective = Poisoned()
    object.__setattr__(objective, "at", at)
    return objective


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "torch-sgd", "torch-adamw"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_gradient_without_a_number_skips_one_step(optimiser, at, caplog):
    trainer = build(poisoned(at), optimiser=optimiser, validated=False)
    with caplog.at_level(logging.WARNING):
        result = trainer.run()
    assert [row["skipped"] for row in result.rows] == [int(at // 4 == e) for e in range(EPOCHS)]
    assert all(torch.isfinite(t).all() for t in trainer.state()[0].values())
    assert all(0 < row["loss"] < 5 for row in result.rows)
    assert f"epoch {at // 4 + 1}: 1 of 4 steps" in caplog.text


def test_a_skipped_step_leaves_the_weights_alone():
    trainer = build(poisoned(2))
    step = trainer.step
    trainer.loader.begin(0)
    step.train()
    step(), step()
    kept = {
        k: t.clone()
        for k, t in step.tensors().items()
        if k.startswith(("model.", "optimiser.moment", "optimiser.average")) and "bn." not in k
    }
    step()
    for name, before in kept.items():
        assert torch.equal(step.tensors()[name], before), name
    assert step.means()["skipped"] == 1


def test_an_epoch_of_such_gradients_rolls_back_and_a_second_stops(caplog):
    with caplog.at_level(logging.WARNING):
        result = build(poisoned(4, 5, 6, 7), validated=False).run()
    assert result.rolled_back == [2]
    assert result.rows[1]["rolled_back_to"] == 1
    assert "rolled back to epoch 1" in caplog.text
    assert all(torch.isfinite(t).all() for t in result.best.values())
    with pytest.raises(EngineError, match=r"epoch 3: 4 of 4 steps.*epoch 1 is kept"):
        build(poisoned(*range(4, 16)), validated=False).run()
    with pytest.raises(EngineError, match="epoch 1: 4 of 4 steps"):
        build(poisoned(*range(16)), validated=False).run()


def test_catastrophic_overfitting_rolls_back_to_the_best_epoch(monkeypatch, caplog):
    """Robust accuracy that falls to nothing: the weights go back, the schedule goes on."""
    trainer = build(PGD())
    scores = iter([0.5, 0.6, 0.1, 0.55])
    monkeypatch.setattr(
        trainer,
        "_validate",
        lambda: {"val_clean": 0.9, "val_pgd": next(scores), "adv_accuracy": 0.7},
    )
    seen = {}

    def safe_point():
        if trainer.step.done in (8, 12):
            seen[trainer.step.done] = {
                k: t.clone() for k, t in trainer.step.optimiser.average.state_dict().items()
            }

    trainer.hooks = Hooks(safe_point=safe_point)
    with caplog.at_level(logging.WARNING):
        result = trainer.run()
    assert "catastrophic overfitting" in caplog.text
    assert result.rolled_back == [3]
    assert result.best_epoch == 2
    for name, t in seen[8].items():
        assert torch.equal(seen[12][name], t), name
    assert trainer.step.done == 16


def test_clean_training_is_not_rolled_back(monkeypatch):
    """Its accuracy under PGD falls to nothing while it learns."""
    for objective, rolled_back in ((Clean(), []), (PGD(), [2])):
        trainer = build(objective)
        scores = iter([0.5, 0.01, 0.0, 0.0])
        monkeypatch.setattr(
            trainer,
            "_validate",
            lambda scores=scores: {
                "val_clean": 0.9,
                "val_pgd": next(scores),
                "adv_accuracy": 0.9,
            },
        )
        assert trainer.run().rolled_back[:1] == rolled_back


def test_a_fall_while_the_radius_grows_is_no_collapse(monkeypatch):
    """A constant answer scores a tenth at any radius, and a fresh network less at full eps."""
    # Over 9.6 of 16 steps: to the third epoch.
    for warmup, rolled_back in ((0.6, []), (0.0, [2])):
        trainer = build(PGD(), eps_warmup=warmup)
        scores = iter([0.2, 0.01, 0.5, 0.6])
        rise = iter([0.1, 0.7, 0.8, 0.9])
        monkeypatch.setattr(
            trainer,
            "_validate",
            lambda scores=scores, rise=rise: {
                "val_clean": 0.9,
                "val_pgd": next(scores),
                "adv_accuracy": next(rise),
            },
        )
        assert trainer.run().rolled_back == rolled_back


def test_a_collapse_after_the_radius_has_grown_is_seen(monkeypatch):
    """Accuracy under training's attack at a smaller eps does not measure accuracy at full eps."""
    # Over 6.4 of 16 steps: the best epoch is of the time before.
    trainer = build(PGD(), eps_warmup=0.4)
    scores, own = iter([0.4, 0.05, 0.3, 0.3]), iter([0.7, 0.65, 0.6, 0.6])
    monkeypatch.setattr(
        trainer,
        "_validate",
        lambda: {"val_clean": 0.9, "val_pgd": next(scores), "adv_accuracy": next(own)},
    )
    assert trainer.run().rolled_back == [2]


def test_a_network_that_does_not_begin_to_learn_is_spoken_of_once(caplog):
    def constant(kept):
        trainer = build(PGD())
        for network in trainer.step.networks():
            network.fc.weight.requires_grad_(False).zero_()
            network.fc.bias.requires_grad_(False).copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
        trainer.step.optimiser.step = lambda *_: None
        ((x, y),) = trainer.validation
        trainer.validation = [(x[kept(y)], y[kept(y)])]
        with caplog.at_level(logging.WARNING):
            return trainer.run().rows

    rows = constant(lambda y: y >= 0)
    assert [row["val_clean"] for row in rows] == [rows[0]["val_clean"]] * EPOCHS
    assert caplog.text.count("schedule.eps_warmup") == 1
    caplog.clear()
    # One class, and rightly so.
    assert constant(lambda y: y == 1)[-1]["val_clean"] == 1
    with caplog.at_level(logging.WARNING):
        build(PGD()).run()
    assert "eps_warmup" not in caplog.text


def test_noise_is_no_collapse():
    trainer = build(PGD())
    trainer._best = 0.12
    row = {"epoch": 2, "skipped": 0, "loss": 2.3, "val_pgd": 0.05, "adv_accuracy": 0.7}
    assert trainer._fault(row) is None
    trainer._best, trainer._best_adversarial = 0.6, 0.65
    assert trainer._fault({**row, "val_pgd": 0.4}) is None
    assert trainer._fault({**row, "val_pgd": 0.35}) is not None
    # Worse at its own attack as well: unsteady, and nothing that going back would help.
    assert trainer._fault({**row, "val_pgd": 0.35, "adv_accuracy": 0.5}) is None


LONG = ["--optim.epochs", "400", "--no-eval"]


def start(*words, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "engine", "train", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background inherits an ignored SIGINT; a person's shell does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_a_signal_checkpoints_and_says_how_to_go_on(tmp_path, signum, status):
    process = start("quickstart", *LONG, "--run-dir", "a run", cwd=tmp_path)
    run = tmp_path / "a run"
    wait_for(run / "last.safetensors", process)
    if signum == signal.SIGTERM:
        # Pre-emption: a checkpoint, and on it goes; and nobody else may train into the folder.
        process.send_signal(signal.SIGUSR1)
        wait_for(run / "checkpoints", process)
        refused = start("--resume", "a run", cwd=tmp_path)
        _, err = refused.communicate(timeout=120)
        assert refused.returncode == 2
        assert "in use by another process" in err.splitlines()[-1]
        assert process.poll() is None
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "engine: stopped; go on with: engine train --resume 'a run'"
    assert load_file(run / "last.safetensors")
    (step,) = Checkpoints(run / "checkpoints").steps()[-1:]
    assert step >= 19 * len(Run.open(run).metrics())
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def run_cli(*words):
    return cli.run(["train", *words, "--no-eval", "--json"])


def test_resuming_a_finished_run_does_nothing(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert run_cli("quickstart", "--optim.epochs", "1", "--run-dir", run) == 0
    first = json.loads(capsys.readouterr().out)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_cli("--resume", run) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == first
    assert "finished" in again.err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    # Killed after training and before the closing table: nothing is trained again.
    (tmp_path / "run" / "summary.json").unlink()
    assert run_cli("--resume", run) == 0
    last = json.loads(capsys.readouterr().out)
    assert {**last, "peak_memory_mb": 0} == {**first, "peak_memory_mb": 0}
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_died_without_a_checkpoint_starts_over(tmp_path, capsys):
    run = tmp_path / "run"
    assert run_cli("quickstart", "--optim.epochs", "1", "--run-dir", str(run)) == 0
    whole = rows(run)
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"epoch": 2, "lo')
    assert run_cli("--resume", str(run)) == 0
    assert differing(rows(run), whole) == 0


def test_mistakes_with_resume_are_one_line(tmp_path, capsys):
    for words, text in [
        (["--resume", str(tmp_path / "none")], "not a run folder"),
        (["quickstart", "--resume", str(tmp_path)], "own recipe"),
        (["--resume", str(tmp_path), "--optim.lr=1"], "own recipe"),
    ]:
        assert run_cli(*words) == 2
        err = capsys.readouterr().err
        assert text in err
        assert err.count("\n") == 1


def test_a_log_that_lost_rows_is_refused(tmp_path, capsys):
    run = tmp_path / "run"
    assert run_cli("quickstart", "--optim.epochs", "1", "--run-dir", str(run)) == 0
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    assert run_cli("--resume", str(run)) == 2
    assert "has lost rows" in capsys.readouterr().err


def test_running_out_of_memory_names_a_batch_that_fits(tmp_path, monkeypatch, capsys):
    real = Step.run

    def small(self, batch):
        if len(batch.y) > 20:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")
        real(self, batch)

    monkeypatch.setattr(Step, "run", small)
    words = ["quickstart", "--optim.batch_size", "128", "--run-dir", str(tmp_path / "run")]
    assert run_cli(*words) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert (
        "out of memory with optim.batch_size = 128: a step with --optim.batch_size 16 fits" in err
    )


def test_a_data_file_that_vanishes_while_training_is_no_matter(tmp_path, monkeypatch, capsys):
    """The set was read into memory, or is mapped: an unlinked file lives as long as its readers."""
    import shutil

    from engine.data import datasets
    from engine.runs import images

    from ..data import official

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.sys, "prefix", str(tmp_path / "prefix"))
    official.install(tmp_path / "data", "mnist", train=64, test=8)
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "data"))
    images._images.cache_clear()
    real = Step.__call__

    def vanish(self, batch=None):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        real(self, batch)

    monkeypatch.setattr(Step, "__call__", vanish)
    words = ["mnist", "--model.name", "tiny-cnn", "--optim.epochs", "2", "--optim.batch_size", "8"]
    words += ["--data.validation", "8", "--run-dir", str(tmp_path / "run")]
    assert run_cli(*words) == 0, capsys.readouterr().err
    images._images.cache_clear()
    # But it is missed by who starts anew, in one line.
    (tmp_path / "run" / "summary.json").unlink()
    assert run_cli("--resume", str(tmp_path / "run")) == 2
    assert "engine data" in capsys.readouterr().err.splitlines()[-1]
    images._images.cache_clear()


def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch, capsys):
    now = [2e9]

    def backwards():
        now[0] -= 1000
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    run = tmp_path / "run"
    assert run_cli("quickstart", "--optim.epochs", "2", "--run-dir", str(run)) == 0
    assert all(row["train_seconds"] > 0 for row in Run.open(run).metrics())


def test_soak(tmp_path):
    """A short form of `make soak`."""
    found = soak(3, tmp_path, epochs=12)
    assert found["identical"]
    assert found["lost_lines"] == 0
    assert found["kills"] == 3


def test_the_soak_sees_a_difference():
    whole = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    assert differing(whole, whole) == 0
    assert differing(whole[:1], whole) == 1
    assert differing([whole[0], whole[0], whole[1]], whole) == 2
    assert differing([whole[0], {"epoch": 2, "loss": 0.5000001}], whole) == 1


def test_signals_reach_the_status():
    assert Stopped(signal.SIGTERM).status == 143
    assert Stopped(signal.SIGINT).status == 130
    assert isinstance(Stopped(signal.SIGINT), KeyboardInterrupt)
    assert os.name == "posix"
