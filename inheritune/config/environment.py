"""Environment variables: each one that is read or set here, its meaning, and its valid values.

`check_variables` refuses a wrong value before a verb starts: most variables are read for the first time hours
later. An empty variable counts as not set. Variables that only libraries read (HF_HOME, CUDA_VISIBLE_DEVICES)
are checked by those libraries.
"""

import math
import os
from dataclasses import dataclass

from inheritune.config.values import MEBIBYTES, MINUTES, RESTARTS, SECONDS, Kind
from inheritune.errors import UserError


@dataclass(frozen=True)
class Variable:
    """One environment variable."""

    meaning: str
    """The end of a sentence that starts with "NAME is"."""
    kind: Kind | None = None
    """The number that it must be; None for text."""
    default: float | None = None
    """The number where it is not set."""
    choices: tuple[str, ...] = ()
    """All valid texts; empty if any text is valid."""


FLAG = Kind("", ge=0, le=1, says="is neither 1 nor 0")

VARIABLES: dict[str, Variable] = {
    # set by the user
    "INHERITUNE_ROOT": Variable("the folder of runs/ and data/, on a disk that all nodes share"),
    "REHEARSE": Variable("1 to shrink every experiment to a rehearsal", FLAG, 0),
    "INHERITUNE_LOCK_WAIT": Variable(
        "how long a job waits for another that writes the same folder", SECONDS, 120
    ),
    "INHERITUNE_GPT2_BPE": Variable("a folder with GPT-2's BPE, where the machine cannot download it"),
    "DEEPSPEED_TIMEOUT": Variable("how long a rank waits for the others in a collective", MINUTES, 60),
    "DS_ACCELERATOR": Variable("cpu to leave the GPUs of this machine alone", choices=("cpu", "cuda")),
    "WANDB_MODE": Variable("online or offline: where `sync` sends a record"),
    # set by the user for a job of slurm/ (its shape may hold any text: `submit` says what is wrong)
    "GPUS": Variable("the GPUs of the whole job"),
    "TASKS": Variable("the tasks of a job on CPUs"),
    "ARRAY": Variable("the tasks of a job's array, or no"),
    "FORCE": Variable("1 to queue a job though one that does the same is queued", FLAG, 0),
    "MAX_RESTARTS": Variable("how often a job may be restarted", RESTARTS, 100),
    "SITE_APPTAINER": Variable("the image in which a job's tasks run"),
    "SITE_INTERFACE": Variable("the network interface between the nodes"),
    "SITE_LEAD": Variable("the time between a job's signal and its time limit, as slurm/site.sh has it"),
    "SITE_REQUEUE": Variable("no where the site does not let jobs requeue themselves"),
    # set by a job's script (slurm/job.sh) for the processes of its job
    "INHERITUNE_JOB": Variable("the folder in which a job's script and its ranks exchange messages"),
    "INHERITUNE_LAUNCH": Variable("the srun line that starts the tasks of a job"),
    "INHERITUNE_PYTHON": Variable("the command that runs Python within an image"),
    "INHERITUNE_HOSTS": Variable("the nodes of a job, where scontrol is not available"),
    "INHERITUNE_REPOSITORY": Variable("the checkout whose snapshot a job runs"),
    "INHERITUNE_AGAIN": Variable("the line that submits a job again"),
    "INHERITUNE_SUBMITTED": Variable("1 in a job that `submit` queued, which has a record", FLAG, 0),
    "INHERITUNE_LEAD": Variable("the time between a job's signal and its time limit", SECONDS, math.inf),
    "INHERITUNE_TOLD": Variable("the folder in which the runs that `grow` starts report a stop"),
    "INHERITUNE_STOP": Variable("a STOP file that stops this run too, set by `grow` for the runs it starts"),
    # set by Slurm
    "SLURM_JOB_ID": Variable("the job's number"),
    "SLURM_RESTART_COUNT": Variable("how often the job was requeued"),
    "SLURM_ARRAY_JOB_ID": Variable("the number of the job's array"),
    "SLURM_ARRAY_TASK_ID": Variable("the task's number in its array"),
    "SLURM_ARRAY_TASK_COUNT": Variable("the number of tasks of the array"),
    "SLURM_ARRAY_TASK_MIN": Variable("the smallest number of a task of the array"),
    "SLURM_NNODES": Variable("the number of the job's nodes"),
    "SLURM_JOB_NUM_NODES": Variable("the same, in older versions"),
    "SLURM_JOB_NODELIST": Variable("the job's nodes"),
    "SLURM_JOB_CPUS_PER_NODE": Variable("the job's CPUs on each node"),
    "SLURM_GPUS_ON_NODE": Variable("the job's GPUs on this node"),
    "SLURM_NTASKS": Variable("the job's tasks"),
    "SLURM_CPUS_PER_TASK": Variable("the job's CPUs per task"),
    "SLURM_MEM_PER_NODE": Variable("the job's --mem", MEBIBYTES, 0),
    "SLURM_STEP_ID": Variable("the step's number within its job"),
    "SLURM_STEP_NODELIST": Variable("the step's nodes"),
    "SLURM_STEP_NUM_NODES": Variable("the number of the step's nodes"),
    "SLURM_STEP_NUM_TASKS": Variable("the step's tasks, of which each is a rank"),
    "SLURM_PROCID": Variable("this task's rank"),
    "SLURM_LOCALID": Variable("this task's rank on its node"),
    "SLURMD_NODENAME": Variable("this node's name"),
    # set by torchrun, the deepspeed launcher, or --procs
    "RANK": Variable("this process's rank"),
    "WORLD_SIZE": Variable("the number of ranks"),
    "LOCAL_RANK": Variable("this process's rank on its node"),
    "LOCAL_WORLD_SIZE": Variable("the ranks of this node", Kind("ranks", ge=1, le=10**5)),
    "MASTER_ADDR": Variable("the address of rank 0"),
    "MASTER_PORT": Variable("the port of rank 0"),
    "TORCHELASTIC_USE_AGENT_STORE": Variable("True where torchrun holds the ranks' store"),
    # of other libraries; some are set so that the libraries log less, compile nothing and fork nothing
    "CUDA_VISIBLE_DEVICES": Variable("the GPUs that CUDA shows"),
    "HF_HOME": Variable("the folder of the Hub's cache"),
    "HF_DATASETS_CACHE": Variable("the folder of the cache of data sets"),
    "XDG_CACHE_HOME": Variable("the folder of caches, where HF_HOME is not set"),
    "USER": Variable("the user's name, for a folder of caches on the node"),
    "TMPDIR": Variable("the folder of temporary files"),
    "TOKENIZERS_PARALLELISM": Variable("whether the tokenizers library starts threads"),
    "DS_LOG_LEVEL": Variable("what DeepSpeed logs"),
    "TRANSFORMERS_VERBOSITY": Variable("what transformers logs"),
    "DISABLE_MULTIPROC": Variable("whether lm-eval forks for the error of a perplexity"),
    "OMP_NUM_THREADS": Variable("the threads of each process that --procs starts"),
    "PYTHONPATH": Variable("where the processes that --procs starts find this package"),
}


