"""Files: every name of a run folder, writing (temporary name, then rename), hashes and markers.

    runs/<experiment>/seed<k>/<run>/          (a grown run holds stage1/, stage2/ ... laid out the same way)
        experiment.yaml  provenance.json  metrics.jsonl  train.log  attention.jsonl  results.json  *.png  validation/
        init/  checkpoints/step_00001000/{..., COMPLETE}  at_00010000/  final/  DONE
        STOP (made by a person: the run saves and leaves)  STOPPED (the last start saved and left before the end)
        bad_batch.json (the last steps whose loss or gradient was not finite, in a row: what a replay needs)

What has no marker (COMPLETE, DONE, manifest.json) does not exist for a reader: markers are written last and carry the
size and xxh3-128 hash of every file they speak for. JSON of ours carries a hash of itself.
"""

import errno
import glob
import json
import math
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
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

    def complete_checkpoints(self) -> list[int]:
        """Steps of the checkpoints that carry their marker, oldest first."""
        found = self.checkpoints.glob("step_*/COMPLETE") if self.checkpoints.is_dir() else ()
        return sorted(int(marker.parent.name.removeprefix("step_")) for marker in found)

    def is_done(self) -> bool:
        return self.done.is_file()

    def chosen(self) -> "RunDir":
        """This finished run; of a grown one, the stage that its DONE names. Raises UserError if that is of other weights."""
        done = read_json(self.done)
        if "stage" not in done:
            return self
        stage = self.stage(done["stage"])
        if done.get("weights") and done["weights"] != stage.weights_hash():
            raise UserError(f"{self.done} does not name the weights that {stage.done} does: one of the two was replaced")
        return stage

    def weights(self) -> Path:
        """final/ of this finished run; of a grown one, that of the chosen stage."""
        return self.chosen().final

    def weights_hash(self) -> str:
        """What tells the finished weights from others, as DONE knows them."""
        return seal_of(read_json(self.done).get("final"))

    def _check_measured(self, facts: dict, file: Path) -> None:
        """Raises UserError if `facts`, from `file`, were measured on other weights than those that DONE names."""
        if "weights" in facts and self.is_done() and facts["weights"] != self.weights_hash():
            raise UserError(f"{file} was measured on other weights than those of {self.final}: replaced, or older than they")

    def read_results(self) -> dict:
        """results.json. Raises UserError if it, or the record behind its numbers, is not what the finished run left."""
        results = read_json(self.results)
        self._check_measured(results, self.results)
        check_files(self.path, results.get("record", {}) if self.is_done() else {})
        return results

    def read_attention(self) -> list[dict]:
        """Rows of attention.jsonl. Raises UserError if they are not as written, or of other weights."""
        rows = read_jsonl(self.attention)
        if not rows and self.attention.is_file():
            raise UserError(f"{self.attention} is empty; analyze the model again")
        self._check_measured(rows[0] if rows else {}, self.attention)
        return rows


def parse_weights_name(name: str) -> tuple[str, str | None, str | None]:
    """(run, stage, step) of "RUN", "RUN/stage2", "RUN@10000" or "RUN/stage2@10000"; None for what is not said."""
    return re.fullmatch(r"(.*?)(?:/stage(\d+))?(?:@(\d+))?", name, re.DOTALL).groups()


def find_weights(experiment: Experiment, name: str, seed: int = 0) -> Path | None:
    """The weights called NAME: RUN (of a grown one those of the stage that its DONE names), RUN/stage2, or RUN@10000, kept at
    that step. None if the run or stage is not finished. Raises UserError for an unknown run."""
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
            f"python -m inheritune {verb} {experiment.name} --run {run}{seed_flag(seed)}"
        )
    return weights


def seed_flag(seed: int) -> str:
    """For a line to paste; none for seed 0, the default."""
    return f" --seed {seed}" if seed else ""


def beside(weights: Path) -> RunDir:
    """Where the results of final/, or of weights kept on the way, lie."""
    return RunDir(weights.parent if weights.name == "final" else weights)


