"""The design of recipes/claim.sh: seeds by a power computation, steps by the budget, hours by `plan`.

    python recipes/claim/design.py [GPU=PRICE ...]     prices of a GPU-hour: H100=2.50 "RTX 4090=0.40"
    python recipes/claim/design.py seeds               the seeds to run, for recipes/claim.sh

The spread of a difference over seeds is that of the evidence's seeds (recipes/evidence/cpu/seeds).
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "evidence"))
from evidence_seeds import find_model
from rule import COMPARISONS, MARGIN
from scipy import optimize, stats
from seed_files import read_seeds

from inheritune.cli.scripts import run_script
from inheritune.config.catalog import GPU_SPECS
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.paths import RECIPES
from inheritune.config.sections import Model
from inheritune.errors import UserError, suggest_name
from inheritune.models.sizes import count_trained_elements, predict_flops_per_token
from inheritune.paper.published import load_curves, select_curve
from inheritune.planning.plan import plan_experiment
from inheritune.planning.report import format_text_table
from inheritune.planning.workload import MFU, estimate_hours

NAME = "claim/gpt2_small"
BUDGET_HOURS = 25
"""GPU-hours on one H100, at the MFU that `plan` assumes."""
POWER = 0.8
"""Probability that a comparison is decided if its true difference is as assumed."""
GPUS = ("H100", "A100", "RTX 4090")
SIZES = (("gpt2_small", 6), ("gpt2_medium", 12))
"""Sizes that were considered, and half their layers."""
REPORTED = (("gpt2_medium_owt", 24, 16), ("gpt2_large_owt", 36, 18), ("gpt2_xl_owt", 48, 24))
"""The paper's comparisons: experiment, layers of the reference and of Inheritune."""
ROUND = 100
"""Steps are rounded down to a multiple of this."""


def measure_spreads() -> dict[str, float]:
    """Return {comparison: standard deviation over the evidence's seeds of Inheritune less the control}.

    A control that the evidence has not run is left out."""
    records = read_seeds(RECIPES / "evidence" / "cpu")
    found = {}
    for comparison in COMPARISONS:
        pairs = [(find_model(one, "inheritune", 1), find_model(one, comparison.other)) for one in records]
        gaps = [ours["loss"]["mean"] - other["loss"]["mean"] for ours, other in pairs if ours and other]
        if len(gaps) > 1:
            found[comparison.name] = statistics.stdev(gaps)
    return found


def list_reported() -> list[float]:
    """Return the paper's differences of Inheritune to the full model, by the last values of its logs."""
    found = []
    for name, full, half in REPORTED:
        curves = load_curves(name)
        ends = [
            list(select_curve(curves, *one).values())[-1]
            for one in (("inheritune", half), ("reference", full))
        ]
        found.append(ends[0] - ends[1])
    return found


def compute_power(seeds: int, distance: float, spread: float) -> float:
    """Return the probability that a 95% interval over `seeds` seeds ends before a limit that is `distance`
    away from the true difference. It is the power of the one-sided t-test at 2.5%."""
    quantile = stats.t.ppf(0.975, seeds - 1)
    return float(stats.nct.sf(quantile, seeds - 1, distance / spread * math.sqrt(seeds)))


def count_seeds(distance: float, spread: float) -> int | None:
    """Return the fewest seeds, at least 2, with which a comparison has POWER at this distance from its limit;
    None if a thousand are not enough."""
    return next((n for n in range(2, 1001) if compute_power(n, distance, spread) >= POWER), None)


def find_distance(seeds: int, spread: float) -> float:
    """Return the distance from its limit at which a comparison over `seeds` seeds has POWER."""
    return float(optimize.brentq(lambda one: compute_power(seeds, one, spread) - POWER, 1e-9, 100 * spread))


def choose_seeds() -> int:
    """Return the seeds that decide parity if Inheritune gains as little as the least of the paper's gains."""
    seeds = count_seeds(MARGIN - max(list_reported()), measure_spreads()["parity"])
    assert seeds, "the least of the paper's gains is far from the margin"
    return seeds


def count_flops(model: Model, half: int, length: int) -> float:
    """Count the FLOPs of all four runs of a seed for each token of the reference.

    Those are twice the whole (reference, and trained on), Inheritune, and random with the FLOPs of both."""
    full, small = (predict_flops_per_token(model, layers, length) for layers in (model.layers, half))
    return 3 * full + 2 * small


