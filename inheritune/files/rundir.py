"""Files: every name of a run folder, writing (temporary name, then rename), hashes and markers.

    runs/<experiment>/seed<k>/<run>/          (a grown run holds stage1/, stage2/ ... laid out the same way)
        experiment.yaml  provenance.json  metrics.jsonl  train.log  attention.jsonl  results.json  *.png
        validation/ init/  checkpoints/step_00001000/{..., COMPLETE}  at_00010000/  final/  DONE
        STOP (made by a person: the run saves and leaves)  STOPPED (the last start saved and left before the
        end) bad_batch.json (the last steps whose loss or gradient was not finite, in a row: what a replay
        needs)

What has no marker (COMPLETE, DONE, manifest.json) does not exist for a reader: markers are written last and
carry the size and xxh3-128 hash of every file they speak for. JSON of ours carries a hash of itself.
"""

import errno
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import xxhash

from inheritune.config import names
from inheritune.config.experiment import REPOSITORY, Experiment
from inheritune.config.reading import refuse_twice
from inheritune.errors import UserError
from inheritune.files.processes import fate, machine, node

logger = logging.getLogger("inheritune")


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
        base = root() / "runs" / names.REHEARSAL if experiment.rehearsal else root() / "runs"
        return cls(base / experiment.name / f"seed{seed}" / run)

    def stage(self, number: int) -> "RunDir":
        """Stage `number` (from 1) of a grown run."""
        return RunDir(self.path / f"stage{number}")

    def seed_checkpoint(self, layers: int) -> Path:
        """The random start that all runs of this experiment and seed with `layers` blocks share."""
        return self.path.parent / names.RANDOM_INIT.format(layers)

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
    stop = property(lambda self: self.path / "STOP")
    stopped = property(lambda self: self.path / "STOPPED")
    bad_batch = property(lambda self: self.path / "bad_batch.json")

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def kept(self, step: int) -> Path:
        return self.path / f"at_{step:08d}"

    def losses(self, step: int) -> Path:
        """Per-window validation losses (nats per token, float64) at `step`."""
        return self.validation / f"step_{step}.npy"

    def stages(self) -> list[int]:
        """Numbers of the stages that have a folder here, in order."""
        found = (re.fullmatch("stage([1-9][0-9]*)", name) for name in _names_in(self.path))
        return sorted(int(match[1]) for match in found if match and (self.path / match[0]).is_dir())

    def checkpoint_steps(self) -> list[int]:
        """Steps of the folders in checkpoints/ that have a checkpoint's name, whole or not, oldest first.
        What a person or another program put beside them (step_00000004.bak, .DS_Store) is not ours."""
        found = {
            int(match[1])
            for name in _names_in(self.checkpoints)
            if (match := re.fullmatch("step_([0-9]{8,})", name))
        }
        return sorted(step for step in found if self.checkpoint(step).is_dir())

    def marked_checkpoints(self) -> list[int]:
        """Steps of the folders that carry a marker, oldest first."""
        return [step for step in self.checkpoint_steps() if (self.checkpoint(step) / "COMPLETE").is_file()]

    def complete_checkpoints(self) -> list[int]:
        """Steps of the checkpoints that carry their own marker, oldest first."""
        return [step for step in self.marked_checkpoints() if self.named_step(step) == step]

    def named_step(self, step: int) -> int:
        """The step that the marker of checkpoint `step` names: another one where the folder is a copy under a
        wrong name. `step` where the marker does not tell: what is damaged is found when the files are
        compared."""
        try:
            marker = read_json(self.checkpoint(step) / "COMPLETE")
        except UserError:
            return step
        named = marker.get("step") if isinstance(marker, dict) else None
        return named if type(named) is int else step

    def check_checkpoint(self, step: int) -> None:
        """Raises UserError unless the files of checkpoint `step` are what its marker says, and the marker is
        of that step."""
        folder = self.checkpoint(step)
        files = marked_files(folder / "COMPLETE")
        if (named := self.named_step(step)) != step:
            raise UserError(
                f"{folder} is a copy of the checkpoint of step {named} under a wrong name; rename or delete "
                f"it"
            )
        check_files(folder, files)

    def is_done(self) -> bool:
        return self.done.is_file()

    def chosen(self) -> "RunDir":
        """This finished run; of a grown one, the stage that its DONE names. Raises UserError if that is of
        other weights."""
        done = read_json(self.done)
        if "stage" not in done:
            return self
        stage = self.stage(done["stage"])
        if done.get("weights") and done["weights"] != stage.weights_hash():
            raise UserError(
                f"{self.done} does not name the weights that {stage.done} does: one of the two was replaced"
            )
        return stage

    def weights(self) -> Path:
        """final/ of this finished run; of a grown one, that of the chosen stage."""
        return self.chosen().final

    def weights_hash(self) -> str:
        """What tells the finished weights from others, as DONE knows them."""
        return seal_of(read_json(self.done).get("final"))

    def _check_measured(self, facts: dict, file: Path) -> None:
        """Raises UserError if `facts`, from `file`, were measured on other weights than those that DONE
        names."""
        if "weights" in facts and self.is_done() and facts["weights"] != self.weights_hash():
            raise UserError(
                f"{file} was measured on other weights than those of {self.final}: replaced, or older than "
                f"they"
            )

    def read_results(self, to_renew: bool = False) -> dict:
        """results.json. Raises UserError if it, or the record behind its numbers, is not what the finished
        run left, or (but `to_renew`) if its reference has other weights by now than those it was compared
        with."""
        results = read_json(self.results)
        if not isinstance(results, dict):
            raise UserError(
                f"{self.results} holds no results but a JSON {type(results).__name__}; restore it"
            )
        self._check_measured(results, self.results)
        if not to_renew:
            self._check_compared(results)
        check_files(self.path, results.get("record", {}) if self.is_done() else {})
        return results

    def _check_compared(self, results: dict) -> None:
        """Raises UserError if the run that `results` are compared with has been trained anew since."""
        name, stage = results.get("compared_with"), results.get("stage")
        beside = self.path.parent.parent if stage else self.path.parent
        if not name or "compared_weights" not in results or not RunDir(beside / name).is_done():
            return
        if RunDir(beside / name).chosen().weights_hash() != results["compared_weights"]:
            ours = f"{results['run']}/stage{stage}" if stage else results["run"]
            raise UserError(
                f"{self.results} compares with weights of run '{name}', which has been trained anew since; "
                f"compare again: "
                f"python -m inheritune evaluate {results['experiment']} --run "
                f"{ours}{seed_flag(results['seed'])}"
            )

    def read_starts(self, *keys: str) -> list[dict]:
        """The starts in provenance.json, at least one, each with `keys`. Raises UserError if it is missing or
        damaged."""
        found = read_json(self.provenance)
        starts = found.get("starts") if isinstance(found, dict) else None
        listed = isinstance(starts, list) and starts and all(isinstance(start, dict) for start in starts)
        if not (listed and all(key in start for key in keys for start in starts)):
            raise UserError(
                f"{self.provenance} does not list the starts of its run: it is damaged; restore it, or "
                f"delete it"
            )
        return starts

    def read_attention(self) -> list[dict]:
        """Rows of attention.jsonl. Raises UserError if they are not as written, or of other weights."""
        rows = read_jsonl(self.attention)
        if not rows and self.attention.is_file():
            raise UserError(f"{self.attention} is empty; analyze the model again")
        self._check_measured(rows[0] if rows else {}, self.attention)
        return rows