# --- writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path):
    """A temporary path to write a file or fill a folder at; it takes the place of `path` when the block ends, and is
    removed if the block fails. The rename is atomic and comes after every byte is on disk, so a reader sees nothing or
    everything. What killed processes of this machine left of earlier attempts is removed.

    Raises UserError when the disk is full."""
    temporary = path.with_name(f".{path.name}.tmp{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error
    for left in path.parent.glob(f"{glob.escape(temporary.name.rpartition('-')[0])}-*"):
        if left == temporary or _born(int(left.name.rpartition("-")[2])) is None:
            remove(left)
    try:
        yield temporary
        for made in (*temporary.rglob("*"), temporary):
            flush(made)
        if path.is_dir() and not path.is_symlink():
            if not temporary.is_dir():
                raise UserError(f"{path} is a folder, so no file of that name can be written; rename or remove it")
            shutil.rmtree(path)  # a folder cannot be renamed over a filled one
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        remove(temporary)
        raise disk_error(error, path) from error
    except BaseException:
        remove(temporary)
        raise


FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_error(error: OSError, path: Path) -> Exception:
    """`error` as a UserError if it says that the disk is full or not writable, else itself."""
    if error.errno in FULL:
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free
        return UserError(
            f"no space left while writing {path} ({free / 1e6:.0f} MB free); free some, or set INHERITUNE_ROOT to a larger disk"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"cannot write {path}: {os.strerror(error.errno)}; set INHERITUNE_ROOT to a folder you own")
    return error


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
        raise UserError(f"{where} is not as it was written; restore it (if you edited it on purpose, delete its '{SEAL}')")
    return content


def write_json(path: Path, value, seal: bool = True) -> None:
    """`seal`: not for files that other programs define."""
    write_text(path, json.dumps(sealed(value) if seal else value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """A whole file of rows, sealed in the first."""
    first = {**rows[0], SEAL: seal_of({**rows[0], "rows": rows[1:]})}
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in (first, *rows[1:])))


def read_json(path: Path):
    """The JSON value in `path`. Raises UserError if it is missing, damaged or not as it was written."""
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8-sig")), str(path))  # editors put a mark first
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore it or delete what it belongs to") from None


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file, none if there is no file; a last line cut off by a crash is left out.

    Raises UserError if a line is no row, or a file whose first row bears a seal is not as `write_jsonl` left it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        rows = [{**json.loads(line)} for line in lines if line.endswith("\n")]
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as rows of JSON ({error}); restore it") from None
    if rows and SEAL in rows[0]:
        rows[0] = unsealed({**rows[0], "rows": rows[1:]}, str(path))
        del rows[0]["rows"]
    return rows


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with what is in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders of killed processes in `folder`; call while holding its lock."""
    for left in folder.glob(".*.tmp*") if folder.is_dir() else ():
        remove(left)


def flush(path: Path) -> None:
    """Make a file, or a folder's entries, survive a power cut before a name points at them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- one job at a time ----------------------------------------------------------------------------------------------------


class Lock:
    """Keeps two jobs out of what is written at `path`, on any file system that the nodes share; use as a context manager.

    Every contender puts a file of its own, `.NAME.lock.<uuid>`, beside `path` and looks for those of others: the later of
    two sees the earlier and withdraws. A holder touches its file every `BEAT` seconds from a thread, so that a crash frees
    the lock: at once where the process can be seen to be gone (same machine), after two silent beats where Slurm says that
    its job has ended, after `SILENCE` seconds otherwise. (flock would not do: Lustre is often mounted without it.)"""

    BEAT, SILENCE = 10.0, 180.0

    def __init__(self, path: Path, wait: float | None = None):
        """`wait`: seconds until UserError while another holds the lock (None: $INHERITUNE_LOCK_WAIT, or 120)."""
        self.path = path
        self.wait = float(os.environ.get("INHERITUNE_LOCK_WAIT") or 120) if wait is None else wait
        self.file = path.with_name(f".{path.name}.lock.{uuid.uuid4().hex[:12]}")
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, waiting for another holder. Raises UserError naming it when the wait is over."""
        deadline, told = time.monotonic() + self.wait, False
        while (holder := self._try()) is not None:
            who = f"{holder.get('job') or 'process ' + str(holder.get('pid'))} on {holder.get('host')}"
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path} is being written by {who}, still after {self.wait:.0f} s of waiting; let it finish, or stop "
                    f"it first; nothing was changed"
                )
            if not told:
                limit = f" up to {self.wait:.0f} s" if math.isfinite(self.wait) else ""
                print(f"{self.path} is being written by {who}: waiting{limit}", flush=True)
                told = True
            time.sleep(random.uniform(0.5, 1.5))  # two that meet do not go on meeting
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        self._released.set()
        self.file.unlink(missing_ok=True)

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def lost(self) -> bool:
        """Whether another job took this one for dead (after minutes without a beat) and may be writing here."""
        return not self.file.is_file()

    def _try(self) -> dict | None:
        """Announce ourselves; None if nobody else is here, else who (and our file is withdrawn)."""
        me = {"machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid()), "host": node()}
        if os.environ.get("SLURM_JOB_ID"):
            me["slurm"] = [os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT") or "0"]
            me["job"] = f"job {os.environ['SLURM_JOB_ID']}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(me), encoding="utf-8")
        except OSError as error:
            self.file.unlink(missing_ok=True)  # an empty one, on a full disk, would look like another's for minutes
            raise disk_error(error, self.file) from error
        now = self.file.stat().st_mtime  # the file server's clock, which the beats of others are measured by
        for other in self.path.parent.glob(f".{self.path.name}.lock.*"):
            try:
                silent, holder = now - other.stat().st_mtime, json.loads(other.read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            except ValueError:  # it is being written this moment
                holder = {}
            if other != self.file and not self._dead(holder, silent):
                self.file.unlink(missing_ok=True)
                return holder
            if other != self.file:
                other.unlink(missing_ok=True)
        return None

    def _dead(self, holder: dict, silent: float) -> bool:
        if holder.get("machine") == _machine():
            return _born(holder["pid"]) != holder["born"]
        if holder.get("slurm") and silent > 2 * self.BEAT and _job_ended(*holder["slurm"]):
            return True
        return silent > self.SILENCE

    def _beat(self) -> None:
        while not self._released.wait(self.BEAT):
            try:
                os.utime(self.file)
            except OSError:  # taken away, or the file server is: `lost` tells
                continue


def lock_holder(path: Path) -> dict | None:
    """Who holds the lock of `path` ({host, pid, slurm, job, silent: seconds since its last beat}), or None. Only looks: Slurm
    is not asked, so a job that died on another machine passes for alive for `Lock.SILENCE` seconds."""
    for file in path.parent.glob(f".{path.name}.lock.*"):
        try:
            holder = json.loads(file.read_text(encoding="utf-8"))
            holder["silent"] = time.time() - file.stat().st_mtime
        except (OSError, ValueError):  # it is being written, or was just taken away
            continue
        here = holder["machine"] == _machine()
        if _born(holder["pid"]) == holder["born"] if here else holder["silent"] <= Lock.SILENCE:
            return holder
    return None


def _machine() -> str:
    """Names this machine, since its last start, and the process numbers seen here (a container has its own)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip() if boot.is_file() else socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def _born(pid: int) -> str | None:
    """Start time of a living process (field 22 of its stat), or None: a number used again is another process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def node() -> str:
    """Name of this node, as Slurm calls it where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _job_ended(job: str, restarts: str) -> bool:
    """Whether Slurm says that this start of `job` is over; False where it cannot be asked."""
    if job == os.environ.get("SLURM_JOB_ID"):
        return restarts != (os.environ.get("SLURM_RESTART_COUNT") or "0")  # an earlier start of our own job
    try:
        said = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    shown = next((line for line in said.stdout.splitlines() if line.startswith(f"JobId={job} ")), "")  # not an array's others
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    if said.returncode or "JobState" not in fields:
        return "Invalid job id" in said.stderr  # forgotten since it ended
    alive = fields["JobState"] in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
    return not alive or fields.get("Restarts", "0") != restarts


# --- hashes and markers ---------------------------------------------------------------------------------------------------

MARKERS = ("DONE", "COMPLETE", "manifest.json", "inherited.json")


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


def damages(folder: Path, files: dict[str, dict]) -> Iterator[str]:
    """Compare a folder with what its marker says: a sentence for each missing, cut or changed file."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing, but its marker lists it"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{path} has {path.stat().st_size} bytes, its marker says {expected['bytes']}: cut off or replaced"
        elif hash_file(path) != expected["xxh3"]:
            yield f"{path} does not have the content that its marker records: damaged or replaced"


def check_files(folder: Path, files: dict[str, dict]) -> None:
    """Raises UserError naming the first file of `folder` that is not as its marker says."""
    for problem in damages(folder, files):
        raise UserError(problem)


def check_own(folder: Path) -> None:
    """Raises UserError if `folder` is of our making (a checkpoint, kept weights, an inherited start, final/) and not as it was
    left."""
    for place, name in ((folder, "COMPLETE"), (folder, "inherited.json"), (folder.parent, "DONE")):
        if (place / name).is_file() and (place == folder or folder.name == "final"):
            check_files(place, marked_files(place / name))


def marked_files(marker: Path) -> dict[str, dict]:
    """{name relative to the marker's folder: {bytes, xxh3}} of the files that a marker speaks for (the DONE of a grown run
    only names a stage: none). Raises UserError if it is damaged."""
    found = read_json(marker)
    try:
        if marker.name == "DONE":
            listed = {f"final/{name}": facts for name, facts in found.get("final", {}).items()}
        elif marker.name == "manifest.json":
            listed = {shard["file"]: shard for split in found["splits"].values() for shard in split["shards"]}
            listed |= found.get("tokenizer_files", {})
        else:
            listed = found["files"]
        return {str(name): {"bytes": int(facts["bytes"]), "xxh3": facts["xxh3"]} for name, facts in listed.items()}
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{marker} is not the marker that its name says; restore it, or delete its folder") from None
