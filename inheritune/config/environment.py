"""Variables of the environment: each that is read or set here, what it means, and what it may hold.

`check` refuses what is no number where a number is meant, before a verb begins: most of these are read for
the first time hours later. Empty counts as not set. Variables that libraries read by themselves (HF_HOME,
CUDA_VISIBLE_DEVICES ...) are theirs to check.
"""

import math
import os
from dataclasses import dataclass

from inheritune.config.values import MEBIBYTES, MINUTES, SECONDS, Kind
from inheritune.errors import UserError


@dataclass(frozen=True)
class Variable:
    """`meaning` completes "NAME is ..."; `kind`: the number it must be (None: text); `choices`: all the texts
    that are understood (none: any); `default`: where it is not set."""

    meaning: str
    kind: Kind | None = None
    default: float | None = None
    choices: tuple[str, ...] = ()


FLAG = Kind("", ge=0, le=1, says="is neither 1 nor 0")

VARIABLES: dict[str, Variable] = {
    # yours
    "INHERITUNE_ROOT": Variable("the folder of runs/ and data/, on a disk that all nodes share"),
    "REHEARSE": Variable("1 to shrink every experiment to a rehearsal", FLAG, 0),
    "INHERITUNE_LOCK_WAIT": Variable(
        "how long a job waits for another that writes the same folder", SECONDS, 120
    ),
    "INHERITUNE_GPT2_BPE": Variable("a folder with GPT-2's BPE, where the machine cannot download it"),
    "DEEPSPEED_TIMEOUT": Variable("how long a rank waits for the others in a collective", MINUTES, 60),
    "DS_ACCELERATOR": Variable("cpu to leave the GPUs of this machine alone", choices=("cpu", "cuda")),
    "WANDB_MODE": Variable("online or offline: where `sync` sends a record"),
    # of a job's script (slurm/job.sh) for the processes of its job
    "INHERITUNE_JOB": Variable("the folder in which a job's script and its ranks leave word for each other"),
    "INHERITUNE_LAUNCH": Variable("the srun line that starts the tasks of a job"),
    "INHERITUNE_PYTHON": Variable("the command that runs Python within an image"),
    "INHERITUNE_HOSTS": Variable("the nodes of a job, where scontrol is not to be had"),
    "INHERITUNE_LEAD": Variable("the time between a job's signal and its time limit", SECONDS, math.inf),
    "INHERITUNE_STOP": Variable("a STOP file that ends this run too, set by `grow` for the runs it starts"),
    # of Slurm
    "SLURM_JOB_ID": Variable("the job's number"),
    "SLURM_RESTART_COUNT": Variable("how often the job was requeued"),
    "SLURM_MEM_PER_NODE": Variable("the job's --mem", MEBIBYTES, 0),
    "SLURM_STEP_ID": Variable("the step's number within its job"),
    "SLURM_STEP_NODELIST": Variable("the step's nodes"),
    "SLURM_STEP_NUM_NODES": Variable("the number of the step's nodes"),
    "SLURM_STEP_NUM_TASKS": Variable("the step's tasks, of which each is a rank"),
    "SLURM_PROCID": Variable("this task's rank"),
    "SLURM_LOCALID": Variable("this task's rank on its node"),
    "SLURMD_NODENAME": Variable("this node's name"),
    # of torchrun, the deepspeed launcher, or --procs
    "RANK": Variable("this process's rank"),
    "WORLD_SIZE": Variable("the number of ranks"),
    "LOCAL_RANK": Variable("this process's rank on its node"),
    "LOCAL_WORLD_SIZE": Variable("the ranks of this node", Kind("ranks", ge=1, le=10**5)),
    "MASTER_ADDR": Variable("the address of rank 0"),
    "MASTER_PORT": Variable("the port of rank 0"),
    "TORCHELASTIC_USE_AGENT_STORE": Variable("True where torchrun holds the ranks' store"),
    # of other libraries, read or set so that they keep quiet, compile nothing and fork nothing
    "CUDA_VISIBLE_DEVICES": Variable("the GPUs that CUDA shows"),
    "HF_HOME": Variable("the folder of the Hub's cache"),
    "HF_DATASETS_CACHE": Variable("the folder of the cache of data sets"),
    "XDG_CACHE_HOME": Variable("the folder of caches, where HF_HOME is not set"),
    "TMPDIR": Variable("the folder of temporary files"),
    "TOKENIZERS_PARALLELISM": Variable("whether the tokenizers library starts threads"),
    "DS_LOG_LEVEL": Variable("what DeepSpeed logs"),
    "TRANSFORMERS_VERBOSITY": Variable("what transformers logs"),
    "DISABLE_MULTIPROC": Variable("whether lm-eval forks for the error of a perplexity"),
    "OMP_NUM_THREADS": Variable("the threads of each process that --procs starts"),
    "PYTHONPATH": Variable("where the processes that --procs starts find this package"),
}


def number(name: str) -> float | int | None:
    """The number in variable `name`, or its default where it is not set. Raises UserError if it holds
    something else."""
    variable, text = VARIABLES[name], os.environ.get(name)
    if not text:
        return variable.default
    kind = variable.kind
    try:
        return kind.read(text)
    except ValueError as problem:
        why = str(problem)
    if why.startswith("takes"):
        why = kind.says or f"is no number of {kind.what}"
    elif not kind.says:
        why += f" {kind.what}"
    ways = "unset it" if variable.default in (None, math.inf) else f"set {variable.default}, or unset it"
    raise UserError(f"{name}={text} {why}; {ways}")


def flag(name: str) -> bool:
    """Whether variable `name` is 1. Raises UserError if it holds anything but 0 and 1."""
    return bool(number(name))


def check() -> None:
    """Raises UserError for the first variable that must be a number and is none, or is none of its
    choices."""
    for name, variable in VARIABLES.items():
        if variable.kind:
            number(name)
        given = os.environ.get(name)
        if given and variable.choices and given not in variable.choices:
            raise UserError(
                f"{name}={given} is not known here; set it to {' or '.join(variable.choices)}, or unset it"
            )
