"""Checkpoints: complete or absent. DeepSpeed writes into a temporary folder; the folder is renamed, and only
then is a COMPLETE marker written, with the size and hash of every file. Readers ignore what has no marker.

Beside DeepSpeed's files a checkpoint holds the state of the run in one dict (`state` of the training loop)
and the random generators of each rank.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inheritune.config import environment
from inheritune.engines.background import Saves
from inheritune.engines.deepspeed_json import get_zero_stage
from inheritune.engines.engine import drop_secondary_copies
from inheritune.engines.failures import Gather, explain_write_error, raise_on_all_ranks
from inheritune.engines.generators import get_generator_file, read_generators, restore_generators
from inheritune.engines.layout import describe_layout
from inheritune.engines.sizes import count_checkpoint_bytes
from inheritune.errors import NoAccess, UserError, is_machine_limit
from inheritune.files.json_files import write_json
from inheritune.files.markers import COMPLETE, hash_folder
from inheritune.files.rundir import RunDir
from inheritune.files.storage import check_free_space, explain_disk_error
from inheritune.files.writing import (
    get_temporary_path,
    remove_if_possible,
    remove_leftovers,
    remove_path,
    sync_path,
)
from inheritune.models.torch_files import list_deepspeed_classes, load_skeleton
from inheritune.runtime.dist import barrier, run_on_rank0
from inheritune.runtime.log import logger
from inheritune.runtime.ranks import get_rank, get_world_size

TAG = "deepspeed"
"""DeepSpeed's tag: the sub-folder of its files."""


def save_checkpoint(
    engine: Any,
    run_dir: RunDir,
    state: dict,
    settings: dict,
    keep_last: int,
    run: dict,
    saves: Saves | None = None,
) -> None:
    """Write a checkpoint of the run's `state`, at its step, on every rank; mark it complete, with the
    description `run` (identity.describe_run); then delete all but the last `keep_last`.

    Without `saves`, or if they are not in the background, no rank returns before the checkpoint is complete
    on all. Otherwise this waits for the save before, copies the states, and returns; `saves` raises what
    then fails. Raises UserError if the disk is full; the earlier checkpoints stay."""
    saves = saves or Saves(in_background=False)
    saves.wait()
    t0, step = time.perf_counter(), state["step"]
    target = run_dir.checkpoint(step)
    # named after this process: one that was taken for dead and still writes cannot write into it
    temporary = run_on_rank0(get_temporary_path, target)
    check_room(engine, run_dir)
    run_on_rank0(prepare_folders, temporary, target)
    with _collecting_errors(engine, saves) as files:
        engine.save_checkpoint(str(temporary), tag=TAG, client_state={"run": dict(state)}, save_latest=False)
        files.write(read_generators(), str(get_generator_file(temporary, get_rank())))
        if get_rank() == 0:
            files.guard(_add_readable_files)(engine, run_dir, temporary)
    shape = {"ranks": get_world_size(), "zero_stage": get_zero_stage(settings), **describe_layout(settings)}
    marker = {"step": step, "run": run, **shape}
    saves.run(partial(_finish, run_dir, temporary, files, marker, keep_last, t0))


def _finish(
    run_dir: RunDir, temporary: Path, files: _Files, marker: dict, keep_last: int, t0: float, gather: Gather
) -> None:
    """Write what is not written yet, flush and hash all files, a share of them on each rank, and publish the
    checkpoint. Raises UserError on every rank if the disk is full; nothing is left then.

    In a thread, so without a collective: `gather` is the only way to the other ranks."""
    target = run_dir.checkpoint(marker["step"])
    files.write_copies()
    raise_on_all_ranks(files.explain_problem(target), temporary, gather)
    # folders too: they hold the files' names
    names = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*"))
    share = set(names[get_rank() :: get_world_size()])
    hashes, problem = _flush_and_hash(temporary, share, target)
    raise_on_all_ranks(problem, temporary, gather)
    marker["files"] = {name: facts for part in gather(hashes) for name, facts in part.items()}
    if get_rank() == 0:
        try:
            _publish(run_dir, temporary, marker, keep_last)
            _report_time(marker["step"], time.perf_counter() - t0)
        except Exception as error:
            problem = error
    raise_on_all_ranks(problem, gather=gather)


