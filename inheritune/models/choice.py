"""Blocks chosen by what an analysis of their model measured: --layers auto:8, layers: auto:8:influence."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from inheritune.config.layers import AutoLayers
from inheritune.config.source_shape import find_commit
from inheritune.errors import UserError
from inheritune.files.markers import stamp_weights
from inheritune.files.rundir import RunDir, get_analysis_dir, get_results_dir


def pick_layers(rows: list[dict], choice: AutoLayers) -> list[int]:
    """Return the blocks that `choice` keeps, in order, given the rows of attention.jsonl.

    cost: the blocks without which, one at a time, the loss rises most. influence: those with the largest 1 -
    cosine between input and output (ShortGPT, arXiv 2403.03853). window: all but the adjacent ones with the
    smallest angular distance (arXiv 2403.17887). Of equal blocks the earlier one is kept.

    Raises UserError if the rows are of a model that has fewer blocks, or lack the measure."""
    layers = [row for row in rows if row["kind"] == "layer"]
    if choice.count > len(layers):
        raise UserError(f"{choice.count} layers are to be kept, but the model has {len(layers)}; keep fewer")
    if choice.count == len(layers):
        return list(range(len(layers)))
    if choice.rule == "window":
        k = len(layers) - choice.count
        found = next((row for row in rows if row["kind"] == "window" and row["k"] == k), None)
        kept = [i for i in range(len(layers)) if found and not found["first"] <= i < found["end"]]
    else:
        worth = [_get_worth(row, choice.rule) for row in layers]
        known = {i: value for i, value in enumerate(worth) if value is not None}
        best = sorted(known, key=lambda i: -known[i])[: choice.count]
        kept = sorted(best) if len(known) == len(layers) else []
    if not kept:
        raise UserError(
            f"the analysis has no {choice.rule} of the layers; analyze the model again with costs"
        )
    return kept


def _get_worth(row: dict, rule: str) -> float | None:
    return row.get("cost", {}).get("block") if rule == "cost" else row.get("influence")


def is_same_model(measured: str, model: str | Path) -> bool:
    """Return whether an analysis whose header names `measured` is of `model`, a folder or a Hub id."""
    return measured == str(model) or Path(measured).resolve() == Path(model).resolve()


def format_analyze(model: str, data: str = "EXPERIMENT", revision: str | None = None) -> str:
    """Return the command that analyzes `model` on the text of an experiment, `data` as the shell takes it."""
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    return f"python -m inheritune analyze --model {shlex.quote(model)}{at} --data {data}"


def choose_layers(
    choice: AutoLayers,
    source: str,
    revision: str | None,
    command: str,
    is_rehearsal: bool = False,
    runs: Sequence[RunDir] = (),
) -> list[int]:
    """Return the blocks of `source` (a folder or Hub id) that `choice` keeps, by its stored analysis.

    That is the one alongside the weights of a run, in one of the folders `runs`, of runs that are this model,
    or in runs/analysis. Raises UserError, with the `command` that makes it, if there is none or it is of
    other weights or without costs."""
    folder = Path(source)
    candidates = [*runs, get_analysis_dir(source, is_rehearsal)]
    if folder.name == "final":
        candidates.insert(0, get_results_dir(folder))
    found = next((run for run in candidates if run.attention.is_file()), None)
    if found is None:
        raise UserError(
            f"layers are to be chosen by {choice.rule}, but there is no analysis of {source} in "
            f"{candidates[0].path}; first: {command}"
        )
    rows = found.read_attention(to_renew=True)  # the stamp is compared below, with the command
    header = rows[0]
    n_layers = sum(row["kind"] == "layer" for row in rows)
    if "weights" not in header:  # else read_attention has compared the hash with the run's
        commit = find_commit(source, revision)
        if not is_same_model(header.get("model", ""), source) or header.get("revision") != commit:
            at = f" at {commit}" if commit else ""
            raise UserError(
                f"{found.attention} was measured on another model than {source}{at}; move it away, then run: "
                f"{command}"
            )
        if header.get("files") != stamp_weights(source):
            raise UserError(f"{source} has changed since {found.attention} was measured; first: {command}")
    try:
        return pick_layers(rows, choice)
    except UserError as problem:
        if choice.count > n_layers:
            raise  # another analysis would not help
        raise UserError(f"{found.attention}: {problem}; the command: {command}") from None
