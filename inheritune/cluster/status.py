"""`status EXPERIMENT`: the state of every run, read from the run folders and squeue only, without torch.

Runs are written while this reads. What the paper's logs say at the same step comes from recipes/paper
(curves.yaml says which curve belongs to which run).
"""

import sys
import time

from tabulate import tabulate

from inheritune.cluster.planner import find_unfinished_source
from inheritune.cluster.standing import STATUS_COLUMNS, View, list_standings
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.jobs import format_shape
from inheritune.config.run import Run
from inheritune.files.rundir import format_seed_flag
from inheritune.runtime import launcher, streams

WATCH_S = 30


def status(experiment: str, seed: int = 0, rehearse: bool | None = None) -> None:
    """Print the standing of every run of `experiment`, then errors and next commands.

    A run whose files are damaged or cannot be read is a row with a remark."""
    loaded = load_experiment(experiment, rehearse)
    view = View(loaded, seed)
    cells, remarks = [], [*view.errors]
    for name, run in loaded.runs.items():
        standings = list_standings(view, name, run)
        cells += [standing.cells() for standing in standings]
        errors = list(dict.fromkeys(error for standing in standings for error in standing.errors))
        command = find_next_command(view, experiment, name, run, standings[0].state)
        if errors or command:
            remarks.append(f"{name}: " + "; ".join(errors + ([f"next: {command}"] if command else [])))
    mark = "REHEARSAL " if loaded.rehearsal else ""
    print(f"{mark}{loaded.name}, seed {seed}, in {view.folder('').path}\n")
    used = [i for i in range(len(STATUS_COLUMNS)) if any(row[i] for row in cells)]
    shown = [[row[i] for i in used] for row in cells]
    headers = [STATUS_COLUMNS[i] for i in used]
    print(tabulate(shown, headers=headers, tablefmt="simple", disable_numparse=True))
    if loaded.paper:
        remarks.append(
            f"all that is finished: python -m inheritune table {experiment}{_list_flags(loaded, seed)}"
        )
    print("\n" + "\n".join(remarks))


def watch_status(experiment: str, seed: int = 0, rehearse: bool | None = None) -> None:
    """Print the status again every WATCH_S seconds, until Ctrl-C or until nobody reads it."""
    while not streams.write_errors:
        print(f"\033[H\033[2J{time.strftime('%F %T')}, every {WATCH_S} s; Ctrl-C ends this\n")
        status(experiment, seed, rehearse)
        sys.stdout.flush()
        time.sleep(WATCH_S)


def _list_flags(experiment: Experiment, seed: int) -> str:
    return format_seed_flag(seed) + (" --rehearse" if experiment.rehearsal else "")


def find_next_command(view: View, experiment: str, name: str, run: Run, state: str) -> str:
    """Return the line to paste that continues the run.

    It is empty if the run is queued, running or finished, or if its state is unknown."""
    if state in ("running", "finished", "unknown"):
        return ""
    loaded, seed = view.experiment, view.seed
    if run.init.external:
        return f"python -m inheritune evaluate {experiment} --run {name}{_list_flags(loaded, seed)}"
    if queued := view.find_queued("train", name):  # a second job would do the same
        return f"scancel {queued.name}" if queued.is_lost else ""
    stop, verb = view.folder(name).stop, "grow" if run.grow else "train"
    remove = f"rm {stop} && " if stop.is_file() else ""
    try:
        first = _list_first(view, run)
    except OSError:  # a run that it starts from has a row of its own, which says what cannot be read
        return ""
    # a growth does itself what comes first
    if any(view.find_queued(*work) for work in (first if verb == "grow" else first[:1])):
        return ""
    if verb == "train" and first:
        purpose, name = first[0]
        if purpose == "prepare":
            return _format_verb(view, "prepare", experiment, "", 0)
        verb = "grow" if loaded.run(name).grow else "train"
    return remove + _format_verb(view, verb, experiment, name, seed)


def _list_first(view: View, run: Run) -> list[tuple[str, str]]:
    """Return what must be done before `run` as (purpose of a key, run): its data, then what it starts from.

    Raises OSError if that cannot be read."""
    needed = find_unfinished_source(view.experiment, run, view.seed)
    return ([] if view.data_ready else [("prepare", "")]) + ([("train", needed)] if needed else [])


def _format_verb(view: View, verb: str, experiment: str, name: str, seed: int) -> str:
    """Return the line that runs `verb` on run `name` (empty for prepare), with Slurm where there is one."""
    if not view.slurm:
        run = f" --run {name}" if name else ""
        return f"python -m inheritune {verb} {experiment}{run}{_list_flags(view.experiment, seed)}"
    prefix = "REHEARSE=1 " if view.experiment.rehearsal else format_shape(verb, view.experiment.name)
    run = f" {name}" if name else ""
    return f"{prefix}{launcher.format_script(verb)} {experiment}{run}{format_seed_flag(seed)}"
