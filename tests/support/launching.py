"""Several runs in one launch of a few ranks, because starting a process costs more than a small run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY
from slurm_cluster import cluster


def launch_jobs(jobs: list[dict], ranks: int, folder: Path) -> None:
    """Run the jobs (as tests/support/resize_worker.py takes them) as srun's tasks on a Slurm of two nodes, or
    under torchrun where Slurm is missing."""
    listed = folder / f"jobs{ranks}.json"
    listed.write_text(json.dumps(jobs))
    worker = [sys.executable, str(REPOSITORY / "tests/support/resize_worker.py"), str(listed)]
    environment = {"OMP_NUM_THREADS": "1"}
    if shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin"):
        with cluster(LAB_GPUS=0) as slurm:
            srun = [
                "srun",
                f"--nodes={min(ranks, 2)}",
                f"--ntasks={ranks}",
                "--export=ALL",
                "--kill-on-bad-exit=1",
            ]
            slurm.run(*srun, *worker, timeout=900, **environment)
        return
    launch_locally(worker[1:], ranks, **environment)


def launch_locally(worker: list[str], ranks: int, **environment) -> None:
    """Run `python WORKER` as `ranks` processes of torchrun; what it printed is in the error if it fails."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        *worker,
    ]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    # torchrun's traceback says nothing
    own = "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))
    assert done.returncode == 0, done.stdout[-2000:] + (own or done.stderr)[-6000:]
