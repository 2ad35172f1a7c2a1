"""Token shards of random tokens, in the form that `prepare` leaves: for the tests and the benchmarks."""

from pathlib import Path

import numpy as np


def write_shards(folder: Path, sizes: dict[str, list[int]], vocabulary: int) -> dict:
    """Write shards of `sizes` (tokens, by split) into `folder`.  -> `splits` of its manifest

    The tokens are a random walk over the vocabulary: something can be learned from it."""
    from inheritune.files.markers import hash_file

    generator, splits = np.random.default_rng(0), {}
    for split, counts in sizes.items():
        shards = []
        for number, size in enumerate(counts):
            path = folder / f"{split}_{number:05d}.bin"
            (np.cumsum(generator.integers(0, 7, size=size)) % vocabulary).astype("<u2").tofile(path)
            shards.append({"file": path.name, "tokens": size, "bytes": 2 * size, "xxh3": hash_file(path)})
        splits[split] = {"tokens": sum(counts), "documents": 1, "shards": shards}
    return splits
