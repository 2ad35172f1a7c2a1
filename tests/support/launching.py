"""Several runs in one launch of a few ranks, because starting a process costs more than a small run."""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from conftest import REPOSITORY, free_port
from fork_server import FORKS
from slurm_cluster import cluster, has_slurm

from inheritune.runtime.launcher import Launch


def launch_jobs(jobs: list[dict], ranks: int, folder: Path) -> None:
    """Run the jobs (as tests/support/resize_worker.py takes them) as srun's tasks on a Slurm of two nodes, or
    on this machine alone where Slurm is missing."""
    listed = folder / f"jobs{ranks}.json"
    listed.write_text(json.dumps(jobs))
    worker = [str(REPOSITORY / "tests/support/resize_worker.py"), str(listed)]
    environment = {"OMP_NUM_THREADS": "1"}
    if has_slurm():
        with cluster(LAB_GPUS=0) as slurm:
            srun = [
                "srun",
                f"--nodes={min(ranks, 2)}",
                f"--ntasks={ranks}",
                "--export=ALL",
                "--kill-on-bad-exit=1",
            ]
            slurm.run(*srun, FORKS.python(), *worker, timeout=900, **environment)
        return
    launch_locally(worker, ranks, **environment)


def train_runs(words: list[str], ranks: int, root: Path) -> None:
    """Train several runs, each EXPERIMENT.yaml:RUN, in one launch of `ranks` processes on this machine."""
    worker = str(REPOSITORY / "tests/support/train_many.py")
    launch_locally([worker, *words], ranks, INHERITUNE_ROOT=root)


def launch_locally(worker: list[str], ranks: int, **environment) -> None:
    """Run `python WORKER`, a script of tests/support, as `ranks` processes on this machine; what a rank that
    fails printed is in the error."""
    threads = {"OMP_NUM_THREADS": "1"} if ranks > 1 else {}
    shared = {**os.environ, **threads, **{name: str(value) for name, value in environment.items()}}
    port = free_port()
    command = [FORKS.python(), *worker]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            own = Launch(rank, ranks, rank, port=port).variables(port)
            with open(Path(folder) / str(rank), "w") as log:
                processes.append(
                    subprocess.Popen(command, cwd=REPOSITORY, env={**shared, **own}, stdout=log, stderr=log)
                )
        while any(process.poll() is None for process in processes) and not any(p.poll() for p in processes):
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        for process in processes:
            process.kill()
            process.wait()
        assert not failed, "\n".join((Path(folder) / str(rank)).read_text()[-6000:] for rank in failed)