def _flush_and_hash(folder: Path, names: set[str], target: Path) -> tuple[dict[str, dict], Exception | None]:
    """Flush the files and folders `names` to the disk; return the hashes of the files, and the error if the
    disk is full or fails. Without the flush a node that dies now could leave a marker beside files that only
    its memory had."""
    try:
        for name in names:
            sync_path(folder / name)
        return hash_folder(folder, only=names), None
    except OSError as error:
        return {}, explain_disk_error(error, target)


def _publish(run_dir: RunDir, temporary: Path, marker: dict, keep_last: int) -> None:
    """Give the finished checkpoint its name and then its marker, and delete the oldest ones."""
    target = run_dir.checkpoint(marker["step"])
    temporary.rename(target)
    sync_path(target.parent)
    write_json(target / COMPLETE, marker)
    prune_checkpoints(run_dir, marker["step"], keep_last)


def _report_time(step: int, seconds: float) -> None:
    """Log how long a save took; warn if it may not fit between a job's signal and its time limit."""
    logger.info("checkpoint of step %d written in %.1f s", step, seconds)
    lead_s = environment.read_number("INHERITUNE_LEAD")
    if lead_s is not None and seconds > lead_s / 3:  # one may be in the writing when the signal comes
        logger.warning(
            "saving took %.0f s of the %.0f s between the job's signal and its time limit: raise SITE_LEAD "
            "in slurm/site.sh to %.0f or more, or the work since the last checkpoint may be lost",
            seconds,
            lead_s,
            4 * seconds,
        )


