"""Checkpoints: complete or absent. DeepSpeed writes into a temporary folder; the folder is renamed, and only
then does a COMPLETE marker with the size and hash of every file appear. What has no marker does not exist for
a reader.

The state of a run beside DeepSpeed's files is one visible dict (`state` of train.py) and each rank's random
generators.
"""

import errno
import pickle
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from inheritune.data.tokenizer_files import copy_tokenizer
from inheritune.engines.engine import drop_secondary_copies, full_parameters, zero_stage
from inheritune.engines.layout import describe_layout, find_changes
from inheritune.engines.sizes import checkpoint_bytes
from inheritune.errors import UserError
from inheritune.files.rundir import (
    RunDir,
    disk_error,
    flush,
    free_bytes,
    hash_folder,
    more_room,
    node,
    read_json,
    remove,
    remove_if_possible,
    remove_leftovers,
    replacing,
    temporary_of,
    write_json,
)
from inheritune.models.architectures import architecture
from inheritune.models.config_files import copy_settings
from inheritune.models.sources import deepspeed_classes, load_skeleton, read_deepspeed, read_tensor
from inheritune.models.writer import CheckpointWriter
from inheritune.runtime.dist import NodeError, barrier, device, gather, on_rank0, rank, world
from inheritune.runtime.log import logger

TAG = "deepspeed"  # DeepSpeed's tag: the sub-folder of its files
MARKER = "COMPLETE"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def save(engine, run_dir: RunDir, state: dict, settings: dict, keep_last: int, run: dict) -> float:
    """Write a checkpoint of the run's `state`, at its step, on every rank; mark it complete, with what `run`
    says of the run (identity.describe_run); then delete all but the last `keep_last`.  -> seconds taken

    No rank leaves before it is complete on all. Raises UserError when the disk is full; the checkpoints
    before it stay."""
    t0, step = time.perf_counter(), state["step"]
    target = run_dir.checkpoint(step)
    # named after this process: one that was taken for dead and still writes cannot get into ours
    temporary = on_rank0(temporary_of, target)
    check_room(engine, run_dir)
    on_rank0(_prepare, temporary, target)
    with _writing(engine) as (write, problems):
        engine.save_checkpoint(str(temporary), tag=TAG, client_state={"run": dict(state)}, save_latest=False)
        write(_generators(), str(temporary / f"rng_{rank():05d}.pt"))
    _agree_on(_explain(problems[0], target) if problems else None, temporary)
    on_rank0(_add_readable, engine, run_dir, temporary)
    names = sorted(
        p.relative_to(temporary).as_posix() for p in temporary.rglob("*")
    )  # folders too: they hold the files' names
    share, problem = set(names[rank() :: world()]), None
    try:
        for name in share:  # a node that dies now must not leave a marker beside files that it alone had
            flush(temporary / name)
    except OSError as error:
        problem = disk_error(error, target)
    _agree_on(problem, temporary)
    hashes = gather(hash_folder(temporary, only=share))

    def finish():
        temporary.rename(target)
        flush(target.parent)
        files = {name: facts for part in hashes for name, facts in part.items()}
        shape = {"ranks": world(), "zero_stage": zero_stage(settings), **describe_layout(settings)}
        marker = {"step": step, "run": run, **shape, "files": files}
        write_json(target / MARKER, marker)
        prune(run_dir, step, keep_last)

    on_rank0(finish)
    seconds = time.perf_counter() - t0
    logger.info("checkpoint of step %d written in %.1f s", step, seconds)
    return seconds


