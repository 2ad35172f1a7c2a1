"""Several runs in one launch (start-up costs more than they do): python tests/resize_worker.py JOBS.json, a list of
{root, experiment, run, ds, fault}. `fault` breaks one thing of a resize on purpose, to show that the test sees it."""

import json
import os
import sys
from pathlib import Path

import torch

from inheritune import checkpoint, dist
from inheritune.__main__ import leave
from inheritune.config import load_experiment
from inheritune.train import Job, train_job

original = checkpoint.restore_resized


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


for job in json.loads(Path(sys.argv[1]).read_text()):
    os.environ["INHERITUNE_ROOT"] = job["root"]
    checkpoint.restore_resized = broken(job["fault"]) if job.get("fault") else original
    train_job(Job(load_experiment(job["experiment"]), job["run"]), job["ds"])
dist.stop()
leave(0)
