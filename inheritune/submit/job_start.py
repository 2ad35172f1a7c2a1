"""The start of a job's script: what it was given, what it runs, and the line that starts its tasks."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from inheritune.cluster.job_records import Record, make_keys, read_record, write_record
from inheritune.config.experiment import load_experiment
from inheritune.config.paths import REPOSITORY, find_checkout
from inheritune.errors import UserError
from inheritune.files.processes import get_node_name
from inheritune.files.storage import find_root
from inheritune.submit.interfaces import find_interface
from inheritune.submit.job_context import JobContext
from inheritune.submit.job_end import fail_job
from inheritune.submit.recovery import describe_options
from inheritune.submit.request import (
    KINDS,
    Request,
    find_spec,
    is_set,
    make_again,
    make_command,
    read_request,
)
from inheritune.submit.runs import is_finished, list_runs
from inheritune.submit.site import DEFAULT_LEAD_S, find_image
from inheritune.submit.slurm_commands import ask_slurm, get_this_job, list_node_gpus, read_fields
from inheritune.training.provenance import git_commit

RECORD_PATIENCE_S = 10
"""How long a job waits for its record, which `submit` writes after sbatch has answered."""
SHAPES = """SLURM_CPUS_PER_GPU SLURM_NTASKS_PER_GPU SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPU_BIND
SLURM_NTASKS_PER_NODE""".split()  # noqa: SIM905 - a list to read
"""How the job was asked for. It must not shape the step again: some versions of srun refuse the two."""


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave this job."""

    nodes: int
    node_list: str
    gpus: int
    """Of each node."""
    tasks: int
    cpus: int
    """Of each task."""

    def launch(self, image: str, single: bool) -> str:
        """Return the srun line that starts the tasks, or one task."""
        words = ["srun", "--kill-on-bad-exit=1", "--wait=180", "--export=ALL", "--mpi=none"]
        if single:
            words += ["--nodes=1", "--ntasks=1"]
        else:
            words += [f"--nodes={self.nodes}", f"--ntasks={self.tasks}"]
            if self.tasks % self.nodes == 0:
                words += [f"--ntasks-per-node={self.tasks // self.nodes}"]
        words += [f"--cpus-per-task={self.cpus}"]
        return " ".join([*words, *([image] if image else [])])


def begin_job(script: str, name: str, argv: list[str]) -> list[str]:
    """Return the shell code that a job's script evaluates: its environment and the array `command`, or an
    exit with a failure that has been reported.

    `script` is the path of the script, `name` its entry in slurm/jobs.yaml, `argv` its arguments."""
    slots = KINDS[find_spec(name).verb].slots
    context = JobContext("", os.environ.get("INHERITUNE_AGAIN", ""), slots, node=get_node_name())
    try:
        request = read_request(name, argv, script)
        context = make_context(request)
        return _begin(request, context)
    except UserError as error:
        code = fail_job(context, 2, str(error).rstrip(".").partition("\n")[0])
    except OSError as error:
        code = fail_job(
            context, 1, f"{error.filename or 'a file'}: {error.strerror} (node {get_node_name()})"
        )
    return ["reported=1", f"exit {code}"]


def make_context(request: Request) -> JobContext:
    """Return the context of this job, from its record or, of plain sbatch, from what Slurm knows of it."""
    environment, job = os.environ, get_this_job()
    record = _find_record(job)
    values, single_run = request.values, request.values.get("run", "")
    keys = make_keys(
        request.job.verb,
        values["experiment"],
        [single_run],
        stage=request.stage,
        seed=request.seed,
        rehearsal=is_set(environment, "REHEARSE"),
    )
    again = record.again if record else make_again(request, environment)
    if record is None and "SLURM_JOB_ID" in environment:
        fields = read_fields(ask_slurm("scontrol", "show", "job", job) or "")
        options = describe_options(fields, environment)
        command = ("bash", request.script, *request.words)
        record = Record(request.job.name, request.script, request.words, options, command, again, keys)
        with suppress(OSError):
            write_record(job, record)
    restarts = int(environment.get("SLURM_RESTART_COUNT") or 0) + (record.restarts if record else 0)
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    context = JobContext(
        request.job.verb, again, request.kind.slots, keys, restarts, "", get_node_name(), nodes
    )
    return replace(context, progress=context.measure_progress())


def _find_record(job: str) -> Record | None:
    """Return the job's record, which may be written a moment after it starts."""
    end = time.monotonic() + RECORD_PATIENCE_S
    while (record := read_record(job)) is None and os.environ.get("INHERITUNE_SUBMITTED") == "1":
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return record


