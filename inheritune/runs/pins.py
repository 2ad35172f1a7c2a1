"""The commits at which an experiment reads models of the Hub for which its file gives no commit.

A branch of a model, main or another, may move between two runs, or between two stages of one. Their starts
would be of two models then, and the reference of a third. So the commit of the first use is recorded beside
the runs.
"""

import logging
from pathlib import Path

from inheritune.config.experiment import Experiment
from inheritune.config.source_shape import find_commit, is_commit
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.lock import Lock
from inheritune.files.rundir import get_seed_dir
from inheritune.runtime import signals

logger = logging.getLogger("inheritune")


def locate_pins(experiment: Experiment) -> Path:
    """Return the file {Hub id, or id@branch: commit} of an experiment."""
    return get_seed_dir(experiment.name, 0, experiment.rehearsal).parent / "revisions.json"


def pin_revision(experiment: Experiment, source: str, revision: str | None) -> str | None:
    """Return the commit of the model `source` for all runs of `experiment`: `revision`, if that is a commit,
    else the one of the first use.

    `revision` itself for a folder or a file, for a model that is neither cached nor on the Hub, and in a
    rehearsal, where random models stand in."""
    if is_commit(revision) or experiment.rehearsal:
        return revision
    file, name = locate_pins(experiment), _name_branch(source, revision)
    if known := _read_pins(file).get(name):
        return known
    commit = find_commit(source, revision)
    if not is_commit(commit):
        return revision
    with Lock(file, signals.get_stop_signal):
        pins = _read_pins(file)
        if name not in pins:
            write_json(file, pins | {name: commit})
            logger.info("%s is read at commit %s in all runs of this experiment (%s)", name, commit, file)
        return pins.get(name, commit)


def read_pin(experiment: Experiment, source: str, revision: str | None) -> str | None:
    """Return `pin_revision` if the model has been used; else `revision`. Nothing is recorded."""
    if is_commit(revision):
        return revision
    return _read_pins(locate_pins(experiment)).get(_name_branch(source, revision), revision)


def _name_branch(source: str, revision: str | None) -> str:
    """Return the name under which the commit of a model's branch (None: main) is recorded."""
    return f"{source}@{revision}" if revision else source


def check_model(experiment: Experiment) -> None:
    """Raise UserError if the experiment's `model` is read from a Hub id at another commit than its runs
    read that at."""
    model = experiment.model
    if not model.from_ or is_commit(model.revision) or experiment.rehearsal:
        return
    pinned = pin_revision(experiment, model.from_, model.revision)
    now = find_commit(model.from_, model.revision)
    if pinned and now and pinned != now:
        name = _name_branch(model.from_, model.revision)
        raise UserError(
            f"{name}, which the experiment's model is read from, is at commit {now} now, and its runs "
            f"read {pinned} ({locate_pins(experiment)}); add 'revision: {pinned}' to 'model'"
        )


def _read_pins(file: Path) -> dict[str, str]:
    """Return {Hub id: commit}. Raises UserError if the file holds anything else."""
    pins = read_json(file) if file.is_file() else {}
    if not isinstance(pins, dict) or not all(
        isinstance(pin, str) and is_commit(pin) for pin in pins.values()
    ):
        raise UserError(
            f"{file} does not give a commit for each Hub id; restore it, or delete this file: the next start "
            f"records the commits that are in the cache"
        )
    return pins
