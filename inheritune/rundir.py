"""Files: every name of a run folder, writing (temporary name, then rename), hashes and markers.

    runs/<experiment>/seed<k>/<run>/          (a grown run holds stage1/, stage2/ ... laid out the same way)
        experiment.yaml  provenance.json  metrics.jsonl  train.log  attention.jsonl  results.json  *.png  validation/
        init/  checkpoints/step_00001000/{..., COMPLETE}  at_00010000/  final/  DONE

What has no marker (COMPLETE, DONE, manifest.json) does not exist for a reader: markers are written last and carry the
size and xxh3-128 hash of every file they speak for.
"""

import errno
import json
import os
import platform
import shutil
from contextlib import contextmanager
from pathlib import Path

import xxhash

from inheritune.config import REPOSITORY, Experiment, UserError


def root() -> Path:
    """Where runs/ and data/ lie: $INHERITUNE_ROOT (a scratch file system), or the repository."""
    return Path(os.environ.get("INHERITUNE_ROOT") or REPOSITORY).expanduser().resolve()


def data_dir(experiment: Experiment) -> Path:
    """Folder of the experiment's token shards, shared by all experiments with the same data section."""
    key = json.dumps(experiment.data.preparation(), sort_keys=True)
    if experiment.data.source == "embedded":
        key += f"python {platform.python_version()}"  # the corpus is this Python's standard library
    return root() / "data" / f"{experiment.data.name}-{xxhash.xxh3_128_hexdigest(key.encode())[:12]}"


class RunDir:
    """Names of the files of one run. Creates nothing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def of(cls, experiment: Experiment, run: str, seed: int = 0) -> "RunDir":
        """The folder of `run`; rehearsals lie apart, under runs/rehearsal/."""
        base = root() / "runs" / "rehearsal" if experiment.rehearsal else root() / "runs"
        return cls(base / experiment.name / f"seed{seed}" / run)

    def stage(self, number: int) -> "RunDir":
        """Stage `number` (from 1) of a grown run."""
        return RunDir(self.path / f"stage{number}")

    def seed_checkpoint(self, layers: int) -> Path:
        """The random start that all runs of this experiment and seed with `layers` blocks share."""
        return self.path.parent / f"random_init_{layers}_layers"

    experiment = property(lambda self: self.path / "experiment.yaml")
    provenance = property(lambda self: self.path / "provenance.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    discarded_metrics = property(lambda self: self.path / "metrics.discarded.jsonl")
    log = property(lambda self: self.path / "train.log")
    wandb_id = property(lambda self: self.path / "wandb_id")
    init = property(lambda self: self.path / "init")
    checkpoints = property(lambda self: self.path / "checkpoints")
    final = property(lambda self: self.path / "final")
    validation = property(lambda self: self.path / "validation")
    attention = property(lambda self: self.path / "attention.jsonl")
    results = property(lambda self: self.path / "results.json")
    done = property(lambda self: self.path / "DONE")

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def kept(self, step: int) -> Path:
        return self.path / f"at_{step:08d}"

    def losses(self, step: int) -> Path:
        """Per-window validation losses (nats per token, float64) at `step`."""
        return self.validation / f"step_{step}.npy"

    def complete_checkpoints(self) -> list[int]:
        """Steps of the checkpoints that carry their marker, oldest first."""
        found = self.checkpoints.glob("step_*/COMPLETE") if self.checkpoints.is_dir() else ()
        return sorted(int(marker.parent.name.removeprefix("step_")) for marker in found)

    def is_done(self) -> bool:
        return self.done.is_file()

    def weights(self) -> Path:
        """final/ of this finished run; of a grown one, that of the stage which its DONE names."""
        done = read_json(self.done)
        return self.stage(done["stage"]).final if "stage" in done else self.final


# --- writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path):
    """A temporary path to write a file or fill a folder at; it takes the place of `path` when the block ends, and is
    removed if the block fails. The rename is atomic, so a reader sees nothing or everything.

    Raises UserError when the disk is full."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        yield temporary
        _flush(temporary)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # a folder cannot be renamed over a filled one
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        remove(temporary)
        raise disk_error(error, path) from error
    except BaseException:
        remove(temporary)
        raise


def disk_error(error: OSError, path: Path) -> Exception:
    """`error` as a UserError if it says that the disk is full or not writable, else itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = next(p for p in (path, *path.parents) if p.is_dir())
        free = shutil.disk_usage(where).free
        return UserError(
            f"no space left while writing {path} ({free / 1e6:.0f} MB free); free some, or set INHERITUNE_ROOT to a larger disk"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"cannot write {path}: {os.strerror(error.errno)}; set INHERITUNE_ROOT to a folder you own")
    return error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path):
    """The JSON value in `path`. Raises UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it or delete what it belongs to") from None


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with what is in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Make a file, or a folder's entries, survive a power cut before a name points at them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- hashes and markers ---------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """xxh3-128 of a file (9.5 GB/s: cheaper than reading the file from most disks)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: Path, only=None) -> dict[str, dict]:
    """{relative name: {bytes, xxh3}} of the files under `folder` (those in `only`, if given), markers left out."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [n for n in names if n not in ("COMPLETE", "DONE") and (only is None or n in only)]
    return {name: {"bytes": (folder / name).stat().st_size, "xxh3": hash_file(folder / name)} for name in names}


def check_files(folder: Path, files: dict[str, dict]) -> None:
    """Compare a folder with what its marker says. Raises UserError naming the first missing, cut or changed file."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, but its marker lists it")
        if path.stat().st_size != expected["bytes"]:
            raise UserError(f"{path} has {path.stat().st_size} bytes, its marker says {expected['bytes']}: cut off or replaced")
        if hash_file(path) != expected["xxh3"]:
            raise UserError(f"{path} does not have the content that its marker records: damaged or replaced")