def prune(run_dir: RunDir, newest: int, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints up to step `newest`, which is known to be whole: a
    start does it too, for one that was killed in between."""
    kept = [step for step in run_dir.complete_checkpoints() if step <= newest][-keep_last:]
    for old in run_dir.checkpoint_steps():
        if (
            old < newest and old not in kept and run_dir.named_step(old) == old
        ):  # a copy under a wrong name is a person's
            remove_if_possible(
                run_dir.checkpoint(old) / MARKER
            )  # first: without it the rest is not there for a reader
            remove_if_possible(run_dir.checkpoint(old))


def _add_readable(engine, run_dir: RunDir, folder: Path) -> None:
    """Put config.json into a checkpoint, so that `inherit` can read it, and the record, which a resumed run
    goes on with."""
    engine.module.config.save_pretrained(folder)
    if run_dir.metrics.is_file():
        shutil.copyfile(run_dir.metrics, folder / run_dir.metrics.name)


@contextmanager
def _writing(engine):
    """DeepSpeed's writers made to collect their errors: a rank that left save_checkpoint early, on a full
    disk, would let the others wait in its barriers.  -> (write(state_dict, path), list of errors)"""
    problems = []

    def guarded(function):
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                problems.append(error)

        return call

    writer, script, crc32 = (
        engine.checkpoint_engine.save,
        engine._copy_recovery_script,
        torch.serialization.get_crc32_options(),
    )
    engine.checkpoint_engine.save, engine._copy_recovery_script = guarded(writer), guarded(script)
    torch.serialization.set_crc32_options(False)  # torch never reads them, and the marker has better hashes
    try:
        yield engine.checkpoint_engine.save, problems
    finally:
        engine.checkpoint_engine.save, engine._copy_recovery_script = writer, script
        torch.serialization.set_crc32_options(crc32)


def check_room(engine, run_dir: RunDir) -> None:
    """Raises UserError on every rank if the run's disk has no room for one more checkpoint."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in engine.module.parameters()]
    trained, weights = (
        sum(n for n, p in sizes if p.requires_grad),
        sum(n * p.element_size() for n, p in sizes),
    )
    need = checkpoint_bytes(trained, weights, engine.zero_optimization_stage())

    def check():
        free = free_bytes(run_dir.path)
        if free < need:
            raise UserError(
                f"a checkpoint of {run_dir.path} needs {need / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB "
                f"free; those "
                f"before it are whole: set train.keep_last lower, {more_room(run_dir.path)}, and start again"
            )

    on_rank0(check)


def _prepare(temporary: Path, target: Path) -> None:
    remove_leftovers(target.parent)  # ours, and those of killed processes: this job holds the run's lock
    remove(target)  # an earlier attempt that died before its marker
    temporary.mkdir(parents=True)


def _explain(error: Exception, path: Path) -> Exception:
    """`error` as a UserError if the disk is full: torch's zip writer reports that as a RuntimeError of its
    own."""
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return disk_error(OSError(errno.ENOSPC, "no space left"), path)
    return disk_error(error, path) if isinstance(error, OSError) else error


def _agree_on(problem: Exception | None, unfinished: Path | None = None) -> None:
    """Raise on every rank what went wrong on any: the rank itself its own, the others a UserError that says
    where."""
    problems = gather(None if problem is None else f"{node()} (rank {rank()}): {problem}")
    failed = next(filter(None, problems), None)
    if failed is None:
        return
    if unfinished:
        on_rank0(remove, unfinished)
    raise problem if problem is not None and not isinstance(problem, UserError) else UserError(failed)


def find(run_dir: RunDir) -> int | None:
    """Step of the newest checkpoint whose files are what its marker says, or None; the same on every rank.

    A damaged one is passed over with a warning. Raises UserError if all that have a marker are damaged."""

    def newest():
        for step in reversed(run_dir.checkpoint_steps()):
            try:
                run_dir.check_checkpoint(step)
                return step
            except (UserError, OSError) as error:
                damage = error
                logger.warning("checkpoint of step %d is passed over: %s", step, damage)
        if run_dir.marked_checkpoints():  # rather than train from the start for days what a copy may restore
            raise UserError(
                f"{damage}; no other checkpoint is whole: restore it, or delete {run_dir.checkpoints} to "
                f"start over"
            )
        return None

    return on_rank0(newest)


def is_resize(run_dir: RunDir, step: int, settings: dict) -> bool:
    """Return whether the states of checkpoint `step` must be read parameter by parameter: it was written by
    another number of ranks, at another ZeRO stage, or under a JSON that stores vectors in another order than
    this job's `settings`.

    Raises UserError if the shape changes to or from ZeRO 0, whose optimizer states are not kept by parameter,
    and for a change of the JSON whose effect is not known."""
    folder = run_dir.checkpoint(step)
    marker = read_json(folder / MARKER)
    try:
        return _must_read_by_name(marker, run_dir, step, settings)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / MARKER} lacks what a marker says, or says it otherwise; restore it, or delete "
            f"{folder}"
        ) from None


