"""The end of a job's script: whether the work is finished, goes on in another job, or has failed.

The exit code alone could not say so. Slurm ends a step whose first task leaves with an error while others
still save, and takes a job whose step ends with 0 at preemption for finished."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from inheritune.cluster.job_records import read_record, write_record
from inheritune.config import environment
from inheritune.submit.job_context import JobContext, read_context, set_comment
from inheritune.submit.sbatch import replay_options, wrap_command
from inheritune.submit.slurm_commands import (
    ask_slurm,
    find_dependents,
    list_pending,
    name_jobs,
    read_fields,
    rewrite_dependency,
    strip_options,
)
from inheritune.submit.snapshot_uses import mark_use

SIGNALLED = 128 + signal.SIGUSR1
STOPPED_CODE = 3
"""Exit code after a STOP file: not 0, so that jobs that wait for the work's success do not start."""
MAX_STALLS = 2
REQUEUE_WAIT_S = 60


@dataclass(frozen=True)
class Facts:
    """What decides how a job ends."""

    code: int
    """Exit code of the program or of srun."""
    signalled: bool
    """Whether the job was asked to stop."""
    more: str | None = None
    stopped: str | None = None
    failure: str | None = None
    undone: tuple[str, ...] = ()
    """Folders of the job's runs that are not finished."""
    slot_behind: bool = False
    """Whether another slot of the array waits."""
    job_state: str = "RUNNING"
    reason: str = ""
    batch: bool = True
    """False in an interactive allocation."""
    restarts: int = 0
    max_restarts: int = 100
    stalls: int = 0
    """Restarts in a row that came to nothing, with this one."""


@dataclass(frozen=True)
class Ending:
    """How a job ends: finished, stopped, next slot, left, requeue or fail."""

    kind: str
    text: str = ""
    code: int = 0


def decide_ending(facts: Facts) -> Ending:
    """Return how the job ends (pure)."""
    more = facts.more
    # the signal ends a task that does not listen yet: nothing was begun, so nothing is lost
    if facts.code == SIGNALLED and facts.signalled and facts.failure is None:
        more = "asked to stop before the tasks had started"
    # an error that no signal explains is a failure, also where other tasks could still save
    if more is not None and facts.failure is None and (facts.code == 0 or facts.signalled):
        return _decide_restart(facts, more)
    if facts.code:
        return Ending("fail", code=facts.code)
    if facts.stopped is not None:
        return Ending("stopped", facts.stopped, STOPPED_CODE)
    if facts.undone:
        text = f"the program ended without an error, and {facts.undone[0]} has no DONE"
        return Ending("fail", text, 1)
    return Ending("finished")


def _decide_restart(facts: Facts, more: str) -> Ending:
    """Return how a job ends that has more to do."""
    if facts.stalls >= MAX_STALLS:
        return Ending("fail", f"no progress: {facts.stalls} restarts in a row without a new step ({more})", 1)
    if facts.slot_behind:
        return Ending("next slot", more)
    if not facts.batch:
        return Ending("left", "this is an interactive allocation; go on with: ")
    # a job that was cancelled, or requeued from outside, must not come back through us
    at_limit = facts.job_state == "COMPLETING" and facts.reason == "TimeLimit"
    if facts.job_state == "COMPLETING" and not at_limit:
        return Ending("left", "the job was cancelled or requeued from outside; to go on: ")
    if facts.job_state not in ("RUNNING", "SIGNALING", "PREEMPTED", "TIMEOUT") and not at_limit:
        return Ending("left", f"the job is {facts.job_state}; to go on, if it does not by itself: ")
    if facts.restarts >= facts.max_restarts:
        return Ending(
            "fail", f"it was restarted {facts.restarts} times, which is all that MAX_RESTARTS allows", 1
        )
    return Ending("requeue", more)


def end_job(code: int, signalled: bool) -> int:
    """Find out how this job ends, do what that takes, and return the script's exit code."""
    context = read_context()
    facts = gather_facts(context, code, signalled)
    ending = decide_ending(facts)
    if facts.more is not None and ending.kind != "fail":
        context.say(f"there is more to do: {facts.more}")
    actions = {"requeue": _requeue, "left": _leave, "next slot": _leave_to_next, "stopped": _stop}
    if ending.kind in actions:
        return actions[ending.kind](context, ending)
    if ending.kind == "fail":
        return fail_job(context, ending.code, ending.text)
    cancel_slots(context, "nothing is left for them to do", succeeded=True)
    with suppress(OSError):
        context.last_failure.unlink(missing_ok=True)
        context.stalls.unlink(missing_ok=True)
    context.say("finished")
    return 0


