"""The sbatch command of a job: a pure function of the request, the site and the user's environment."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from inheritune.cluster.job_records import list_indices
from inheritune.config import names
from inheritune.config.jobs import TRAINING
from inheritune.errors import UserError
from inheritune.submit.request import Request, drop_option, is_set, name_job, read_option
from inheritune.submit.site import Site, read_minutes
from inheritune.submit.slurm_commands import count_gres

REHEARSAL_TIME = "01:00:00"


@dataclass(frozen=True)
class Shape:
    """What a job asks for."""

    gpus: int
    """GPUs of the whole job; 0 for a job on CPUs."""
    nodes: int
    tasks: int
    """Tasks of a job on CPUs."""
    cpus: int
    """CPUs of each of these tasks."""
    array: str | None

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes


@dataclass(frozen=True)
class Submission:
    """A job that can be given to sbatch."""

    name: str
    shape: Shape
    options: tuple[str, ...]
    log: str
    """Pattern of the job's log, with Slurm's %x, %j, %A and %a."""
    command: tuple[str, ...]
    """What the job runs."""

    def words(self, code: str = "", again: str = "") -> list[str]:
        """Return the words of the command line, for `wrap_command`."""
        return ["sbatch", *self.options, "--wrap", wrap_command(self.command, code, again)]

    def line(self, site: Site) -> str:
        """Return the command as a line to paste, for a shell that may export sbatch's options."""
        unset = [word for name in site.exported for word in ("-u", name)]
        return shlex.join([*(["env", *unset] if unset else []), *self.words()])


def wrap_command(command: tuple[str, ...], code: str = "", again: str = "") -> str:
    """Return the shell code of a job that runs `command`.

    If snapshot `code` has been removed, it says so with the line `again`, and cancels the array's other
    tasks."""
    run = f"exec {shlex.join(command)}"
    if not code:
        return run
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    cause = f"the snapshot {code}, which this job runs, was removed"
    fail = (
        'if [ -n "$SLURM_ARRAY_JOB_ID" ]; then scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; fi; '
        f'scontrol update jobid="{job}" comment={shlex.quote(cause[:250])}; '
        f'echo "job {job}:" {shlex.quote(f"FAILED (code 2): {cause}; submit again: {again}")}; exit 2'
    )
    return f"test -f {shlex.quote(command[1])} || {{ {fail}; }}; {run}"


def is_rehearsal(request: Request, environment: Mapping[str, str]) -> bool:
    """Return whether the job runs at small scale, on CPUs."""
    return "rehearse" in request.switches or is_set(environment, "REHEARSE")


def make_submission(
    request: Request, site: Site, environment: Mapping[str, str], n_runs: int = 1, array: str | None = None
) -> Submission:
    """Return the submission of `request`.

    `n_runs` is the number of tasks of an array over runs, `array` other tasks than all of them. Raises
    UserError for a shape that cannot be had or would fail."""
    site.check()
    rehearsal = is_rehearsal(request, environment)
    shape = make_shape(request, site, environment, rehearsal, n_runs)
    shape = replace(shape, array=array or read_option(request.options, "--array", "-a") or shape.array)
    check_array(shape.array, request, site)
    words = (*request.words, *(["--rehearse"] if "rehearse" in request.switches else []))
    name = name_job(Path(request.script), request.words, rehearsal)
    pattern = "%x-%A_%a.out" if shape.array else "%x-%j.out"
    log = f"{site.root}/runs/{names.LOGS}/{pattern}"
    check_paths(request, site)
    own_name = read_option(request.options, "--job-name", "-J")
    if own_name and "/" in own_name:  # Slurm starts no job whose log it cannot open
        raise UserError(
            f"--job-name {own_name!r} has a slash, and the name of the job's log holds it: leave it out"
        )
    own_log = os.path.abspath(read_option(request.options, "--output", "-o") or log)
    on_cpus = rehearsal or not shape.gpus
    partition, constraint = _choose_partition(site, on_cpus)
    options = [f"--job-name={name}", *_ask_for_size(shape, site)]
    options += _ask_for_time(site, partition, rehearsal, on_cpus)
    options += [f"--signal=B:USR1@{site.lead_s}", "--requeue" if site.requeues else "--no-requeue"]
    options += ["--open-mode=append", f"--output={log}", "--export=ALL", "--kill-on-invalid-dep=yes"]
    own = {
        "array": shape.array,
        "partition": partition,
        "account": site.get("ACCOUNT"),
        "qos": site.get("QOS"),
        "constraint": constraint,
        "mail-user": site.get("MAIL"),
        "mail-type": "END,FAIL,REQUEUE" if site.get("MAIL") else "",
    }
    options += [f"--{key}={value}" for key, value in own.items() if value]
    options += request.options
    check_time(options, site)
    check_option_shape(request.options)
    shape = _adopt_size(shape, request.options)
    return Submission(own_name or name, shape, tuple(options), own_log, ("bash", request.script, *words))


