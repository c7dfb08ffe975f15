"""A user's mistake as one line that names what is wrong and what to do."""


class EngineError(Exception):
    """Report a user's mistake or a fault outside; the CLI prints it in one line and exits 2."""
