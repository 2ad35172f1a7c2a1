"""Names that you choose and that become folder names: which are valid, so that none clashes with other files.

    runs/EXPERIMENT/seed0/RUN/ ...      runs/rehearsal/EXPERIMENT/ ...      data/NAME-<hash>/

runs/ also holds the folders of FOLDERS. A seed's folder also holds tables, plots and random starts. Alongside
each folder are its lock and its temporary copy. A name with '/' would lead elsewhere; one with ',' or '@'
would be two names in --run.
"""

import re
from collections.abc import Iterable

REHEARSAL, PAPER, ANALYSIS, JOBS, LOGS, CODE = FOLDERS = (
    "rehearsal",
    "paper",
    "analysis",
    "jobs",
    "logs",
    "code",
)
"""Folders of runs/ that belong to no experiment. In order: rehearsals; tables and figures of the paper;
attention of models that belong to no run; messages between a job and its ranks; output of jobs; the code
that jobs run."""
RANDOM_INIT = "random_init_{}_layers"
"""Name of a random start in a seed's folder."""
LOCK, TEMPORARY = ".lock", ".tmp"
"""What follows a folder's name in the names of its lock and of its temporary copy."""
WITHIN_RUN = (
    "init",
    "checkpoints",
    "final",
    "validation",
    "experiment.yaml",
    "provenance.json",
    "metrics.jsonl",
    "metrics.discarded.jsonl",
    "train.log",
    "wandb_id",
    "attention.jsonl",
    "results.json",
    "DONE",
    "STOP",
    "STOPPED",
    "bad_batch.json",
)
"""Names of a run's own files (rundir.RunDir). Paths to weights end in one of them."""
PLOTS = (
    "max_rank.png",
    "max_rank_taus.png",
    "avg_mass.png",
    "rank_heat_map.png",
    "layer_worth.png",
    "attention_maps.png",
)
"""Plots that `analyze` writes alongside attention.jsonl."""
BESIDE_RUNS = (".md", ".csv", ".tex", ".png", ".html")
"""Ends of the names of the tables, plots and reports in a seed's folder."""
MAX_NAME_BYTES = 150
"""A file's name has at most 255 bytes. The lock, a hash, or a temporary name with the machine's name take up
to 100 of them."""


def format_name(name: str) -> str:
    """Return a name for a sentence: escaped where it cannot be printed, and not longer than a line."""
    plain = name if name.isprintable() else repr(name)[1:-1]
    return plain if len(plain) <= 60 else f"{plain[:40]}..."


def find_folder_problem(name: str) -> str:
    """Return why no folder may have this name, as the end of a sentence; empty if it may."""
    if not name.isprintable():
        return "holds a character that cannot be printed; leave it out"
    if name.startswith("-"):
        return "begins with '-', as a flag does; begin with another character"
    if len(name.encode()) > MAX_NAME_BYTES:
        size = len(name.encode())
        return f"has {size} bytes; a folder's name has {MAX_NAME_BYTES} at most here, shorten it"
    return ""


def find_experiment_problem(name: str) -> str:
    """Return why no experiment may have this name, as `find_folder_problem` does."""
    if name.casefold() in FOLDERS:
        return f"is a reserved folder name in runs/ ({', '.join(FOLDERS)}); choose another"
    return find_folder_problem(name)


def find_run_problem(name: str) -> str:
    """Return why no run may have this name, as `find_folder_problem` does."""
    folded = name.casefold()
    if folded.startswith(RANDOM_INIT.partition("{")[0]):
        return "begins like the random starts in the same folder (random_init_4_layers); choose another"
    if re.fullmatch(r"stage[0-9]+|at_[0-9]+", folded):
        return "is the name of a stage, or of weights kept at a step; choose another"
    if folded in [own.casefold() for own in WITHIN_RUN]:
        return "is the name of a file or folder within every run; choose another"
    if LOCK in folded or TEMPORARY in folded:
        return f"holds '{LOCK}' or '{TEMPORARY}', which mark locks and unfinished files; choose another"
    if folded.endswith(BESIDE_RUNS):
        return "ends like the tables and plots in the same folder; choose another"
    return find_folder_problem(name)


def find_task_problem(name: str) -> str:
    """Return why no task of `evaluate` may have this name, as the end of a sentence; empty if it may.

    --tasks a,b lists several tasks, --tasks none is no task, and tasks.NAME.METRIC is a score."""
    if name == "none" or not re.fullmatch(r"[^\s,.]+", name) or not name.isprintable():
        return "is not a valid task name; use neither 'none' nor blanks, commas and dots"
    return ""


def find_same_folder(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two names that are one on a file system that ignores case, or None."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            return other, name
    return None
