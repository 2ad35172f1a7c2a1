"""Losses beside those of a reference: intervals over validation windows, and the paired difference.

Because the windows are shared, differences between two models are paired: much of a window's difficulty
cancels. The interval covers the choice of windows, not the choice of seeds. (The paper evaluates 400 random
windows each time; the noise of one such evaluation, 0.007 to 0.026 nats, exceeds several of its gaps.)
"""

import math

import numpy as np

from inheritune.errors import UserError
from inheritune.runs.job import Job

Z95 = 1.959963984540054
"""Standard deviations from the mean to either end of a normal 95% interval."""


def interval(values: np.ndarray) -> dict:
    """Mean of per-window values with its 95% interval over windows: {mean, low, high, n}."""
    mean = float(np.mean(values))
    half = Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def paired_difference(ours: np.ndarray, reference: np.ndarray) -> dict:
    """Mean of (ours - reference) over the shared windows with its 95% interval.

    Raises UserError if the two were measured on different numbers of windows."""
    if len(ours) != len(reference):
        raise UserError(
            f"{len(ours)} validation windows here, {len(reference)} in the reference: the two cannot be "
            f"paired; "
            f"evaluate both with the same data and train.final_windows"
        )
    return interval(ours - reference)


def compare(job: Job, losses: np.ndarray, results: dict) -> dict:
    """{compared_with, compared_weights, difference, paper_rule} of per-window `losses` and the job's
    reference (of a grown one, the chosen stage), if that one is finished; else {}. The paper's own rule (last
    value at or below the reference's last) is recorded beside the paired interval.

    Raises UserError if the two were measured on other data, windows or precision."""
    name = job.experiment.reference_of(job.run)
    if not name or not job.sibling(name).is_done():
        return {}
    reference = job.sibling(name).chosen()
    theirs = reference.read_results(to_renew=True)
    for key in ("data_fingerprint", "precision", "windows"):
        if theirs.get(key, results[key]) != results[key]:  # results of older versions say nothing of windows
            raise UserError(
                f"{reference.path} was measured with {key} {theirs[key]}, this run with {results[key]}: no "
                f"comparison; measure "
                f"both by the same experiment"
            )
    difference = paired_difference(losses, np.load(reference.losses(theirs["steps"])))
    weights = reference.weights_hash()
    return {
        "compared_with": name,
        "compared_weights": weights,
        "difference": difference,
        "paper_rule": difference["mean"] <= 0,
    }