def gather_facts(context: JobContext, code: int, signalled: bool) -> Facts:
    """Return what decides the ending, from the job's folder, its runs and Slurm."""
    more, stopped, failure = (context.read_message(name) for name in ("more", "stopped", "failure"))
    undone = tuple(str(folder) for folder in context.list_run_folders() if not (folder / "DONE").is_file())
    facts = Facts(code, signalled, more, stopped, failure, undone)
    if more is None and code != SIGNALLED:
        return facts
    shown = ask_slurm("scontrol", "show", "job", "-o", context.job)
    fields = dict(word.partition("=")[::2] for word in shown.split()) if shown else {}
    return replace(
        facts,
        slot_behind=bool(context.slots and context.array and _list_slots(context)),
        job_state=fields.get("JobState", "RUNNING"),  # where Slurm does not answer
        reason=fields.get("Reason", ""),
        batch=fields.get("BatchFlag", "1") != "0",
        restarts=context.restarts,
        max_restarts=int(environment.read_number("MAX_RESTARTS") or 0),
        stalls=_count_stalls(context),
    )


def _count_stalls(context: JobContext) -> int:
    """Count this restart among those in a row that came to nothing, and keep the number for the next."""
    if not context.progress:
        return 0
    stalls = 0
    with suppress(OSError, ValueError):  # without a file, this is the first start and no restart
        before = int(context.stalls.read_text(encoding="utf-8"))
        stalls = before + 1 if context.measure_progress() == context.progress else 0
    with suppress(OSError):
        context.stalls.write_text(f"{stalls}\n", encoding="utf-8")
    return stalls


def _list_slots(context: JobContext) -> list[str]:
    """Return the tasks of the array that wait behind this one."""
    shown = ask_slurm("squeue", "-h", "-r", "-j", context.array, "-t", "PENDING", "-o", "%K") or ""
    return [task for task in shown.split() if task != context.task]


def cancel_slots(context: JobContext, why: str, succeeded: bool = False) -> None:
    """Cancel the slots behind this one, which have nothing to do or would fail in the same way.

    What waits for the whole array would then never start: after a success it waits for this task instead."""
    if not (context.slots and context.array and _list_slots(context)):
        return
    if succeeded:
        move_dependents(context, context.job)
    ask_slurm("scancel", "--state=PENDING", context.array, tries=1)
    context.say(f"the rest of the array was cancelled: {why}")


def move_dependents(context: JobContext, new: str) -> None:
    """Let the jobs that wait for this one, or for its array of slots, wait for `new`, which has its work."""
    own, task = context.job.partition("_")[::2]
    queued = list_pending()
    if queued is None:
        context.say(f"what waits for this job must wait for {new} instead")
    task = "" if context.slots else task
    for job, dependency in find_dependents(queued or "", own, task):
        changed = rewrite_dependency(dependency, own, task, new)
        if (
            job.partition("_")[0] != new.partition("_")[0]
            and ask_slurm("scontrol", "update", f"jobid={job}", f"dependency={changed}", tries=1) is None
        ):
            context.say(f"job {job} should wait for {new}; Slurm took no such change")


def _leave(context: JobContext, ending: Ending) -> int:
    context.say(f"{ending.text}{context.again}")
    return 0


def _leave_to_next(context: JobContext, ending: Ending) -> int:
    context.say("the next slot of the array goes on")
    return 0


def _stop(context: JobContext, ending: Ending) -> int:
    """End after a STOP file: neither later slots nor jobs that wait for the end of the work may start."""
    cancel_slots(context, "the run was stopped")
    context.say(f"stopped, not finished: {ending.text}{_describe_dependents(context)}")
    return ending.code


def _requeue(context: JobContext, ending: Ending) -> int:
    """Let Slurm start this job again, or submit one like it where the site does not allow that."""
    if os.environ.get("SITE_REQUEUE", "yes") == "yes":
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # Slurm's, to a job that it requeues
        if ask_slurm("scontrol", "requeue", context.job) is not None:
            context.say(f"requeued as restart {context.restarts + 1}")
            time.sleep(REQUEUE_WAIT_S)
            return 0
    return _resubmit(context)