def read_number(name: str) -> float | int | None:
    """Return the number in variable `name`, or its default where it is not set.

    Raises UserError if the variable holds something else."""
    variable, text = VARIABLES[name], os.environ.get(name)
    if not text:
        return variable.default
    kind = variable.kind
    if kind is None:
        raise TypeError(f"{name} is a text, not a number")
    try:
        return kind.read(text)
    except ValueError as problem:
        why = str(problem)
    if why.startswith("takes"):
        why = kind.says or f"is not a number of {kind.what}"
    elif not kind.says:
        why += f" {kind.what}"
    ways = "unset it" if variable.default in (None, math.inf) else f"set {variable.default}, or unset it"
    raise UserError(f"{name}={text} {why}; {ways}")


def read_flag(name: str) -> bool:
    """Return whether variable `name` is 1. Raises UserError if it holds anything but 0 and 1."""
    return bool(read_number(name))


def check_variables() -> None:
    """Raises UserError for the first variable that is not the number, or one of the choices, it must be."""
    for name, variable in VARIABLES.items():
        if variable.kind:
            read_number(name)
        given = os.environ.get(name)
        if given and variable.choices and given not in variable.choices:
            raise UserError(
                f"{name}={given} is not known here; set it to {' or '.join(variable.choices)}, or unset it"
            )
