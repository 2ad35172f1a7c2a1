"""`submit`: check a job, queue it unless the same work is queued already, and keep a record of it."""

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from inheritune.cluster.job_records import (
    Key,
    Record,
    find_record,
    list_indices,
    make_keys,
    read_record,
    write_record,
)
from inheritune.cluster.slurm_queue import QueuedJob, list_queued_work, read_queue
from inheritune.config import names
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.paths import REPOSITORY, find_checkout
from inheritune.errors import UserError
from inheritune.files.advice import format_seed_flag
from inheritune.files.rundir import get_data_dir, get_seed_dir
from inheritune.submit.preflight import check_baselines, check_folders, check_request, describe_cost
from inheritune.submit.request import (
    Request,
    describe_job,
    drop_option,
    format_local,
    is_set,
    make_again,
    read_option,
    read_request,
)
from inheritune.submit.runs import list_runs, list_unmeasured, list_waiting
from inheritune.submit.sbatch import Submission, is_rehearsal, make_submission
from inheritune.submit.site import Site, check_image, read_site
from inheritune.submit.slurm_commands import ask_slurm, is_alive, strip_options
from inheritune.submit.snapshot import list_code, list_own_files, make_snapshot
from inheritune.submit.snapshot_uses import drop_use, mark_use, remove_unused

REPLAYED = (
    "REHEARSE",
    "GPUS",
    "NODES",
    "TASKS",
    "CPUS",
    "ARRAY",
    "SITE",
    "MAX_RESTARTS",
    "DEEPSPEED_TIMEOUT",
)
"""Variables that shape a job, kept in its record."""
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Queued:
    """What became of a submission: the job's id, or that of the job that does the same already."""

    job: str
    is_new: bool = True


def submit(job: str, argv: list[str], script: str | None = None) -> None:
    """Submit job `job` of slurm/jobs.yaml with the arguments `argv`, as `bash slurm/JOB.sh` does.

    Raises UserError, with nothing queued, for what cannot run."""
    request = read_request(job, argv, script)
    if "help" in request.switches:
        print(describe_job(job))
        return
    environment = dict(os.environ)
    if not is_alive():
        raise UserError(
            "no Slurm answers here (sinfo does not); without Slurm: python -m "
            f"inheritune {format_local(request.job)}"
        )
    submit_request(request, read_site(environment), environment)


def submit_request(request: Request, site: Site, environment: Mapping[str, str]) -> list[Queued]:
    """Check a request and queue it: as one job, or where baselines wait for each other as several. Returns
    what was queued, or found in the queue."""
    rehearsal = is_rehearsal(request, environment)
    check_image(site.values)
    loaded = check_request(request, rehearsal)
    runs: list[str] = []
    if request.kind.array == "runs" and loaded and "run" not in request.values:
        runs = list_runs(loaded, request.job.verb)
    own_array = environment.get("ARRAY") or read_option(request.options, "--array", "-a")
    is_whole = request.job.verb == "baselines" and not own_array
    if is_whole and loaded:
        waiting, unmeasured = list_waiting(loaded), list_unmeasured(loaded, request.seed)
        if waiting or unmeasured:
            return _submit_in_order(request, loaded, site, environment, waiting, unmeasured)
    submission = make_submission(request, site, environment, len(runs) or 1)
    keys, own = list_keys(request, rehearsal, runs, submission), list_own_files(request, loaded)
    takes_all = runs and submission.shape.array and not own_array
    if busy := find_busy(request, keys, environment) if takes_all else {}:
        free = [str(number) for number in range(1, len(runs) + 1) if number not in busy]
        if not free:
            return [Queued(job.partition("_")[0], False) for job in busy.values()]
        submission = make_submission(request, site, environment, len(runs), ",".join(free))
        keys = list_keys(request, rehearsal, runs, submission)
    if request.job.verb == "baselines" and loaded:
        check_baselines(request, loaded, [key.run for key in keys])
    print(describe_cost(request, loaded, submission.shape, site))
    return [queue_job(request, submission, site, environment, keys, own)]