def _must_read_by_name(marker: dict, run_dir: RunDir, step: int, settings: dict) -> bool:
    """`is_resize`, by the checkpoint's marker."""
    folder = run_dir.checkpoint(step)
    before, now = (int(marker["ranks"]), int(marker["zero_stage"])), (world(), zero_stage(settings))
    if before != now and 0 in (before[1], now[1]):
        raise UserError(
            f"checkpoint {folder} was written by {before[0]} rank(s) at ZeRO {before[1]}, this job has "
            f"{now[0]} at ZeRO {now[1]}; only ZeRO 1, 2 and 3 can be resized: "
            + ("use a ZeRO 1 JSON" if before[1] else f"resume with {before[0]} rank(s) at ZeRO 0")
        )
    if "layout" not in marker:  # an older checkpoint
        if before == now:
            _check_recorded_json(run_dir, step, settings)
        return before != now
    changed = find_changes(marker, settings, f"checkpoint {folder}")
    if changed and before == now and before[1]:
        logger.info(
            "the states of step %d are read parameter by parameter, for a change of %s",
            step,
            ", ".join(changed),
        )
    return before != now or (bool(changed) and before[1] > 0)


def _check_recorded_json(run_dir: RunDir, step: int, settings: dict) -> None:
    """Raises UserError unless `settings` is the JSON under which checkpoint `step` was written, by
    provenance.json."""
    folder, starts = run_dir.checkpoint(step), []
    if run_dir.provenance.is_file():
        starts = read_json(run_dir.provenance).get("starts", [])
    recorded = next((s.get("deepspeed") for s in reversed(starts) if (s.get("resumed_at") or 0) < step), None)
    if recorded != settings:
        raise UserError(
            f"checkpoint {folder} does not record how its states are stored, so it is resumed only under the "
            f"DeepSpeed JSON "
            f"that wrote it, which {run_dir.provenance} has as 'deepspeed' of the last start before it: "
            f"resume under that one"
        )


def restore(engine, run_dir: RunDir, step: int) -> dict:
    """Load checkpoint `step` (model, optimizer, random generators) into the engine; returns the run's
    `state`.

    Raises UserError on every rank, before anything is loaded, if a file asks to run code or holds the
    parameters in another order than the engine."""
    folder = run_dir.checkpoint(step)
    problem = None
    try:
        _check_stored(engine, folder / TAG)
    except UserError as error:
        problem = error
    _agree_on(problem)
    with _reading(engine):
        path, client = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:  # DeepSpeed only warns
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}, although its marker is there")
    drop_secondary_copies(engine)
    _restore_generators(folder, rank())
    barrier()
    return client["run"]


def _check_stored(engine, folder: Path) -> None:
    """Raises UserError if one of DeepSpeed's files that this rank is about to load asks to run code, or if
    the parameters in it are not those of the engine, in the same order: nothing else tells one flat vector
    from another."""
    stage = engine.zero_optimization_stage()
    own = [
        path
        for path in sorted(folder.glob("*.pt"))
        if f"pp_rank_{rank()}_" in path.name or path.name.startswith("mp_rank_")
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
                f"be mixed up; "
                f"resume with the versions of torch, transformers and this repository that provenance.json "
                f"names"
            )


