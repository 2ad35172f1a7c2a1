"""recipes/claim: the design against a simulation and the evidence's files, the rule on every outcome, the
verdict from made-up run folders, and docs/claim.md against them."""

import json
import sys

import claim_page
import numpy as np
import pytest
from conftest import REPOSITORY
from scipy import stats
from test_tables import finish

from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.rundir import RunDir
from inheritune.files.writing import write_text
from inheritune.planning.plan import plan_experiment

sys.path.append(str(REPOSITORY / "recipes" / "claim"))
import claim
import design
import rule

RUNS = ("reference", "random_longer", "reference_longer", "inheritune")


def finish_seed(
    seed: int, reference: float, random: float, longer: float, ours: float, lazy=0, **more
) -> None:
    """The four runs of a seed, and `lazy` layers of its reference near rank 1."""
    for run, loss in zip(RUNS, (reference, random, longer, ours), strict=True):
        folder = finish(design.NAME, run, loss, seed=seed, **more)
        if run == "reference":
            rows = [{"kind": "header"}, {"kind": "summary", "near_lazy_layers": list(range(lazy))}]
            write_text(folder.attention, "".join(json.dumps(row) + "\n" for row in rows))


def test_the_experiment_is_what_the_budget_has_for_its_seeds():
    experiment, seeds = load_experiment(design.NAME), design.choose_seeds()
    train = experiment.train
    assert (train.steps, experiment.train_of(experiment.run("random_longer")).steps) == design.compute_steps(
        experiment, seeds
    )
    assert train.warmup_steps == train.steps // 20
    plans = plan_experiment(experiment, gpus=1, gpu="H100")
    assert 0.98 < seeds * sum(facts["gpu_hours"] for facts in plans) / design.BUDGET_HOURS <= 1
    assert all(facts["peak"] < 24e9 for facts in plans)  # an RTX 4090
    flops = {facts["run"]: facts["flops"] for facts in plans}
    assert flops["random_longer"] == pytest.approx(flops["reference"] + flops["inheritune"], rel=0.002)
    assert flops["reference_longer"] == flops["reference"]
    small = load_experiment("gpt2_small_owt")
    assert experiment.data == small.data and experiment.model == small.model
    own = {"steps", "batch_tokens", "warmup_steps", "deepspeed", "eval_every"}
    assert train.model_dump(exclude=own) == small.train.model_dump(exclude=own)


def test_spreads_are_those_of_the_evidences_seeds():
    records = [read_json(path) for path in sorted((REPOSITORY / "recipes/evidence/cpu/seeds").glob("*.json"))]

    def losses(run: str, stage=None) -> np.ndarray:
        models = [m for record in records for m in record["models"] if (m["run"], m["stage"]) == (run, stage)]
        return np.array([model["loss"]["mean"] for model in models])

    found = design.measure_spreads()
    for name, other in (("parity", "reference"), ("worth", "random_longer")):
        assert found[name] == pytest.approx(np.std(losses("inheritune", 1) - losses(other), ddof=1))
    assert design.list_reported() == pytest.approx([2.8108 - 2.8187, 2.8090 - 2.8531, 2.6420 - 2.6566])


@pytest.mark.parametrize(("seeds", "distance"), [(3, 2.0), (6, 1.5), (6, 0.4)])
def test_power_is_the_share_of_simulated_intervals_that_end_below_the_limit(seeds, distance):
    draws = np.random.default_rng(5).normal(-distance, 1.0, (40_000, seeds))
    half = stats.t.ppf(0.975, seeds - 1) * draws.std(axis=1, ddof=1) / np.sqrt(seeds)
    share = np.mean(draws.mean(axis=1) + half <= 0)
    assert design.compute_power(seeds, distance, 1.0) == pytest.approx(share, abs=0.01)


def test_the_seeds_are_the_fewest_with_that_power():
    seeds, spread = design.choose_seeds(), design.measure_spreads()["parity"]
    distance = rule.MARGIN - max(design.list_reported())
    powers = [design.compute_power(n, distance, spread) for n in (seeds - 1, seeds)]
    assert powers[0] < design.POWER <= powers[1]
    assert design.compute_power(seeds, design.find_distance(seeds, spread), spread) == pytest.approx(
        design.POWER
    )
    assert design.count_seeds(1e-6, 1.0) is None


def test_every_outcome_has_a_meaning():
    """A comparison is asked only if all before it hold."""
    for place in range(len(rule.COMPARISONS)):
        for verdict in (rule.HOLDS, rule.FAILS, rule.UNDECIDED):
            asked, meaning = rule.conclude([rule.HOLDS] * place + [verdict] + [rule.FAILS] * (2 - place))
            assert asked[: place + 1] == (*[rule.HOLDS] * place, verdict) and meaning == rule.OUTCOMES[asked]
    parity, worth, _ = rule.COMPARISONS
    assert [parity.judge(low, high) for low, high in ((-1, 0.01), (0.0, 0.011), (0.011, 1))] == [
        rule.HOLDS,
        rule.UNDECIDED,
        rule.FAILS,
    ]
    assert worth.judge(-1, 0.005) == rule.UNDECIDED == parity.judge(None, None)


