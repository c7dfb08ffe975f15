"""Code shared by the commands: the parser, overrides of fields, printed rows, exit status."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ..errors import EngineError
from ..text import printable
from ..training.signals import Stopped


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake as one EngineError line."""

    def error(self, message: str) -> NoReturn:
        raise EngineError(f"{message} (see {self.prog} --help)")


# What add_subparsers returns; argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


FIELDS = (
    "Every field of the recipe can be changed: --attack.steps 2, --threat.eps 4/255, ... "
    "`engine train --help` lists the fields; `engine train --help SECTION` lists one section."
)


def add_command(
    commands: Commands,
    name: str,
    function: Callable[..., int],
    text: str,
    overridable: bool = False,
    fields: str = FIELDS,
) -> Parser:
    """Add a command and return its parser.

    Args:
        function: runs the command and returns the exit status. Its arguments are the parsed ones
            and, for an overridable command, the words that the parser left for `parse_overrides`.
        fields: the help's line about the recipe fields that an overridable command takes.
    """
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=fields if overridable else None,
        allow_abbrev=False,
    )
    parser.set_defaults(run=function, overridable=overridable)
    return parser


def path_of(text: str) -> Path:
    """Return the path that a word names; a shell variable that is not set leaves an empty word."""
    if not text:
        raise argparse.ArgumentTypeError("needs a path, got an empty word")
    return Path(text)


def add_import(parser: Parser) -> None:
    """Add the flag that brings networks and objectives of one's own; `cli.run` obeys it."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers networks or objectives of your own; may be repeated",
    )


def parse_overrides(rest: list[str]) -> dict[str, str]:
    """Turn `--attack.steps 2` and `--attack.steps=2` into {"attack.steps": "2"}."""
    overrides: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--") or len(word) < 3:
            raise EngineError(f"unexpected argument {word!r}: options look like --attack.steps 2")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise EngineError(f"--{key} needs a value")
        overrides[key] = value
    return overrides


def print_rows(rows: list[dict[str, Any]], as_json: bool, hidden: Sequence[str] = ()) -> None:
    """Print rows as JSON, or as aligned columns that a narrow terminal wraps and does not cut."""
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


def add_output(parser: Parser) -> None:
    """Add the flags that say where a benchmark's rows go."""
    parser.add_argument(
        "--store",
        action="store_true",
        help="in a source checkout: keep the rows in benchmarks/results, for `make tables`",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def store_rows(what: str, words: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Do what `--store` asks for; arguments as for `results.write`."""
    from .. import results

    print(f"engine: stored in {results.write(what, words, rows)}", file=sys.stderr)


def exit_status(stopped: KeyboardInterrupt) -> int:
    """Return 130 for Ctrl-C, or 128 plus the signal's number."""
    return stopped.status if isinstance(stopped, Stopped) else 130