def prune_checkpoints(run_dir: RunDir, newest: int, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints up to step `newest`, which is known to be complete. A
    start calls this too, in case the process before was killed in between."""
    kept = [step for step in run_dir.complete_checkpoints() if step <= newest][-keep_last:]
    for old in run_dir.checkpoint_steps():
        # a copy under another name belongs to the user
        if old < newest and old not in kept and run_dir.named_step(old) == old:
            # the marker first: without it readers ignore the rest
            remove_if_possible(run_dir.checkpoint(old) / COMPLETE)
            remove_if_possible(run_dir.checkpoint(old))


def _add_readable_files(engine: Any, run_dir: RunDir, folder: Path) -> None:
    """Add config.json to a checkpoint, so that `inherit` can read it, and the metrics so far, to which a
    resumed run appends."""
    engine.module.config.save_pretrained(folder)
    if run_dir.metrics.is_file():
        shutil.copyfile(run_dir.metrics, folder / run_dir.metrics.name)


class _Files:
    """The files that this rank writes of a checkpoint, at once or, from copies, later. Errors are collected:
    if a rank left early, on a full disk, the others would wait for it."""

    def __init__(self, writer: Callable[..., None], saves: Saves):
        self._writer, self._saves = self.guard(writer), saves
        self._copies: list[tuple[Any, str]] = []
        self._problems: list[Exception] = []

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its errors collected."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                self._problems.append(error)

        return call

    def write(self, state_dict: Any, path: str) -> None:
        """Write a file, or copy its content for `write_copies`."""
        content = self._saves.copy(state_dict)
        if content is None:
            self._writer(state_dict, path)
        else:
            self._copies.append((content, path))

    def write_copies(self) -> None:
        """Write the files whose content was copied."""
        with _without_crc32():
            for content, path in self._copies:
                self._writer(content, path)
        self._copies.clear()

    def explain_problem(self, target: Path) -> Exception | None:
        """Return the first error of writing the checkpoint `target`."""
        return explain_write_error(self._problems[0], target) if self._problems else None


@contextmanager
def _collecting_errors(engine: Any, saves: Saves) -> Iterator[_Files]:
    """Let DeepSpeed write through _Files."""
    writer, script = engine.checkpoint_engine.save, engine._copy_recovery_script
    files = _Files(writer, saves)
    engine.checkpoint_engine.save, engine._copy_recovery_script = files.write, files.guard(script)
    try:
        with _without_crc32():
            yield files
    finally:
        engine.checkpoint_engine.save, engine._copy_recovery_script = writer, script


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Let torch.save compute no checksums: torch never reads them, and the marker has better hashes."""
    crc32 = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(crc32)


def check_room(engine: Any, run_dir: RunDir) -> None:
    """Raise UserError on every rank if the run's disk has no room for one more checkpoint."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in engine.module.parameters()]
    trained = sum(n for n, p in sizes if p.requires_grad)
    weights = sum(n * p.element_size() for n, p in sizes)
    need = count_checkpoint_bytes(trained, weights, engine.zero_optimization_stage())
    run_on_rank0(
        check_free_space,
        run_dir.path,
        need,
        f"a checkpoint of {run_dir.path}",
        first="those before it are whole: set train.keep_last lower, ",
        last=", and start again",
    )


def prepare_folders(temporary: Path, target: Path) -> None:
    """Make the empty folder `temporary`, and delete what earlier attempts have left."""
    remove_leftovers(target.parent)  # of this and of killed processes: this job holds the run's lock
    remove_path(target)  # an earlier attempt that died before its marker
    temporary.mkdir(parents=True)


def find_newest_checkpoint(run_dir: RunDir) -> int | None:
    """Return the step of the newest checkpoint whose files match its marker, or None; the same on every rank.

    A damaged checkpoint is skipped with a warning. Raises UserError if all that have a marker are damaged,
    and NoAccess for one that may not be read."""
    return run_on_rank0(_find_newest, run_dir)


def _find_newest(run_dir: RunDir) -> int | None:
    """Return `find_newest_checkpoint`, on rank 0."""
    damage: Exception | None = None
    for step in reversed(run_dir.checkpoint_steps()):
        try:
            run_dir.check_checkpoint(step)
            return step
        except NoAccess:
            raise
        except PermissionError as error:  # no damage: an older one is not to be taken in its place
            raise NoAccess(error.filename, error.strerror) from None
        except (UserError, OSError) as error:
            if is_machine_limit(error):
                raise
            damage = error
            logger.warning("checkpoint of step %d is skipped: %s", step, damage)
    # rather than train for days from the start although a copy may restore the checkpoint
    if run_dir.marked_checkpoints():
        raise UserError(
            f"{damage}; no other checkpoint is whole: restore it, or delete {run_dir.checkpoints} to start "
            f"over"
        )
    return None


def restore_checkpoint(engine: Any, run_dir: RunDir, step: int) -> dict:
    """Load checkpoint `step` (model, optimizer, random generators) into the engine; return the run's `state`.

    Raises UserError on every rank, before anything is loaded, if a file would run code or holds the
    parameters in another order than the engine."""
    folder = run_dir.checkpoint(step)
    problem = None
    try:
        _check_stored(engine, folder / TAG)
    except UserError as error:
        problem = error
    raise_on_all_ranks(problem)
    with _reading_safely(engine):
        path, client = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:  # DeepSpeed only warns
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}, although its marker is there")
    drop_secondary_copies(engine)
    restore_generators(folder, get_rank())
    barrier()
    return client["run"]


def _check_stored(engine: Any, folder: Path) -> None:
    """Raise UserError if one of DeepSpeed's files that this rank is about to load would run code, or if its
    parameters are not those of the engine in the same order: nothing else distinguishes one flat vector from
    another."""
    stage = engine.zero_optimization_stage()
    own = [
        path
        for path in sorted(folder.glob("*.pt"))
        if f"pp_rank_{get_rank()}_" in path.name or path.name.startswith("mp_rank_")
    ]
    read = {path: load_skeleton(path) for path in own}
    models = {path: content for path, content in read.items() if path.name.endswith("_model_states.pt")}
    for path, content in models.items():
        if stage:
            stored = [list(group.items()) for group in content["param_shapes"]]
            expected = [list(group.items()) for group in engine._get_zero_param_shapes()]
        else:
            stored, expected = list(content["module"]), list(engine.module.state_dict())
        if stored != expected:
            raise UserError(
                f"{path} holds the parameters in another order than this program does, so its states would "
                f"be mixed up; resume with the versions of torch, transformers and this repository that "
                f"provenance.json names"
            )


@contextmanager
def _reading_safely(engine: Any) -> Iterator[None]:
    """Let DeepSpeed's reader unpickle only tensors, plain values and a few classes of DeepSpeed's own."""
    reader = engine.checkpoint_engine.load

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(list_deepspeed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load
    try:
        yield
    finally:
        engine.checkpoint_engine.load = reader
