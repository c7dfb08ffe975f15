"""Read what a run found, summary.json and evaluation.json, with checks.

A run folder may come from a stranger, and a person may have edited its files.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2

from ..errors import EngineError
from ..text import shown
from .folder import Run

Check = Callable[[Any], bool]


def is_text(value: object) -> bool:
    """Tell whether a value is a string."""
    return isinstance(value, str)


def is_count(value: object) -> bool:
    """Tell whether a value is a whole number in [0, 2^53)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number that a float can hold."""
    limit = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= limit


def is_share(value: object) -> bool:
    """Tell whether a value is a share in [0, 1], or None: not measured."""
    return value is None or (is_number(value) and 0 <= value <= 1)  # type: ignore[operator]


def _is_positive_count(value: object) -> bool:
    return is_count(value) and value != 0


def _is_duration(value: object) -> bool:
    return is_number(value) and value >= 0  # type: ignore[operator]


def _is_percent(value: object) -> bool:
    """Tell whether a value is a percentage in [0, 100], as a number or as text: "97.50"."""
    if isinstance(value, str):
        return re.fullmatch(r"\d{1,3}(\.\d{1,20})?", value, re.ASCII) is not None and (
            float(value) <= 100
        )
    return is_number(value) and 0 <= value <= 100  # type: ignore[operator]


def _or_none(fits: Check) -> Check:
    return lambda value: value is None or fits(value)


def _list_of(fits: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _table_of(fits: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


# Checks of the fields that are read. Those of the second table may be absent or null.
_SUMMARY: dict[str, Check] = {
    "train_seconds": _is_duration,
    "passes_per_step": _is_duration,
    "steps": is_count,
}
_SUMMARY_MORE: dict[str, Check] = {
    **dict.fromkeys(("clean", "pgd", "autoattack", "worst_case"), is_share),
    **dict.fromkeys(("recipe", "precision"), is_text),
    **dict.fromkeys(("best_epoch", "peak_memory_mb"), is_count),
    "examples": _is_positive_count,
    "autoattack_attacks": _list_of(is_text),
    "rolled_back": _list_of(is_count),
}
_EVALUATION: dict[str, Check] = {
    **dict.fromkeys(("clean_acc", "worst_case_acc", "standard_error"), _is_percent),
    "examples": _is_positive_count,
}
_EVALUATION_MORE: dict[str, Check] = {
    **dict.fromkeys(("pgd_acc", "autoattack_acc", "reported"), _is_percent),
    **dict.fromkeys(("name", "dataset", "architecture", "pgd", "precision"), is_text),
    **dict.fromkeys(("autoattack_version", "autoattack_judge", "checkpoint"), is_text),
    **dict.fromkeys(("autoattack_attacks", "notes"), _list_of(is_text)),
    "after_each_attack": _table_of(_is_percent),
}


def summary(run: Run) -> dict[str, Any]:
    """Return the fields of summary.json, each checked; {} where the run is not finished.

    Raises:
        EngineError: where the file is damaged.
    """
    again = f"engine train --resume {run.path}"
    fields = _checked(run, "summary.json", _SUMMARY, _SUMMARY_MORE, again)
    if fields.get("clean") is not None and fields.get("examples") is None:
        raise _damaged(run, "summary.json", "examples is missing", again)
    return fields


def evaluation(run: Run) -> dict[str, Any]:
    """Return the fields of evaluation.json, each checked; {} before an evaluation.

    Raises:
        EngineError: where the file is damaged.
    """
    again = f"engine eval {run.path}"
    return _checked(run, "evaluation.json", _EVALUATION, _EVALUATION_MORE, again)


def _checked(
    run: Run, file: str, always: Mapping[str, Check], sometimes: Mapping[str, Check], again: str
) -> dict[str, Any]:
    fields = run.read_json(file)
    if not (run.path / file).exists():
        return {}
    checks = {**always, **{name: _or_none(fits) for name, fits in sometimes.items()}}
    for name, fits in checks.items():
        if not fits(fields.get(name)):
            reason = f"is {shown(fields[name])}" if name in fields else "is missing"
            raise _damaged(run, file, f"{name} {reason}", again)
    return fields


def _damaged(run: Run, file: str, reason: str, again: str) -> EngineError:
    path = run.path / file
    return EngineError(f"{path} is damaged ({reason}): remove it, and `{again}` writes it again")


@contextlib.contextmanager
def foreign_files(run: Run) -> Iterator[None]:
    """Name the run where its files make the block fail: they are not what a run writes.

    Raises:
        EngineError: in place of the exceptions that wrong fields lead to.
    """
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        jinja2.UndefinedError,
    ) as error:
        # The engine reads its own files; only a damaged or foreign folder gets here.
        what = str(error).split("\n")[0]
        raise EngineError(
            f"{run.path}: its files are not what a run writes ({type(error).__name__}: {what})"
        ) from error
