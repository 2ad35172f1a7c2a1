"""The blocks that `layers: auto:N` of a run keeps. `check` asks on hosts without torch."""

from inheritune.config.layers import AutoLayers, parse_auto
from inheritune.config.run import External, Inherit, Stack
from inheritune.files.advice import format_seed_flag
from inheritune.files.markers import INHERITED
from inheritune.files.rundir import require_weights
from inheritune.models.choice import choose_layers, format_analyze
from inheritune.runs.job import Job


def choose_blocks(
    job: Job, copied: Inherit | Stack, choice: AutoLayers, source: str, revision: str | None
) -> list[int]:
    """Return the blocks of `source` that `choice` keeps, by its analysis: its own, or that of a run of the
    file which is the same third-party model.

    Raises UserError, with the command that makes it, if there is none."""
    experiment = job.experiment
    external = External(source=copied.source, revision=copied.revision)
    same = [name for name, run in experiment.runs.items() if run.init.external == external]
    known = [*same, *({copied.source} & experiment.runs.keys())]
    data = experiment.given.removesuffix(" --rehearse")
    command = format_analyze(known[0], data) if known else format_analyze(source, data, revision)
    command = f"{'REHEARSE=1 ' if experiment.rehearsal else ''}{command}{format_seed_flag(job.seed)}"
    folders = [job.sibling(name) for name in same]
    return choose_layers(choice, source, revision, command, experiment.rehearsal, folders)


def check_choice(job: Job) -> None:
    """Raise UserError, with the command that makes it, if the job's start needs an analysis of its source
    that is not there. Its source, if that is a run, is finished."""
    copied, experiment = job.run.init.copied, job.experiment
    choice = parse_auto(copied.layers) if isinstance(copied, Inherit | Stack) and not job.stage else None
    if choice is None or (job.dir.init / INHERITED).is_file():
        return
    assert isinstance(copied, Inherit | Stack)
    source, revision = copied.source, copied.revision
    if source in experiment.runs:
        source, revision = str(require_weights(experiment, source, job.seed)), None
    elif experiment.rehearsal:  # a random model stands in for the public one
        source, revision = str(job.root.seed_checkpoint(experiment.model.layers)), None
    choose_blocks(job, copied, choice, source, revision)
