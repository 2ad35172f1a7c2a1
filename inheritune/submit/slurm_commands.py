"""Slurm's commands: called with patience, and what they print taken apart."""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping

TRIES, WAIT_S = 12, 5
"""How often and at what distance a controller that does not answer is asked: it is restarted now and then."""


def ask_slurm(*command: str, tries: int = TRIES, environment: Mapping[str, str] | None = None) -> str | None:
    """Return what one of Slurm's commands prints; None if it fails, also when it is asked again."""
    for left in reversed(range(tries)):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, env=environment
            )
        except OSError:
            return None
        if done.returncode == 0:
            return done.stdout
        if left:
            time.sleep(WAIT_S)
    return None


def strip_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without sbatch's options (a login shell that sourced site.sh has them) and without
    what Slurm sets for a job. A job's own variables must not pass for the next one's."""
    ours = ("INHERITUNE_JOB", "INHERITUNE_LAUNCH", "INHERITUNE_HOSTS", "INHERITUNE_PYTHON")
    return {
        name: value
        for name, value in environment.items()
        if name not in ours and (name == "SLURM_CONF" or not name.startswith(("SBATCH_", "SLURM_")))
    }


def count_gres(text: str, gpu_type: str = "") -> int:
    """Return the GPUs that a gres text names, such as gpu:h200:8(S:0-1) or gpu:4(IDX:0-3)."""
    found = re.findall(r"gpu(?::([^:,()]+))?:([0-9]+)", text)
    return sum(int(number) for kind, number in found if not gpu_type or kind == gpu_type)


def read_fields(text: str) -> dict[str, str]:
    """Return {name: value} of one job in the text of `scontrol show job`; later tasks of an array are
    ignored.

    Values with blanks, such as a command, are whole where the text has one of them per line."""
    first = text.strip().split("\n\n")[0]
    found: dict[str, str] = {}
    for line in first.splitlines():
        line = line.strip()
        whole = re.match(r"(Command|WorkDir|StdOut|StdErr|StdIn|Comment|JobName|AdminComment)=(.*)", line)
        if whole:
            found.setdefault(whole[1], whole[2])
            continue
        for word in line.split():
            name, equals, value = word.partition("=")
            if equals:
                found.setdefault(name, value)
    return found


def list_node_gpus(text: str) -> list[tuple[str, int]]:
    """Return (nodes, GPUs of each) from `scontrol show job -d`: one entry per group of equal nodes."""
    return [
        (match[1], count_gres(match[0]))
        for line in text.splitlines()
        if (match := re.match(r"Nodes=(\S+) .*", line.strip()))
    ]


def list_pending(tries: int = TRIES) -> str | None:
    """Return the user's queued jobs as `find_dependents` reads them; None where Slurm does not answer."""
    return ask_slurm("squeue", "--me", "-h", "-r", "-t", "PENDING", "-o", "%i|%E", tries=tries)


def find_dependents(text: str, job: str, task: str = "") -> list[tuple[str, str]]:
    """Return (job, its dependency) of the queued jobs that wait for `job`, or for its task `task`.

    `text` has lines "ID|DEPENDENCY", as `list_pending` returns them."""
    found = []
    for line in text.splitlines():
        name, _, dependency = line.partition("|")
        if name.partition("_")[0] != job and re.search(rf":{job}(_\*|_{task or '[0-9]+'})?\(", dependency):
            found.append((name, dependency))
    return found


def name_jobs(names: Iterable[str]) -> str:
    """Return jobs for a sentence, in order; several tasks of an array as the array."""
    tasks: dict[str, list[str]] = {}
    for name in set(names):
        tasks.setdefault(name.partition("_")[0], []).append(name)
    found = [own[0] if len(own) == 1 else array for array, own in tasks.items()]
    return ", ".join(sorted(found, key=lambda name: [int(number) for number in name.split("_")]))


def rewrite_dependency(dependency: str, job: str, task: str, new: str) -> str:
    """Return a dependency, as squeue prints it, for scontrol, with `new` in place of `job` (or its task)."""
    changed = re.sub(rf":{job}(_\*|_{task or '[0-9]+'})?\(", f":{new}(", dependency)
    return re.sub(r"\([^)]*\)", "", changed)


def read_cluster() -> str:
    """Return the name of this Slurm cluster; empty where its controller does not answer."""
    shown = ask_slurm("scontrol", "show", "config", tries=1) or ""
    match = re.search(r"^ClusterName\s*=\s*(\S+)", shown, re.MULTILINE)
    return match[1] if match else ""


def is_alive() -> bool:
    """Return whether this machine belongs to a Slurm cluster whose controller answers."""
    return ask_slurm("sinfo", "-h", tries=1) is not None


def get_this_job(environment: Mapping[str, str] = os.environ) -> str:
    """Return what scontrol takes for this job and no other: the last task of an array has the id of the whole
    array. Empty outside a job."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment.get("SLURM_JOB_ID", "")
