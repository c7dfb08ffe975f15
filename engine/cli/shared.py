"""What the commands share: the parser, overrides of a recipe's fields, what is printed, what exits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from ..errors import EngineError, printable
from ..training.signals import Stopped


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake as one EngineError line."""

    def error(self, message: str) -> NoReturn:
        raise EngineError(f"{message} (see {self.prog} --help)")


# What add_subparsers returns; argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(
    commands: Commands,
    name: str,
    function: Callable[..., int],
    text: str,
    overridable: bool = False,
) -> Parser:
    """A command's parser, for its flags.

    Args:
        function: what the command does; takes the arguments (of an overridable command: and the words
            that the parser left, for `parse_overrides`) and returns the exit status.
    """
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=function, overridable=overridable)
    return parser


def parse_overrides(rest: list[str]) -> dict[str, str]:
    """`--attack.steps 2` and `--attack.steps=2` as {"attack.steps": "2"}."""
    found: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--") or len(word) < 3:
            raise EngineError(f"unexpected argument {word!r}: options look like --attack.steps 2")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise EngineError(f"--{key} needs a value")
        found[key] = value
    return found


def print_rows(rows: list[dict[str, Any]], as_json: bool, hidden: Sequence[str] = ()) -> None:
    """Rows as JSON, or as plain aligned columns that a narrow terminal wraps rather than cuts."""
    if as_json:
        print(json.dumps(rows))
        return

    def text(value: Any) -> str:
        shown = f"{value:.3g}" if isinstance(value, float) else printable(str(value))
        return "-" if value is None else shown

    keys = [key for key in rows[0] if key not in hidden]
    lines = [keys, *([text(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    for line in lines:
        print(
            "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        )


def print_row(row: dict[str, Any], as_json: bool) -> None:
    """A run's closing row as JSON, or as a table with titles; shares as percentages."""
    if as_json:
        print(json.dumps(row))
        return
    from rich.table import Table

    from ..progress import stdout

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    # Paths are for copying: a narrow terminal wraps them and cuts nothing.
    table.add_column(overflow="fold")
    for key, value in row.items():
        if value is None or value == []:
            continue
        name = _TITLES.get(key, key)
        share = key in ("clean", "pgd", "autoattack", "worst_case")
        table.add_row(name, f"{100 * value:.2f} %" if share else str(value), end_section=False)
    stdout.print(table)


_TITLES = {
    "clean": "clean accuracy",
    "pgd": "PGD accuracy",
    "autoattack": "AutoAttack accuracy",
    "worst_case": "worst case of all attacks",
    "examples": "test images",
    "train_seconds": "training seconds (no evaluation)",
    "eval_seconds": "evaluation seconds",
    "passes_per_step": "passes per step",
    "best_epoch": "best epoch (validation PGD)",
    "rolled_back": "epochs rolled back",
    "peak_memory_mb": "peak memory [MB]",
    "run_dir": "run folder",
}


def add_output(parser: Parser) -> None:
    """The flags that say where a benchmark's rows go."""
    parser.add_argument(
        "--store",
        action="store_true",
        help="in a source checkout: keep the rows in benchmarks/results, for `make tables`",
    )
    parser.add_argument("--json", action="store_true")


def store_rows(what: str, words: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Do what `--store` asks for; arguments as for `results.write`."""
    from .. import results

    print(f"engine: stored in {results.write(what, words, rows)}", file=sys.stderr)


def exit_status(stopped: KeyboardInterrupt) -> int:
    """130 for Ctrl-C; 128 and the signal's number for another."""
    return stopped.status if isinstance(stopped, Stopped) else 130
