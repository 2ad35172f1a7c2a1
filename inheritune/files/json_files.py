"""JSON and JSON-lines files of this package: writing with a seal, reading with a check of it."""

import errno
import json
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from inheritune.config.reading import refuse_duplicate_keys
from inheritune.errors import NoAccess, UserError, is_machine_limit
from inheritune.files.writing import write_text

SEAL = "seal"
"""Key under which a JSON object of this package holds a hash of itself. No other file records its content."""


def compute_seal(value: Any) -> str:
    """Return the xxh3-64 hash of a JSON value."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value).encode())


def add_seal(value: Any) -> Any:
    """Return `value` with its seal if it is an object, else unchanged. `remove_seal` checks the seal."""
    return {**value, SEAL: compute_seal(value)} if isinstance(value, dict) else value


def remove_seal(value: Any, where: str) -> Any:
    """Return `value` without its seal; what has no seal is returned unchanged.

    Raises UserError naming `where` if the object does not match its seal."""
    if not isinstance(value, dict) or SEAL not in value:
        return value
    content = {key: inner for key, inner in value.items() if key != SEAL}
    if compute_seal(content) != value[SEAL]:
        raise UserError(
            f"{where} is not as it was written; restore it (if you edited it on purpose, delete its '{SEAL}')"
        )
    return content


def write_json(path: Path, value: Any, seal: bool = True) -> None:
    """Write a JSON file. `seal`: add a seal; False for formats that other programs define."""
    write_text(path, json.dumps(add_seal(value) if seal else value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write a whole JSON-lines file; the first row carries the seal of all."""
    first = {**rows[0], SEAL: compute_seal({**rows[0], "rows": rows[1:]})}
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in (first, *rows[1:])))


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`, without its seal.

    Raises UserError if the file is missing or damaged, has a key twice, or does not match its seal; NoAccess,
    a kind of it, if the file may not be read."""
    try:
        text = _read_with_retries(path)
        value = json.loads(text, object_pairs_hook=partial(refuse_duplicate_keys, path))
        return remove_seal(value, str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except PermissionError as error:
        raise NoAccess(path, error.strerror) from None
    except (ValueError, OSError, RecursionError) as error:
        if is_machine_limit(error):
            raise
        raise UserError(
            f"{path} cannot be read as JSON ({error}); restore it or delete what it belongs to"
        ) from None


def read_jsonl(path: Path) -> list[dict]:
    """Return the rows of a JSON-lines file; none if there is no file.

    A last line cut off by a crash is skipped. Raises UserError if a line is not a row, or if the file has a
    seal and does not match it."""
    try:
        lines = _read_with_retries(path).splitlines(keepends=True) if path.exists() else []
        rows = [{**json.loads(line)} for line in lines if line.endswith("\n")]
    except PermissionError as error:
        raise NoAccess(path, error.strerror) from None
    except (ValueError, TypeError, OSError, RecursionError) as error:
        if is_machine_limit(error):
            raise
        raise UserError(f"{path} cannot be read as rows of JSON ({error}); restore it") from None
    if rows and SEAL in rows[0]:
        rows[0] = remove_seal({**rows[0], "rows": rows[1:]}, str(path))
        del rows[0]["rows"]
    return rows


def is_sealed(path: Path) -> bool:
    """Return whether a JSON-lines file has a seal in its first row. Call it after `read_jsonl`."""
    return SEAL in json.loads(_read_with_retries(path).partition("\n")[0])


def _read_with_retries(path: Path) -> str:
    """Return the text of a file. A file that is being replaced on NFS (ESTALE) is opened again."""
    for _ in range(10):
        try:
            return path.read_text(encoding="utf-8-sig")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return path.read_text(encoding="utf-8-sig")
