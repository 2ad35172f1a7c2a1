"""The evidence over seeds: a row per model, with intervals and differences paired by seed.

Intervals are Student's t over seeds. All runs of a seed read the same batches.
"""

import math
import statistics
from collections.abc import Iterable

from evidence_seeds import find_model
from scipy import stats

from inheritune.paper.training_costs import find_step_at_loss

HEADERS = (
    "model",
    "layers",
    "parameters",
    "steps",
    "seeds",
    "validation loss (95% interval)",
    "step 0, above the reference's end",
    "to the reference (95% interval; p, corrected)",
    "to the random start (95% interval; p, corrected)",
    "tokens to the random start's loss",
    "training FLOPs",
    "with those it starts from",
)

HOLDS, FAILS, UNDECIDED = "holds", "fails", "not decided"
"""Verdicts on a difference over seeds."""


def average_seeds(values: list[float]) -> dict:
    """Return {mean, low, high, n}: the mean and its 95% interval, Student's t; no interval for one seed."""
    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "n": n,
    }


def judge_interval(low: float | None, high: float | None, most: float, least: float = -math.inf) -> str:
    """Return whether a difference with the 95% interval from `low` to `high` (None: one seed) is between
    `least` and `most`: it holds or fails where the whole interval says so."""
    if low is None or high is None:
        return UNDECIDED
    if least <= low and high <= most:
        return HOLDS
    return FAILS if low > most or high < least else UNDECIDED


def compute_p_value(gap: dict) -> float | None:
    """Return the two-sided p of Student's t for a difference over seeds; None for one without an interval."""
    if gap["low"] is None:
        return None
    half, degrees = (gap["high"] - gap["low"]) / 2, gap["n"] - 1
    if not half:
        return 0.0 if gap["mean"] else 1.0
    return float(2 * stats.t.sf(abs(gap["mean"]) / half * stats.t.ppf(0.975, degrees), degrees))


