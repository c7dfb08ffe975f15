"""Test the loggers of a run: what each receives, and that no logger can end a run."""

from __future__ import annotations

import json
import sys
import tomllib
import types

import pytest
from safetensors.torch import load_file

from engine import cli, recipes
from engine.runs import loggers
from engine.runs.folder import Run
from engine.runs.loggers import LOGGERS

from .soak import SHORT


def train(run, *words):
    return cli.run(["train", *SHORT, "--run-dir", str(run), "--no-eval", "--json", *words])


def resumed(run):
    """Train on from the newest checkpoint but one, as after a kill."""
    newest = sorted((run / "checkpoints").glob("*.json"))[-1]
    newest.unlink()
    (run / "summary.json").unlink(missing_ok=True)
    return cli.run(["train", "--resume", str(run), "--no-eval", "--json"])


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Recorded:
    """A logger that notes its calls, and raises in one of them."""

    calls: list
    broken = ""

    def __init__(self, run, done):
        self.note("open", done)

    def log(self, step, values):
        self.note("log", step, values)

    def close(self):
        self.note("close")

    def note(self, *call):
        self.calls.append(call)
        if call[0] == self.broken:
            raise ValueError("the server\nis gone")


@pytest.fixture
def recorded(monkeypatch):
    kind = type("Kind", (Recorded,), {"calls": []})
    monkeypatch.setitem(LOGGERS, "wandb", kind)
    return kind


def test_tensorboard_is_the_default(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path / "run") == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    wanted = [(row["step"], row["loss"]) for row in rows(tmp_path / "run")]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(loss)) for step, loss in wanted]
    assert 'to = [\n    "tensorboard",\n]' in (tmp_path / "run" / "recipe.toml").read_text()


def test_a_recipe_of_an_earlier_engine_logs_to_tensorboard():
    fields = recipes.tree("quickstart")
    assert "log" not in fields
    assert recipes.parse(fields).log.to == ("tensorboard",)


@pytest.mark.parametrize(("word", "names"), [("none", ()), ("wandb,mlflow", ("wandb", "mlflow"))])
def test_the_command_line_chooses_the_loggers(word, names):
    recipe = recipes.load("quickstart", {"log.to": word})
    assert recipe.log.to == names
    assert recipes.parse(tomllib.loads(recipes.dump(recipe))) == recipe


def test_an_unknown_logger_is_one_line(tmp_path, capsys):
    assert train(tmp_path / "run", "--log.to", "comet") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "log.to" in line
    assert "'tensorboard', 'wandb' or 'mlflow'" in line


def test_a_logger_receives_every_row_and_its_end(recorded, tmp_path):
    assert train(tmp_path / "run", "--log.to", "wandb") == 0
    wanted = [
        ("log", row["step"], {k: v for k, v in row.items() if k not in ("epoch", "step")})
        for row in rows(tmp_path / "run")
    ]
    assert recorded.calls == [("open", 0), *wanted, ("close",)]
    assert not list((tmp_path / "run").glob("events.*"))


@pytest.mark.parametrize("broken", ["open", "log", "close"])
def test_a_run_does_not_fail_because_a_logger_does(recorded, tmp_path, caplog, broken):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    assert train(tmp_path / "plain", "--log.to", "none") == 0
    recorded.broken = broken
    assert train(tmp_path / "run", "--log.to", "wandb,tensorboard") == 0
    said = [r.getMessage() for r in caplog.records if "log.to" in r.getMessage()]
    assert said == [
        "log.to = wandb: ValueError: the server is gone; the run goes on without it",
    ]
    names = [call[0] for call in recorded.calls]
    many = ["log"] * len(rows(tmp_path / "run"))
    assert len(many) > 1
    assert (
        names
        == {
            "open": ["open"],
            "log": ["open", "log"],
            "close": ["open", *many, "close"],
        }[broken]
    )
    # The other logger has all rows, and the weights are those of a run without loggers.
    assert list((tmp_path / "run").glob("events.*"))
    plain = load_file(tmp_path / "plain" / "last.safetensors")
    ours = load_file(tmp_path / "run" / "last.safetensors")
    assert all(t.equal(ours[name]) for name, t in plain.items())


