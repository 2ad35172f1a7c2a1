"""Whether the models that runs copy have the shape that the experiment states. Nothing here imports torch.

A run's own weights decide what is trained, so a `model` section of another shape would only make `plan`, the
random starts and the table's parameter counts wrong, without a word.
"""

from collections.abc import Iterable
from pathlib import Path

from inheritune.config.experiment import Experiment
from inheritune.config.source_shape import PADDING, find_config, find_contradictions, read_shape
from inheritune.errors import UserError

EXEMPT = ("norm_eps",)
"""Keys of `model` that are no sizes."""


def check_sources(experiment: Experiment, names: Iterable[str] | None = None) -> None:
    """Raise UserError if a model outside the file that a run copies has another shape than `model` states.

    `names` are the runs to look at, by default all. A source that is neither a folder with a config.json nor
    in the Hub's cache is not compared. In a rehearsal there is nothing to compare: random models stand in."""
    if experiment.rehearsal:
        return
    for name in names or experiment.runs:
        start = experiment.run(name).init.copied
        if start is None or start.source in experiment.runs:
            continue
        try:
            path = find_config(start.source, start.revision, may_download=False)
            shape = read_shape(path)
        except UserError:  # the start itself says what is wrong with it
            continue
        if found := _compare(experiment, shape, path):
            raise UserError(
                f"{experiment.name}: run '{name}' copies {start.source}, which has another shape than "
                f"`model`: {'; '.join(found)}; write 'model: {{from: {start.source}}}' in place of the sizes"
            )


def _compare(experiment: Experiment, shape: dict, path: Path) -> list[str]:
    """Return a sentence for each key of `model` that is otherwise in `shape`, read from `path`."""
    stated = experiment.model.model_dump(exclude=set(EXEMPT))
    if abs(stated["vocab_size"] - shape["vocab_size"]) < PADDING:
        stated["vocab_size"] = shape["vocab_size"]
    return find_contradictions(stated, shape, path)
