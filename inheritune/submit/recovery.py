"""The options of a job that plain sbatch queued, recovered from what Slurm knows of it."""

import re
from collections.abc import Mapping

from inheritune.submit.site import DEFAULT_LEAD_S

UNSET = ("", "(null)", "None", "N/A", "0", "*")


def describe_options(fields: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return sbatch's options for a job with the same name, shape, place, limits and mail as the job with the
    `fields` of `scontrol show job`.

    `environment` is the job's: Slurm states some of its shape only there."""

    def get(name: str) -> str:
        value = fields.get(name, "")
        return "" if value in UNSET else value

    named = {
        "job-name": get("JobName"),
        "partition": get("Partition"),
        "account": get("Account"),
        "qos": get("QOS"),
        "constraint": get("Features"),
        "nodelist": get("ReqNodeList"),
        "exclude": get("ExcNodeList"),
        "nice": get("Nice"),
        "comment": get("Comment"),
        "mail-user": get("MailUser"),
        "mail-type": get("MailType"),
        "time": get("TimeLimit"),
        "output": get("StdOut"),
        "array": environment.get("SLURM_ARRAY_TASK_ID", ""),
        "nodes": environment.get("SLURM_NNODES") or environment.get("SLURM_JOB_NUM_NODES") or "1",
    }
    named |= _describe_size(fields, environment)
    options = [f"--{name}={value}" for name, value in named.items() if value]
    options += ["--exclusive"] if fields.get("OverSubscribe") == "NO" else []
    lead = environment.get("SITE_LEAD") or DEFAULT_LEAD_S
    requeue = "--requeue" if fields.get("Requeue") == "1" else "--no-requeue"
    return (*options, f"--signal=B:USR1@{lead}", requeue, "--open-mode=append", "--export=ALL")


def _describe_size(fields: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the options for GPUs, tasks, CPUs and memory."""
    size = {}
    gpus = re.fullmatch(r"gres:gpu:?(.*)", fields.get("TresPerNode", ""))
    if gpus:
        size["gpus-per-node"] = gpus[1] or "1"
        each = re.fullmatch(r"gres:gpu:([0-9]+)", fields.get("CpusPerTres", ""))
        size["cpus-per-gpu"] = each[1] if each else ""
    else:
        size["ntasks"] = environment.get("SLURM_NTASKS", "1")
        size["cpus-per-task"] = environment.get("SLURM_CPUS_PER_TASK", "1")
    memory = {
        "mem-per-gpu": "SLURM_MEM_PER_GPU",
        "mem-per-cpu": "SLURM_MEM_PER_CPU",
        "mem": "SLURM_MEM_PER_NODE",
    }
    given = [(option, environment[name]) for option, name in memory.items() if environment.get(name)]
    return size | dict(given[:1])
