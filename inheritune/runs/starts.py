"""The first weights of a job: a random model of its size, or what `init` of its run names."""

from pathlib import Path

from inheritune.config.layers import parse_auto, repeat_middle
from inheritune.config.run import HalfWidth, Inherit, Stack
from inheritune.data.batches import Tokens
from inheritune.data.tokenizer_comparison import has_same_ids, open_encoder
from inheritune.errors import UserError
from inheritune.files import writing
from inheritune.files.lock import Lock
from inheritune.files.markers import INHERITED
from inheritune.models.networks import build_config
from inheritune.models.sources import open_source
from inheritune.models.surgery import extend_model, halve_width, inherit, write_random
from inheritune.runs.chosen_blocks import choose_blocks, locate_source
from inheritune.runs.job import Job
from inheritune.runs.pins import check_model
from inheritune.runtime import signals


def prepare_start(job: Job) -> Path:
    """Return the folder of the checkpoint that the job starts from, and write it if it does not exist yet.
    Only rank 0 calls this."""
    copied = job.run.init.copied
    if copied is None and not job.continues_stage:
        check_model(job.experiment)
        return make_random_start(job, job.depths()[0] if job.stage else job.experiment.layers_of(job.run))
    folder = job.dir.init
    if (folder / INHERITED).is_file():
        if job.dir.experiment.is_file() or job.dir.complete_checkpoints():
            return folder
        # left by a start that was refused or killed before the run began; the settings may have changed since
        writing.remove_path(folder)
    if job.continues_stage:
        _continue_stage(job, folder)
    elif isinstance(copied, HalfWidth):
        source, revision = find_source(job, copied.source, copied.revision)
        halve_width(source, folder, revision)
    elif copied:
        _copy_blocks(job, copied, folder)
    return folder


def _continue_stage(job: Job, folder: Path) -> None:
    """Write the weights of the stage before to `folder`, with more blocks: those of the reference that come
    next, or its own middle ones again."""
    copied, grow = job.run.init.inherit, job.run.grow
    assert job.stage and grow, "only a stage of a grown run continues another"
    before, after = job.depths()[job.stage - 2 : job.stage]
    previous = job.root.stage(job.stage - 1)
    if not previous.is_done():
        raise UserError(
            f"stage {job.stage} continues stage {job.stage - 1}, which is not finished; train that one first"
        )
    if grow.from_ == "middle":
        inherit(previous.final, repeat_middle(before, after - before), folder)
    elif copied:
        source, revision = find_source(job, copied.source, copied.revision)
        extend_model(previous.final, source, before, after, folder, revision)


def _copy_blocks(job: Job, copied: Inherit | Stack, folder: Path) -> None:
    """Write the blocks that `copied` names to `folder`; those of this stage's depth, in a grown run."""
    source, revision = find_source(job, copied.source, copied.revision)
    layers: str | list[int] = f"0:{job.depths()[job.stage - 1]}" if job.stage else copied.layers
    if choice := parse_auto(layers):
        layers = choose_blocks(job, copied, choice, source, revision)
    if isinstance(copied, Inherit):
        inherit(
            source,
            layers,
            folder,
            copied.parts,
            modules=copied.modules,
            seed=job.seed,
            revision=revision,
            depth=copied.depth,
            at=copied.at or 0,
        )
    else:
        inherit(source, layers, folder, copied.parts, seed=job.seed, revision=revision, copies=2)


def make_random_start(job: Job, layers: int) -> Path:
    """Return the folder of the random model of this experiment and seed with `layers` blocks, and write it if
    it does not exist yet."""
    folder = job.root.seed_checkpoint(layers)
    with Lock(folder, signals.get_stop_signal):  # runs of one size share it, and may start at the same time
        if not (folder / INHERITED).is_file():
            write_random(build_config(job.experiment.model, layers), folder, seed=job.seed)
    return folder


def find_source(job: Job, source: str, revision: str | None) -> tuple[str, str | None]:
    """Return `locate_source`, and write the random model that it may name."""
    if job.experiment.rehearsal and source not in job.experiment.runs:
        make_random_start(job, job.experiment.model.layers)
    return locate_source(job, source, revision)


def find_foreign_tokenizer(job: Job, tokens: Tokens) -> str | None:
    """Return a sentence on a model from elsewhere, which the job copies or learns from, whose tokenizer gives
    other ids than that of the data; None where there is none, and in a rehearsal, whose models are random.

    A model that cannot be opened any more is passed over: the start may have been made from it before."""
    outside = [pair for pair in job.run.sources() if pair[0] not in job.experiment.runs]
    for source, revision in [] if job.experiment.rehearsal else outside:
        try:
            encode = open_encoder(open_source(source, revision, check=False).folder)
        except UserError:
            continue
        if encode and not has_same_ids(encode, tokens, job.experiment.data):
            return (
                f"the tokenizer of {source} gives other ids than {job.experiment.data.tokenizer}, the one of "
                f"the data: its embedding knows other tokens; to keep its own, set data.tokenizer to it"
            )
    return None
