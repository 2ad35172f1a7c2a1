"""Whether the loss of a third-party model can be measured on an experiment's tokens.

A model that was trained on other token ids has no meaningful loss on these. Growth asks before it prepares
anything, on hosts that have neither torch nor the tokenizers' libraries: these are imported where needed.
"""

import contextlib
from importlib.util import find_spec

from inheritune.config.experiment import Experiment
from inheritune.config.paths import resolve_path
from inheritune.config.source_shape import find_config, read_shape
from inheritune.data.tokenizer_files import check_embedding, count_ids
from inheritune.errors import UserError
from inheritune.files.markers import is_prepared
from inheritune.files.rundir import get_data_dir
from inheritune.runs.pins import read_pin


def describe_other_ids(experiment: Experiment, name: str, source: str) -> str:
    """Return the sentence that refuses the reference `name`, whose tokenizer is not that of the data."""
    return (
        f"the loss of '{name}' ({source}), the reference, cannot be measured on these tokens: its tokenizer "
        f"is not {experiment.data.tokenizer}; set data.tokenizer to '{source}', or compare with another run"
    )


def check_reference(experiment: Experiment, name: str, must_exist: bool = False) -> None:
    """Raise UserError if run `name`, a third-party model that others are compared with, cannot be measured on
    the experiment's tokens, or has a tokenizer with more ids than its embedding has rows.

    A model that is not on this machine is an error only if it `must_exist`. Nothing is asked of a run that
    is trained here, nor in a rehearsal, where random models stand in."""
    external = experiment.run(name).init.external
    if external is None or experiment.rehearsal or resolve_path(external.source).is_file():
        return
    if not find_spec("transformers"):  # beside a container image; evaluate, inside it, asks again
        return
    rows = 0
    try:
        commit = read_pin(experiment, external.source, external.revision)
        path = find_config(external.source, commit, may_download=False)
    except UserError:
        if must_exist:
            raise
        return
    folder = path.parent
    with contextlib.suppress(UserError):  # of a family that is only evaluated, or not readable
        rows = read_shape(path)["vocab_size"]
    if rows:
        check_embedding(folder, rows)
    if experiment.data.tokenizer == external.source or not count_ids(folder):
        return
    from inheritune.data.bpe_training import parse_bpe_size

    data = get_data_dir(experiment)
    prepared = is_prepared(data)
    if not prepared and parse_bpe_size(experiment.data.tokenizer) is not None:
        return  # not trained yet: evaluate compares
    from inheritune.data.batches import Tokens
    from inheritune.data.tokenizer_comparison import encode_with, has_same_ids
    from inheritune.evaluation.downstream import open_tokenizer  # which imports torch

    tokenizer, tokens = open_tokenizer(folder), Tokens(data, "val") if prepared else None
    if tokenizer is not None and not has_same_ids(encode_with(tokenizer), tokens, experiment.data):
        raise UserError(describe_other_ids(experiment, name, external.source))
