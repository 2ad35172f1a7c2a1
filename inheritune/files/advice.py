"""Sentences on measurements that are out of date, with the command that renews them."""

import shlex
from pathlib import Path

from inheritune.config.paths import RECIPES
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.markers import stamp_weights


def format_seed_flag(seed: int) -> str:
    """Return " --seed N" for a command line; empty for seed 0, the default."""
    return f" --seed {seed}" if seed else ""


def name_experiment(results: dict) -> str:
    """Return the words for a command line that name the experiment of `results`. A file outside recipes/ is
    named as from its own folder: its path is not known here."""
    name = results["experiment"]
    word = name if (RECIPES / f"{name}.yaml").is_file() else shlex.quote(f"{name}.yaml")
    return f"{word} --rehearse" if results.get("rehearsal") else word


def check_unchanged(facts: dict, file: Path) -> None:
    """Raise UserError if the weights that `facts`, from `file`, were measured on were written anew since.

    Their folder is not asked for where it is another machine's, or its weights are gone."""
    now = stamp_weights(facts["model"]) if facts.get("files") else {}
    if now and now != facts["files"]:
        results = file.parent / "results.json"
        run = read_json(results) if results.is_file() else {}
        way = "analyze that model again"
        if "run" in run:
            verb = f"evaluate {name_experiment(run)} --run {run['run']}"
            verb = verb if file == results else f"analyze {run['run']} {name_experiment(run)}"
            way = f"measure again: python -m inheritune {verb}{format_seed_flag(run['seed'])}"
        changed = f"the weights in {facts['model']} were rewritten"
        raise UserError(f"{file} was measured before {changed}; {way}")


def describe_other_origin(path: Path, source: str) -> str:
    """Return the sentence on the run in `path`, whose start came from other weights than `source` has."""
    return (
        f"{path} was started from weights of run '{source}', which has other weights by now; restore "
        f"those, or move {path} away, so that it starts from the new ones"
    )
