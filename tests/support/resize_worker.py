"""Several runs in one launch (start-up costs more than they do): python tests/support/resize_worker.py
JOBS.json, a list of {root, experiment, run, ds, fault, refused}. `fault` breaks one thing of a resize on
purpose, to show that the test sees it; with `refused` the run is to end in a UserError, whose sentence rank 0
writes to this file."""

import json
import os
import sys
from pathlib import Path

import torch

from inheritune.cli import leave
from inheritune.config.experiment import load_experiment
from inheritune.engines import adamw, resize
from inheritune.errors import UserError
from inheritune.runs.job import Job
from inheritune.runtime import dist
from inheritune.training.loop import train_job

original, groups = resize.restore_resized, adamw.make_parameter_groups


def broken(fault: str):
    """restore_resized with one thing done wrong."""

    def restore(engine, run_dir, step):
        state = original(engine, run_dir, step)
        optimizer = engine.optimizer.optimizer
        if fault == "one group's weight decay for all":
            for group in optimizer.param_groups:
                group["weight_decay"] = optimizer.param_groups[0]["weight_decay"]
        for values in optimizer.state.values():
            with torch.no_grad():
                if fault == "exp_avg zero":
                    values["exp_avg"].zero_()
                elif fault == "exp_avg_sq zero":
                    values["exp_avg_sq"].zero_()
                elif fault == "step not restored":
                    values["step"].fill_(1)
        return state

    return restore


def reversed_groups(model, weight_decay: float) -> list[dict]:
    """parameter_groups in another order, as another version of a library may have it."""
    return [{**group, "params": group["params"][::-1]} for group in groups(model, weight_decay)]


def run(job: dict) -> None:
    os.environ["INHERITUNE_ROOT"] = job["root"]
    fault = job.get("fault")
    adamw.make_parameter_groups = reversed_groups if fault == "parameters in another order" else groups
    resize.restore_resized = broken(fault) if fault else original
    if not job.get("refused"):
        return train_job(Job(load_experiment(job["experiment"]), job["run"]), job["ds"])
    try:
        train_job(Job(load_experiment(job["experiment"]), job["run"]), job["ds"])
    except UserError as error:
        if dist.get_rank() == 0:
            Path(job["refused"]).write_text(str(error))
    return None


for job in json.loads(Path(sys.argv[1]).read_text()):
    run(job)
dist.leave_group()
leave(0)
