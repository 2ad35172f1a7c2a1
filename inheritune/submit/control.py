"""`queue`, `cancel` and `retry`: the user's queued jobs by what they do, not by their numbers."""

import os
import re

from tabulate import tabulate

from inheritune.cluster.job_records import Key, Record, find_record, make_keys, read_keys, read_record
from inheritune.cluster.slurm_queue import QueuedJob, read_queue
from inheritune.errors import UserError
from inheritune.submit.request import KINDS, drop_option, find_spec, read_option, read_request
from inheritune.submit.site import read_site
from inheritune.submit.slurm_commands import ask_slurm, find_dependents, list_pending, name_jobs
from inheritune.submit.submission import submit_request

HEADS = ("job", "state", "where or why", "waits for", "does", "submitted")


def list_jobs() -> list[tuple[QueuedJob, tuple[Key, ...], Record | None]]:
    """Return (job, what it does, its record) of the user's queued jobs, each task of an array by itself.

    Raises UserError where Slurm does not answer."""
    queue = read_queue()
    if queue is None:
        raise UserError("no Slurm answers here (squeue does not); if there is one, try again")
    return [
        (job, read_keys(name, job.command), read_record(name))
        for name, job in queue.items()
        if name == job.name
    ]


def print_queue() -> None:
    """Print the user's jobs: state, reason, dependencies and what each does. Tasks that wait are one row."""
    rows: dict[str, list[str]] = {}
    works: dict[str, dict[Key, None]] = {}
    for job, keys, record in list_jobs():
        row = job.name.partition("_")[0] if job.state == "PENDING" else job.name
        script = os.path.basename(job.command.split(" ")[0])
        submitted = record.submitted if record else ""
        rows.setdefault(row, [job.name, job.state, job.explain_where(), job.dependency, script, submitted])
        works.setdefault(row, {}).update(dict.fromkeys(keys))
    for row, found in works.items():
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            rows[row][4] = next(iter(found)).describe() + more
    if not rows:
        print("no job is queued")
        return
    print(tabulate(rows.values(), headers=HEADS, tablefmt="simple", disable_numparse=True))


def cancel(target: str, run: str | None = None, seed: int = 0) -> None:
    """Cancel job `target`, or the jobs that work on experiment `target` (and `run` with `seed`). Of an array
    over runs, only the tasks of that run.

    Prints each, and the jobs that will not start because of it. Raises UserError if there is none."""
    wanted, listed = make_keys("", target, [run or ""])[0], list_jobs()
    arrays: dict[str, list[tuple[QueuedJob, tuple[Key, ...]]]] = {}
    for job, keys, _ in listed:
        array = job.name.partition("_")[0]
        if target in (job.name, array) or any(
            key.experiment == wanted.experiment and (run is None or (key.run, key.seed) == (run, seed))
            for key in keys
        ):
            arrays.setdefault(array, []).append((job, keys))
    if not arrays:
        what = f"run '{run}' with seed {seed} of {target}" if run else f"'{target}'"
        raise UserError(f"no queued job is or works on {what}; python -m inheritune queue lists all")
    queued = list_pending(tries=1) or ""
    for array, jobs in arrays.items():
        whole = len(jobs) == sum(job.name.partition("_")[0] == array for job, _, _ in listed)
        for job, keys in jobs[:1] if whole else jobs:
            _cancel_job(array if whole else job.name, job, keys, queued)


def _cancel_job(name: str, job: QueuedJob, keys: tuple[Key, ...], queued: str) -> None:
    """Cancel a job, a task or a whole array, and print it with what waited for it."""
    if ask_slurm("scancel", name, tries=1) is None:
        print(f"job {name} could not be cancelled")
        return
    array, _, task = name.partition("_")
    waiting = [other for other, _ in find_dependents(queued, array, task)]
    behind = f"; job(s) {name_jobs(waiting)} waited for it" if waiting else ""
    print(f"cancelled job {name} ({job.state}{': ' + keys[0].describe() if keys else ''}){behind}")


def retry(job: str) -> None:
    """Submit a job again as it was asked for: the same script, arguments, options and variables. Of an array
    over runs, the same tasks, or the task that `job` names.

    It waits for jobs that are still queued, and no longer for others. Raises UserError if it has no record,
    is still queued, or cannot run."""
    record = read_record(job)
    if record is None:
        has = "a damaged record" if find_record(job).is_file() else "no record"
        raise UserError(f"runs/jobs/{job} has {has} of a submission; submit the script itself")
    queue = read_queue(timeout_s=60)
    if queue is None:
        raise UserError(f"squeue does not answer, so it is not known whether job {job} is queued; try again")
    queued = [name for name, other in queue.items() if name == other.name]
    arrays = {name.partition("_")[0] for name in queued}
    if job in queued or job in arrays:
        raise UserError(f"job {job} is still queued; cancel it first with: scancel {job}")
    environment, options = {**os.environ, **record.environment}, list(record.user_options)
    waits = read_option(options, "--dependency", "-d")
    if (others := set(re.findall(r":([0-9]+)", waits))) and not others & arrays:
        print(f"note: it waited for {waits}, which is not queued any more; now it does not wait")
        options = drop_option(options, "--dependency", "-d")
    tasks = read_option(record.options, "--array")
    if tasks and not KINDS[find_spec(record.job).verb].slots:
        environment["ARRAY"] = job.partition("_")[2] or tasks
        options = drop_option(options, "--array", "-a")
    words = [*record.words, *(["--", *options] if options else [])]
    if record.folder:  # paths count from there
        try:
            os.chdir(record.folder)
        except OSError as error:
            raise UserError(
                f"job {job} was submitted from {record.folder}, which cannot be entered ({error.strerror}); "
                "submit the script itself"
            ) from None
    request = read_request(record.job, words, record.script)
    submit_request(request, read_site(environment), environment)
