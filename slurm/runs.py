"""Names of an experiment's runs, one a line, for the array jobs: python slurm/runs.py EXPERIMENT all|baselines

all: every run. baselines: those that are trained, are not grown, and are not what a grown run is compared with.
"""

import sys

from inheritune.config import Experiment, UserError, load_experiment


def names(experiment: Experiment, kind: str) -> list[str]:
    """The runs of `kind`, in the order of the file."""
    references = {experiment.reference_of(run) for run in experiment.runs.values() if run.grow} | {"reference"}
    return [
        name
        for name, run in experiment.runs.items()
        if kind == "all" or not (run.grow or run.init.external or name in references)
    ]


if __name__ == "__main__":
    try:
        print("\n".join(names(load_experiment(sys.argv[1]), sys.argv[2])))
    except UserError as error:
        print(f"inheritune: {error}", file=sys.stderr)
        sys.exit(2)