def _begin(request: Request, context: JobContext) -> list[str]:
    environment, job = os.environ, context.job
    shown = ask_slurm("scontrol", "show", "job", "-d", job) or ""
    given = read_allocation(shown, environment, request)
    image = find_image(environment)
    launch = given.launch(image, request.kind.single)
    if "dry_run" in request.switches:
        print(
            f"this job would run: {launch} python -m inheritune {shlex.join(make_command(request))}",
            file=sys.stderr,
        )
        return ["reported=1", "exit 0"]
    _describe_start(request, context, given, shown)
    _check_array(request, context, shown)
    context.write()
    chosen, context = _choose_run(_choose_part(request, context), context)
    if chosen is None:
        return ["reported=1", "exit 0"]
    request = chosen
    exports = _list_exports(request, context, given, image, launch)
    if request.job.verb in ("train", "baselines"):
        _check(request, context, exports)
    host = "python3" if image else "python"
    starter = [host] if request.job.verb == "grow" else [*shlex.split(launch), "python"]
    command = [*starter, "-m", "inheritune", *make_command(request)]
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    return [f"unset {' '.join(SHAPES)}", *lines, f"command=({shlex.join(command)})"]


def read_allocation(shown: str, environment: Mapping[str, str], request: Request) -> Allocation:
    """Return what the job was given, from `scontrol show job -d` and the job's environment.

    Raises UserError for nodes with unequal numbers of GPUs, and for a job without a GPU that needs one."""
    groups = list_node_gpus(shown)
    if len({gpus for _, gpus in groups}) > 1:
        each = ", ".join(f"{nodes}: {gpus}" for nodes, gpus in groups)
        raise UserError(
            f"the nodes of job {get_this_job(environment)} have unequal numbers of GPUs ({each}); ask for "
            "equal ones with --nodes=N --gpus-per-node=G, not with --gpus: bash slurm/X.sh does"
        )
    gpus = groups[0][1] if groups else int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    nodes = int(environment.get("SLURM_NNODES") or environment.get("SLURM_JOB_NUM_NODES") or 1)
    rehearsal = is_set(environment, "REHEARSE")
    if not gpus and request.job.gpus and not rehearsal:
        raise UserError(
            f"job {get_this_job(environment)} has no GPU; submit it with 'bash slurm/X.sh', which asks "
            "for some, or rehearse in small with REHEARSE=1"
        )
    tasks = gpus * nodes if gpus else int(environment.get("SLURM_NTASKS") or nodes)
    tasks = 1 if request.kind.single else int(environment.get("TASKS") or tasks)
    per_node = -(-tasks // nodes)
    counts = re.findall(r"([0-9]+)(?:\([^)]*\))?", environment.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    cpus = max(1, min(int(count) for count in counts) // per_node)
    return Allocation(nodes, environment.get("SLURM_JOB_NODELIST", ""), gpus, tasks, cpus)


def _describe_start(request: Request, context: JobContext, given: Allocation, shown: str) -> None:
    """Log what runs, on what, from which commit."""
    words = " ".join(make_command(request))
    memory = re.search(r"TRES=\S*mem=([^,\s]*)", shown)
    rehearsal = ", REHEARSAL" if context.keys and context.keys[0].rehearsal else ""
    if find_checkout() != REPOSITORY:
        code = f"snapshot {REPOSITORY}"
    else:
        code = f"live checkout {REPOSITORY}: what is edited there reaches this job"
    context.say(words)
    context.say(
        f"restart {context.restarts} on {given.nodes} node(s) {given.node_list}, each {given.gpus} GPU(s); "
        f"{given.tasks} task(s) of {given.cpus} CPU(s); memory {memory[1] if memory else 'unknown'} in all"
    )
    commit = (git_commit() or "unknown").replace("+changes", " with changes")
    commit = re.sub(r"^([0-9a-f]{9})[0-9a-f]*", r"\1", commit)
    context.say(f"commit {commit} ({code}), INHERITUNE_ROOT={find_root()}{rehearsal}")
    total = given.gpus * given.nodes
    if total and (given.tasks < total or not request.job.gpus):
        context.say(
            f"note: this job holds {total} GPUs and uses fewer; 'bash slurm/{request.job.name}.sh' asks "
            "for what is needed"
        )


def _check_array(request: Request, context: JobContext, shown: str) -> None:
    """Raise UserError for a task that must not run: of an array that `check_tasks` refuses, or that was
    stopped."""
    if not context.array:
        return
    check_tasks(os.environ, shown, request.shares_run)
    if not context.slots:
        return
    with suppress(OSError):
        why = context.array_stopped.read_text(encoding="utf-8").strip()
        raise UserError(f"this array was stopped: {why}")


def check_tasks(environment: Mapping[str, str], shown: str, shares_run: bool) -> None:
    """Raise UserError in each task of an array that has index 0, or, with `shares_run`, whose tasks would
    work on one run at the same time.

    Plain sbatch queues such arrays. `shown` is the task in `scontrol show job`."""
    if "0" in (environment.get("SLURM_ARRAY_TASK_MIN"), environment.get("SLURM_ARRAY_TASK_ID")):
        raise UserError("the array has index 0, and its tasks count from 1 here; submit it with --array=1-N")
    is_alone = environment.get("SLURM_ARRAY_TASK_COUNT", "1") == "1"
    if shares_run and not is_alone and not re.search(r"\bArrayTaskThrottle=1\b", shown):
        raise UserError(
            "the tasks of this array would work on one run at the same time; submit it with --array=1-N%1"
        )


def _choose_part(request: Request, context: JobContext) -> Request:
    """Return the request for this task's part of a preparation; for all of it in a job that is no array."""
    values = {key: value for key, value in request.values.items() if key != "parts"}
    if "parts" in request.values and context.task:
        values |= {"parts": request.values["parts"], "task": context.task}
    return replace(request, values=values)


def _choose_run(request: Request, context: JobContext) -> tuple[Request | None, JobContext]:
    """Return both with the run of this task of an array over runs; (None, ...) if there is nothing to do."""
    if request.kind.array != "runs" or "run" in request.values:
        return request, context
    loaded = load_experiment(request.values["experiment"])
    runs, task = list_runs(loaded, request.job.verb), int(context.task or 1)
    if task > len(runs):
        context.say(f"nothing to do: there are {len(runs)} runs and this is task {task} of the array")
        return None, context
    run = runs[task - 1]
    if request.job.verb == "evaluate" and not is_finished(loaded, run, request.seed):
        context.say(f"nothing to evaluate: run {run} is not finished")
        return None, context
    request = replace(request, values={**request.values, "run": run})
    keys = tuple(replace(key, run=run) for key in context.keys)
    context = replace(context, keys=keys)
    context = replace(context, progress=context.measure_progress())
    context.write()
    return request, context


def _check(request: Request, context: JobContext, exports: dict[str, str]) -> None:
    """Run `check` of the run, which says what is missing. Raises UserError with its sentence."""
    host = "python3" if exports["INHERITUNE_PYTHON"] else "python"
    words = [host, "-m", "inheritune", "check", request.values["experiment"], "--run", request.values["run"]]
    done = subprocess.run(
        [*words, *request.flags("run")], stdout=sys.stderr, check=False, env={**os.environ, **exports}
    )
    if done.returncode:
        said = (context.read_message("failure") or "").partition("\n")[0]
        raise UserError(said or f"the sentence above tells what is missing (node {get_node_name()})")


def _list_exports(
    request: Request, context: JobContext, given: Allocation, image: str, launch: str
) -> dict[str, str]:
    """Return what the job's program finds in its environment."""
    hosts = ask_slurm("scontrol", "show", "hostnames", given.node_list) or ""
    user = os.environ.get("USER") or str(os.getuid())
    # on the node: compilers must not share a network disk, nor two users a folder
    cache = f"{'/tmp' if image else os.environ.get('TMPDIR') or '/tmp'}/inheritune-{user}"
    exports = {
        "SLURM_NNODES": str(given.nodes),
        "INHERITUNE_LAUNCH": launch,
        "INHERITUNE_HOSTS": " ".join(hosts.split()),  # an image has no scontrol
        "INHERITUNE_PYTHON": f"{image} python" if image else "",
        "INHERITUNE_JOB": str(context.folder),
        "INHERITUNE_LEAD": os.environ.get("SITE_LEAD") or str(DEFAULT_LEAD_S),
        "OMP_NUM_THREADS": str(given.cpus),
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TORCH_EXTENSIONS_DIR": f"{cache}/extensions",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # minutes; DeepSpeed's own 10 are too short for a large first step
        "DEEPSPEED_TIMEOUT": os.environ.get("DEEPSPEED_TIMEOUT") or "60",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }
    exports |= {} if given.gpus else {"DS_ACCELERATOR": "cpu"}
    exports |= {"TMPDIR": "/tmp"} if image else {}  # which every image has
    interface = os.environ.get("SITE_INTERFACE", "")
    if not interface and given.nodes > 1 and (interface := find_interface(hosts.split())):
        context.say(f"network interface {interface} (SITE_INTERFACE chooses another)")
    return (
        exports | dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), interface)
        if interface
        else exports
    )