def _submit_in_order(
    request: Request,
    loaded: Experiment,
    site: Site,
    environment: Mapping[str, str],
    waiting: dict[int, list[int]],
    unmeasured: dict[int, str],
) -> list[Queued]:
    """Queue the baselines that start from others of them behind these, and those whose blocks an analysis
    chooses behind that analysis, each in a job of its own, and all others as one array."""
    runs, rehearsal = list_runs(loaded, "baselines"), is_rehearsal(request, environment)
    check_baselines(request, loaded, runs, is_whole=True)
    all_tasks = make_submission(request, site, environment, len(runs))
    keys, own = list_keys(request, rehearsal, runs, all_tasks), list_own_files(request, loaded)
    tasks = find_busy(request, keys, environment)
    queued = [Queued(task.partition("_")[0], False) for task in tasks.values()]
    behind_others = {*waiting, *unmeasured}
    if alone := [number for number in range(1, len(runs) + 1) if number not in {*behind_others, *tasks}]:
        submission = make_submission(request, site, environment, len(runs), ",".join(map(str, alone)))
        print(describe_cost(request, loaded, submission.shape, site))
        keys = list_keys(request, rehearsal, runs, submission)
        first = queue_job(request, submission, site, environment, keys, own)
        queued.insert(0, first)
        tasks |= {number: f"{first.job or 'JOB'}_{number}" for number in alone}
    todo = [number for number in sorted(behind_others) if number not in tasks]
    models = dict.fromkeys(unmeasured[number] for number in todo if number in unmeasured)
    analyses = {model: _queue_analysis(request, loaded, model, site, environment) for model in models}
    queued += analyses.values()
    for number in todo:
        behind_of = [tasks.get(source, f"JOB_{source}") for source in waiting.get(number, [])]
        if number in unmeasured:
            behind_of.append(analyses[unmeasured[number]].job or "JOB")
        waits = ",".join(f"afterok:{job}" for job in behind_of)
        behind = replace(request, options=(*request.options, f"--dependency={waits}"))
        submission = make_submission(behind, site, environment, len(runs), str(number))
        keys = list_keys(request, rehearsal, runs, submission)
        queued.append(queue_job(behind, submission, site, environment, keys, own))
        if queued[-1].job:
            tasks[number] = f"{queued[-1].job}_{number}"
    return queued


def _queue_analysis(
    request: Request, loaded: Experiment, model: str, site: Site, environment: Mapping[str, str]
) -> Queued:
    """Queue the analysis of run `model` that baselines need, behind what they wait for; its shape is its own,
    not theirs."""
    shape = ("--array", "-a", "--nodes", "-N", "--gpus-per-node", "--gpus", "-G", "--job-name", "-J")
    words = [model, request.values["experiment"], *format_seed_flag(request.seed).split()]
    options = tuple(drop_option(request.options, *shape))
    analysis = replace(read_request("analyze", words), options=options, switches=request.switches)
    own = {name: text for name, text in environment.items() if name not in ("GPUS", "NODES", "TASKS")}
    submission = make_submission(analysis, site, own)
    print(describe_cost(analysis, loaded, submission.shape, site))
    keys = list_keys(analysis, is_rehearsal(request, environment), [], submission)
    return queue_job(analysis, submission, site, own, keys, list_own_files(analysis, loaded))


def find_busy(request: Request, keys: tuple[Key, ...], environment: Mapping[str, str]) -> dict[int, str]:
    """Return {task: job or task of the queue that does its work already} of an array with work `keys`, and
    print each; none in a dry run, or with FORCE=1."""
    if "dry_run" in request.switches or is_set(environment, "FORCE"):
        return {}
    work, busy = read_queued_work(), {}
    for number, key in enumerate(keys, 1):
        if found := find_queued((key,), work):
            busy[number] = found[0].name
            print(_describe_queued(*found))
    return busy


def _describe_queued(job: QueuedJob, key: Key) -> str:
    """Return that `job` does the work `key` already."""
    return (
        f"not submitted: job {job.name} ({job.state}) does this already ({key.describe()}); FORCE=1 submits "
        "another"
    )


def list_keys(request: Request, rehearsal: bool, runs: list[str], submission: Submission) -> tuple[Key, ...]:
    """Return what the job works on; of an array over `runs`, the work of its tasks."""
    values, verb = request.values, request.job.verb
    chosen = [values["model"]] if verb == "analyze" else values.get("run", "").split(",")
    detail = " ".join(request.flags("run", "seed", "ds")) if verb == "evaluate" else ""
    if verb == "analyze":  # whatever else it is asked for, it writes the same file
        detail = values.get("out", "")
    if verb == "prepare":
        detail = get_data_dir(load_experiment(values["experiment"], rehearsal or None)).name
    if runs and submission.shape.array:
        indices = list_indices(submission.shape.array)
        chosen = [runs[index - 1] for index in indices if 0 < index <= len(runs)]
    details = {"stage": request.stage, "seed": request.seed, "rehearsal": rehearsal, "detail": detail}
    return make_keys(verb, values["experiment"], chosen, **details)


def read_queued_work() -> list[tuple[Key, QueuedJob]]:
    """Return (work, job) of the queued jobs of this user, and of other users who work in the same folder.

    Raises UserError where nobody knows whether some work is queued already: squeue does not answer, or the
    record of a queued job cannot be read."""
    of_all, own = (read_queue(everybody, timeout_s=60) for everybody in (True, False))
    if of_all is None or own is None:
        raise UserError(
            "squeue does not answer, so it is not known whether this work is queued already; try again, or "
            "submit without looking, with FORCE=1"
        )
    queue = of_all | own
    for name in dict.fromkeys(job.name.partition("_")[0] for job in queue.values()):
        if (record := find_record(name)).is_file() and read_record(name) is None:
            raise UserError(
                f"{record} of queued job {name} is damaged, so it is not known what that job does; "
                f"cancel it (scancel {name}), or submit in spite of it, with FORCE=1"
            )
    return list_queued_work(queue)


def find_queued(keys: tuple[Key, ...], work: list[tuple[Key, QueuedJob]]) -> tuple[QueuedJob, Key] | None:
    """Return the first queued job that does some of the same work, and which."""
    return next(((job, key) for other, job in work for key in keys if key.meets(other)), None)


