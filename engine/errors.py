"""What a user's mistake looks like: one line that names what is wrong and what to do."""


class EngineError(Exception):
    """A mistake of the user's or of the outside world; the CLI prints it in one line and exits 2."""