def test_a_missing_package_is_announced_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(tmp_path / "run", "--log.to", "wandb") == 0
    (line,) = [r.getMessage() for r in caplog.records if "log.to" in r.getMessage()]
    assert "wandb is not installed: pip install 'robust-engine[wandb]'" in line


class FakeWandB(types.ModuleType):
    """Weights & Biases, as far as the hook uses it."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def Settings(self, **options):  # as the package calls it
        return options

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_recipe_and_a_resume_goes_on_with_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = tmp_path / "run"
    assert train(run, "--log.to", "wandb", "--checkpoint.seconds", "0") == 0
    before = len(fake.logged)
    assert [values["step"] for values in fake.logged] == [row["step"] for row in rows(run)]
    assert resumed(run) == 0
    first, second = fake.inits
    assert first["id"] == second["id"] == json.loads((run / "loggers.json").read_text())["wandb"]
    assert first["project"] == "robust-engine"
    assert first["config"]["threat"]["eps"] == Run.open(run).recipe.threat.eps
    assert first["dir"] == str(run)
    assert fake.finished == 2
    assert len(fake.logged) > before


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    assert train(run, "--log.to", "wandb", "--checkpoint.seconds", "0") == 0
    identity = json.loads((run / "loggers.json").read_text())["wandb"]
    assert list((run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert resumed(run) == 0
    assert json.loads((run / "loggers.json").read_text())["wandb"] == identity


class FakeClient:
    """MLflow's client, as far as the hook uses it."""

    def __init__(self, tracking_uri):
        self.uri, self.runs, self.params, self.metrics, self.status = tracking_uri, [], {}, [], {}

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"of {name}"

    def create_run(self, experiment, run_name):
        self.runs.append((experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def update_run(self, identity, status):
        self.status[identity] = status

    def log_batch(self, identity, metrics=(), params=()):
        assert identity == "r1"
        assert len(params) <= 100
        self.params |= dict(params)
        self.metrics += metrics

    def set_terminated(self, identity):
        self.status[identity] = "FINISHED"


def test_mlflow_gets_the_recipe_and_a_resume_goes_on_with_the_same_run(tmp_path, monkeypatch):
    clients = []
    fake, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    fake.MlflowClient = lambda tracking_uri: clients.append(FakeClient(tracking_uri)) or clients[-1]
    entities.Metric, entities.Param = (lambda *of: of), (lambda *of: of)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    assert train(run, "--log.to", "mlflow", "--checkpoint.seconds", "0") == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert resumed(run) == 0
    first, second = clients
    assert first.uri == f"sqlite:///{run / 'mlflow.db'}"
    assert second.uri == "http://elsewhere"
    assert (first.runs, second.runs) == ([("of robust-engine", "run")], [])
    assert first.params["optim.epochs"] == str(Run.open(run).recipe.optim.epochs)
    steps = [row["step"] for row in rows(run)]
    assert [step for name, _, _, step in first.metrics if name == "loss"] == steps
    assert second.metrics
    assert first.status == second.status == {"r1": "FINISHED"}


def test_mlflow_itself_in_the_run_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    assert train(run, "--log.to", "mlflow", "--checkpoint.seconds", "0") == 0
    assert resumed(run) == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    identity = json.loads((run / "loggers.json").read_text())["mlflow"]
    history = client.get_metric_history(identity, "loss")
    assert {m.step for m in history} == {row["step"] for row in rows(run)}
    kept = client.get_run(identity)
    assert kept.info.status == "FINISHED"
    assert kept.data.params["data.name"] == "digits"


def test_nested_fields_have_dotted_names():
    assert loggers._flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