def queue_job(
    request: Request,
    submission: Submission,
    site: Site,
    environment: Mapping[str, str],
    keys: tuple[Key, ...],
    own: Iterable[Path] = (),
) -> Queued:
    """Give a submission to sbatch and keep its record, unless a queued job does the same or this is a dry
    run.

    `own` are the user's files that belong to its snapshot. Prints the command, then the job, its log, how
    to watch it and how to stop it."""
    log = submission.log.replace("%x", submission.name)
    if "dry_run" in request.switches:
        print(submission.line(site))
        print(f"dry run: nothing was submitted; its log would be {log}")
        return Queued("", False)
    if not is_set(environment, "FORCE") and (found := find_queued(keys, read_queued_work())):
        print(_describe_queued(*found))
        return Queued(found[0].name.partition("_")[0], False)
    check_folders(submission, Path(site.root))
    record = Record(
        request.job.name,
        request.script,
        (*request.words, *(f"--{name.replace('_', '-')}" for name in sorted(request.switches))),
        submission.options,
        submission.command,
        make_again(request, environment),
        keys,
        request.options,
        {n: v for n, v in environment.items() if n in REPLAYED or n.startswith("SITE_")},
        os.getcwd(),
    )
    if "no_snapshot" not in request.switches:
        submission, record = _use_snapshot(submission, record, own)
    print(submission.line(site))
    with _hold_signals():
        try:
            job = send(submission.words(record.code, record.again), record, site, environment)
        except UserError:
            drop_use(record.code)
            raise
        _print_queued(job, submission, keys, site)
    if removed := remove_unused(record.code):
        print(f"removed {removed} snapshot(s) of runs/{names.CODE} that no job can run any more")
    return Queued(job)


def _use_snapshot(submission: Submission, record: Record, own: Iterable[Path]) -> tuple[Submission, Record]:
    """Return both with the command that runs a snapshot of the checkout and of the files `own`, where its
    script is in the snapshot."""
    script = Path(submission.command[1])
    if not script.is_relative_to(REPOSITORY) or script.relative_to(REPOSITORY) not in list_code():
        return submission, record
    code = make_snapshot(own)
    command = ("bash", str(code / script.relative_to(REPOSITORY)), *submission.command[2:])
    return replace(submission, command=command), replace(record, command=command, code=str(code))


def send(words: list[str], record: Record, site: Site, environment: Mapping[str, str]) -> str:
    """Give a command to sbatch, and write the job's record. Returns the job's id.

    Raises UserError with the answer of sbatch if it refuses, and where the record cannot be written: then the
    job is cancelled."""
    shown = strip_options(environment) | dict(site.values)
    shown |= {"INHERITUNE_ROOT": site.root, "INHERITUNE_SUBMITTED": "1"}
    if record.code:
        # the job imports the snapshot, not the checkout that the environment was installed from
        shown |= {"INHERITUNE_REPOSITORY": str(find_checkout())}
    words = [*words, "--parsable"]
    done = subprocess.run(  # in a session of its own, which the terminal's Ctrl-C does not reach
        words, capture_output=True, text=True, check=False, env=shown, start_new_session=True
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"it ended with code {done.returncode}"
        raise UserError(f"sbatch refused the job: {said.removeprefix('sbatch: error: ')}")
    answer = re.search(r"^([0-9]+)(?:;(\S+))?$", done.stdout, re.MULTILINE)  # a site may add lines
    if not answer:
        raise UserError(
            "sbatch ended without an error and without a job's number (it said "
            f"{done.stdout.strip()!r}); squeue --me shows whether the job is queued"
        )
    job, cluster = answer[1], answer[2] or ""
    try:
        mark_use(record.code, job, cluster)
        write_record(job, record)
    except (OSError, UserError) as error:
        ask_slurm("scancel", job, tries=1)
        raise UserError(f"job {job} was cancelled, since its record cannot be written: {error}") from None
    return job


@contextmanager
def _hold_signals() -> Iterator[None]:
    """Let Ctrl-C and its like wait: a job that is queued without its record, or a word of it, would be queued
    again."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda held, _: came.append(held)) for number in HELD}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _print_queued(job: str, submission: Submission, keys: tuple[Key, ...], site: Site) -> None:
    """Print a queued job: its id, log, how to watch and how to stop it."""
    log = submission.log.replace("%x", submission.name)
    log = log.replace("%j", job).replace("%A", job).replace("%a", "*")
    quoted = "*".join(shlex.quote(part) if part else "" for part in log.split("*"))  # the tasks of an array
    print(f"submitted job {job}")
    print(f"log:    {log} (once the job has started)")
    print(f"watch:  squeue -j {job}; tail -F {quoted}")
    stop = ""
    if keys and keys[0].verb == "train" and len(keys) == 1:
        key = keys[0]
        file = get_seed_dir(key.experiment, key.seed, key.rehearsal, Path(site.root)) / key.run / "STOP"
        stop = f"      (or, with a checkpoint first: touch {shlex.quote(str(file))})"
    print(f"stop:   scancel {job}{stop}")
