"""Write numbers as people read them, and text from strangers so that it is safe to show."""

from __future__ import annotations

import reprlib
import unicodedata


def percent(mean: float | None, deviation: float | None = None) -> str:
    """Write a share [0..1] in percent, with its deviation where there is one: "49.1 ± 0.3"."""
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def duration(seconds: float) -> str:
    """Write seconds in their own unit: "12.3 s", "4 min 05 s", "2 h 07 min"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out a number of more than 4300 digits.
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 512 else repr(x)


def shown(value: object) -> str:
    """Return `repr(value)` for an error line, cut short for a long, deep or large value."""
    return _Short().repr(value)


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with control characters as escapes: names and paths come from strangers.

    A terminal obeys escape sequences, and a lone surrogate (a byte of a path that is not UTF-8)
    cannot be encoded.

    Args:
        keep: control characters to leave as they are, "\n" for text of several lines.
    """
    escapes = {
        ord(c): c.encode("unicode_escape").decode()
        for c in set(text).difference(keep)
        if unicodedata.category(c).startswith("C")
    }
    return text.translate(escapes) if escapes else text
