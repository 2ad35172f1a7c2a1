"""Evaluates a small run, then a large one, and writes by how many bytes this rank's memory rose for the
second at its peak:

    python evaluate_worker.py EXPERIMENT.yaml OUT DEEPSPEED.json SMALL LARGE"""

import ctypes
import gc
import sys
from pathlib import Path

from inheritune.cli import leave
from inheritune.evaluation.evaluate import evaluate
from inheritune.runtime.ranks import get_rank

M_MMAP_THRESHOLD = -3


def read_memory(key: str) -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return int(next(row.split()[1] for row in rows if row.startswith(key))) * 1024


def main(experiment: str, out: str, ds: str, small: str, large: str) -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the kernel
    evaluate(experiment, small, tasks="none", ds=ds)
    gc.collect()
    before = read_memory("VmRSS")
    evaluate(experiment, large, tasks="none", ds=ds)
    Path(out, f"{Path(ds).stem}_{get_rank()}").write_text(str(read_memory("VmHWM") - before))


main(*sys.argv[1:])
leave(0)