def _names_in(folder: Path) -> list[str]:
    """Names of what lies in a folder; none if there is none."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def parse_weights_name(name: str) -> tuple[str, str | None, str | None]:
    """(run, stage, step) of "RUN", "RUN/stage2", "RUN@10000" or "RUN/stage2@10000"; None for what is not
    said."""
    return re.fullmatch(r"(.*?)(?:/stage(\d+))?(?:@(\d+))?", name, re.DOTALL).groups()


def find_weights(experiment: Experiment, name: str, seed: int = 0) -> Path | None:
    """The weights called NAME: RUN (of a grown one those of the stage that its DONE names), RUN/stage2, or
    RUN@10000, kept at that step. None if the run or stage is not finished. Raises UserError for an unknown
    run."""
    run, stage, step = parse_weights_name(name)
    experiment.run(run)
    folder = RunDir.of(experiment, run, seed)
    folder = folder.stage(int(stage)) if stage else folder
    if not folder.is_done():
        return None
    return RunDir(folder.weights().parent).kept(int(step)) if step else folder.weights()


def finished_weights(experiment: Experiment, name: str, seed: int = 0) -> Path:
    """The same. Raises UserError, with what to do, if they are not there."""
    if (weights := find_weights(experiment, name, seed)) is None:
        run, *_ = parse_weights_name(name)
        verb = "grow" if experiment.run(run).grow else "train"
        raise UserError(
            f"run '{name}' of {experiment.name} (seed {seed}) is not finished; first: "
            f"python -m inheritune {verb} {experiment.given} --run {run}{seed_flag(seed)}"
        )
    return weights


def seed_flag(seed: int) -> str:
    """For a line to paste; none for seed 0, the default."""
    return f" --seed {seed}" if seed else ""


def beside(weights: Path) -> RunDir:
    """Where the results of final/, or of weights kept on the way, lie."""
    return RunDir(weights.parent if weights.name == "final" else weights)


# --- writing ------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path):
    """A temporary path to write a file or fill a folder at; it takes the place of `path` when the block ends,
    and is removed if the block fails. The rename is atomic and comes after every byte is on disk, so a reader
    sees nothing or everything. What processes that are gone left of earlier attempts is removed.

    Raises UserError when the disk is full or the place cannot be written."""
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        yield temporary
        for made in (*temporary.rglob("*"), temporary):
            flush(made)
        if path.is_dir() and not path.is_symlink():
            if not temporary.is_dir():
                raise UserError(
                    f"{path} is a folder, so no file of that name can be written; rename or remove it"
                )
            shutil.rmtree(path)  # a folder cannot be renamed over a filled one
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException as error:
        with suppress(OSError):  # what stopped the writing may stop this too
            remove(temporary)
        if isinstance(error, OSError) and _is_about(error, path, temporary):
            raise disk_error(error, path) from error
        raise


def _is_about(error: OSError, path: Path, temporary: Path) -> bool:
    """Whether `error` came of writing `path`, not of another file that was read for it."""
    if not isinstance(error.filename, str):
        return True
    name = Path(error.filename)
    return name.is_relative_to(temporary) or name.is_relative_to(path) or path.is_relative_to(name)


LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.tmp(?P<node>[\w.-]+?)(-(?P<place>[0-9a-f]{8}))?-(?P<pid>[0-9]+)", re.DOTALL | re.ASCII
)
ABANDONED_S = 24 * 3600
"""Age of a temporary file from which on nobody writes it, whoever made it."""


def temporary_of(path: Path) -> Path:
    """Where this process writes what will be `path`. The name says whose it is: node, machine (a hash) and
    process number."""
    return path.with_name(f".{path.name}.tmp{node()}-{_hash_of(machine())}-{os.getpid()}")


@cache
def _hash_of(place: str | None) -> str:
    return xxhash.xxh3_64_hexdigest(str(place).encode())[:8]


def _remove_abandoned(path: Path) -> None:
    """Remove the temporaries of `path` whose processes are gone for certain or have not written for a day."""
    with suppress(
        OSError
    ):  # a folder that cannot be listed, another user's file: they are only in nobody's way
        for name in os.listdir(path.parent):
            match, left = LEFTOVER.fullmatch(name), path.parent / name
            if match and match["name"] == path.name and _is_abandoned(left, match):
                remove(left)


def _is_abandoned(left: Path, match: re.Match) -> bool:
    if left == temporary_of(left.with_name(match["name"])):
        return True  # of this very process: an earlier attempt that failed
    here = machine()
    if fate(here if match["place"] == _hash_of(here) else None, int(match["pid"])) == "dead":
        return True
    return time.time() - max(made.lstat().st_mtime for made in (left, *left.rglob("*"))) > ABANDONED_S


FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_error(error: OSError, path: Path) -> Exception:
    """`error` as a UserError if it says that the disk is full or not writable, or that $INHERITUNE_ROOT
    cannot be made, else itself."""
    if problem := root_problem(error):
        return problem
    if error.errno in FULL:
        return UserError(
            f"no space left while writing {path} ({free_bytes(path) / 1e6:.0f} MB free); {more_room(path)}"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(
            f"cannot write {path}: {os.strerror(error.errno)}; {_elsewhere(path, 'that you can write')}"
        )
    return error


def root_problem(error: OSError) -> UserError | None:
    """`error` as a UserError if it says that $INHERITUNE_ROOT, which is no folder yet, cannot be made (as
    below /proc)."""
    given, failed = os.environ.get("INHERITUNE_ROOT"), path_of(error, Path())
    unmade = given and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL) and not root().is_dir()
    if unmade and (
        root().is_relative_to(failed) or error.errno == errno.ENOTDIR and failed.is_relative_to(root())
    ):
        return UserError(
            f"INHERITUNE_ROOT={given} is no folder and cannot be made ({error.strerror}); set it to another "
            f"one"
        )
    return None


def path_of(error: Exception, default: Path) -> Path:
    """The file that `error` is about, or `default` if it does not tell."""
    name = getattr(error, "filename", None)
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else default


def fullest_place() -> Path:
    """Of the folders that we and the libraries write to, the one with the least free space: where an error
    without a name struck."""
    return min((folder.expanduser() for folder, *_ in _places()), key=free_bytes)


def free_bytes(path: Path) -> int:
    """Free space of the disk on which `path` lies or will lie."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.is_dir())).free


