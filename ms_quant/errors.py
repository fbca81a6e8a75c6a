"""The one exception a user is meant to read."""


class MsQuantError(ValueError):
    """Bad input, said in one sentence: what was named, what was found, what was expected.

    The commands print the message and leave with a non-zero status; no traceback is shown.
    """
