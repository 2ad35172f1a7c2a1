"""The comparison of a run with its reference: intervals over validation windows, and the paired difference.

Both models are measured on the same windows, so their differences are paired: much of a window's difficulty
cancels. The interval covers the choice of windows, not the choice of seeds. (The paper evaluates 400 random
windows each time; the noise of one such evaluation, 0.007 to 0.026 nats, exceeds several of its gaps.)
"""

import math

import numpy as np

from inheritune.errors import UserError
from inheritune.files.advice import check_unchanged, describe_other_origin, format_seed_flag
from inheritune.files.json_files import read_json
from inheritune.files.markers import INHERITED
from inheritune.files.rundir import WINDOW_LOSSES, RunDir, is_finished
from inheritune.runs.job import Job

Z95 = 1.959963984540054
"""Standard deviations from the mean to either end of a normal 95% interval."""


def compute_interval(values: np.ndarray) -> dict:
    """Return {mean, low, high, n}: the mean of per-window values with its 95% interval over windows."""
    mean = float(np.mean(values))
    half = Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def compare_windows(losses: np.ndarray, reference: np.ndarray) -> dict:
    """Return the mean of (losses - reference) over the shared windows, with its 95% interval.

    Raises UserError if the two were measured on different numbers of windows."""
    if len(losses) != len(reference):
        raise UserError(
            f"{len(losses)} validation windows here, {len(reference)} in the reference: the two cannot be "
            "paired; evaluate both with the same data and train.final_windows"
        )
    return compute_interval(losses - reference)


def compare_with_reference(job: Job, losses: np.ndarray, results: dict) -> dict:
    """Return {compared_with, compared_weights, difference, paper_rule} of per-window `losses` and the job's
    reference (of a grown one, the chosen stage), or {} if the reference is not finished.

    `paper_rule` is the paper's own rule: the last value is at or below the reference's last.

    Raises UserError if the two were measured on other data, windows or precision, if the weights of a
    third-party reference were written anew since, and if the job's start was cut from others of it."""
    name = job.experiment.reference_of(job.run)
    if not name or not is_finished(job.experiment, name, job.seed):
        return {}
    is_external = job.experiment.run(name).init.external is not None
    reference = job.sibling(name) if is_external else job.sibling(name).chosen()
    measured = reference.read_results(to_renew=True)
    if is_external:
        check_unchanged(measured, reference.results)
        stage = job.stage or results.get("stage")
        _check_same_source(job.root.stage(stage) if stage else job.root, measured, name)
    for key in ("data_fingerprint", "precision", "windows"):
        if measured.get(key, results[key]) != results[key]:  # older versions did not record the windows
            again = f"python -m inheritune evaluate {job.experiment.given} --run {name}"
            way = again + format_seed_flag(job.seed) if is_external else "measure both by the same experiment"
            raise UserError(
                f"{reference.path} was measured with {key} {measured[key]}, this run with {results[key]}: no "
                f"comparison; {'measure it again: ' if is_external else ''}{way}"
            )
    theirs = (
        np.array(measured[WINDOW_LOSSES]) if is_external else np.load(reference.losses(measured["steps"]))
    )
    difference = compare_windows(losses, theirs)
    weights = job.sibling(name).identify_weights()
    return {
        "compared_with": name,
        "compared_weights": weights,
        "difference": difference,
        "paper_rule": difference["mean"] <= 0,
    }


def _check_same_source(run_dir: RunDir, measured: dict, name: str) -> None:
    """Raise UserError if the start in `run_dir` was cut from the third-party model that `measured`, the
    results of run `name`, are of, but from another commit, or from files of other sizes or times."""
    start = run_dir.init / INHERITED
    manifest = read_json(start) if start.is_file() else {}
    for origin in (manifest, manifest.get("reference") or {}):  # a later stage adds blocks of the reference
        if not measured.get("model") or origin.get("source") != measured["model"]:
            continue
        stamps = {file: [s["bytes"], s["mtime_ns"]] for file, s in origin.get("source_files", {}).items()}
        known = measured.get("files") or {}
        is_other = any(known[file] != stamps[file] for file in stamps.keys() & known.keys())
        if is_other or (origin.get("revision") and origin["revision"] != measured["weights"]):
            raise UserError(describe_other_origin(run_dir.path, name))
