"""Checkpoints: complete or absent. DeepSpeed writes into a temporary folder; the folder is renamed, and only then does a
COMPLETE marker with the size and hash of every file appear. What has no marker does not exist for a reader.

The state of a run beside DeepSpeed's files is one visible dict (`state` of train.py) and each rank's random generators.
"""

import errno
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from inheritune.config import UserError
from inheritune.dist import barrier, gather, on_rank0, rank, world
from inheritune.engine import full_parameters, zero_stage
from inheritune.log import logger
from inheritune.rundir import (
    RunDir,
    check_files,
    disk_error,
    hash_folder,
    node,
    read_json,
    remove,
    remove_leftovers,
    replacing,
    write_json,
)
from inheritune.sources import CheckpointWriter

TAG = "deepspeed"  # DeepSpeed's tag: the sub-folder of its files
MARKER = "COMPLETE"


def save(engine, run_dir: RunDir, step: int, state: dict, settings: dict, keep_last: int) -> float:
    """Write checkpoint `step` on every rank, mark it complete, then delete all but the last `keep_last`.  -> seconds taken

    No rank leaves before it is complete on all. Raises UserError when the disk is full; the checkpoints before it stay."""
    t0 = time.perf_counter()
    target = run_dir.checkpoint(step)
    # named after this process: one that was taken for dead and still writes cannot get into ours
    temporary = on_rank0(lambda: target.with_name(f".{target.name}.tmp{node()}-{os.getpid()}"))
    need = checkpoint_bytes(engine)
    on_rank0(_prepare, temporary, target, need)
    with _writing(engine) as (write, problems):
        engine.save_checkpoint(str(temporary), tag=TAG, client_state={"run": dict(state)}, save_latest=False)
        write(_generators(), str(temporary / f"rng_{rank():05d}.pt"))
    _agree_on(_explain(problems[0], target) if problems else None, temporary)
    on_rank0(engine.module.config.save_pretrained, temporary)  # so that `inherit` can read this checkpoint
    names = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
    hashes = gather(hash_folder(temporary, only=set(names[rank() :: world()])))

    def finish():
        temporary.rename(target)
        files = {name: facts for part in hashes for name, facts in part.items()}
        marker = {"step": step, "ranks": world(), "zero_stage": zero_stage(settings), "files": files}
        write_json(target / MARKER, marker)
        for old in run_dir.complete_checkpoints()[:-keep_last]:
            remove(run_dir.checkpoint(old))

    on_rank0(finish)
    seconds = time.perf_counter() - t0
    logger.info("checkpoint of step %d written in %.1f s", step, seconds)
    return seconds


@contextmanager
def _writing(engine):
    """DeepSpeed's writers made to collect their errors: a rank that left save_checkpoint early, on a full disk, would let the
    others wait in its barriers.  -> (write(state_dict, path), list of errors)"""
    problems = []

    def guarded(function):
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                problems.append(error)

        return call

    writer, script = engine.checkpoint_engine.save, engine._copy_recovery_script
    engine.checkpoint_engine.save, engine._copy_recovery_script = guarded(writer), guarded(script)
    try:
        yield engine.checkpoint_engine.save, problems
    finally:
        engine.checkpoint_engine.save, engine._copy_recovery_script = writer, script


def checkpoint_bytes(engine) -> int:
    """Size of one checkpoint: fp32 masters and two moments of what is trained, and below ZeRO 3 the weights beside them."""
    parameters = [(getattr(p, "ds_numel", p.numel()), p) for p in engine.module.parameters()]
    states = sum(12 * n for n, p in parameters if p.requires_grad)
    return states + (sum(n * p.element_size() for n, p in parameters) if engine.zero_optimization_stage() < 3 else 0)


def _prepare(temporary: Path, target: Path, need: int) -> None:
    remove_leftovers(target.parent)  # ours, and those of killed processes: this job holds the run's lock
    remove(target)  # an earlier attempt that died before its marker
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise disk_error(error, target) from error
    free = shutil.disk_usage(temporary).free
    if free < need:
        remove(temporary)
        raise UserError(
            f"checkpoint {target} needs {need / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free; the checkpoints before it "
            f"are whole: free some space and start again, or set train.keep_last lower or INHERITUNE_ROOT to a larger disk"
        )


def _explain(error: Exception, path: Path) -> Exception:
    """`error` as a UserError if the disk is full: torch's zip writer reports that as a RuntimeError of its own."""
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return disk_error(OSError(errno.ENOSPC, "no space left"), path)
    return disk_error(error, path) if isinstance(error, OSError) else error


def _agree_on(problem: Exception | None, unfinished: Path) -> None:
    """Raise on every rank what went wrong on any: the rank itself its own, the others a UserError that says where."""
    problems = gather(None if problem is None else f"{node()} (rank {rank()}): {problem}")
    failed = next(filter(None, problems), None)
    if failed is None:
        return
    on_rank0(remove, unfinished)
    raise problem if problem is not None and not isinstance(problem, UserError) else UserError(failed)


def find(run_dir: RunDir) -> int | None:
    """Step of the newest checkpoint whose files are what its marker says, or None; the same on every rank.

    A damaged one is passed over with a warning."""

    def newest():
        for step in reversed(run_dir.complete_checkpoints()):
            try:
                check_files(run_dir.checkpoint(step), read_json(run_dir.checkpoint(step) / MARKER)["files"])
                return step
            except UserError as damage:
                logger.warning("checkpoint of step %d is passed over: %s", step, damage)
        return None

    return on_rank0(newest)


def check_shape(run_dir: RunDir, step: int, settings: dict) -> None:
    """Raises UserError if checkpoint `step` was written by another number of ranks or at another ZeRO stage."""
    marker = read_json(run_dir.checkpoint(step) / MARKER)
    here = {"ranks": world(), "zero_stage": zero_stage(settings)}
    if any(marker[key] != value for key, value in here.items()):
        raise UserError(
            f"checkpoint {run_dir.checkpoint(step)} was written by {marker['ranks']} rank(s) at ZeRO {marker['zero_stage']}, "
            f"this job has {world()} at ZeRO {here['zero_stage']}; resume it with the same, or start over in another run folder"
        )


def restore(engine, run_dir: RunDir, step: int) -> dict:
    """Load checkpoint `step` (model, optimizer, random generators) into the engine; returns the run's `state`."""
    folder = run_dir.checkpoint(step)
    path, client = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:  # DeepSpeed only warns
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}, although its marker is there")
    generators = torch.load(folder / f"rng_{rank():05d}.pt", weights_only=True)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    barrier()
    return client["run"]


def _generators() -> dict:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def export_weights(engine, folder: Path, tokenizer: Path) -> None:
    """Write the fp32 masters as an HF checkpoint with tokenizer, one parameter in memory at a time; all ranks must call.

    Raises UserError on every rank when the disk is full; nothing is left then."""
    config = engine.module.config
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    parameters = full_parameters(engine)
    problem = None
    if rank() == 0:
        try:
            with replacing(folder) as temporary:
                temporary.mkdir()
                writer = CheckpointWriter(temporary, config, {name: (shape, torch.float32) for name, shape in shapes.items()})
                for name, value in parameters:
                    writer.add(name, value)
                writer.close()
                for file in tokenizer.iterdir():
                    (temporary / file.name).write_bytes(file.read_bytes())
        except Exception as error:
            problem = _explain(error, folder)
    for _ in parameters:  # gathering needs every rank, also for what rank 0 could not write
        pass
    _agree_on(problem, folder.with_name(f".{folder.name}.tmp"))
