"""Names that you choose, which become names of folders: what they may be, so that they meet nothing of
ours.

    runs/EXPERIMENT/seed0/RUN/ ...      runs/rehearsal/EXPERIMENT/ ...      data/NAME-<hash>/

runs/ also holds the folders of FOLDERS, a seed's folder also tables, plots and random starts, beside each
folder lie its lock and its temporary twin. A name with '/' would lead elsewhere, one with ',' or '@' would be
two names in --run.
"""

import re

REHEARSAL, PAPER, ANALYSIS, JOBS, LOGS = FOLDERS = ("rehearsal", "paper", "analysis", "jobs", "logs")
"""Folders of runs/ that are no experiment's: rehearsals; tables and figures of the paper; attention of models
that are no run's; what a job and its ranks tell each other; what jobs print."""
RANDOM_INIT = "random_init_{}_layers"
"""The random starts of a seed's folder."""
LOCK, TEMPORARY = ".lock", ".tmp"
"""What follows a folder's name in the names of its lock and of its temporary twin."""
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
"""Names of a run's own files (rundir.RunDir), which paths to weights end in."""
PLOTS = ("max_rank.png", "max_rank_taus.png", "avg_mass.png", "rank_heat_map.png", "attention_maps.png")
"""What `analyze` draws beside attention.jsonl."""
BESIDE_RUNS = (".md", ".csv", ".tex", ".png")
"""Ends of the names of the tables and plots in a seed's folder."""
MOST_BYTES = 150
"""A file's name has 255 bytes at most, of which the lock, a hash, or a temporary name with the machine's take
up to 100."""


def shown(name: str) -> str:
    """A name in a sentence: what cannot be printed escaped, and not longer than a line."""
    plain = name if name.isprintable() else repr(name)[1:-1]
    return plain if len(plain) <= 60 else f"{plain[:40]}..."


def folder_problem(name: str) -> str:
    """Why no folder may have this name, as the end of a sentence; empty if it may."""
    if not name.isprintable():
        return "holds a character that cannot be printed; leave it out"
    if name.startswith("-"):
        return "begins with '-', as a flag does; begin with another character"
    if len(name.encode()) > MOST_BYTES:
        return f"has {len(name.encode())} bytes; a folder's name has {MOST_BYTES} at most here, shorten it"
    return ""


def experiment_problem(name: str) -> str:
    """The same for an experiment."""
    if name.casefold() in FOLDERS:
        return f"is the name of a folder of ours in runs/ ({', '.join(FOLDERS)}); choose another"
    return folder_problem(name)


def run_problem(name: str) -> str:
    """The same for a run."""
    folded = name.casefold()
    if folded.startswith(RANDOM_INIT.partition("{")[0]):
        return "begins as the random starts in the same folder do (random_init_4_layers); choose another"
    if re.fullmatch(r"stage[0-9]+|at_[0-9]+", folded):
        return "is the name of a stage, or of weights kept at a step; choose another"
    if folded in [own.casefold() for own in WITHIN_RUN]:
        return "is the name of a file or folder within every run; choose another"
    if LOCK in folded or TEMPORARY in folded:
        return (
            f"holds '{LOCK}' or '{TEMPORARY}', by which locks and unfinished files are known; choose another"
        )
    if folded.endswith(BESIDE_RUNS):
        return "ends as the tables and plots in the same folder do; choose another"
    return folder_problem(name)


def task_problem(name: str) -> str:
    """The same for a task of `evaluate`: --tasks a,b lists several, none is none, tasks.NAME.METRIC is a
    score."""
    if name == "none" or not re.fullmatch(r"[^\s,.]+", name) or not name.isprintable():
        return "is no name of a task; use neither 'none' nor blanks, commas and dots"
    return ""


def same_folder(names) -> tuple[str, str] | None:
    """Two names that are one on a file system that does not tell capitals from small letters, or None."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            return other, name
    return None
