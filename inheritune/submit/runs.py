"""Which runs of an experiment the tasks of an array work on."""

from inheritune.cluster.planner import find_unfinished_source
from inheritune.config.experiment import Experiment
from inheritune.errors import UserError
from inheritune.files.rundir import RunDir
from inheritune.runs.chosen_blocks import check_choice, find_choice, find_measured_run
from inheritune.runs.job import Job


def list_runs(experiment: Experiment, verb: str) -> list[str]:
    """Return the runs that the tasks of an array of `verb` work on, task 1 first.

    Raises UserError if there is none."""
    found = list_baselines(experiment) if verb == "baselines" else list(experiment.runs)
    if not found:
        raise UserError(f"{experiment.name} has no such run: nothing to submit")
    return found


def list_baselines(experiment: Experiment) -> list[str]:
    """Return the runs that are trained, are not grown, and are not what a grown run is compared with."""
    references = {experiment.reference_of(run) for run in experiment.runs.values() if run.grow}
    references.add("reference")
    return [
        name
        for name, run in experiment.runs.items()
        if not (run.grow or run.init.external or name in references)
    ]


def list_waiting(experiment: Experiment) -> dict[int, list[int]]:
    """Return {number of a baseline: numbers of the baselines that it starts from}, counted from 1, without
    those that start from none."""
    numbers = {name: number for number, name in enumerate(list_baselines(experiment), 1)}
    sources = {
        number: [numbers[source] for source, _ in experiment.run(name).sources() if source in numbers]
        for name, number in numbers.items()
    }
    return {number: needed for number, needed in sources.items() if needed}


def list_unmeasured(experiment: Experiment, seed: int) -> dict[int, str]:
    """Return {number of a baseline, counted from 1: run whose analysis chooses its blocks} of those whose
    analysis is not there, or was made of other weights."""
    found = {}
    for number, name in enumerate(list_baselines(experiment), 1):
        job = Job(experiment, name, seed)
        chosen = None if job.dir.is_done() else find_choice(job)
        if chosen is None or (run := find_measured_run(experiment, chosen[0])) is None:
            continue
        try:
            if not find_unfinished_source(experiment, job.run, seed):
                check_choice(job)
                continue
        except UserError:
            pass
        found[number] = run
    return found


def is_finished(experiment: Experiment, run: str, seed: int) -> bool:
    """Return whether a run can be evaluated: it is finished, or, outside a rehearsal, a third-party model."""
    if experiment.run(run).init.external:
        return not experiment.rehearsal
    return RunDir.of(experiment, run, seed).is_done()