def correct_by_holm(p_values: list[float]) -> list[float]:
    """Return the p-values after Holm's correction for their number, in the same order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def add_p_values(rows: list[dict], gaps: dict[str, dict]) -> list[dict]:
    """Add `p` and `p_holm` to each difference that is shown with an interval. Return one of each comparison.

    `gaps` are those of `compare_starts`. Holm's correction counts all comparisons together. A difference that
    is shown twice, or once in each direction, is one comparison."""
    shown = [row[key] for row in rows for key in ("to_reference", "to_random") if row[key]]
    comparisons: dict[tuple, list[dict]] = {}
    for gap in (*shown, *gaps.values()):
        p = compute_p_value(gap)
        if p is not None:
            # two comparisons do not agree in all digits of mean and p unless their losses are the same
            comparisons.setdefault((abs(gap["mean"]), p, gap["n"]), []).append(gap)
    corrected = correct_by_holm([p for _, p, _ in comparisons])
    for ((_, p, _), alike), p_holm in zip(comparisons.items(), corrected, strict=True):
        for gap in alike:
            gap |= {"p": p, "p_holm": p_holm}
    return [alike[0] for alike in comparisons.values()]


def select_attention(record: dict) -> dict:
    """Return what was measured of the reference at its end."""
    of_steps = find_model(record, "reference")["attention"]
    return of_steps[max(of_steps, key=int)]


def count_tokens(stages: list[dict], target: float) -> int | None:
    """Return the training tokens until a curve is at or below `target`, through all stages in order, or
    None."""
    before = 0
    for model in stages:
        curve = [{"step": step, "val_loss": loss} for step, loss in model["curve"]]
        step = find_step_at_loss(curve, target)
        if step is not None:
            return before + step * model["batch_tokens"]
        before += model["steps"] * model["batch_tokens"]
    return None


def select_chosen(record: dict, run: str) -> tuple[dict, list[dict]] | None:
    """Return (the stage that a grown run chose, all stages that were trained for it), or None."""
    stages = [one for one in record["models"] if one["run"] == run]
    return (stages[record["growth"][run]["stage"] - 1], stages) if run in record["growth"] else None


def make_rows(records: list[dict], order: Iterable[str]) -> list[dict]:
    """Return a row for each model that any seed has, in the `order` of their runs.

    A grown run that went beyond its first stage in some seed also has a row "as grown", with the stage that
    each seed chose."""
    names = {(one["run"], one["stage"]): one["label"] for record in records for one in record["models"]}
    places = {run: place for place, run in enumerate(order)}
    rows = []
    for run, stage in sorted(names, key=lambda name: (places[name[0]], name[1] or 0)):
        found = [(model, record) for record in records if (model := find_model(record, run, stage))]
        stages = [
            [one for one in r["models"] if one["run"] == run and (one["stage"] or 1) <= (stage or 1)]
            for _, r in found
        ]
        rows.append(_make_row(names[run, stage], found, stages))
        if (stage or 1) > 1 and (run, stage + 1) not in names:
            ends = [(end, record) for record in records if (end := select_chosen(record, run))]
            label = names[run, 1].removesuffix(", stage 1") + ", as grown"
            chosen = [(model, record) for (model, _), record in ends]
            rows.append(_make_row(label, chosen, [trained for (_, trained), _ in ends]))
            rows[-1]["stage"] = "as grown"
    return rows


def _make_row(label: str, found: list[tuple[dict, dict]], stages: list[list[dict]]) -> dict:
    """Return the row of one model over seeds.

    `found` has the model and the record of each seed, `stages` the models that were trained for it."""
    first = found[0][0]
    row = {
        "run": first["run"],
        "stage": first["stage"],
        "label": label,
        "seeds": [record["seed"] for _, record in found],
    }
    row |= {key: sorted({model[key] for model, _ in found}) for key in ("layers", "parameters")}
    row |= {"steps": first["steps"], "loss": average_seeds([model["loss"]["mean"] for model, _ in found])}
    for key in ("train_flops", "flops_with_sources"):
        row[key] = statistics.fmean(trained[-1][key] for trained in stages)
    for other in ("reference", "random"):
        gaps = [
            model["loss"]["mean"] - find_model(record, other)["loss"]["mean"]
            for model, record in found
            if first["run"] != other
        ]
        row[f"to_{other}"] = average_seeds(gaps) if gaps else None
    row["at_start"] = average_seeds(
        [model["curve"][0][1] - find_model(record, "reference")["curve"][-1][1] for model, record in found]
    )
    targets = [find_model(record, "random")["curve"][-1][1] for _, record in found]
    row["tokens_to_random"] = [
        count_tokens(trained, target) for trained, target in zip(stages, targets, strict=True)
    ]
    return row


def compare_starts(records: list[dict]) -> dict:
    """Return {run: the loss of Inheritune's first stage minus that of the run, over seeds}.

    The runs are the other starts of the same size (of a grown run its first stage), and the reference trained
    on. The random start with as many steps has a column in the table."""
    gaps: dict[str, list[float]] = {}
    for record in records:
        ours = find_model(record, "inheritune", 1)
        for model in record["models"]:
            alike = model["layers"] == ours["layers"] or model["run"] == "reference_longer"
            if alike and model["stage"] in (None, 1) and model["run"] not in ("inheritune", "random"):
                gaps.setdefault(model["run"], []).append(ours["loss"]["mean"] - model["loss"]["mean"])
    return {run: average_seeds(values) for run, values in gaps.items()}


def list_depths(records: list[dict]) -> list[dict]:
    """Return per seed the n that `analyze` suggests for the reference and why, the smallest n with which a
    grown run of the paper's parts reached parity (None if none did), and the smallest n that was tried."""
    found = []
    for record in records:
        grown = [record["growth"][run] for run in ("inheritune", "smallest") if run in record["growth"]]
        tried = [model["layers"] for model in record["models"] if model["run"] in ("inheritune", "smallest")]
        last = select_attention(record)
        found.append(
            {
                "seed": record["seed"],
                "suggested": last["suggested"],
                "reason": last["reason"],
                "smallest": min((one["layers"] for one in grown if one["parity"]), default=None),
                "tried_from": min(tried),
            }
        )
    return found


def format_interval(value: dict | None, sign: str = "") -> str:
    """Return a mean with its interval, as in 0.1234 (0.1200 to 0.1300)."""
    if value is None:
        return ""
    ends = "" if value["low"] is None else f" ({value['low']:{sign}.4f} to {value['high']:{sign}.4f})"
    return f"{value['mean']:{sign}.4f}{ends}"


def format_difference(gap: dict | None) -> str:
    """Return a difference with its interval and, where `add_p_values` gave them, both p-values."""
    tests = f"; p {gap['p']:.2g}, {gap['p_holm']:.2g}" if gap and "p" in gap else ""
    return format_interval(gap, "+") + tests


def make_cells(row: dict) -> list[str]:
    """Return the row as cells under HEADERS."""
    reached = [tokens for tokens in row["tokens_to_random"] if tokens is not None]
    n_seeds = len(row["tokens_to_random"])
    share = f" ({len(reached)} of {n_seeds} seeds)" if len(reached) < n_seeds else ""
    sizes = [f"{parameters / 1e6:.2f}" for parameters in row["parameters"]]
    return [
        row["label"],
        " or ".join(map(str, row["layers"])),
        f"{' or '.join(sizes)}M",
        str(row["steps"]),
        str(len(row["seeds"])),
        format_interval(row["loss"]),
        f"{row['at_start']['mean']:+.2f}",
        format_difference(row["to_reference"]),
        format_difference(row["to_random"]),
        f"{statistics.fmean(reached) / 1e6:.2f}M{share}" if reached else "not reached",
        f"{row['train_flops']:.2e}",
        f"{row['flops_with_sources']:.2e}",
    ]
