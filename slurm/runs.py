"""Print names of an experiment's runs, one a line, for the array jobs.

    python slurm/runs.py EXPERIMENT KIND [SEED]

all: every run.
baselines: the runs that are trained, are not grown, and are not what a grown run is compared with.
waiting: a line such as "17 16" for each baseline that starts from other baselines: its number in that list
    and theirs, separated by commas.
finished: the runs that can be evaluated, including third-party models.
"""

import sys

from inheritune.config.experiment import Experiment, load_experiment
from inheritune.errors import UserError
from inheritune.files.rundir import RunDir


def list_runs(experiment: Experiment, kind: str, seed: int = 0) -> list[str]:
    """Return the names of the runs of `kind`, in the order of the file."""
    if kind == "all":
        return list(experiment.runs)
    if kind == "finished":
        return _list_finished(experiment, seed)
    references = {experiment.reference_of(run) for run in experiment.runs.values() if run.grow}
    references.add("reference")
    return [
        name
        for name, run in experiment.runs.items()
        if not (run.grow or run.init.external or name in references)
    ]


def _list_finished(experiment: Experiment, seed: int) -> list[str]:
    """Return the names of the finished runs and, outside a rehearsal, of the third-party models."""
    found = []
    for name, run in experiment.runs.items():
        is_public = bool(run.init.external) and not experiment.rehearsal
        if is_public or RunDir.of(experiment, name, seed).is_done():
            found.append(name)
    return found


def list_waiting(experiment: Experiment) -> list[str]:
    """Return the lines of kind "waiting"."""
    numbers = {name: str(number) for number, name in enumerate(list_runs(experiment, "baselines"), 1)}
    lines = []
    for name, number in numbers.items():
        sources = [numbers[source] for source, _ in experiment.run(name).sources() if source in numbers]
        if sources:
            lines.append(f"{number} {','.join(sources)}")
    return lines


def main(name: str, kind: str, *seed: str) -> None:
    """Print the lines of `kind` for the experiment called `name`."""
    experiment = load_experiment(name)
    lines = list_waiting(experiment) if kind == "waiting" else list_runs(experiment, kind, *map(int, seed))
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(f"inheritune: {error}", file=sys.stderr)
        sys.exit(2)
