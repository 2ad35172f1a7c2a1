"""The jobs of a table or figure of the paper: what is missing, each behind what it needs."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from inheritune.config.experiment import load_experiment
from inheritune.config.jobs import TRAINING, count_gpus
from inheritune.config.paths import RECIPES, REPOSITORY
from inheritune.errors import UserError
from inheritune.paper.items import Item, load_experiments, load_item
from inheritune.paper.prerequisites import Step, list_missing, make_disk_check
from inheritune.submit.request import Request, is_set, read_request
from inheritune.submit.site import read_site
from inheritune.submit.submission import submit_request


@dataclass(frozen=True)
class PlannedJob:
    """A job of the graph, and the numbers (from 1) of those it waits for."""

    step: Step
    request: Request
    after: tuple[int, ...]


def plan_jobs(steps: list[Step], seed: int, gpus: int | None = None) -> list[PlannedJob]:
    """Return the job of each step, in order (pure).

    Jobs that train take `gpus` GPUs, or as many as the paper's jobs of their experiment."""
    found = []
    for step in steps:
        seeded = [] if step.verb == "prepare" else ["--seed", str(seed)]
        words = {
            "prepare": [step.experiment],
            "train": [step.experiment, step.run],
            "grow": [step.experiment, step.run],
            "evaluate": [step.experiment, "--run", step.run],
            "analyze": [step.run, step.experiment],
        }[step.verb]
        request = read_request(step.verb, [*words, *seeded, *step.options.split()])
        usual = count_gpus(step.verb, step.experiment)
        spec = replace(request.job, gpus=gpus if gpus and step.verb in TRAINING else usual)
        found.append(PlannedJob(step, replace(request, job=spec), step.after))
    return found


def format_dependency(after: tuple[int, ...], steps: list[Step], jobs: dict[int, str]) -> str:
    """Return sbatch's dependency on the queued jobs of the steps `after`; empty if none of them is queued.

    A slot of a growth may fail and the next make it good: the jobs behind it look for themselves."""
    waits = []
    for number in after:
        if number in jobs:
            kind = "afterany" if steps[number - 1].verb == "grow" else "afterok"
            waits.append(f"{kind}:{jobs[number]}")
    return ",".join(waits)


def submit_item(item: str, seed: int = 0) -> bool:
    """Submit what is missing for the paper's item of this name, as `submit_missing` does."""
    return submit_missing(load_item(item), seed)


def submit_missing(item: Item, seed: int = 0, gpus: int | None = None) -> bool:
    """Submit what is missing for an item, each training on `gpus` GPUs (default: as the paper's jobs do).
    Returns whether there was anything to submit.

    Stops at the first job that is refused, says what is queued by then, and raises SystemExit."""
    experiments = load_experiments(item)
    steps = list_missing(item, experiments, make_disk_check(item, experiments, seed))
    environment = dict(os.environ)
    if not steps:
        return False
    if not is_set(environment, "REHEARSE"):
        _fetch(steps)
    site = read_site(environment)
    jobs: dict[int, str] = {}
    for number, planned in enumerate(plan_jobs(steps, seed, gpus), 1):
        print(f"\n== {planned.step.line()}")
        waits = format_dependency(planned.after, steps, jobs)
        request = replace(planned.request, options=(f"--dependency={waits}",) if waits else ())
        try:
            jobs[number] = submit_request(request, site, environment)[0].job
        except UserError as error:
            queued = " ".join(jobs.values())
            cancel = f"queued so far: {queued} (scancel {queued} cancels them)"
            so_far = cancel if queued else "nothing is queued"
            print(f"inheritune: {planned.step.line()}: {error}", file=sys.stderr)
            print(f"{so_far}; when that is fixed, run the same again", file=sys.stderr)
            raise SystemExit(1) from None
    print("When these jobs are done, run this again: it then only draws.")
    return True


def _fetch(steps: list[Step]) -> None:
    """Download here, where there is internet, what the jobs need. Raises UserError if that fails."""
    experiments = dict.fromkeys(step.experiment for step in steps)
    for step in steps:
        other = step.run.rpartition("/")[0]
        if other and (RECIPES / f"{other}.yaml").is_file():  # whose model is measured on the other's text
            experiments[other] = None
    for name in experiments:
        load_experiment(name)
        done = subprocess.run(["bash", str(REPOSITORY / "slurm" / "fetch.sh"), name], check=False)
        if done.returncode:
            raise UserError(f"bash {Path('slurm/fetch.sh')} {name} failed, see above; nothing is queued")
