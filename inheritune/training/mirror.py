"""The W&B mirror of a run: opened by training, or filled later by `sync`. metrics.jsonl is the record; W&B
never stops a run."""

import os
import uuid
from typing import TYPE_CHECKING, Literal, cast

from inheritune.config.experiment import Experiment
from inheritune.config.reading import read_yaml
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, read_jsonl, write_json
from inheritune.files.rundir import RunDir
from inheritune.files.storage import find_root
from inheritune.files.writing import write_text
from inheritune.runtime.log import logger, make_progress_bar

if TYPE_CHECKING:
    from wandb import Run

FINISH_PATIENCE_S = 60
"""A job near its time limit must not wait for a network; what has not reached W&B by then stays on disk."""


def start_wandb(run_dir: RunDir, experiment: Experiment, run: str, mode: str, project: str) -> "Run | None":
    """Return the W&B run that mirrors this run folder, or None. A folder has one id, so that a requeued job
    continues its W&B run.

    W&B never stops a run: if it cannot start, a warning is logged and the run continues without it."""
    if mode == "disabled":
        return None
    import wandb

    try:
        return _open_wandb(
            run_dir,
            f"{experiment.name}/{run}",
            experiment.model_dump(mode="json"),
            experiment.rehearsal,
            mode,
            project,
            FINISH_PATIENCE_S,
        )
    except (wandb.errors.Error, OSError) as error:
        logger.warning("W&B could not start (%s); the run continues, metrics.jsonl is the record", error)
        return None


def _open_wandb(
    run_dir: RunDir, name: str, config: dict, rehearsal: bool, mode: str, project: str, patience_s: int = 0
) -> "Run":
    """Open the W&B run of this folder, new or continued. What has not reached W&B `patience_s` seconds after
    its end stays on disk only; 0 waits for ever. Raises what W&B raises."""
    import wandb

    if not run_dir.wandb_id.is_file():
        write_text(run_dir.wandb_id, uuid.uuid4().hex[:12])
    mirror = wandb.init(
        project=project,
        id=run_dir.wandb_id.read_text(),
        resume="allow",
        mode=cast(Literal["online", "offline"], mode),
        dir=str(run_dir.path),
        name=name,
        config=config,
        tags=["rehearsal"] if rehearsal else None,
        settings=wandb.Settings(silent=True, finish_timeout=patience_s),
    )
    # W&B's own step only grows, and a resumed run may log a step again
    mirror.define_metric("*", step_metric="step")
    return mirror


def sync(folder: str) -> None:
    """Send the rows of a run folder's metrics.jsonl that no earlier sync has sent to its one W&B run, from a
    machine with internet. Offline segments are ignored: metrics.jsonl is the record, and it holds no row
    twice.

    Raises UserError if `folder` is not a run folder, if no W&B account is known here, and if W&B cannot be
    reached."""
    run_dir = RunDir(folder)
    _check_run_folder(run_dir, folder)
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in ("online", "offline"):
        raise UserError(
            f"WANDB_MODE is '{mode}', so there is nothing to sync to; unset it, or use offline or online"
        )
    marker = run_dir.path / "wandb_synced.json"
    rows = read_jsonl(run_dir.metrics)
    synced = read_json(marker) if marker.is_file() and run_dir.wandb_id.is_file() else None
    # what was written to an offline segment has not reached W&B, as far as can be known here
    new = _unsynced(rows, synced if synced and synced["mode"] == mode else None)
    if not new:
        print(f"{folder}: nothing new since the last sync ({mode}, {len(rows)} rows)")
        return
    mirror = _send(run_dir, new, mode)
    write_json(marker, {"mode": mode, "rows": len(rows), "last_step": rows[-1]["step"]})
    done = "sent to" if mode == "online" else "written to a segment that 'wandb sync' sends, for"
    print(f"{folder}: {len(new)} of {len(rows)} rows {done} W&B run {mirror.id}")


def _check_run_folder(run_dir: RunDir, folder: str) -> None:
    """Raise UserError unless the folder holds one run with its record."""
    stages = [f"stage{number}" for number in run_dir.stages() if run_dir.stage(number).metrics.is_file()]
    if stages and not run_dir.metrics.is_file():
        raise UserError(
            f"{folder} is a grown run, whose stages are runs of their own ({', '.join(stages)}); sync "
            f"{folder}/stage1"
        )
    if not (run_dir.metrics.is_file() and run_dir.experiment.is_file()):
        raise UserError(
            f"{folder} is not a run folder (no metrics.jsonl and experiment.yaml); runs are in "
            f"{find_root() / 'runs'}"
        )


def _send(run_dir: RunDir, rows: list[dict], mode: str) -> "Run":
    """Send `rows` to the run's W&B run. Raises UserError if W&B cannot be reached or refuses."""
    import wandb

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError(
            "there is no W&B account on this machine: run 'wandb login', or set WANDB_API_KEY, and sync again"
        )
    described = read_yaml(run_dir.experiment)
    name, project = f"{described['experiment']}/{described['run_name']}", described["train"]["wandb_project"]
    try:
        mirror = _open_wandb(run_dir, name, described, described["rehearsal"], mode, project)
        for row in make_progress_bar(rows, desc="syncing", unit="row"):
            mirror.log(row)
        mirror.finish()
    except wandb.errors.AuthenticationError as error:
        raise UserError(
            f"W&B refuses this machine's account ({_one_line(error)}): run 'wandb login --relogin'"
        ) from None
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"W&B cannot be reached ({_one_line(error)}); sync where there is internet, or with "
            f"WANDB_MODE=offline into a segment that 'wandb sync' can send later"
        ) from None
    return mirror


def _unsynced(rows: list[dict], synced: dict | None) -> list[dict]:
    """Return the rows after those that an earlier sync sent. A run that went back to a checkpoint since then
    has other rows at its end: of these, the steps that are new are sent, since W&B cannot take rows back."""
    if synced is None:
        return rows
    count = synced["rows"]
    if len(rows) >= count and rows[count - 1]["step"] == synced["last_step"]:
        return rows[count:]
    return [row for row in rows if row["step"] > synced["last_step"]]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
