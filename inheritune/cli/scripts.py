"""How the programs of recipes/ end: as the verbs do, with a sentence and exit code 2 for a user's mistake."""

import sys
from collections.abc import Callable
from typing import NoReturn

from inheritune.config.values import ARGUMENTS
from inheritune.errors import UserError


def run_script(main: Callable[..., int | None], *words: str) -> NoReturn:
    """Call main(*words) and exit with what it returns; with 2, after its sentence, for a UserError."""
    try:
        sys.exit(main(*words))
    except UserError as error:
        print(f"inheritune: {error}", file=sys.stderr)
        sys.exit(2)


def read_variable(name: str, text: str) -> int:
    """Return the whole number that a script's variable such as SEED holds. Raises UserError for others."""
    try:
        return int(ARGUMENTS[name.lower()].read(text))
    except ValueError as problem:
        raise UserError(f"{name} {problem} (got '{text}')") from None
