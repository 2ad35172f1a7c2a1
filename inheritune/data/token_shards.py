"""The writing of token shards: files of raw little-endian ids that survive a kill."""

import io
import os
import re
from pathlib import Path

import numpy as np

from inheritune.files.markers import hash_file
from inheritune.files.storage import explain_disk_error
from inheritune.files.writing import break_links, remove_path, sync_file


class Shards:
    """The token files of one split, filled one after another.

    They are written in place: they do not count before the manifest names them."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, state: dict | None):
        """`state` is what `save` returned in an earlier process. What was written after it is cut off."""
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.tokens, self.documents, self.filled = 0, 0, 0
        self.shards: list[dict] = []
        self._file: io.FileIO | None = None
        if state:
            self.tokens, self.documents, self.shards = state["tokens"], state["documents"], state["shards"]
            self.filled = state["open_bytes"] // self.dtype.itemsize
        own = {path.name for path in folder.iterdir() if re.fullmatch(rf"{split}_[0-9]{{5}}\.bin", path.name)}
        later = own - {shard["file"] for shard in self.shards}
        for name in later - ({self.path.name} if self.filled else set()):
            remove_path(folder / name)
        if self.filled:
            break_links(self.path)
            os.truncate(self.path, self.filled * self.dtype.itemsize)

    @property
    def path(self) -> Path:
        """The shard that is open, or would be opened next."""
        return self.folder / f"{self.split}_{len(self.shards):05d}.bin"

    def write(self, ids: np.ndarray, documents: int) -> bool:
        """Append tokens and return whether a shard was filled. Raises UserError if the disk is full."""
        self.tokens += len(ids)
        self.documents += documents
        done = len(self.shards)
        while len(ids):
            part = ids[: self.shard_tokens - self.filled]
            try:
                if self._file is None:
                    self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open over many calls)
                view = np.ascontiguousarray(part).data.cast("B")
                while view:  # an unbuffered write may write only a part
                    view = view[self._file.write(view) :]
            except OSError as error:
                raise explain_disk_error(error, self.path) from error
            self.filled, ids = self.filled + len(part), ids[len(part) :]
            if self.filled == self.shard_tokens:
                self.finish()
        return len(self.shards) > done

    def finish(self) -> None:
        """Close the open shard, if there is one, and record it with its hash."""
        if self.filled:
            self.save()
            if self._file:
                self._file.close()
            path, size = self.path, self.filled * self.dtype.itemsize
            self.shards.append(
                {"file": path.name, "tokens": self.filled, "bytes": size, "xxh3": hash_file(path)}
            )
            self.filled, self._file = 0, None

    def describe(self) -> dict:
        """Return the split's entry in the manifest."""
        return {"tokens": self.tokens, "documents": self.documents, "shards": self.shards}

    def save(self) -> dict:
        """Make what is written survive a power cut, and return the state from which a later process can
        resume."""
        if self._file:
            sync_file(self._file.fileno())
        return self.describe() | {"open": self.path.name, "open_bytes": self.filled * self.dtype.itemsize}
