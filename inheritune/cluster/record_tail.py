"""The last rows of a metrics.jsonl, read from its end, also while a run appends to it."""

import json
import math
import os
from pathlib import Path

TAIL_BYTES = (1 << 14, 1 << 20)
"""Bytes read from the end of metrics.jsonl: the last rows and, if they hold no evaluation, some thousand,
more than lie between two evaluations."""


def find_number(row: dict, key: str) -> float | None:
    """Return the finite number at `key` of a row, or None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def read_last_rows(path: Path, keys: tuple[str, ...]) -> dict[str, dict]:
    """Return {key: the last row of a JSON-lines file that has a number at this key}, without the keys that no
    row has."""
    found: dict[str, dict] = {}
    for n_bytes in TAIL_BYTES:
        missing = [key for key in keys if key not in found]
        tail = _read_tail(path, n_bytes) if missing else b""
        found |= {key: row for key in missing if (row := _find_last_row(tail, key))}
    return found


def _read_tail(path: Path, n_bytes: int) -> bytes:
    """Return the last `n_bytes` of a file; an empty string if there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - n_bytes))
            return file.read()
    except FileNotFoundError:
        return b""


def _find_last_row(tail: bytes, key: str) -> dict | None:
    """Return the last row with a step and a number at `key`, or None.

    Only lines that contain the key are parsed, because a record without any evaluation has thousands of other
    lines. A line that is cut or damaged is ignored, because the last one may just be being written."""
    word, end = json.dumps(key).encode(), len(tail)
    while (place := tail.rfind(word, 0, end)) >= 0:
        end, newline = tail.rfind(b"\n", 0, place) + 1, tail.find(b"\n", place)
        try:
            row = json.loads(tail[end:newline] if newline >= 0 else tail[end:])
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and find_number(row, key) is not None:
            return row
    return None
