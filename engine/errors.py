"""A user's mistake as one line that names what is wrong and what to do; text that is safe to show."""

import reprlib
import unicodedata


class EngineError(Exception):
    """Report a mistake of the user or a fault outside; the CLI prints it in one line and exits 2."""


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out a number of more than 4300 digits.
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 512 else repr(x)


def shown(value: object) -> str:
    """Return `repr(value)` for an error line: cut where it is long, however deep or large the value."""
    return _Short().repr(value)


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with control characters as escapes: names and paths come from strangers.

    A terminal obeys escape sequences, and a lone surrogate (a byte of a path that is not UTF-8)
    cannot be encoded.

    Args:
        keep: control characters to leave as they are, "\n" for text of several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c).startswith("C") and c not in keep
        else c
        for c in text
    )
