"""The Hub as it fails: what its libraries raise, as sentences that name the way out."""

import errno
from contextlib import contextmanager
from pathlib import Path

from inheritune.errors import UserError, first_line
from inheritune.files.rundir import FULL, disk_error, moved_by, path_of


def gate(error: Exception, what: str, page: str) -> UserError | None:
    """The sentence for a Hub that knows `what` (on https://huggingface.co/`page`) but does not give it to us;
    else None."""
    answers = [getattr(e, "response", None) for e in (error, error.__cause__)]
    if not any(answer is not None and answer.status_code in (401, 403) for answer in answers):
        return None
    return UserError(
        f"the Hub does not give {what} to everyone: log in, accept the licence at "
        f"https://huggingface.co/{page} , make a token "
        f"of that account and set HF_TOKEN to it (or the name is wrong: the Hub tells this apart only for "
        f"members)"
    )


@contextmanager
def hub_errors(what: str, page: str):
    """What the Hub's libraries raise while they look for `what`, which lies on https://huggingface.co/`page`,
    as one sentence that names the way out."""
    from httpx2 import HTTPError  # what huggingface-hub speaks through
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in (*FULL, errno.EACCES, errno.EROFS):
            raise disk_error(error, path_of(error, Path(constants.HF_HUB_CACHE))) from error
        raise gate(error, what, page) or UserError(
            f"{what} is neither in the cache ({constants.HF_HUB_CACHE}) nor can it be had from the Hub "
            f"({first_line(error)}); "
            f"run 'python -m inheritune fetch' where there is internet, or set "
            f"{moved_by(Path(constants.HF_HUB_CACHE))[0]} to "
            f"a cache that has it"
        ) from None
