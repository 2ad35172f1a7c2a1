"""The jobs that a cluster's user submits (slurm/jobs.yaml): what each does, and on how many GPUs."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from inheritune.config.paths import REPOSITORY

JOBS_FILE = REPOSITORY / "slurm" / "jobs.yaml"
TRAINING = ("train", "grow", "baselines")
"""Verbs of jobs that train."""
HEADER = "--nodes=1 --gpus-per-node=4 --cpus-per-gpu=8 --mem-per-gpu=60G --time=24:00:00"
"""Options of plain sbatch, where the job states none."""


@dataclass(frozen=True)
class JobSpec:
    """One entry of slurm/jobs.yaml, and the script slurm/NAME.sh."""

    name: str
    verb: str
    gpus: int
    """GPUs of the whole job; 0 for a job on CPUs."""
    about: str
    experiment: str | None = None
    run: str | None = None
    stage: int | None = None
    header: str = HEADER

    @property
    def script(self) -> Path:
        return REPOSITORY / "slurm" / f"{self.name}.sh"


@cache
def load_jobs() -> dict[str, JobSpec]:
    """Return {name: job} of slurm/jobs.yaml."""
    table = yaml.safe_load(JOBS_FILE.read_text(encoding="utf-8"))
    return {name: JobSpec(name=name, **fields) for name, fields in table.items()}


def find_job(verb: str, experiment: str, run: str | None, stage: int | None = None) -> JobSpec | None:
    """Return the job of the paper that does exactly this, or None."""
    wanted = (verb, experiment, run, stage)
    jobs = load_jobs().values()
    return next((job for job in jobs if (job.verb, job.experiment, job.run, job.stage) == wanted), None)


def count_gpus(verb: str, experiment: str) -> int:
    """Return the GPUs of a job: those that the paper's jobs of this experiment take, or the verb's default.

    `verb` is train, grow or baselines; the others take one GPU or none."""
    jobs = load_jobs()
    if verb not in TRAINING:
        return jobs[verb].gpus
    asked = [job.gpus for job in jobs.values() if job.experiment == Path(experiment).stem]
    return asked[0] if asked else jobs[verb].gpus


def format_shape(verb: str, experiment: str) -> str:
    """Return "GPUS=16 " where the script of `verb` alone would ask for fewer or more GPUs; else nothing."""
    wanted = count_gpus(verb, experiment)
    return "" if wanted == load_jobs()[verb].gpus else f"GPUS={wanted} "