@contextmanager
def _reading(engine):
    """DeepSpeed's reader made to unpickle nothing but tensors, plain values and the few classes of its
    own."""
    reader = engine.checkpoint_engine.load

    def load(path: str, map_location=None):
        with torch.serialization.safe_globals(deepspeed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load
    try:
        yield
    finally:
        engine.checkpoint_engine.load = reader


def restore_resized(engine, run_dir: RunDir, step: int) -> dict:
    """Load checkpoint `step`, written by another number of ranks or at another ZeRO stage (1 to 3), into an
    engine whose weights were filled from it (`open_source` reads them); returns the run's `state`.

    Masters and both moments are read from the old ranks' files by rank 0, parameter by parameter, and each
    rank takes its part: nothing is converted on disk. (DeepSpeed's universal checkpoint gives the first
    group's weight decay to all groups and one `step` to all parameters.)"""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    t0 = time.perf_counter()
    folder = run_dir.checkpoint(step)
    marker = read_json(folder / MARKER)
    partitioned = engine.zero_optimization_stage() == 3
    stored = (
        {what: read_deepspeed(folder / TAG, what) for what in ("master", *MOMENTS, "step")}
        if rank() == 0
        else {}
    )
    updates = on_rank0(lambda: float(read_tensor(stored["step"]["step"])))
    optimizer = engine.optimizer.optimizer
    zero = engine.optimizer
    for flat in zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups:
        empty = {moment: torch.zeros_like(flat) for moment in MOMENTS}  # torch makes them at its first step
        optimizer.state[flat] = {"step": torch.full((), updates, device=flat.device), **empty}
    if not partitioned:
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        for what in ("master", *MOMENTS) if parameter.requires_grad else ():
            value = read_tensor(stored[what][name]) if rank() == 0 else torch.empty(_shape(parameter))
            value = value.to(engine.device)
            torch.distributed.broadcast(value, src=0) if world() > 1 else None
            if partitioned:  # this rank's part; the last one is padded
                n = parameter.ds_tensor.ds_numel
                padded = torch.nn.functional.pad(value.flatten(), (0, n * world() - value.numel()))
                part = padded[n * rank() : n * (rank() + 1)]
                set_part = safe_set_local_fp32_param if what == "master" else safe_set_local_optimizer_state
                set_part(parameter, part, *(() if what == "master" else (what,)))
            elif what == "master":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, what)
    drop_secondary_copies(engine)
    client = on_rank0(_client_state, folder)
    engine.global_steps, engine.skipped_steps = client["global_steps"], client["skipped_steps"]
    _restore_generators(folder, rank() % marker["ranks"])  # nothing draws from them while there is no dropout
    barrier()
    logger.info(
        "resized from %d rank(s), ZeRO %d to %d rank(s), ZeRO %d in %.1f s",
        marker["ranks"],
        marker["zero_stage"],
        world(),
        engine.zero_optimization_stage(),
        time.perf_counter() - t0,
    )
    return client["run"]


def _client_state(folder: Path) -> dict:
    """What DeepSpeed's model file holds beside tensors: the run's state, counts of steps."""
    saved = load_skeleton(sorted((folder / TAG).glob("[!.]*model_states.pt"))[0])
    return {key: saved[key] for key in ("run", "global_steps", "skipped_steps")}


def _shape(parameter) -> torch.Size:
    """A parameter's whole shape, also where ZeRO 3 has left a rank only a part."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _restore_generators(folder: Path, saved_rank: int) -> None:
    file = folder / f"rng_{saved_rank:05d}.pt"
    try:
        generators = torch.load(file, weights_only=True)
        torch.set_rng_state(generators["cpu"])
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        RuntimeError,
    ):  # of another program, with a right hash
        raise NodeError(
            f"{file} holds no state of random generators; restore it, or delete its checkpoint"
        ) from None
    if "cuda" in generators and device().type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"])


def _generators() -> dict:
    states = {"cpu": torch.get_rng_state()}
    if device().type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def export_weights(engine, folder: Path, tokenizer: Path, run: dict | None = None) -> None:
    """Write the fp32 masters as an HF checkpoint with tokenizer and the generation settings of the model that
    the run started from, one parameter in memory at a time; all ranks must call. Weights kept on the way (all
    but final/) get a marker, which names the `run` (identity.describe_run).

    Raises UserError on every rank when the disk is full; nothing is left then."""
    config = engine.module.config
    table = architecture(config.model_type)
    pieces = {
        name: table.in_checkpoint(name, tuple(_shape(p))) for name, p in engine.module.named_parameters()
    }
    specs = {piece: (shape, torch.float32) for its in pieces.values() for piece, shape in its.items()}
    parameters = full_parameters(engine)
    problem = None
    if rank() == 0:
        try:
            with replacing(folder) as temporary:
                temporary.mkdir()
                writer = CheckpointWriter(temporary, config, specs)
                for name, value in parameters:
                    its = pieces[name]
                    for (piece, shape), part in zip(
                        its.items(), value.flatten().tensor_split(len(its)), strict=True
                    ):
                        writer.add(piece, part.view(shape))
                writer.close()
                copy_tokenizer(tokenizer, temporary, ["**/*"], trained=True)
                if (RunDir(folder.parent).init / "config.json").is_file():  # what the weights started from
                    copy_settings(RunDir(folder.parent).init, temporary)
                if folder.name != "final":  # whose marker is DONE
                    write_json(temporary / MARKER, {"files": hash_folder(temporary), "run": run})
        except Exception as error:
            problem = _explain(error, folder)
    for _ in parameters:  # gathering needs every rank, also for what rank 0 could not write
        pass
    _agree_on(problem)
