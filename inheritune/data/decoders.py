"""Readers of files of documents, each of which notices whether its file is complete.

A download or a copy that broke off must not pass for a shorter file. gzip ends with a length and a checksum,
zstd with the end of a frame, parquet with a footer, a JSON array with its bracket. A file without its end is
refused in one sentence. JSONL has no end of its own: a last line that is cut off is not JSON and is counted
as such. Plain text has no such mark.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from inheritune.errors import UserError, is_machine_limit, suggest_name

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What some editors put before UTF-8. It is not part of the text."""
BLOCK_BYTES = 1 << 20
MAX_WINDOW = 1 << 31
"""Window of zstd --long=31, its largest. It takes that much memory, and only for files that ask for it."""
MAX_JSON_BYTES = 2 << 30
"""Of one JSON value, which is in memory as a whole, several times as large, while it is parsed."""


@contextmanager
def report_read_errors(path: Path) -> Iterator[None]:
    """Raise as a UserError what goes wrong while `path` is read: cut off, damaged, or not readable at all."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); fetch or copy it again") from None
    except OSError as error:
        if is_machine_limit(error):
            raise
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of a .zst file of one or more frames, as a stream.

    zstandard's own stream_reader ends silently where the file does, even in the middle of a frame."""

    def __init__(self, path: Path):
        """Open `path`. Raises EOFError if it is empty: even nothing compresses to a frame."""
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._unpacked = memoryview(b"")
        if not self._file.peek(1):
            raise EOFError("it is empty")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes. Raises EOFError if the file ends within a frame,
        ZstdError if it is damaged."""
        while not self._unpacked:
            packed = self._file.read(BLOCK_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._unpacked = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        """Return the decompressed bytes of the next part of the file, across the borders of frames."""
        parts = []
        while packed:
            frame = self._frame or self._decompressor.decompressobj()
            parts.append(frame.decompress(packed))
            packed = frame.unused_data if frame.eof else b""
            self._frame = None if frame.eof else frame
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_unpacked(path: Path) -> BinaryIO:
    """Open a file as a buffered stream of its decompressed bytes; the end of its name says how.

    Raises EOFError if it is of a compressed kind and empty."""
    if path.name.endswith(".zst"):
        return io.BufferedReader(ZstdFile(path), BLOCK_BYTES)
    if path.name.endswith(".gz"):
        if not path.stat().st_size:  # gzip reads it as an archive of nothing
            raise EOFError("it is empty")
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb", buffering=BLOCK_BYTES)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of the lines of a JSONL file that are not blank."""
    with open_unpacked(path) as file:
        yield from _number_lines(file)


def _number_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BYTE_ORDER_MARK)
        if line and not line.isspace():
            yield number, line


def read_json_documents(path: Path, key: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, a line of JSON with `key`) of the documents of a .json file.

    The file is JSON Lines (streamed), or an array of objects or of texts, or one object (both in memory as a
    whole).

    Raises UserError if it is not JSON, of another form, or one value of more than MAX_JSON_BYTES."""
    with open_unpacked(path) as file:
        first = next(_number_lines(iter(file.readline, b"")), (0, b""))[1]
        if _is_object(first):  # an object that ends on its line begins JSON Lines, or is the only one
            yield 1, first
            yield from ((number + 1, line) for number, line in _number_lines(file))
            return
        rest = file.read(MAX_JSON_BYTES + 1)
    if len(rest) > MAX_JSON_BYTES:
        raise UserError(
            f"{path} has one JSON value of more than {MAX_JSON_BYTES >> 30} GB; write it as JSON Lines "
            f"(.jsonl)"
        )
    if not first:
        return
    try:
        value = json.loads((first + rest).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is cut off or not JSON ({error}); fetch or copy it again") from None
    if not isinstance(value, list | dict):
        raise UserError(
            f"{path} holds a JSON {type(value).__name__}; documents are objects with '{key}', or an array of "
            f"them"
        )
    for number, element in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, json.dumps({key: element} if isinstance(element, str) else element).encode()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# --- columns ------------------------------------------------------------------------------------------------


def read_parquet(path: Path, key: str) -> Iterator[tuple[int, bytes | None]]:
    """Yield (row from 1, bytes) of a column of texts or chats, a few hundred rows at a time.

    Raises UserError as `find_column_kind` does."""
    with _open_parquet(path) as file:
        kind, row = find_column_kind(path, file.schema_arrow, key), 0
        for batch in file.iter_batches(batch_size=256, columns=[key]):
            # by name: where 'a.b' is asked for, pyarrow also reads field b of a column a
            for raw in list_raw_values(batch.column(key), kind, key):
                row += 1
                yield row, raw


def find_parquet_kind(path: Path, key: str) -> str:
    """Return `find_column_kind` of a parquet file."""
    with _open_parquet(path) as file:
        return find_column_kind(path, file.schema_arrow, key)


def count_parquet(path: Path, key: str) -> int:
    """Return the number of rows of a parquet file. Raises UserError as `read_parquet` does."""
    with _open_parquet(path) as file:
        find_column_kind(path, file.schema_arrow, key)
        return file.metadata.num_rows


def find_column_kind(path: Path, schema: Any, key: str) -> str:
    """Return how the column `key` of an Arrow schema holds documents: "text", or "json" for chats, which are
    lists of messages.

    Raises UserError unless there is one such column."""
    import pyarrow as pa

    if key not in schema.names:
        raise make_column_error(path, key, schema.names)
    if (times := schema.names.count(key)) > 1:
        raise UserError(
            f"{path} has {times} columns of the name '{key}' (data.text_key); rename all but one of them"
        )
    kind = schema.field(key).type
    if pa.types.is_null(kind):
        raise UserError(
            f"{path}: column '{key}' (data.text_key) is empty, all its values are null; name another column"
        )
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
        return "json"
    texts = (pa.string(), pa.large_string(), pa.string_view())
    if kind not in (*texts, pa.binary(), pa.large_binary(), pa.binary_view()):
        raise UserError(
            f"{path}: column '{key}' (data.text_key) holds {schema.field(key).type}, neither text nor chats "
            f"(lists of messages)"
        )
    return "text"


def make_column_error(where: object, key: str, names: Iterable[str]) -> UserError:
    """Return the refusal of a `data.text_key` that is none of the columns or keys `names`."""
    known = list(names)
    close = suggest_name(key, known)
    listed = "" if close.startswith("valid names") else f" It has: {', '.join(known)}"
    return UserError(f"{where} has no column '{key}' (data.text_key); {close}{listed}")


def list_raw_values(column: Any, kind: str, key: str) -> list[bytes | None]:
    """Return the values of an Arrow column of the `kind` that `find_column_kind` found: texts as bytes, so
    that invalid UTF-8 is one bad document and not the end, and chats as lines of JSON."""
    import pyarrow as pa

    if kind == "json":
        return [None if chat is None else json.dumps({key: chat}).encode() for chat in column.to_pylist()]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path} is not a complete parquet file ({str(error).splitlines()[0]}); fetch or copy it again"
        ) from None
