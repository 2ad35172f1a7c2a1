"""Readers of the formats that the datasets library streams and this package has no reader of: CSV, Arrow and
WebDataset archives.

JSON Lines, JSON, parquet and text have readers of their own (decoders.py), because datasets stops there at
the first malformed row, which those count and pass over. They read JSON Lines in two thirds of the library's
time and parquet in the same time, with a seventh and half of its memory (benchmarks/readers.py). No code of a
data set runs: the library's own builders read the files, and its decoders of archives load no pickles.
"""

import csv
import glob
import gzip
import json
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inheritune.data.decoders import find_column_kind, list_raw_values, make_column_error
from inheritune.errors import UserError, summarize_error

BUILDERS = {".csv": "csv", ".csv.gz": "csv", ".tsv": "csv", ".arrow": "arrow", ".tar": "webdataset"}
"""The library's builder for each kind of file."""
ENDS = {".tar": (bytes(1024),), ".arrow": (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")}
"""How such a file ends: a tar file in two empty blocks, an Arrow stream in an empty message, an Arrow file in
the format's name."""
ROWS = 256
"""Rows of a table that is in memory at a time."""


def stream_documents(path: Path, suffix: str, key: str) -> Iterator[tuple[int, bytes | None]]:
    """Yield (row from 1, raw bytes) of a column of texts or chats of a file that ends in `suffix`.

    In an archive `key` names the file of each sample, such as `txt`, or a key in it, such as `json.text`.
    Raises UserError if there is no such column, or if the file is damaged. CSV has no end of its own: a file
    that was cut off is noticed only within quotes."""
    if suffix in ENDS:
        _check_end(path, suffix)
    # the library makes a lock in its cache
    with _report_damage(path, suffix), tempfile.TemporaryDirectory() as cache:
        if BUILDERS[suffix] == "csv":
            _check_header(path, suffix, key)
        stream = _open_stream(path, suffix, key, cache)
        if BUILDERS[suffix] == "webdataset":
            yield from enumerate(_read_samples(path, stream, key), 1)
        else:
            tables = stream.with_format("arrow").iter(batch_size=ROWS)
            yield from enumerate(_read_tables(path, tables, key), 1)


def find_streamed_kind(path: Path, suffix: str, key: str) -> str:
    """Return how `stream_documents` gives the documents, as `find_column_kind` does: "text" or "json"."""
    import pyarrow as pa

    if suffix != ".arrow":
        return "json" if BUILDERS[suffix] == "webdataset" else "text"
    with _report_damage(path, suffix), open(path, "rb") as file:
        try:
            schema = pa.ipc.open_stream(file).schema
        except pa.ArrowInvalid:
            file.seek(0)
            schema = pa.ipc.open_file(file).schema
    return find_column_kind(path, schema, key)


def _check_end(path: Path, suffix: str) -> None:
    """Raise EOFError if a file lacks its end. Its readers take one that was cut off between two parts."""
    size, ends = path.stat().st_size, ENDS[suffix]
    with open(path, "rb") as file:
        file.seek(max(0, size - max(map(len, ends))))
        tail = file.read()
    if not tail.endswith(ends):
        raise EOFError(f"it has no end of {'an archive' if suffix == '.tar' else 'a stream'}")


def _get_separator(suffix: str) -> str:
    """Return what separates the fields of a CSV file."""
    return "\t" if suffix == ".tsv" else ","


def _check_header(path: Path, suffix: str, key: str) -> None:
    """Raise UserError if the column `key` is there twice: pandas renames the second without a word."""
    opened = gzip.open if suffix.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file, delimiter=_get_separator(suffix)), [])
    if header.count(key) > 1:
        raise UserError(f"{path} has two columns '{key}'; rename one of them")


@contextmanager
def _report_damage(path: Path, suffix: str) -> Iterator[None]:
    """Raise as a UserError what the libraries find wrong with a file."""
    import pyarrow as pa
    from pandas.errors import ParserWarning

    try:
        yield
    except ParserWarning:
        raise UserError(
            f"{path} has rows with more fields than its header; quote the texts that hold the separator, and "
            f"delete separators at the end of lines"
        ) from None
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        ValueError,
        csv.Error,
        tarfile.TarError,
        EOFError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own have no number
            raise
        raise UserError(
            f"{path} is cut off, damaged or no {BUILDERS[suffix]} file ({summarize_error(error)[:150]}); "
            f"fetch or copy it again"
        ) from None


def _open_stream(path: Path, suffix: str, key: str, cache: str) -> Any:
    """Return the library's stream of the rows of one file."""
    import datasets

    options: dict[str, Any] = {}
    if BUILDERS[suffix] == "csv":
        from pandas.errors import ParserWarning

        # rows with more fields than the header: by default pandas moves each column by one without a word
        warnings.filterwarnings("error", "Length of header", ParserWarning)
        # a text of digits stays a text, and so does "NA"
        options = {"converters": {key: str}, "keep_default_na": False, "index_col": False}
        options["sep"] = _get_separator(suffix)
    return datasets.load_dataset(
        BUILDERS[suffix],
        data_files=[glob.escape(str(path))],
        split="train",
        streaming=True,
        cache_dir=cache,
        **options,
    )


def _read_tables(path: Path, tables: Iterable[Any], key: str) -> Iterator[bytes | None]:
    """Yield the raw documents in the column `key` of Arrow tables."""
    for table in tables:
        kind = find_column_kind(path, table.schema, key)
        yield from list_raw_values(table[key], kind, key)


def _read_samples(path: Path, stream: Any, key: str) -> Iterator[bytes | None]:
    """Yield a line of JSON with `key` for each sample of an archive."""
    names = [name for name in stream.features if not name.startswith("__")]
    name, _, inner = (key, "", "") if key in names else key.partition(".")
    if name not in names:
        raise make_column_error(path, key, names)
    for sample in stream.select_columns([name]):
        value = sample[name]
        if isinstance(value, bytes):  # a kind that the library does not decode; what is not UTF-8 is counted
            value = value.decode(errors="surrogateescape")
        if inner:
            value = _take_inner(path, value, name, inner)
        # what the library decodes to an image or an array is counted as "not text"
        yield None if value is None else json.dumps({key: value}, default=lambda _: 0).encode()


def _take_inner(path: Path, value: Any, name: str, inner: str) -> Any:
    """Return the value of the key `inner` of a sample's file `name`. Raises UserError if it is no JSON
    object."""
    if value is not None and not isinstance(value, dict):
        raise UserError(
            f"data.text_key: {name}.{inner}: the files '{name}' in {path} are read as "
            f"{type(value).__name__}, not as an object with keys; name '{name}', or a file of JSON (.json)"
        )
    return value and value.get(inner)
