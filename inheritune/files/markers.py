"""Markers: files written last, with the size and the xxh3-128 hash of every file that they cover."""

from collections.abc import Collection, Iterator
from pathlib import Path

import xxhash

from inheritune.errors import UserError
from inheritune.files.json_files import read_json

DONE, COMPLETE, MANIFEST, INHERITED = MARKERS = ("DONE", "COMPLETE", "manifest.json", "inherited.json")
"""Markers of a finished run, a checkpoint, a folder of tokens and an inherited start."""


def is_prepared(folder: Path) -> bool:
    """Return whether `folder` holds finished token shards."""
    return (folder / MANIFEST).is_file()


def hash_file(path: Path) -> str:
    """Return the xxh3-128 hash of a file (9.5 GB/s: faster than most disks deliver it)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: Path, only: Collection[str] | None = None) -> dict[str, dict]:
    """Return {relative name: {bytes, xxh3}} of the files under `folder`, without DONE and COMPLETE.

    `only`: the relative names to include (None: all)."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [n for n in names if n not in (COMPLETE, DONE) and (only is None or n in only)]
    return {
        name: {"bytes": (folder / name).stat().st_size, "xxh3": hash_file(folder / name)} for name in names
    }


def find_damage(folder: Path, files: dict[str, dict]) -> Iterator[str]:
    """Yield a sentence for each file of a folder that is missing, cut off or changed.

    `files`: what the marker records, as `read_marked_files` returns it."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing, but its marker lists it"
        elif path.stat().st_size != expected["bytes"]:
            yield (
                f"{path} has {path.stat().st_size} bytes, its marker says {expected['bytes']}: cut off or "
                f"replaced"
            )
        elif hash_file(path) != expected["xxh3"]:
            yield f"{path} does not have the content that its marker records: damaged or replaced"


def check_files(folder: Path, files: dict[str, dict]) -> None:
    """Raises UserError naming the first file of `folder` that differs from what its marker records."""
    for problem in find_damage(folder, files):
        raise UserError(problem)


def check_marked_folder(folder: Path) -> None:
    """Raises UserError if `folder` has a marker and its files differ from what the marker records.

    Checkpoints, kept weights, inherited starts and final/ have markers."""
    for place, name in ((folder, COMPLETE), (folder, INHERITED), (folder.parent, DONE)):
        if (place / name).is_file() and (place == folder or folder.name == "final"):
            check_files(place, read_marked_files(place / name))


def read_marked_files(marker: Path) -> dict[str, dict]:
    """Return {name relative to the marker's folder: {bytes, xxh3}} of the files that a marker covers.

    The DONE of a grown run only names a stage, and covers no file. Raises UserError if the marker is
    damaged."""
    found = read_json(marker)
    try:
        if marker.name == DONE:
            listed = {f"final/{name}": facts for name, facts in found.get("final", {}).items()}
        elif marker.name == MANIFEST:
            listed = {shard["file"]: shard for split in found["splits"].values() for shard in split["shards"]}
            listed |= found.get("tokenizer_files", {})
        else:
            listed = found["files"]
        return {
            str(name): {"bytes": int(facts["bytes"]), "xxh3": facts["xxh3"]} for name, facts in listed.items()
        }
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{marker} is not a valid marker; restore it, or delete its folder") from None


def stamp_weights(model: str | Path) -> dict[str, list[int]]:
    """Return {name: [bytes, time of the last change in ns]} of a GGUF file, or of the weight files in a
    folder; empty for a Hub id. Weights that are written anew have another stamp."""
    folder = Path(model)
    paths = [p for pattern in ("*.safetensors", "*.bin", "*.gguf") for p in sorted(folder.glob(pattern))]
    paths = [folder] if folder.is_file() else paths
    return {path.name: [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths}
