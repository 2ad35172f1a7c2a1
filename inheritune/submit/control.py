"""`queue`, `cancel` and `retry`: the user's queued jobs by what they do, not by their numbers."""

import os

from tabulate import tabulate

from inheritune.cluster.job_records import Key, Record, make_keys, read_keys, read_record
from inheritune.cluster.slurm_queue import QueuedJob, read_queue
from inheritune.errors import UserError
from inheritune.submit.request import read_request
from inheritune.submit.site import read_site
from inheritune.submit.slurm_commands import ask_slurm, find_dependents, list_pending
from inheritune.submit.submission import submit_request

HEADS = ("job", "state", "where or why", "waits for", "does", "submitted")


def list_jobs() -> list[tuple[QueuedJob, tuple[Key, ...], Record | None]]:
    """Return (job, what it does, its record) of the user's queued jobs. Tasks of an array that wait are one.

    Raises UserError where Slurm does not answer."""
    queue = read_queue()
    if queue is None:
        raise UserError("no Slurm answers here (squeue does not); if there is one, try again")
    found, arrays = [], set()
    for name, job in queue.items():
        if name != job.name:
            continue
        array = name.partition("_")[0]
        if job.state == "PENDING" and "_" in name:
            if array in arrays:
                continue
            arrays.add(array)
        found.append((job, read_keys(name, job.command), read_record(name)))
    return found


def print_queue() -> None:
    """Print the user's jobs: state, reason, dependencies and what each does."""
    rows = []
    for job, keys, record in list_jobs():
        does = keys[0].describe() if keys else os.path.basename(job.command.split(" ")[0])
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        submitted = record.submitted if record else ""
        rows.append([job.name, job.state, job.where, job.dependency, does + more, submitted])
    if not rows:
        print("no job is queued")
        return
    print(tabulate(rows, headers=HEADS, tablefmt="simple", disable_numparse=True))


def cancel(target: str, run: str | None = None, seed: int = 0) -> None:
    """Cancel job `target`, or the jobs that work on experiment `target` (and `run` with `seed`).

    Prints each, and the jobs that will not start because of it. Raises UserError if there is none."""
    wanted = make_keys("", target, [run or ""])[0]
    jobs = [
        (job, keys)
        for job, keys, _ in list_jobs()
        if target in (job.name, job.name.partition("_")[0])
        or any(
            key.experiment == wanted.experiment and (run is None or (key.run, key.seed) == (run, seed))
            for key in keys
        )
    ]
    if not jobs:
        what = f"run '{run}' with seed {seed} of {target}" if run else f"'{target}'"
        raise UserError(f"no queued job is or works on {what}; python -m inheritune queue lists all")
    queued = list_pending(tries=1) or ""
    for job, keys in jobs:
        whole = job.name.partition("_")[0] if job.state == "PENDING" and target != job.name else job.name
        if ask_slurm("scancel", whole, tries=1) is None:
            print(f"job {whole} could not be cancelled")
            continue
        waiting = sorted({other for other, _ in find_dependents(queued, job.name.partition("_")[0])})
        behind = f"; job(s) {', '.join(waiting)} waited for it" if waiting else ""
        print(f"cancelled job {whole} ({job.state}{': ' + keys[0].describe() if keys else ''}){behind}")


def retry(job: str) -> None:
    """Submit a job again as it was asked for: the same script, arguments, options and variables.

    Raises UserError if it has no record, is still queued, or cannot run."""
    record = read_record(job)
    if record is None:
        raise UserError(f"runs/jobs/{job} has no record of a submission; submit the script itself")
    if (read_queue() or {}).get(job):
        raise UserError(f"job {job} is still queued; cancel it first with: scancel {job}")
    words = [*record.words, *(["--", *record.user_options] if record.user_options else [])]
    request = read_request(record.job, words, record.script)
    environment = {**os.environ, **record.environment}
    submit_request(request, read_site(environment), environment)
