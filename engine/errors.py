"""A user's mistake as one line that names what is wrong and what to do; text that is safe to show."""

import unicodedata


class EngineError(Exception):
    """Report a mistake of the user or a fault outside; the CLI prints it in one line and exits 2."""


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
