"""Evaluates the run `reference` and writes the peak of each rank's allocations, in bytes:

python evaluate_worker.py EXPERIMENT.yaml OUT DEEPSPEED.json"""

import sys
from pathlib import Path

from memory_worker import peak_bytes

from inheritune.cli import leave
from inheritune.evaluation.evaluate import evaluate
from inheritune.runtime.ranks import get_rank


def main(experiment: str, out: str, ds: str) -> None:
    peak = peak_bytes(lambda: evaluate(experiment, "reference", tasks="none", ds=ds))
    Path(out, f"{Path(ds).stem}_{get_rank()}").write_text(str(peak))


main(*sys.argv[1:])
leave(0)
