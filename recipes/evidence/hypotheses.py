"""The hypotheses of recipes/evidence/deep.yaml, fixed before any of its runs, and how they are judged.

H1: at least LAZY_LAYERS of the reference's layers have MaxRank below 1.5 at the end, in each seed.
H2: in each seed, the loss rises by at most REMOVAL_COST nats without all of them together, and the layers'
    rank and cost correlate (Spearman at least CORRELATION).
H3: a start from the last half ends within LAST_MARGIN of the random start, and Inheritune at most MARGIN
    above the reference trained on: the means over seeds, with their 95% intervals.

H2 and H3 are about lazy layers only if H1 holds: without them the claim cannot be tested at this scale.
"""

import math
import warnings

from evidence_rows import (
    FAILS,
    HOLDS,
    UNDECIDED,
    average_seeds,
    format_interval,
    judge_interval,
    select_attention,
)
from evidence_seeds import find_model
from scipy import stats

from inheritune.analysis.thresholds import NEAR_ONE

EXPERIMENT = "evidence_deep"
LAZY_LAYERS = 6
REMOVAL_COST = 0.05
CORRELATION = 0.5
LAST_MARGIN = 0.02
MARGIN = 0.01


def judge(records: list[dict]) -> list[str]:
    """Return a sentence for each hypothesis on the seeds `records`, and one on what they mean together."""
    lazy = [_count_lazy(record) for record in records]
    first = HOLDS if min(lazy) >= LAZY_LAYERS else FAILS
    depth = len(select_attention(records[0])["max_rank"])
    lowest = [f"{min(select_attention(record)['max_rank']):.2f}" for record in records]
    found = [
        f"H1 {first}: {_join(lazy)} of {depth} layers have MaxRank below {NEAR_ONE} (at least {LAZY_LAYERS} "
        f"were expected in each seed; the lowest MaxRank is {_join(lowest)})."
    ]
    if first == FAILS:
        found.append("So the claim about lazy layers cannot be tested at this scale.")
    return [*found, _judge_removal(records), *_judge_starts(records)]


def _count_lazy(record: dict) -> int:
    return sum(rank < NEAR_ONE for rank in select_attention(record)["max_rank"])


def _judge_removal(records: list[dict]) -> str:
    """Return the sentence on H2: what the lazy layers cost together, and whether rank goes with cost."""
    found = [select_attention(record) for record in records]
    if not all(one.get("cost") for one in found):
        return f"H2 {UNDECIDED}: the cost of the layers was not measured in each seed."
    with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):
        correlations = [float(stats.spearmanr(one["max_rank"], one["cost"]).statistic) for one in found]
    said = f"Spearman of MaxRank and cost {_join(f'{one:+.2f}' for one in correlations)}"
    removed = [one.get("without_lazy") for one in found]
    if None in removed:
        return f"H2 {FAILS}: there is no lazy layer to remove in each seed; {said}."
    if any(map(math.isnan, correlations)):
        return f"H2 {UNDECIDED}: ranks or costs that are all the same have no correlation; {said}."
    holds = max(removed) <= REMOVAL_COST and min(correlations) >= CORRELATION
    rises = _join(f"{one:.4f}" for one in removed)
    return (
        f"H2 {HOLDS if holds else FAILS}: without all lazy layers the loss rises by {rises} nats (at most "
        f"{REMOVAL_COST} were expected); {said} (at least {CORRELATION})."
    )


def _judge_starts(records: list[dict]) -> list[str]:
    """Return the two sentences on H3. The second is an interval on one side: lower than the control is no
    failure."""
    last = _measure_gap(records, "last_half", None, "random")
    ours = _measure_gap(records, "inheritune", 1, "reference_longer")
    return [
        _describe_gap("H3, the start from the last half less the random one", last, LAST_MARGIN, both=True),
        _describe_gap("H3, Inheritune less the reference trained on", ours, MARGIN, both=False),
    ]


def _measure_gap(records: list[dict], run: str, stage: int | None, other: str) -> dict | None:
    """Return the difference of two runs' losses over the seeds that have both; None if no seed has."""
    pairs = [(find_model(record, run, stage), find_model(record, other)) for record in records]
    gaps = [one["loss"]["mean"] - control["loss"]["mean"] for one, control in pairs if one and control]
    return average_seeds(gaps) if gaps else None


def _describe_gap(what: str, gap: dict | None, margin: float, both: bool) -> str:
    """Return the sentence on a difference: within `margin` (on `both` sides) or not, by its interval."""
    if gap is None:
        return f"{what}: not run."
    verdict = judge_interval(gap["low"], gap["high"], margin, -margin if both else -math.inf)
    limit = f"within {margin} of each other" if both else f"at most {margin}"
    return f"{what}: {format_interval(gap, '+')} over {gap['n']} seeds, {limit}: {verdict}."


def _join(values: object) -> str:
    return ", ".join(map(str, values))