def compute_steps(experiment: Experiment, seeds: int) -> tuple[int, int]:
    """Return the steps that the budget has for the reference, and for random at equal FLOPs."""
    length, model = experiment.data.sequence_length, experiment.model
    half = experiment.layers_of(experiment.run("inheritune"))
    per_step = estimate_hours(count_flops(model, half, length) * experiment.train.batch_tokens, "H100", MFU)
    steps = int(BUDGET_HOURS / seeds / per_step) // ROUND * ROUND
    full, small = (predict_flops_per_token(model, layers, length) for layers in (model.layers, half))
    return steps, round(steps * (full + small) / small / ROUND) * ROUND


def make_size_rows(seeds: int) -> list[list[str]]:
    """Return for each size what the budget buys: hours for 1B tokens, tokens, tokens per parameter."""
    experiment = load_experiment(NAME, rehearse=False)
    rows = []
    for size, half in SIZES:
        model = Model(size=size)
        hours = estimate_hours(count_flops(model, half, experiment.data.sequence_length) * 1e9, "H100", MFU)
        billions = BUDGET_HOURS / seeds / hours
        share = billions * 1e9 / count_trained_elements(model, model.layers)
        rows.append(
            [f"{size}, {half} of {model.layers} layers", f"{hours:.1f}", f"{billions:.2f}", f"{share:.0f}"]
        )
    return rows


def make_power_rows(seeds: int) -> list[list[str]]:
    """Return for each comparison the spread, and what so many seeds decide."""
    spreads = measure_spreads()
    rows = []
    for one in COMPARISONS:
        spread = spreads.get(one.name)
        cells = [one.name, f"Inheritune - {one.other}", f"{one.limit:g}"]
        if spread is None:
            rows.append([*cells, "not measured", ""])
        else:
            rows.append(
                [*cells, f"{spread:.4f}", f"{one.limit - find_distance(seeds, spread):+.3f} or lower"]
            )
    return rows


def make_hour_rows(seeds: int, prices: dict[str, float]) -> list[list[str]]:
    """Return for each GPU the hours of a seed and of all, and their cost where the price is given."""
    experiment = load_experiment(NAME, rehearse=False)
    rows = []
    for gpu in GPUS:
        plans = plan_experiment(experiment, gpus=1, gpu=gpu)
        hours = sum(facts["gpu_hours"] for facts in plans)
        peak = max(facts["peak"] for facts in plans) / 1e9
        price = prices.get(gpu)
        cost = f"{hours * seeds:.1f} x price" if price is None else f"{hours * seeds * price:,.0f}"
        rows.append([gpu, f"{hours:.1f}", f"{hours * seeds:.1f}", f"{peak:.0f}", cost])
    return rows


SIZE_HEADS = [
    "size",
    "H100-hours for 1B tokens and one seed",
    "B tokens in the budget",
    "tokens per parameter",
]
POWER_HEADS = ["comparison", "difference", "limit", "spread over seeds", "decided 4 times in 5 if truly"]
HOUR_HEADS = ["one GPU", "hours a seed", "hours in all", "GB, planned", "cost"]


def read_prices(words: list[str]) -> dict[str, float]:
    """Return {GPU: price of an hour} of words like H100=2.50. Raises UserError for others."""
    found = {}
    for word in words:
        gpu, _, price = word.partition("=")
        if gpu not in GPUS:
            raise UserError(f"claim: no hours are planned for the GPU '{gpu}'; {suggest_name(gpu, GPUS)}")
        try:
            found[gpu] = float(price)
        except ValueError:
            found[gpu] = math.nan
        if not (math.isfinite(found[gpu]) and found[gpu] >= 0):
            raise UserError(f"claim: the price of a GPU-hour is a number, as in {gpu}=2.50 (got '{word}')")
    return found


def main(*words: str) -> None:
    """Print the seeds, or the whole design."""
    seeds = choose_seeds()
    if words == ("seeds",):
        print(*range(seeds))
        return
    prices = read_prices(list(words))
    rates = ", ".join(f"{gpu} {GPU_SPECS[gpu]['tflops']:g}" for gpu in GPUS)
    least = max(list_reported())
    print(
        f"{seeds} seeds: parity is decided 4 times in 5 if the true difference is {least:+.4f}, the least\n"
        f"of the paper's gains, and seeds differ as in the evidence.\n"
    )
    print(format_text_table(POWER_HEADS, make_power_rows(seeds)), end="\n\n")
    print(format_text_table(SIZE_HEADS, make_size_rows(seeds)), end="\n\n")
    print(format_text_table(HOUR_HEADS, make_hour_rows(seeds, prices)))
    print(
        f"planned, not measured: {MFU:.0%} of the bf16 rate ({rates} TFLOP/s), without evaluation and saving"
    )


if __name__ == "__main__":
    run_script(main, *sys.argv[1:])
