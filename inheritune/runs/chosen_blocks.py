"""The blocks that `layers: auto:N` of a run keeps. `check` asks on hosts without torch."""

from inheritune.config.experiment import Experiment
from inheritune.config.layers import AutoLayers, parse_auto
from inheritune.config.run import External, Inherit, Stack
from inheritune.files.advice import format_seed_flag
from inheritune.files.markers import INHERITED
from inheritune.files.rundir import require_weights
from inheritune.models.choice import choose_layers, format_analyze
from inheritune.runs.job import Job
from inheritune.runs.pins import pin_revision


def locate_source(job: Job, source: str, revision: str | None) -> tuple[str, str | None]:
    """Return (path or id, commit) of a model that a run copies or learns from.

    In a rehearsal a random model of its size, which may not be there yet, stands in for a public one. Raises
    UserError if it is an unfinished run of the same file."""
    if source in job.experiment.runs:
        return str(require_weights(job.experiment, source, job.seed)), None
    if job.experiment.rehearsal:
        return str(job.root.seed_checkpoint(job.experiment.model.layers)), None
    return source, pin_revision(job.experiment, source, revision)


def choose_blocks(
    job: Job, copied: Inherit | Stack, choice: AutoLayers, source: str, revision: str | None
) -> list[int]:
    """Return the blocks of `source` that `choice` keeps, by its analysis: its own, or that of a run of the
    file which is the same third-party model.

    Raises UserError, with the command that makes it, if there is none."""
    experiment = job.experiment
    known, same = find_measured_run(experiment, copied), _list_same(experiment, copied)
    data = experiment.given.removesuffix(" --rehearse")
    command = format_analyze(known, data) if known else format_analyze(source, data, revision)
    command = f"{'REHEARSE=1 ' if experiment.rehearsal else ''}{command}{format_seed_flag(job.seed)}"
    folders = [job.sibling(name) for name in same]
    return choose_layers(choice, source, revision, command, experiment.rehearsal, folders)


def _list_same(experiment: Experiment, copied: Inherit | Stack) -> list[str]:
    """Return the runs of the file that are the third-party model `copied` names."""
    external = External(source=copied.source, revision=copied.revision)
    return [name for name, run in experiment.runs.items() if run.init.external == external]


def find_measured_run(experiment: Experiment, copied: Inherit | Stack) -> str | None:
    """Return the run of the file whose analysis chooses the blocks; None if the source is no run of it."""
    return next(iter([*_list_same(experiment, copied), *({copied.source} & experiment.runs.keys())]), None)


def find_choice(job: Job) -> tuple[Inherit | Stack, AutoLayers] | None:
    """Return what the job's start copies and how its blocks are chosen; None if an analysis has no say in it,
    or if it has chosen already."""
    copied = job.run.init.copied
    choice = parse_auto(copied.layers) if isinstance(copied, Inherit | Stack) and not job.stage else None
    if choice is None or (job.dir.init / INHERITED).is_file():
        return None
    assert isinstance(copied, Inherit | Stack)
    return copied, choice


def check_choice(job: Job) -> None:
    """Raise UserError, with the command that makes it, if the job's start needs an analysis of its source
    that is not there. Its source, if that is a run, is finished."""
    if found := find_choice(job):
        copied, choice = found
        source, revision = locate_source(job, copied.source, copied.revision)
        choose_blocks(job, copied, choice, source, revision)
