"""Trains runs of an experiment and writes, per run, how many bytes its ranks gathered of each type:

    python gather_worker.py EXPERIMENT.yaml OUT.json RUN ...

Those named `resumed` have been stopped after STOP steps under BEFORE, a JSON beside the run's own.
"RUN by step" has the bytes of each training step."""

import json
import sys
from collections import Counter
from pathlib import Path

from deepspeed.runtime.zero import partition_parameters

from inheritune.errors import Stopped
from inheritune.runtime import signals
from inheritune.runtime.ranks import get_rank
from inheritune.training import loop

STOP, BEFORE = 3, "fp32.json"
counted: Counter = Counter()
by_step: list[int] = []
gather, train_step = partition_parameters._dist_allgather_fn, loop.Trainer.train_step
get_stop_signal = signals.get_stop_signal


def count(part, whole, group=None):
    counted[str(whole.dtype)] += whole.nbytes
    return gather(part, whole, group)


def count_step(trainer, state):
    before = counted.total()
    result = train_step(trainer, state)
    by_step.append(counted.total() - before)
    return result


def get_signal_after_step(trainer, state):
    result = train_step(trainer, state)
    if state.step == STOP:
        signals.get_stop_signal = lambda: "SIGUSR1"
    return result


def main(experiment: str, out: str, *runs: str) -> None:
    found = {}
    for run in runs:
        counted.clear()
        if run.startswith("resumed"):
            before = Path(experiment).with_name(BEFORE)
            loop.Trainer.train_step = get_signal_after_step
            try:
                loop.train(experiment, run, ds=str(before))
            except Stopped:
                counted.clear()
            signals.get_stop_signal = get_stop_signal
        by_step.clear()
        loop.Trainer.train_step = count_step
        loop.train(experiment, run)
        found |= {run: dict(counted), f"{run} by step": list(by_step)}
    if get_rank() == 0:
        Path(out).write_text(json.dumps(found))


partition_parameters._dist_allgather_fn = count
main(*sys.argv[1:])
