"""Progress of long work, all on stderr, so that stdout holds results only."""

from __future__ import annotations

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

from .text import printable


class _PlainConsole(Console):
    """Show strings as they are: no markup, no emoji codes, control characters as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(
            printable(text, "\n"), **{**options, "markup": False, "emoji": False}
        )


stderr = _PlainConsole(stderr=True)
stdout = _PlainConsole()

_REFRESH_STEPS = 10


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


class TrainingBar:
    """Show steps, loss and adversarial accuracy while training; print one line an epoch."""

    def __init__(self, progress: Progress, name: str, epochs: int) -> None:
        self.progress, self.epochs = progress, epochs
        self.task = progress.add_task(f"training {printable(name)}", total=None, note="")

    def step(self, done: int, total: int, means: Callable[[], dict[str, float]]) -> None:
        """Show the step; `means` waits for the device, so it is called at few steps."""
        if done % _REFRESH_STEPS == 0 or done == total:
            now = means()
            note = f"loss {now['loss']:.3f}  adv {now['adv_accuracy']:.0%}"
            self.progress.update(self.task, completed=done, total=total, note=note)

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

    def __call__(self, attack: str, done: int, total: int) -> None:
        self.progress.update(
            self.task, description=f"evaluating: {attack}", completed=done, total=total
        )
