"""The texts that were read before, by hash: which documents repeat one."""

import os
from pathlib import Path

import numpy as np

from inheritune.files.storage import explain_disk_error
from inheritune.files.writing import break_links, remove_path, sync_file

SEEN = "seen.bin"
"""The hashes of all different texts so far, in the data folder until it is finished."""
HASH_BYTES = 16


class SeenTexts:
    """The hashes of the texts so far, in memory (about 100 bytes a text) and in a file, from which a later
    process resumes."""

    def __init__(self, folder: Path, count: int):
        """`count` is what `save` returned in an earlier process. What was written after it is cut off."""
        self.path = folder / SEEN
        self.seen: set[bytes] = set()
        if count:
            break_links(self.path)
            os.truncate(self.path, count * HASH_BYTES)
            content = self.path.read_bytes()
            self.seen.update(content[at : at + HASH_BYTES] for at in range(0, len(content), HASH_BYTES))
        else:
            remove_path(self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115 (open over many calls)

    def find_repeats(self, digests: list[bytes]) -> np.ndarray:
        """Return which of the next documents repeat an earlier text, (documents,) bool.

        An empty hash is of no text. Raises UserError if the disk is full."""
        repeats, new = np.zeros(len(digests), bool), []
        for index, digest in enumerate(digests):
            if digest in self.seen:
                repeats[index] = True
            elif digest:
                self.seen.add(digest)
                new.append(digest)
        try:
            self._file.write(b"".join(new))
        except OSError as error:
            raise explain_disk_error(error, self.path) from error
        return repeats

    def save(self) -> int:
        """Make what is written survive a power cut, and return the number of texts."""
        try:
            self._file.flush()
        except OSError as error:
            raise explain_disk_error(error, self.path) from error
        sync_file(self._file.fileno())
        return len(self.seen)

    def remove(self) -> None:
        """Remove the file, which a finished folder does not need."""
        self._file.close()
        remove_path(self.path)
