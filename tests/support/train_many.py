"""Train several runs in one launch: python tests/support/train_many.py EXPERIMENT.yaml:RUN ... (start-up
costs more than they do)."""

import sys

from inheritune.cli import leave
from inheritune.config.experiment import load_experiment
from inheritune.runs.job import Job
from inheritune.runtime import dist
from inheritune.training.loop import train_job

for word in sys.argv[1:]:
    path, _, run = word.rpartition(":")
    train_job(Job(load_experiment(path), run))
dist.leave_group()
leave(0)
