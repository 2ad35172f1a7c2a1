"""Where a job's first weights come from: a random model of its size, or what `init` of its run names."""

from inheritune.errors import UserError
from inheritune.files import rundir
from inheritune.files.lock import Lock
from inheritune.files.rundir import finished_weights
from inheritune.models.architectures import hf_config
from inheritune.models.surgery import extend, halve, inherit, write_random
from inheritune.runs.job import Job
from inheritune.runtime import signals


def prepare_start(job: Job):
    """The checkpoint that the job starts from, made by rank 0 if it is not there yet.  -> its folder"""
    copied, inherited = job.run.init.copied, job.run.init.inherit
    if copied is None:
        return random_start(job, job.experiment.layers_of(job.run))
    folder = job.dir.init
    if (folder / "inherited.json").is_file():
        if job.dir.experiment.is_file() or job.dir.complete_checkpoints():
            return folder
        rundir.remove(
            folder
        )  # of a start that was refused or killed before the run began: asked for otherwise, perhaps
    source, revision = source_of(job, copied.source, copied.revision)
    if job.run.init.half_width:
        halve(source, folder, revision)
        return folder
    layers, options = copied.layers, {"copies": 2}
    if inherited:
        options = {"modules": inherited.modules, "depth": inherited.depth, "at": inherited.at or 0}
    if job.stage:
        depths = job.depths()
        layers = f"0:{depths[job.stage - 1]}"
        if job.stage > 1 and job.run.grow.from_ == "previous":
            before = job.root.stage(job.stage - 1)
            if not before.is_done():
                raise UserError(
                    f"stage {job.stage} continues stage {job.stage - 1}, which is not finished; train that "
                    f"one first"
                )
            extend(before.final, source, depths[job.stage - 2], depths[job.stage - 1], folder)
            return folder
    inherit(source, layers, folder, copied.parts, seed=job.seed, revision=revision, **options)
    return folder


def random_start(job: Job, layers: int):
    """The random model of this experiment and seed with `layers` blocks, written once.  -> its folder"""
    folder = job.root.seed_checkpoint(layers)
    with Lock(folder, signals.asked_to_stop):  # runs of one size share it, and may start at the same time
        if not (folder / "inherited.json").is_file():
            write_random(hf_config(job.experiment.model, layers), folder, seed=job.seed)
    return folder


def source_of(job: Job, source: str, revision: str | None) -> tuple[str, str | None]:
    """(path or id, revision) of a model that a run copies or learns from. Raises UserError if it is a run of
    the file that is not finished."""
    if source in job.experiment.runs:
        return str(finished_weights(job.experiment, source, job.seed)), None
    if (
        job.experiment.rehearsal
    ):  # a public model has not the rehearsal's size: a random one of that size stands in for it
        return str(random_start(job, job.experiment.model.layers)), None
    return source, revision
