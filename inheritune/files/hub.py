"""Errors of the Hub's libraries, as sentences that name the way out."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inheritune.errors import UserError, is_machine_limit, summarize_error
from inheritune.files.storage import DISK_FULL, explain_disk_error, find_moving_variable, get_error_path


def explain_gated(error: Exception, what: str, page: str) -> UserError | None:
    """Return a UserError if the Hub refuses access to `what` (on huggingface.co/`page`), else None."""
    answers = [getattr(e, "response", None) for e in (error, error.__cause__)]
    if not any(answer is not None and answer.status_code in (401, 403) for answer in answers):
        return None
    return UserError(
        f"the Hub restricts access to {what}: log in, accept the licence at "
        f"https://huggingface.co/{page} , make a token "
        f"of that account and set HF_TOKEN to it (or the name is wrong: the Hub tells this apart only for "
        f"members)"
    )


@contextmanager
def translate_hub_errors(what: str, page: str) -> Iterator[None]:
    """Raise errors of the Hub's libraries about `what` as a UserError; its page is huggingface.co/`page`."""
    from httpx2 import HTTPError  # the HTTP client of huggingface-hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        if is_machine_limit(error):
            raise
        if isinstance(error, OSError) and error.errno in (*DISK_FULL, errno.EACCES, errno.EROFS):
            path = get_error_path(error, Path(constants.HF_HUB_CACHE))
            raise explain_disk_error(error, path) from error
        variable, _ = find_moving_variable(Path(constants.HF_HUB_CACHE))
        raise explain_gated(error, what, page) or UserError(
            f"{what} is neither in the cache ({constants.HF_HUB_CACHE}) nor available from the Hub "
            f"({summarize_error(error)}); run 'python -m inheritune fetch' where there is internet, or set "
            f"{variable} to a cache that has it"
        ) from None