def _resubmit(context: JobContext) -> int:
    """Submit a job behind this one with everything that this one was asked for."""
    record = read_record(context.job)
    fields = read_fields(ask_slurm("scontrol", "show", "job", context.job) or "")
    if record is None or not fields:
        return fail_job(context, 1, "the job could neither be requeued nor submitted again")
    options = replay_options(record.options, f"afterany:{context.job}", context.task, fields["StdOut"])
    new = replace(record, options=tuple(options), restarts=context.restarts + 1, submitted="")
    words = [
        "sbatch",
        "--parsable",
        *options,
        "--wrap",
        wrap_command(record.command, record.code, record.again),
    ]
    shown = strip_options(os.environ) | {"INHERITUNE_SUBMITTED": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=shown)
    if done.returncode:
        said = " ".join(done.stderr.split())
        return fail_job(context, 1, f"the job could neither be requeued nor submitted again ({said})")
    job = done.stdout.strip().partition(";")[0]
    with suppress(OSError):
        mark_use(new.code, job)
    write_record(job, new)
    _carry_stalls(context, job)
    context.say(f"this site does not requeue; job {job} goes on after this one")
    move_dependents(context, f"{job}_{context.task}" if context.task and not context.slots else job)
    return 0


def _carry_stalls(context: JobContext, job: str) -> None:
    with suppress(OSError):
        text = context.stalls.read_text(encoding="utf-8")
        context.stalls.with_name(f"{job}.stalls").write_text(text, encoding="utf-8")


def describe_cause(context: JobContext, code: int) -> tuple[str, int]:
    """Return (the cause of a failure, the exit code of the task that failed)."""
    said = context.read_message("failure")
    if said:
        cause, _, own = said.partition("\n")
        # srun may report the code of a task that it ended because of the one that failed
        return cause.rstrip(":"), int(own) if re.fullmatch("[1-9][0-9]*", own.strip()) else code
    where = f"on one of the nodes {context.nodes or context.node}"
    if code > 128:
        extra = {
            137: " (out of memory?)",
            143: " (cancelled, or the time limit came before the work was saved)",
        }
        return f"a task was killed by signal {code - 128}{extra.get(code, '')} {where}", code
    if code == 2:
        return f"the sentence above tells what is missing (node {context.node or 'unknown'})", code
    return f"it ended with code {code}, see above, {where}", code


def fail_job(context: JobContext, code: int, cause: str = "") -> int:
    """End a job that has failed: the last line of its log has cause, node and the line to paste.

    Stops the rest of an array of slots if it would fail in the same way. Needs no disk. Returns the exit
    code."""
    if not cause:
        cause, code = describe_cause(context, code)
    stops = _stops_array(context, code, cause)
    if stops:
        cancel_slots(context, "it would fail in the same way")
    set_comment(context.job, f"{context.node}: {cause}")
    if stops:
        with suppress(OSError):
            context.array_stopped.write_text(f"{cause}\n", encoding="utf-8")
    fix = "the same command resumes from the last checkpoint"
    next_line = f"{'fix that, then submit again' if code == 2 else fix}: {context.again}"
    dependents = _describe_dependents(context) if stops or not (context.slots and context.array) else ""
    context.say(f"FAILED (code {code}): {cause}{dependents}; {next_line}")
    return code


def _stops_array(context: JobContext, code: int, cause: str) -> bool:
    """Return whether the next slot would fail in the same way, and keep this failure to compare.

    It would after a mistake, without progress, if the last slot failed for the same cause at the same place,
    or on a disk that cannot be written."""
    if not (context.slots and context.array):
        return False
    failure = _identify(context, cause)
    try:
        is_same = context.last_failure.is_file() and context.last_failure.read_text("utf-8") == failure
        context.last_failure.write_text(failure, encoding="utf-8")
    except OSError:
        return True
    return is_same or code == 2 or cause.startswith("no progress")


def _identify(context: JobContext, cause: str) -> str:
    """Return what two failures have in common that struck at the same place for the same cause, on any
    rank."""
    return f"{re.sub('.* rank [^ ]*: ', '', cause)} | {context.measure_progress()}\n"


def _describe_dependents(context: JobContext) -> str:
    """Return which queued jobs will not start because this one did not succeed; empty if none."""
    queued = list_pending(tries=1) or ""
    own, task = context.job.partition("_")[::2]
    waiting = find_dependents(queued, own, "" if context.slots else task)
    found = [job for job, dependency in waiting if "afterok" in dependency]
    if not found:
        return ""
    return f"; job(s) {name_jobs(found)} waited for its success and will not start"
