"""A mistake of the user, and the words that help to mend it."""

import difflib


class UserError(Exception):
    """A user's mistake: printed as one sentence without a traceback, exit code 2."""


class Stopped(Exception):
    """The work was saved before its end because a signal or a STOP file asked for it: exit code 0. `again`:
    there is more to do, and a job's script may go on with it (not after a STOP file, which is a person's)."""

    def __init__(self, message: str, again: bool = True):
        super().__init__(message)
        self.again = again


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