def more_room(path: Path) -> str:
    """What to do where the disk of `path` is full."""
    return f"free some, or {_elsewhere(path, 'on a larger disk')}"


def _elsewhere(path: Path, which: str) -> str:
    """How to have what lies at `path` in a folder `which` ("on a larger disk"), so that the same command
    works."""
    variable, place = moved_by(path)
    if variable is None:
        return f"choose a folder {which}"
    if variable == "TMPDIR" or not any(_names_in(place)):
        return f"set {variable} to a folder {which}"
    return f"set {variable} to a copy of {place} {which}"


def moved_by(path: Path) -> tuple[str | None, Path]:
    """(the variable that moves what lies at `path`, the folder that it names now); no variable for a place of
    the user's own choice, such as --out."""
    real = Path(os.path.realpath(path))
    around = [
        (os.path.realpath(folder.expanduser()), variable, named) for folder, variable, named in _places()
    ]
    around = [
        one
        for one in around
        if real.is_relative_to(one[0]) and (one[1] != "TMPDIR" or _is_scratch(real, one[0]))
    ]
    _, variable, named = max(around, key=lambda one: len(one[0]), default=("", None, path))
    return variable, named


def _is_scratch(path: Path, temporary: str) -> bool:
    """Whether `path` is a library's own in the temporary folder (tempfile's names), not what a user put
    there."""
    return path == Path(temporary) or path.relative_to(temporary).parts[0].startswith("tmp")


