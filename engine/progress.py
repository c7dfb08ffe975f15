"""Progress of long work, all on stderr, so that stdout holds results only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .text import duration, printable

_announced: set[str] = set()


def announce_once(log: logging.Logger, line: str) -> None:
    """Log a warning that this process has not logged before."""
    if line not in _announced:
        _announced.add(line)
        log.warning(line)


class _PlainConsole(Console):
    """Show strings as they are: no markup, no emoji codes, control characters as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(
            printable(text, "\n"), **{**options, "markup": False, "emoji": False}
        )


stderr = _PlainConsole(stderr=True)
stdout = _PlainConsole()

_REFRESH_STEPS, _REFRESH_SECONDS = 10, 1.0
# Without a terminal there is no bar; a line a minute shows that the work goes on.
_LINE_SECONDS = 60.0
# A run that is longer than this is announced with its length, once it is known so well.
_LONG_SECONDS, _SURE_SECONDS = 3600.0, 10.0


@contextmanager
def bar() -> Iterator[Progress]:
    """Show a live progress bar; without a terminal, only the lines printed beside it show."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        yield progress


class _Lines:
    """Print a line a minute where stderr is no terminal, and so shows no bar."""

    def __init__(self, progress: Progress) -> None:
        self._console, self._last = progress.console, time.monotonic()

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= _LINE_SECONDS:
            self._last = now
            self._console.print(line, highlight=False)


class TrainingBar:
    """Show steps, loss and adversarial accuracy while training; print one line an epoch.

    Args:
        steps: of the whole run; None: known at the first step.
    """

    def __init__(
        self, progress: Progress, name: str, epochs: int, steps: int | None = None
    ) -> None:
        self.progress, self.epochs = progress, epochs
        self.task = progress.add_task(f"training {printable(name)}", total=steps, note="")
        self._line = _Lines(progress)
        self._began = self._shown = time.monotonic()
        self._before: int | None = None
        self._announced = False

    def step(self, done: int, total: int, means: Callable[[], dict[str, float]]) -> None:
        """Show the step; `means` waits for the device, so it is called at few steps."""
        now = time.monotonic()
        if self._before is None:
            self._before = done - 1
        self._announce(now, done, total)
        if done % _REFRESH_STEPS and done != total and now - self._shown < _REFRESH_SECONDS:
            return
        self._shown = now
        mean = means()
        note = f"loss {mean['loss']:.3f}  adv {mean['adv_accuracy']:.0%}"
        self.progress.update(self.task, completed=done, total=total, note=note)
        self._line(f"step {done:,} of {total:,}  {note}")

    def _announce(self, now: float, done: int, total: int) -> None:
        """Say how long a long run takes, once, as soon as its steps have taken ten seconds."""
        elapsed = now - self._began
        if self._announced or elapsed < _SURE_SECONDS or self._before is None:
            return
        self._announced = True
        a_step = elapsed / (done - self._before)
        if a_step * (total - self._before) > _LONG_SECONDS:
            self.progress.console.print(
                f"a step takes {duration(a_step)}: this run takes about "
                f"{duration(a_step * (total - self._before))} here. Smaller: --optim.epochs 1, "
                "--data.train_examples 1000, --model.name tiny-cnn, or `engine train quickstart`",
                highlight=False,
                soft_wrap=True,
            )

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the line of an epoch."""
        validation = ""
        if "val_pgd" in row:
            validation = f"   val clean {row['val_clean']:6.1%}  PGD {row['val_pgd']:6.1%}"
        self.progress.console.print(
            f"epoch {row['epoch']:>3}/{self.epochs}  {row['train_seconds']:7.1f} s  "
            f"loss {row['loss']:.3f}  adv {row['adv_accuracy']:6.1%}{validation}",
            highlight=False,
        )


class EvaluationBar:
    """Show which attack runs and how far it is."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("evaluating", total=None, note="")
        self._line = _Lines(progress)
        self._attack, self._began, self._before = "", time.monotonic(), 0

    def __call__(self, attack: str, done: int, total: int) -> None:
        self.progress.update(
            self.task, description=f"evaluating: {attack}", completed=done, total=total
        )
        if attack != self._attack:
            self._attack, self._began, self._before = attack, time.monotonic(), done
        self._line(f"evaluating: {attack} {done} of {total}{self._time_left(done, total)}")

    def _time_left(self, done: int, total: int) -> str:
        """Return how long the attack takes from here at its speed so far; "" before its first."""
        if done <= self._before or done == total:
            return ""
        each = (time.monotonic() - self._began) / (done - self._before)
        return f", about {duration(each * (total - done))} left in this attack"
