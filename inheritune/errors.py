"""A mistake of the user, and the words that help to mend it."""

import difflib


class UserError(Exception):
    """A user's mistake: printed as one sentence without a traceback, exit code 2."""


def nearest(name: str, valid) -> str:
    """The end of a sentence that refuses `name`: the closest valid name, or all of them."""
    valid = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "valid names: " + ", ".join(sorted(valid)) if valid else "nothing is valid here"


def first_line(error: Exception) -> str:
    """Return what a library's error says, without the lines that only its own developers need."""
    return str(error).strip().partition("\n")[0]