@pytest.mark.parametrize(
    ("losses", "verdicts", "said"),
    [
        ((3.0, 3.1, 2.99, 2.95), ["holds"] * 3, "The claim holds in full"),
        ((3.0, 3.1, 2.80, 2.95), ["holds", "holds", "fails"], "the layers that were cut were not redundant"),
        ((3.0, 2.9, 2.80, 2.95), ["holds", "fails", "not asked (fails)"], "Who has no trained reference"),
        ((2.9, 3.1, 2.80, 2.95), ["fails", "not asked (holds)", "not asked (fails)"], "The claim fails"),
    ],
)
def test_the_verdict_follows_from_the_losses(losses, verdicts, said, capsys):
    """Seeds that differ by 0.2 from each other, their differences by 0.002."""
    for seed in range(3):
        finish_seed(seed, *(loss + 0.2 * seed for loss in losses[:3]), losses[3] + 0.201 * seed, lazy=3)
    claim.main("judge", "0", "1", "2")
    printed = capsys.readouterr().out
    shown = [
        line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| Inheritune")
    ]
    assert [cells[-1].strip() for cells in shown] == verdicts and said in printed
    assert "near rank 1: 3, 3, 3 of 12." in printed and "nothing about these" not in printed
    made = read_json(RunDir.of(load_experiment(design.NAME), "x").path.parent.parent / "claim.json")
    gaps = [losses[3] - losses[0] + 0.001 * seed for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, np.mean(gaps), np.std(gaps, ddof=1) / np.sqrt(3))
    assert (made["comparisons"][0]["low"], made["comparisons"][0]["high"]) == pytest.approx((low, high))


def test_what_is_not_decided_and_what_is_missing_is_said(capsys):
    finish_seed(0, 3.0, 3.1, 2.9, 2.9)
    claim.main("judge", "0", "1")
    printed = capsys.readouterr().out
    assert (
        "So far, with 1 of 6 seeds, which is no verdict: Not decided: an interval over seeds takes" in printed
    )
    assert "Not finished, and not counted: seeds 1." in printed and "nothing about these" in printed
    finish_seed(1, 3.0, 3.1, 2.9, 3.2)
    claim.main("judge", "0", "1")
    printed = capsys.readouterr().out
    needed = design.count_seeds(abs(0.01 - 0.05), float(np.std([-0.1, 0.2], ddof=1)))
    assert f"as measured here, takes {needed} seeds" in printed
    assert "Not finished" not in printed and "So far, with 2 of 6 seeds" in printed
    finish_seed(1, 3.0, 3.1, 2.9, 3.2, data_fingerprint="other")
    with pytest.raises(UserError, match="mixes what does not compare"):
        claim.main("judge", "0", "1")


def test_a_verdict_over_chosen_seeds_says_so(capsys):
    """Six are the rule's, and the one that was left out is named."""
    for seed in range(7):
        finish_seed(seed, 3.0 + 0.001 * seed, 3.1, 2.99 + 0.001 * seed, 2.95 if seed != 3 else 3.5)
    claim.main("judge", "0", "1", "2", "4", "5", "6")
    printed = capsys.readouterr().out
    assert "**The claim holds in full" in printed and "So far" not in printed
    said = "Finished, and left out of this table: seeds 3. A verdict over chosen seeds is not a verdict."
    assert said in printed
    damaged = RunDir.of(load_experiment(design.NAME), "reference", 3).results
    write_text(damaged, '{"x":')
    claim.main("judge", "0", "1", "2", "4", "5", "6")
    assert said in capsys.readouterr().out
    finish_seed(3, 3.003, 3.1, 2.993, 3.5)
    claim.main("judge", *"0123456")
    printed = capsys.readouterr().out
    assert "left out" not in printed and "The claim holds in full" not in printed


def test_ranks_of_other_lengths_are_not_counted(capsys):
    """They are to be measured, and until then the outcome says nothing of lazy layers."""
    for seed in range(2):
        finish_seed(seed, 3.0, 3.1, 2.9, 2.9, lazy=3)
    claim.main("judge", "0", "1")
    assert "near rank 1: 3, 3 of 12." in capsys.readouterr().out
    attention = RunDir.of(load_experiment(design.NAME), "reference", 1).attention
    rows = [json.loads(line) for line in attention.read_text().splitlines()]
    rows[0] |= {"sequences": 1, "length": 2}
    write_text(attention, "".join(json.dumps(row) + "\n" for row in rows))
    claim.main("judge", "0", "1")
    printed = capsys.readouterr().out
    assert "near rank 1" not in printed and "not measured in every seed on 100 sequences of 100" in printed
    claim.main("missing", "0")
    assert "analyze" not in capsys.readouterr().out
    claim.main("missing", "1")
    assert f"analyze {design.NAME} reference" in capsys.readouterr().out


def test_wrong_words_are_refused():
    for words, why in (((), "whole numbers"), (("a",), "whole numbers"), (("1", "1"), "given once")):
        with pytest.raises(UserError, match=why):
            claim.main("judge", *words)
    with pytest.raises(UserError, match="no seed has all four runs yet"):
        claim.main("judge", "7")
    for word, why in (
        ("H100=x", "is a number"),
        ("H10=2", "did you mean 'H100'"),
        ("A100=-1", "is a number"),
    ):
        with pytest.raises(UserError, match=why):
            design.read_prices([word])


def test_the_page_is_current():
    page = claim_page.FILE.read_text(encoding="utf-8")
    assert page == claim_page.document(), "docs/claim.md is stale: python tools/claim_page.py"
    names = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
    seeds = names[design.choose_seeds()]
    assert f"Why {seeds} seeds" in page and f"With {seeds} seeds" in page and f"for {seeds} seeds" in page
    assert f"difference is {max(design.list_reported()):.4f}" in page.replace("\n", " ")
    assert design.make_hour_rows(6, {"H100": 2.0})[0][-1] == "50"