def _places() -> list[tuple[Path, str, Path]]:
    """(folder, the variable that moves it, the folder that this one names now) of all folders that can be
    moved so."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser()
    datasets, temporary = (
        os.environ.get("HF_DATASETS_CACHE") or home / "datasets",
        os.environ.get("TMPDIR") or "/tmp",
    )
    named = {"HF_HOME": home, "HF_DATASETS_CACHE": Path(datasets), "TMPDIR": Path(temporary)}
    hubs = [name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if os.environ.get(name)]
    named |= {name: Path(os.environ[name]) for name in hubs[:1]}  # the first decides
    ours = [(root() / name, "INHERITUNE_ROOT", root()) for name in ("runs", "data")]
    return ours + [(folder, variable, folder) for variable, folder in named.items()]


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


SEAL = "seal"
"""Key of the hash of itself that a JSON object of ours carries: no other file knows what it should hold."""


def seal_of(value) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value).encode())


def sealed(value):
    """`value`, if it is an object with its seal, which `unsealed` checks and takes off."""
    return {**value, SEAL: seal_of(value)} if isinstance(value, dict) else value


def unsealed(value, where: str):
    """Raises UserError naming `where` if an object is not as it was sealed; what has no seal passes."""
    if not isinstance(value, dict) or SEAL not in value:
        return value
    content = {key: its for key, its in value.items() if key != SEAL}
    if seal_of(content) != value[SEAL]:
        raise UserError(
            f"{where} is not as it was written; restore it (if you edited it on purpose, delete its '{SEAL}')"
        )
    return content


def write_json(path: Path, value, seal: bool = True) -> None:
    """`seal`: not for files that other programs define."""
    write_text(path, json.dumps(sealed(value) if seal else value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """A whole file of rows, sealed in the first."""
    first = {**rows[0], SEAL: seal_of({**rows[0], "rows": rows[1:]})}
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in (first, *rows[1:])))


def read_json(path: Path):
    """The JSON value in `path`. Raises UserError if it is missing, damaged, has a key twice or is not as it
    was written."""
    try:
        return unsealed(
            json.loads(_read_text(path), object_pairs_hook=partial(refuse_twice, path)), str(path)
        )
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); restore it or delete what it belongs to"
        ) from None


def _read_text(path: Path) -> str:
    """The text of a file of ours. One that is replaced at this moment on NFS (ESTALE) is opened again."""
    for _ in range(10):
        try:
            return path.read_text(encoding="utf-8-sig")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return path.read_text(encoding="utf-8-sig")


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file, none if there is no file; a last line cut off by a crash is left out.

    Raises UserError if a line is no row, or a file whose first row bears a seal is not as `write_jsonl` left
    it."""
    try:
        lines = _read_text(path).splitlines(keepends=True) if path.exists() else []
        rows = [{**json.loads(line)} for line in lines if line.endswith("\n")]
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as rows of JSON ({error}); restore it") from None
    if rows and SEAL in rows[0]:
        rows[0] = unsealed({**rows[0], "rows": rows[1:]}, str(path))
        del rows[0]["rows"]
    return rows