def check_paths(request: Request, site: Site) -> None:
    """Raise UserError for a folder that Slurm would read otherwise than it is written."""
    if "%" in site.root:
        raise UserError(
            f"INHERITUNE_ROOT is {site.root}, and Slurm would replace what follows the % in the name of the "
            "job's log; use a folder without it"
        )
    if request.names_files and (folder := read_option(request.options, "--chdir", "-D")):
        raise UserError(
            f"the job would look for {request.values['experiment']} in {folder} (--chdir); leave that out, "
            "or give whole paths"
        )


def make_shape(
    request: Request, site: Site, environment: Mapping[str, str], rehearsal: bool, n_runs: int = 1
) -> Shape:
    """Return what the job asks for. Raises UserError for GPUs that the site lacks or that no nodes share
    equally."""
    gpus = _read_count(environment, "GPUS", request.job.gpus)
    if request.job.verb not in TRAINING:  # GPUS of a paper's table is for the jobs that train
        gpus = min(gpus, request.job.gpus)
    array = choose_array(request, environment, n_runs)
    if rehearsal or gpus == 0:
        tasks = _read_count(environment, "TASKS", request.kind.cpu_tasks)
        wide = request.job.verb == "prepare" and not rehearsal
        cpus = _read_count(environment, "CPUS", 16 if wide else 1) if request.job.verb == "prepare" else 1
        return Shape(
            0, _read_count(environment, "NODES", 1), 1 if request.kind.single else tasks, cpus, array
        )
    most, partition = site.count("GPUS_PER_NODE"), site.get("PARTITION")
    if not most:
        kind = f" of type {site.get('GPU_TYPE')}" if site.get("GPU_TYPE") else ""
        where = f" in partition {partition}" if partition else ""
        raise UserError(
            f"sinfo shows no GPU{where}{kind}; set SITE_PARTITION or SITE_GPUS_PER_NODE in slurm/site.sh, or "
            "rehearse on CPUs with REHEARSE=1"
        )
    total = site.count_gpus(partition)
    if total and gpus > total:
        raise UserError(
            f"this job asks for {gpus} GPUs and "
            f"{'partition ' + partition if partition else 'the default partition'} "
            f"has {total}; GPUS={total} or fewer gives the same results, more slowly"
        )
    nodes = -(-gpus // most)
    if gpus % nodes:
        fewer, more = gpus // nodes * nodes, -(-gpus // nodes) * nodes
        raise UserError(
            f"{gpus} GPUs cannot be divided equally over {nodes} nodes of at most {most} "
            f"(SITE_GPUS_PER_NODE); use GPUS={fewer} or GPUS={more}"
        )
    return Shape(gpus, nodes, gpus, 0, array)


def _adopt_size(shape: Shape, options: tuple[str, ...]) -> Shape:
    """Return the shape of a job with GPUs whose nodes, or GPUs of each, the user's own options change."""
    nodes, each = read_option(options, "--nodes", "-N"), read_option(options, "--gpus-per-node")
    if not shape.gpus or not (nodes or each):
        return shape
    wanted = int(nodes) if nodes.isdecimal() and int(nodes) else shape.nodes
    return replace(shape, nodes=wanted, gpus=wanted * (count_gres(f"gpu:{each}") or shape.gpus_per_node))


def choose_array(request: Request, environment: Mapping[str, str], n_runs: int) -> str | None:
    """Return the tasks of the job's array; None for a single job."""
    given, usual = environment.get("ARRAY"), request.kind.array
    if "parts" in request.values:
        usual = f"1-{request.values['parts']}"
    if request.job.verb == "evaluate" and "run" in request.values or usual is None:
        return None
    if given:
        return None if given == "no" else given
    return f"1-{n_runs}" if usual == "runs" else usual


def check_array(array: str | None, request: Request, site: Site) -> None:
    """Raise UserError for an array that would go wrong."""
    if array is None:
        return
    indices = list_indices(array)
    if indices[0] == 0:
        raise UserError(
            f"the array {array} has index 0, and the tasks of an array count from 1 here; use ARRAY=1-N"
        )
    if request.shares_run and len(indices) > 1 and not array.endswith("%1"):
        raise UserError(
            f"the tasks of {array} would work on one run at the same time; let one run after the other, "
            f"with ARRAY={array.partition('%')[0]}%1"
        )
    if site.max_array_size and indices[-1] >= site.max_array_size:
        longest = f"ARRAY=1-{site.max_array_size - 1}"
        advice = f"use {longest}%1" if request.kind.slots else f"submit {longest}, then the others"
        raise UserError(
            f"the array {array} is longer than this cluster allows (MaxArraySize={site.max_array_size}); "
            f"{advice}"
        )


def check_option_shape(options: tuple[str, ...]) -> None:
    """Raise UserError for an option of the user's that gives nodes unequal numbers of GPUs."""
    if gpus := read_option(options, "--gpus", "-G"):
        raise UserError(
            f"--gpus={gpus} lets Slurm give the nodes unequal numbers of GPUs; ask for a total with GPUS=N "
            "before the command, or for --nodes=N --gpus-per-node=G"
        )


def check_time(options: list[str], site: Site) -> None:
    """Raise UserError if the signal to save would come at or before the start of a job."""
    time = read_option(options, "--time", "-t")
    minutes = read_minutes(time)
    if minutes and site.lead_s >= minutes * 60:
        raise UserError(
            f"SITE_LEAD={site.lead_s} seconds is not less than the time limit {time}, so the job "
            "would save and stop as soon as it starts; lower SITE_LEAD or raise SITE_TIME"
        )


def _ask_for_size(shape: Shape, site: Site) -> list[str]:
    """Return the options for nodes, GPUs, CPUs and memory."""
    if not shape.gpus:
        size = [f"--nodes={shape.nodes}", f"--ntasks={shape.tasks}", f"--cpus-per-task={shape.cpus}"]
        return [*size, "--mem-per-cpu=4G"]
    kind = f"{site.get('GPU_TYPE')}:" if site.get("GPU_TYPE") else ""
    size = [f"--nodes={shape.nodes}", f"--gpus-per-node={kind}{shape.gpus_per_node}"]
    shares = {"cpus-per-gpu": site.get("CPUS_PER_GPU"), "mem-per-gpu": site.get("MEM_PER_GPU")}
    return size + [f"--{key}={value}" for key, value in shares.items() if value]


def _choose_partition(site: Site, on_cpus: bool) -> tuple[str, str]:
    """Return (partition, constraint) of a job; empty for what is left to Slurm."""
    partition, constraint = site.get("PARTITION"), site.get("CONSTRAINT")
    if not on_cpus:
        return partition, constraint
    if site.get("CPU_PARTITION"):
        return site.get("CPU_PARTITION"), ""  # a constraint is a feature of GPU nodes
    guessed = partition and partition == site.get("GUESSED_PARTITION")  # a guess for jobs with GPUs
    return "" if guessed else partition, constraint


def _ask_for_time(site: Site, partition: str, rehearsal: bool, on_cpus: bool) -> list[str]:
    """Return the option for the time limit. A partition that was not asked for has its own limit."""
    time, is_own = site.get("TIME"), site.get("TIME") != site.get("GUESSED_TIME")
    if rehearsal and not is_own:
        return [f"--time={REHEARSAL_TIME}"]
    if on_cpus and not rehearsal and not is_own and partition != site.get("PARTITION"):
        return []
    return [f"--time={time}"] if time else []


def _read_count(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return the whole number in a variable. Raises UserError for anything else."""
    text = environment.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()) or (int(text) == 0 and name != "GPUS"):
        raise UserError(f"{name} takes a number of at least 1 (got '{text}')")
    return int(text)


def replay_options(
    options: tuple[str, ...], dependency: str = "", task: str = "", log: str = ""
) -> list[str]:
    """Return the options of a recorded submission for a job that continues it: all that was asked for, with
    another dependency, task of the array and log, and without the time at which the first was to begin."""
    dropped = ["--dependency", "-d", "--begin", "-b"]
    dropped += [*(["--array", "-a"] if task else []), *(["--output", "-o"] if log else [])]
    kept = drop_option(options, *dropped)
    kept = [word for word in kept if word not in ("--hold", "-H")]
    new = {"dependency": dependency, "array": task, "output": log}
    return kept + [f"--{key}={value}" for key, value in new.items() if value]
