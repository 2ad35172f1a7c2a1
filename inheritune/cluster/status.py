"""`status EXPERIMENT`: the state of every run, read from the run folders and squeue only, without torch.

Runs are written while this reads. What the paper's logs say at the same step comes from recipes/paper
(curves.yaml says which curve belongs to which run).
"""

import sys
import time

from tabulate import tabulate

from inheritune.cluster.commands import format_command
from inheritune.cluster.planner import find_unfinished_source
from inheritune.cluster.standing import STATUS_COLUMNS, View, list_standings
from inheritune.config.experiment import load_experiment
from inheritune.config.run import Run
from inheritune.runtime import streams

WATCH_S = 30


def status(experiment: str, seed: int = 0, rehearse: bool | None = None) -> None:
    """Print the standing of every run of `experiment`, then errors and next commands.

    A run whose files are damaged or cannot be read is a row with a remark."""
    loaded = load_experiment(experiment, rehearse)
    view = View(loaded, seed)
    cells, remarks, finished = [], [*view.errors], set[str]()
    for name, run in loaded.runs.items():
        standings = list_standings(view, name, run)
        cells += [standing.cells() for standing in standings]
        errors = list(dict.fromkeys(error for standing in standings for error in standing.errors))
        command = find_next_command(view, name, run, standings[0].state)
        finished |= {name} if standings[0].state == "finished" and not errors else set()
        if errors or command:
            remarks.append(f"{name}: " + "; ".join(errors + ([f"next: {command}"] if command else [])))
    mark = "REHEARSAL " if loaded.rehearsal else ""
    print(f"{mark}{loaded.name}, seed {seed}, in {view.folder('').path}\n")
    used = [i for i in range(len(STATUS_COLUMNS)) if any(row[i] for row in cells)]
    shown = [[row[i] for i in used] for row in cells]
    headers = [STATUS_COLUMNS[i] for i in used]
    print(tabulate(shown, headers=headers, tablefmt="simple", disable_numparse=True))
    if loaded.paper and loaded.paper[0].run in finished:  # without that row there is no table
        remarks.append(f"all that is finished: {format_command('table', loaded, seed=seed)}")
    print("\n" + "\n".join(remarks))


def watch_status(experiment: str, seed: int = 0, rehearse: bool | None = None) -> None:
    """Print the status again every WATCH_S seconds, until Ctrl-C or until nobody reads it."""
    while not streams.write_errors:
        print(f"\033[H\033[2J{time.strftime('%F %T')}, every {WATCH_S} s; Ctrl-C ends this\n")
        status(experiment, seed, rehearse)
        sys.stdout.flush()
        time.sleep(WATCH_S)


def find_next_command(view: View, name: str, run: Run, state: str) -> str:
    """Return the line to paste that continues the run.

    It is empty if the run is queued, running or finished, or if its state is unknown."""
    if state in ("running", "finished", "unknown"):
        return ""
    loaded, seed = view.experiment, view.seed
    if not run.init.external and (queued := view.find_queued("train", name)):  # a second would do the same
        return f"scancel {queued.name}" if queued.is_lost else ""
    stop = view.folder(name).stop
    remove = f"rm {stop} && " if stop.is_file() else ""
    found = _find_next_verb(view, name, run)
    if found is None:
        return ""
    verb, name = found
    if view.find_queued("prepare" if verb == "prepare" else "train", name) or _does_growth(view, verb, name):
        return ""
    if verb == "prepare":
        remove, seed = "", 0
    return remove + format_command(verb, loaded, name, seed, slurm=view.slurm and verb != "evaluate")


def _does_growth(view: View, verb: str, name: str) -> bool:
    """Return whether a queued growth will do `verb` on run `name` itself: the data, and its reference."""
    grown = [run for own, run in view.experiment.runs.items() if run.grow and view.find_queued("train", own)]
    return any(verb == "prepare" or view.experiment.reference_of(run) == name for run in grown)


def _find_next_verb(view: View, name: str, run: Run) -> tuple[str, str] | None:
    """Return (verb, run) of what run `name` needs next; None if it cannot be told, or is queued."""
    needed = None
    if not run.init.external:
        try:
            needed = find_unfinished_source(view.experiment, run, view.seed)
        except OSError:  # that run has a row of its own, which says what cannot be read
            return None
    if run.grow:  # grow itself does what its run needs, unless a job is about to
        waits = not view.data_ready and view.find_queued("prepare", "")
        return None if waits or needed and view.find_queued("train", needed) else ("grow", name)
    if not view.data_ready:
        return "prepare", ""
    if run.init.external:
        return "evaluate", name
    if needed:
        return "grow" if view.experiment.run(needed).grow else "train", needed
    return "train", name
