"""Checkpoints: complete or absent. DeepSpeed writes into a temporary folder; the folder is renamed, and only then does a
COMPLETE marker with the size and hash of every file appear. What has no marker does not exist for a reader.

The state of a run beside DeepSpeed's files is one visible dict (`state` of train.py) and each rank's random generators.
"""

import time
from pathlib import Path

import torch

from inheritune.config import UserError
from inheritune.dist import barrier, gather, on_rank0, rank, world
from inheritune.engine import full_parameters, zero_stage
from inheritune.log import logger
from inheritune.rundir import RunDir, check_files, disk_error, hash_folder, read_json, remove, replacing, write_json
from inheritune.sources import CheckpointWriter

TAG = "deepspeed"  # DeepSpeed's tag: the sub-folder of its files
MARKER = "COMPLETE"


def save(engine, run_dir: RunDir, step: int, state: dict, settings: dict, keep_last: int) -> None:
    """Write checkpoint `step` on every rank, mark it complete, then delete all but the last `keep_last`.

    Raises UserError when the disk is full; the checkpoints before it stay."""
    t0 = time.perf_counter()
    target = run_dir.checkpoint(step)
    temporary = target.with_name(f".{target.name}.tmp")
    on_rank0(_prepare, temporary, target)
    try:
        engine.save_checkpoint(str(temporary), tag=TAG, client_state={"run": dict(state)}, save_latest=False)
        torch.save(_generators(), temporary / f"rng_{rank():05d}.pt")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
        problem = disk_error(error, target) if isinstance(error, OSError) else error
    else:
        problem = None
    failed = [where for where, bad in enumerate(gather(problem is not None)) if bad]
    if failed:
        on_rank0(remove, temporary)
        raise problem or RuntimeError(f"rank {failed[0]} could not write checkpoint {target}")
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
    logger.info("checkpoint of step %d written in %.1f s", step, time.perf_counter() - t0)


def _prepare(temporary: Path, target: Path) -> None:
    remove(temporary)
    remove(target)  # an earlier attempt that died before its marker
    temporary.mkdir(parents=True)


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
    """Write the fp32 masters as an HF checkpoint with tokenizer, one parameter in memory at a time; all ranks must call."""
    config = engine.module.config
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    if rank() != 0:
        for _ in full_parameters(engine):
            pass
    else:
        with replacing(folder) as temporary:
            temporary.mkdir()
            writer = CheckpointWriter(temporary, config, {name: (shape, torch.float32) for name, shape in shapes.items()})
            for name, value in full_parameters(engine):
                writer.add(name, value)
            writer.close()
            for file in tokenizer.iterdir():
                (temporary / file.name).write_bytes(file.read_bytes())
    barrier()
