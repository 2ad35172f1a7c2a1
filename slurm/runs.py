"""Names of an experiment's runs, one a line, for the array jobs: python slurm/runs.py EXPERIMENT KIND [SEED]

all: every run. baselines: those that are trained, are not grown, and are not what a grown run is compared
with. waiting: for each of these that starts from others of them, its number in that list and, with a comma
between, theirs. finished: those that can be evaluated, the models of others among them.
"""

import sys

from inheritune.config.experiment import Experiment, load_experiment
from inheritune.errors import UserError
from inheritune.files.rundir import RunDir


def names(experiment: Experiment, kind: str, seed: int = 0) -> list[str]:
    """The runs of `kind`, in the order of the file."""
    if kind == "finished":
        public = (
            set()
            if experiment.rehearsal
            else {name for name, run in experiment.runs.items() if run.init.external}
        )
        return [
            name for name in experiment.runs if name in public or RunDir.of(experiment, name, seed).is_done()
        ]
    references = {experiment.reference_of(run) for run in experiment.runs.values() if run.grow} | {
        "reference"
    }
    return [
        name
        for name, run in experiment.runs.items()
        if kind == "all" or not (run.grow or run.init.external or name in references)
    ]


def waiting(experiment: Experiment) -> list[str]:
    """The lines of that kind, such as "17 16"."""
    numbers = {name: str(number) for number, name in enumerate(names(experiment, "baselines"), 1)}
    sources = {
        name: [numbers[s] for s, _ in experiment.run(name).sources() if s in numbers] for name in numbers
    }
    return [f"{numbers[name]} {','.join(found)}" for name, found in sources.items() if found]


if __name__ == "__main__":
    try:
        experiment, kind = load_experiment(sys.argv[1]), sys.argv[2]
        print(
            "\n".join(
                waiting(experiment) if kind == "waiting" else names(experiment, kind, *map(int, sys.argv[3:]))
            )
        )
    except UserError as error:
        print(f"inheritune: {error}", file=sys.stderr)
        sys.exit(2)