def is_sealed(path: Path) -> bool:
    """Whether the first row of a JSON-lines file, which `read_jsonl` has accepted, bears a seal."""
    return SEAL in json.loads(_read_text(path).partition("\n")[0])


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with what is in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that processes of ours left in `folder`; call while holding its
    lock, so that none of them still writes. What else begins with a dot is not ours."""
    for name in _names_in(folder):
        if LEFTOVER.fullmatch(name):
            remove_if_possible(folder / name)


def remove_if_possible(path: Path) -> None:
    """Delete what is needed no more, or warn: another user's file may stop that, or a reader on a network
    disk. No run ends for it."""
    try:
        remove(path)
    except OSError as error:
        _tell_kept(path, error.strerror)


@cache
def _tell_kept(path: Path, why: str) -> None:
    logger.warning("%s is not needed any more and cannot be deleted (%s): delete it by hand", path, why)


def break_links(path: Path) -> None:
    """Give a file its own content if it shares it with other names (a run copied by `cp -l` or `cp -s`); call
    before adding to it."""
    if path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
        with replacing(path) as temporary:
            shutil.copyfile(path, temporary)


CANNOT_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS)
"""What some network and FUSE file systems answer to fsync, of folders above all. A full or failing disk says
something else."""


def flush(path: Path) -> None:
    """Make a file, or a folder's entries, survive a power cut before a name points at them, where the file
    system can."""
    if path.is_symlink():  # an entry of its folder, which is flushed too
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError as error:  # written, but not for us to read
        _tell_unsynced(error.strerror)
        return
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> None:
    """os.fsync, where the file system can. Raises OSError if the disk is full or fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        _tell_unsynced(error.strerror)


@cache
def _tell_unsynced(why: str) -> None:
    logger.debug("a file or folder cannot be synced (%s): a power cut may lose what was written last", why)


# --- hashes and markers -------------------------------------------------------------------------------------

MARKERS = ("DONE", "COMPLETE", "manifest.json", "inherited.json")


def hash_file(path: Path) -> str:
    """xxh3-128 of a file (9.5 GB/s: cheaper than reading the file from most disks)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: Path, only=None) -> dict[str, dict]:
    """{relative name: {bytes, xxh3}} of the files under `folder` (those in `only`, if given), markers left
    out."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [n for n in names if n not in ("COMPLETE", "DONE") and (only is None or n in only)]
    return {
        name: {"bytes": (folder / name).stat().st_size, "xxh3": hash_file(folder / name)} for name in names
    }


def damages(folder: Path, files: dict[str, dict]) -> Iterator[str]:
    """Compare a folder with what its marker says: a sentence for each missing, cut or changed file."""
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
    """Raises UserError naming the first file of `folder` that is not as its marker says."""
    for problem in damages(folder, files):
        raise UserError(problem)


def check_own(folder: Path) -> None:
    """Raises UserError if `folder` is of our making (a checkpoint, kept weights, an inherited start, final/)
    and not as it was left."""
    for place, name in ((folder, "COMPLETE"), (folder, "inherited.json"), (folder.parent, "DONE")):
        if (place / name).is_file() and (place == folder or folder.name == "final"):
            check_files(place, marked_files(place / name))


def marked_files(marker: Path) -> dict[str, dict]:
    """{name relative to the marker's folder: {bytes, xxh3}} of the files that a marker speaks for (the DONE
    of a grown run only names a stage: none). Raises UserError if it is damaged."""
    found = read_json(marker)
    try:
        if marker.name == "DONE":
            listed = {f"final/{name}": facts for name, facts in found.get("final", {}).items()}
        elif marker.name == "manifest.json":
            listed = {shard["file"]: shard for split in found["splits"].values() for shard in split["shards"]}
            listed |= found.get("tokenizer_files", {})
        else:
            listed = found["files"]
        return {
            str(name): {"bytes": int(facts["bytes"]), "xxh3": facts["xxh3"]} for name, facts in listed.items()
        }
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{marker} is not the marker that its name says; restore it, or delete its folder"
        ) from None
