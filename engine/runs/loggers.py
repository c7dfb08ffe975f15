"""Loggers of a run's rows beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A run never fails because a logger does: the failure is announced once, and training goes on
without that logger.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..recipes import LoggerName
from .folder import Run

log = logging.getLogger(__name__)

_PROJECT = "robust-engine"
# The identities of the run at each tool, for a resume.
_IDENTITIES = "loggers.json"
_MLFLOW_PARAMS = 100  # of one request
_MLFLOW_LONGEST = 6000  # characters of a parameter


class Logger(Protocol):
    """Log the rows of a run: built with (run, steps done before)."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Write TensorBoard's events into the run folder."""

    def __init__(self, run: Run, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run.path
        self._link = tempfile.TemporaryDirectory()
        if not str(path).isascii():
            # The writer encodes its path as UTF-8, which a path need not be: give it another name.
            link = Path(self._link.name) / "run"
            link.symlink_to(path.absolute(), target_is_directory=True)
            path = link
        # After a resume TensorBoard hides what an earlier process wrote from this step on.
        self._writer = SummaryWriter(str(path), purge_step=done + 1 if done else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
        self._link.cleanup()


class WandB:
    """Log to Weights & Biases, in the mode and project that its environment variables name.

    Files lie in RUN/wandb. A resume goes on with the same run; offline, with another part of it,
    which `wandb sync` joins.
    """

    def __init__(self, run: Run, done: int) -> None:
        import wandb

        identity = _identity(run, "wandb") or secrets.token_hex(8)
        run.place("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.path.name,
            id=identity,
            resume="allow",
            dir=str(run.path),
            config=dataclasses.asdict(run.recipe),
            # The progress bar redraws its lines: as captured output they are noise.
            settings=wandb.Settings(console="off"),
        )
        # Rows after the newest checkpoint are logged twice: wandb's own step cannot go back.
        self._run.define_metric("*", step_metric="step")
        _remember(run, "wandb", identity)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Log to MLflow: the store of MLFLOW_TRACKING_URI, else RUN/mlflow.db.

    A resume goes on with the same run.
    """

    def __init__(self, run: Run, done: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        place = run.place("mlflow.db").absolute()
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place}"
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=store)
        identity = _identity(run, "mlflow")
        if identity:
            self._client.update_run(identity, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            created = self._client.create_run(experiment, run_name=run.path.name)
            identity = created.info.run_id
            fields = _flat(dataclasses.asdict(run.recipe))
            params = [Param(key, str(value)[:_MLFLOW_LONGEST]) for key, value in fields.items()]
            for first in range(0, len(params), _MLFLOW_PARAMS):
                self._client.log_batch(identity, params=params[first : first + _MLFLOW_PARAMS])
            _remember(run, "mlflow", identity)
        self._identity = identity

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._identity, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._identity)


LOGGERS: dict[LoggerName, Callable[[Run, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


class Loggers:
    """Hold the loggers that a recipe names, and survive each of them.

    Args:
        done: the steps that earlier processes did.
    """

    def __init__(self, run: Run, done: int) -> None:
        self._open: dict[LoggerName, Logger] = {}
        for name in dict.fromkeys(run.recipe.log.to):
            with self._survived(name):
                self._open[name] = LOGGERS[name](run, done)

    def log(self, row: dict[str, Any]) -> None:
        """Log an epoch's row; "step" is the place of its values."""
        values = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        for name, logger in list(self._open.items()):
            with self._survived(name):
                logger.log(row["step"], values)

    def close(self) -> None:
        """Close the loggers that still work."""
        for name, logger in list(self._open.items()):
            with self._survived(name):
                logger.close()
        self._open.clear()

    @contextlib.contextmanager
    def _survived(self, name: LoggerName) -> Any:
        """Announce an exception of the block, and drop the logger `name`."""
        try:
            yield
        except ModuleNotFoundError as error:
            self._drop(
                name,
                f"{error.name} is not installed: pip install 'robust-engine[{name}]', or "
                "leave it out of log.to",
            )
        # A logger talks to other people's programs, which raise anything.
        except Exception as error:
            self._drop(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _drop(self, name: LoggerName, reason: str) -> None:
        self._open.pop(name, None)
        log.warning("log.to = %s: %s; the run goes on without it", name, reason)


def _identity(run: Run, name: str) -> str | None:
    value = run.read_json(_IDENTITIES).get(name)
    return value if isinstance(value, str) else None


def _remember(run: Run, name: str, identity: str) -> None:
    run.write_json(_IDENTITIES, {**run.read_json(_IDENTITIES), name: identity})


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
