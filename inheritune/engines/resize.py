"""Resuming a checkpoint of another number of ranks, another ZeRO stage, or another order of the stored
vectors: its states are read parameter by parameter."""

import time
from pathlib import Path
from typing import Any

import torch

from inheritune.engines.checkpoint import TAG
from inheritune.engines.deepspeed_json import get_zero_stage
from inheritune.engines.engine import drop_secondary_copies
from inheritune.engines.generators import restore_generators
from inheritune.engines.layout import find_layout_changes
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.markers import COMPLETE
from inheritune.files.rundir import RunDir
from inheritune.models.deepspeed_files import read_deepspeed
from inheritune.models.extents import read_tensor
from inheritune.models.torch_files import load_skeleton
from inheritune.runtime.dist import barrier, run_on_rank0
from inheritune.runtime.log import logger
from inheritune.runtime.ranks import get_rank, get_world_size

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter: its fp32 master and two moments."""


def is_resize(run_dir: RunDir, step: int, settings: dict) -> bool:
    """Return whether the states of checkpoint `step` must be read parameter by parameter: it was written by
    another number of ranks, at another ZeRO stage, or under a JSON that stores vectors in another order than
    this job's `settings`.

    Raises UserError if the stage changes to or from ZeRO 0, whose optimizer states are not stored by
    parameter, and for a change of the JSON whose effect is not known."""
    folder = run_dir.checkpoint(step)
    marker = read_json(folder / COMPLETE)
    try:
        return _must_read_by_name(marker, run_dir, step, settings)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / COMPLETE} lacks fields of a marker, or holds them in another form; restore it, or "
            f"delete {folder}"
        ) from None


def _must_read_by_name(marker: dict, run_dir: RunDir, step: int, settings: dict) -> bool:
    """Return `is_resize` for the checkpoint's marker."""
    folder = run_dir.checkpoint(step)
    before = (int(marker["ranks"]), int(marker["zero_stage"]))
    now = (get_world_size(), get_zero_stage(settings))
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
    changed = find_layout_changes(marker, settings, f"checkpoint {folder}")
    if changed and before == now and before[1]:
        logger.info(
            "the states of step %d are read parameter by parameter, for a change of %s",
            step,
            ", ".join(changed),
        )
    return before != now or (bool(changed) and before[1] > 0)


def _check_recorded_json(run_dir: RunDir, step: int, settings: dict) -> None:
    """Raise UserError unless `settings` is the JSON under which checkpoint `step` was written, according to
    provenance.json."""
    folder, starts = run_dir.checkpoint(step), []
    if run_dir.provenance.is_file():
        starts = read_json(run_dir.provenance).get("starts", [])
    recorded = next((s.get("deepspeed") for s in reversed(starts) if (s.get("resumed_at") or 0) < step), None)
    if recorded != settings:
        raise UserError(
            f"checkpoint {folder} does not record how its states are stored, so it is resumed only under the "
            f"DeepSpeed JSON that wrote it, which {run_dir.provenance} has as 'deepspeed' of the last start "
            f"before it: resume under that one"
        )


def restore_resized(engine: Any, run_dir: RunDir, step: int) -> dict:
    """Load checkpoint `step`, written by another number of ranks or at another ZeRO stage (1 to 3), into an
    engine whose weights were filled from it (`open_source` reads them); return the run's `state`.

    Rank 0 reads masters and both moments from the old ranks' files, parameter by parameter, and each rank
    keeps its part: nothing is converted on disk. (DeepSpeed's universal checkpoint gives the first group's
    weight decay to all groups and one `step` to all parameters.)"""
    t0 = time.perf_counter()
    folder = run_dir.checkpoint(step)
    marker = read_json(folder / COMPLETE)
    stored = _open_stored(folder / TAG) if get_rank() == 0 else {}
    _make_optimizer_states(engine, run_on_rank0(lambda: float(read_tensor(stored["step"]["step"]))))
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        for what in (MASTER, *MOMENTS):
            value = read_tensor(stored[what][name]) if get_rank() == 0 else torch.empty(get_shape(parameter))
            value = value.to(engine.device)
            if get_world_size() > 1:
                torch.distributed.broadcast(value, src=0)
            _set_state(engine, parameter, what, value)
    drop_secondary_copies(engine)
    client = run_on_rank0(read_client_state, folder)
    engine.global_steps, engine.skipped_steps = client["global_steps"], client["skipped_steps"]
    # nothing draws from the generators while there is no dropout
    restore_generators(folder, get_rank() % marker["ranks"])
    barrier()
    logger.info(
        "resized from %d rank(s), ZeRO %d to %d rank(s), ZeRO %d in %.1f s",
        marker["ranks"],
        marker["zero_stage"],
        get_world_size(),
        engine.zero_optimization_stage(),
        time.perf_counter() - t0,
    )
    return client["run"]


def _open_stored(folder: Path) -> dict[str, Any]:
    """Return {state: {parameter: stored tensor}} of the files of all old ranks."""
    return {what: read_deepspeed(folder, what) for what in (MASTER, *MOMENTS, "step")}


def _make_optimizer_states(engine: Any, updates: float) -> None:
    """Give the optimizer empty moments and the number of `updates`; torch would make them at its first
    step."""
    zero, optimizer = engine.optimizer, engine.optimizer.optimizer
    partitioned = engine.zero_optimization_stage() == 3
    for flat in zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups:
        empty = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        optimizer.state[flat] = {"step": torch.full((), updates, device=flat.device), **empty}
    if not partitioned:
        zero._lazy_init_hp_params_optimizer_state()


def _set_state(engine: Any, parameter: Any, what: str, value: torch.Tensor) -> None:
    """Set this rank's part of a parameter's master or moment to that of the whole `value`."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if engine.zero_optimization_stage() == 3:  # the last rank's part is padded
        n, world_size = parameter.ds_tensor.ds_numel, get_world_size()
        padded = torch.nn.functional.pad(value.flatten(), (0, n * world_size - value.numel()))
        part = padded[n * get_rank() : n * (get_rank() + 1)]
        if what == MASTER:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, what)
    elif what == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, what)


def read_client_state(folder: Path) -> dict:
    """Return what DeepSpeed's model file holds beside tensors: the run's state and the counts of steps."""
    saved = load_skeleton(sorted((folder / TAG).glob("[!.]*model_states.pt"))[0])
    return {key: saved[key] for key in ("run", "global_steps", "skipped_steps")}


def get_shape(parameter: torch.Tensor) -> torch.Size:
    """Return a parameter's (or a buffer's) whole shape, also at ZeRO 3, where a rank holds only a part."""
    return getattr(parameter, "ds_shape", parameter.shape)
