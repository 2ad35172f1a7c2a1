"""Train several runs in one launch: python tests/train_many.py EXPERIMENT.yaml:RUN ... (start-up costs more than they do)."""

import sys

from inheritune import dist
from inheritune.__main__ import leave
from inheritune.config import load_experiment
from inheritune.job import Job
from inheritune.train import train_job

for word in sys.argv[1:]:
    path, _, run = word.rpartition(":")
    train_job(Job(load_experiment(path), run))
dist.stop()
leave(0)
