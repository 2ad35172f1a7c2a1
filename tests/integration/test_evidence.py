"""recipes/evidence.sh in rehearsal from nothing, stopped and gone on with; its numbers against the runs'; the
committed results against the seeds they come from, and the documents against them."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY
from fork_server import FORKS
from markdown_rows import split_row
from scipy import stats
from test_tables import finish

from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import get_data_dir
from inheritune.files.writing import write_text

EVIDENCE = REPOSITORY / "recipes" / "evidence"
SCALES = ("cpu", "gpu", "deep")
CORE = ("reference", "random", "random_longer", "reference_longer", "inheritune", "last_half")
REPORTED = [scale for scale in SCALES if (EVIDENCE / scale / "evidence.json").is_file()]


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    import evidence_rows
    import evidence_seeds
    import hypotheses
    import seed_files
    import summary

    modules = (evidence_seeds, seed_files, evidence_rows, summary, hypotheses)
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def written(value) -> str:
    """As JSON, numbers to nine digits: another scipy may differ in the last."""
    return re.sub(r"\d+\.\d+(e[+-]\d+)?", lambda number: f"{float(number[0]):.9g}", json.dumps(value))


def evidence(**settings) -> subprocess.CompletedProcess:
    """`bash recipes/evidence.sh` with these variables."""
    environment = {**os.environ, **FORKS.on_path(anyway=True), **settings}
    command = ["bash", REPOSITORY / "recipes" / "evidence.sh"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_script_in_small(own_root, summary):
    """Two seeds of the core arms, stopped after the first seconds; then the same command goes on to the
    table, whose numbers are those of the runs, worked out here by numpy and scipy."""
    small = {"REHEARSE": "1", "SEEDS": "1 2"}
    done = evidence(**small, BUDGET_HOURS="0.004")
    assert done.returncode == 0 and "hours are over, everything is saved" in done.stdout, (
        done.stdout + done.stderr
    )
    folder, runs = own_root / "runs/rehearsal/evidence_cpu", own_root / "runs/rehearsal/evidence_cpu"
    assert not (folder / "evidence.json").exists()
    done = evidence(**small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found, table = read_json(folder / "evidence.json"), (folder / "table.md").read_text()
    assert found["rehearsal"] and found["seeds"] == [1, 2] and "REHEARSAL" in table
    assert found["command"] == 'REHEARSE=1 SCALE=cpu SEEDS="1 2" bash recipes/evidence.sh'
    results = {
        run: np.array(
            [read_json(runs / f"seed{seed}/{run}/results.json")["validation"]["mean"] for seed in (1, 2)]
        )
        for run in ("reference", "random", "random_longer", "inheritune/stage1", "last_half")
    }
    for row in found["rows"]:
        name = f"{row['run']}/stage{row['stage']}" if row["stage"] else row["run"]
        if name not in results:
            continue  # a later stage, which not every seed may have, or what a seed ended with
        for key, values in (("loss", results[name]), ("to_reference", results[name] - results["reference"])):
            if row[key] is None:
                assert name == "reference" and key == "to_reference"
                continue
            low, high = stats.t.interval(0.95, 1, values.mean(), values.std(ddof=1) / np.sqrt(2))
            assert [row[key][end] for end in ("mean", "low", "high")] == pytest.approx(
                [values.mean(), low, high], rel=1e-9
            )
        assert summary.make_cells(row)[0] in table and summary.format_interval(row["loss"]) in table
        assert row["train_flops"] == pytest.approx(
            read_json(runs / f"seed1/{name}/results.json")["train_flops"]
        )
    rows = {(row["run"], row["stage"]): row for row in found["rows"]}
    cost = rows["inheritune", 1]["train_flops"] + rows["reference", None]["train_flops"]
    assert rows["inheritune", 1]["flops_with_sources"] == pytest.approx(cost)
    points = {point["run"]: point["layers"] for point in found["rank_worth"]["points"]}
    assert points == {"inheritune": [0, 1], "last_half": [2, 3]} and found["rank_worth"]["slope"]["n"] <= 2
    assert [depth["seed"] for depth in found["depths"]] == [1, 2]
    for plot in ("curves", "attention", "rank_worth"):
        assert (folder / f"{plot}.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("DONE")}
    done = evidence(**small)
    assert done.returncode == 0 and "== " not in done.stdout  # nothing is run again
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("DONE")}


@pytest.mark.slow
def test_the_deep_scale_in_small(own_root):
    """One seed of the core arms, from the packages' text on: each hypothesis has its sentence, in the
    table and in evidence.json, from costs that were measured. The rehearsal's few layers are none of them
    lazy."""
    done = evidence(REHEARSE="1", SCALE="deep", SEEDS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = own_root / "runs/rehearsal/evidence_deep"
    found = read_json(folder / "evidence.json")
    record = read_json(folder / "seeds/seed1.json")
    reference = next(model for model in record["models"] if model["run"] == "reference")
    last = max(reference["attention"].items(), key=lambda one: int(one[0]))[1]
    assert len(last["cost"]) == len(last["max_rank"]) == reference["layers"]
    first, conclusion, second, *third = found["hypotheses"]
    assert first.startswith("H1 fails: 0 of 8 layers") and "cannot be tested at this scale" in conclusion
    assert second.startswith("H2 fails: there is no lazy layer") and len(third) == 2
    assert third[0].endswith(": not decided.") and third[1].endswith(": not run.")
    assert all(said in (folder / "table.md").read_text() for said in found["hypotheses"])


def test_what_is_reported_of_the_deep_references_is_what_their_files_say(tmp_path):
    """No seed has the other runs yet: the hypotheses are judged on the references, and there is no table."""
    shutil.copy(EVIDENCE / "deep.yaml", tmp_path)
    shutil.copytree(EVIDENCE / "deep" / "seeds", tmp_path / "deep" / "seeds")
    command = [sys.executable, EVIDENCE / "summary.py", "summary", tmp_path / "deep.yaml"]
    own = {**os.environ, "PYTHON_PACKAGES": "anywhere"}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("layers.md", "layers.csv", "layers.tex"):
        assert (tmp_path / "deep" / name).read_text() == (EVIDENCE / "deep" / name).read_text()
    assert not (tmp_path / "deep" / "evidence.json").exists()
    pages = [REPOSITORY / "docs" / "evidence.md", EVIDENCE / "README.md"]
    text = " ".join(" ".join(page.read_text() for page in pages).split())
    for file in (EVIDENCE / "deep" / "seeds").glob("*.json"):
        record = read_json(file)
        (reference,) = (model for model in record["models"] if model["run"] == "reference")
        last = max(reference["attention"].items(), key=lambda one: int(one[0]))[1]
        lazy = [layer + 1 for layer, rank in enumerate(last["max_rank"]) if rank < 1.5]
        rho = stats.spearmanr(last["max_rank"], last["cost"])
        said = [
            f"layer {lazy[0]} ({last['max_rank'][lazy[0] - 1]:.2f})",
            f"{last['without_lazy']:.2f} nats",
            f"{rho.statistic:+.2f}, p {rho.pvalue:.2f}",
            f"{reference['loss']['mean']:.3f}",
            f"rises by {min(last['cost'][12:]):.2f} to {max(last['cost'][12:]):.2f} nats",
        ]
        assert len(lazy) == 1 and all(one in text for one in said), said


def lazy_record(seed: int, ranks, cost=None, removed=None, **losses) -> dict:
    """A seed's record with the attention of its reference."""
    record = made_up(seed, **{"reference": 3.0, "random": 3.2} | losses)
    last = {"max_rank": ranks} | ({"cost": cost} if cost else {})
    last |= {} if removed is None else {"without_lazy": removed}
    record["models"][0]["attention"] = {"5": {"max_rank": [9.0] * len(ranks)}, "10": last}
    return record


RANKS = [9.0, 8.0, *[1.4, 1.3, 1.2, 1.1, 1.05, 1.0]]
COST = [0.5, 0.4, 0.03, 0.02, 0.02, 0.01, 0.01, 0.0]


@pytest.mark.parametrize(
    "change, verdict",
    [
        ({}, "H2 holds: without all lazy layers the loss rises by 0.0400, 0.0500 nats"),
        ({"removed": 0.06}, "H2 fails: without all lazy layers the loss rises by 0.0600, 0.0500 nats"),
        ({"cost": COST[::-1]}, "H2 fails"),
        ({"removed": None}, "H2 fails: there is no lazy layer to remove in each seed"),
        ({"cost": None}, "H2 not decided: the cost of the layers was not measured"),
        ({"cost": [0.1] * len(COST)}, "H2 not decided: ranks or costs that are all the same have no"),
        ({"ranks": [9.0, *RANKS[:2], *RANKS[3:]]}, "H1 fails: 5, 6 of 8 layers have MaxRank below 1.5"),
    ],
)
def test_hypotheses_about_lazy_layers_are_judged_in_each_seed(change, verdict, summary):
    plain = {"ranks": RANKS, "cost": COST, "removed": 0.04}
    records = [lazy_record(1, **plain | change), lazy_record(2, **plain | {"removed": 0.05})]
    said = summary.judge(records)
    assert any(one.startswith(verdict[:9]) for one in summary.judge(records[::-1]))  # in any order
    assert any(one.startswith(verdict) for one in said)
    untestable = "So the claim about lazy layers cannot be tested at this scale."
    assert (untestable in said) == verdict.startswith("H1 fails") == (not said[0].startswith("H1 holds: 6, "))


@pytest.mark.parametrize(
    "gaps, verdict",
    [
        ((0.001, 0.002, 0.003), ("holds", "holds")),
        ((0.03, 0.031, 0.032), ("fails", "fails")),
        ((-0.03, -0.031, -0.032), ("fails", "holds")),
        ((-0.1, 0.0, 0.1), ("not decided", "not decided")),
        ((0.001,), ("not decided", "not decided")),
    ],
)
def test_starts_are_judged_by_their_intervals(gaps, verdict, summary):
    """The last half is to be level with the random start; Inheritune is not to be above its control."""
    records = []
    for seed, gap in enumerate(gaps):
        losses = {"last_half": 3.2 + gap, "reference_longer": 2.9, "inheritune__1": 2.9 + gap}
        records.append(lazy_record(seed, RANKS, COST, 0.01, **losses))
    last, ours = summary.judge(records)[-2:]
    assert last.endswith(f": {verdict[0]}.") and ours.endswith(f": {verdict[1]}.")
    for record in records:
        record["models"] = [one for one in record["models"] if one["run"] != "reference_longer"]
    assert summary.judge(records)[-1].endswith("less the reference trained on: not run.")


@pytest.mark.parametrize(
    "wrong",
    [
        {"SCALE": "tpu"},
        {"SCALE": "depths"},
        {"ARMS": "some;"},
        {"SEEDS": "a"},
        {"BUDGET_HOURS": "1h"},
        {"BUDGET_HOURS": "."},
        {"JOBS": "0"},
    ],
)
def test_wrong_settings_are_told_the_right_ones(wrong):
    done = evidence(**wrong)
    assert done.returncode == 2 and "ARMS=core" in done.stderr and not done.stdout


def test_an_unknown_arm_is_told_before_the_text_is_prepared(tmp_path):
    done = evidence(ARMS="stackin window_4", INHERITUNE_ROOT=tmp_path)
    assert done.returncode == 2 and "did you mean 'stacking'" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, said",
    [
        ("evidence/summary.py", "takes missing EXPERIMENT ARMS SEED"),
        ("evidence/summary.py missing recipes/evidence/cpu.yaml", "takes missing EXPERIMENT ARMS SEED"),
        (
            "evidence/summary.py missing recipes/evidence/cpu.yaml core x",
            "SEED takes a whole number (got 'x')",
        ),
        ("claim/claim.py", "takes missing, submit or judge"),
        ("claim/claim.py bogus 1", "takes missing, submit or judge, and seeds (got 'bogus')"),
    ],
)
def test_words_that_a_program_does_not_take_are_told(words, said):
    """A mistyped verb of claim.py once submitted."""
    program, *rest = words.split()
    command = [sys.executable, REPOSITORY / "recipes" / program, *rest]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_gpu_scale_does_not_train_on_a_cpu():
    done = evidence(SCALE="gpu")
    assert done.returncode == 2 and "needs a GPU, and there is none here" in done.stderr and not done.stdout


def test_arms_bring_what_they_start_from(summary):
    experiment = load_experiment(str(EVIDENCE / "cpu.yaml"))
    assert summary.select_runs(experiment, "core") == list(summary.CORE)
    assert summary.select_runs(experiment, "stacking window_4") == [
        "reference",
        "stacking_half",
        "stacking",
        "window_4",
    ]
    assert summary.select_runs(experiment, "all") == list(experiment.runs)
    with pytest.raises(UserError, match="did you mean 'stacking'"):
        summary.select_runs(experiment, "stackin")


def test_runs_of_an_earlier_sitting_stay_beside_the_same_reference(summary):
    """Not beside one of other bits, and not where they were trained again."""
    before, now = made_up(11, reference=3.0, random=3.2, grown__1=3.1), made_up(11, reference=3.0, random=3.3)
    for record in (before, now):
        record |= {"key": "a", "text": "b", "made_by": [{"commit": len(record["models"])}]}
    before["growth"] = {"grown": {"stage": 1}}
    both = summary.merge_records(before, now)
    assert [(m["run"], m["loss"]["mean"]) for m in both["models"]] == [
        ("reference", 3.0),
        ("random", 3.3),
        ("grown", 3.1),
    ]
    assert both["growth"] == before["growth"] and len(both["made_by"]) == 2
    for key in ("key", "text"):
        assert summary.merge_records(before | {key: "other"}, now) == now
    before["models"][0]["curve"][1][1] = 3.0000000000000004
    assert summary.merge_records(before, now) == now


@pytest.mark.parametrize("script", ["quickstart", "evidence"])
def test_a_login_node_is_not_trained_on(script, tmp_path):
    for name in ("srun", "sinfo"):
        (tmp_path / name).write_text("#!/bin/bash\n")
        (tmp_path / name).chmod(0o755)
    there = {key: value for key, value in os.environ.items() if key not in ("SLURM_JOB_ID", "REHEARSE")}
    there["PATH"] = f"{tmp_path}:{there['PATH']}"
    command = ["bash", REPOSITORY / f"recipes/{script}.sh"]
    done = subprocess.run(command, env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f" bash recipes/{script}.sh\n" in done.stderr and not done.stdout


ORDER = ("reference", "random", "grown", "inheritune")


def made_up(seed: int, **losses: float) -> dict:
    """A seed's record: models of 2 layers, 10 steps of 100 tokens; the curve falls to the loss at step 5. A
    run's stage follows two low lines: grown__2."""
    models = []
    for name, loss in losses.items():
        run, _, stage = name.partition("__")
        models.append(
            {
                "run": run,
                "stage": int(stage) if stage else None,
                "label": run + f", stage {stage}" * bool(stage),
                "layers": 2,
                "parameters": 1000,
                "steps": 10,
                "batch_tokens": 100,
                "train_flops": 1.0 * int(stage or 1),
                "flops_with_sources": 2.0,
                "loss": {"mean": loss, "n": 4},
                "curve": [[0, 9.0], [5, loss], [10, loss]],
            }
        )
    return {"seed": seed, "models": models, "growth": {}}


def test_differences_are_paired_by_seed(summary):
    """Seeds that differ much from one another, all by the same amount between two models: a narrow interval
    around it."""
    records = [made_up(s, reference=s, random=s + 0.5, inheritune=s + 0.25) for s in (1.0, 2.0, 3.0)]
    rows = {row["run"]: row for row in summary.make_rows(records, ORDER)}
    gap, loss = rows["inheritune"]["to_random"], rows["inheritune"]["loss"]
    assert (gap["mean"], gap["low"], gap["high"], gap["n"]) == pytest.approx((-0.25, -0.25, -0.25, 3))
    # t of 2 degrees
    assert (loss["mean"], loss["low"]) == pytest.approx((2.25, 2.25 - 4.302653 / 3**0.5), abs=1e-5)
    assert (
        rows["inheritune"]["tokens_to_random"] == [500, 500, 500]
        and rows["reference"]["to_reference"] is None
    )
    assert summary.make_rows(records[:1], ORDER)[0]["loss"] == {
        "mean": 1.0,
        "low": None,
        "high": None,
        "n": 1,
    }
    records[1]["models"].pop()  # a seed that lacks a run: the others count, and the row says how many
    row = summary.make_rows(records, ORDER)[-1]
    assert row["seeds"] == [1.0, 3.0] and row["to_random"]["n"] == 2


def test_differences_have_p_values_corrected_for_their_number(summary):
    """Against scipy's paired t; Holm against a worked example, and never below the p before it."""
    losses = {"reference": (3.0, 3.1, 3.3), "random": (3.2, 3.15, 3.6), "inheritune": (2.9, 2.95, 3.3)}
    records = [made_up(seed, **{run: of[seed] for run, of in losses.items()}) for seed in range(3)]
    for record in records:
        record["models"][2]["stage"] = 1
    rows = summary.make_rows(records, ORDER)
    tested = summary.add_p_values(rows, summary.compare_starts(records))
    found = {row["run"]: row for row in rows}
    for run, other in (("inheritune", "reference"), ("inheritune", "random"), ("random", "reference")):
        gap = found[run][f"to_{other}"]
        assert gap["p"] == pytest.approx(stats.ttest_rel(losses[run], losses[other]).pvalue)
        assert gap["p"] <= gap["p_holm"] <= len(tested) * gap["p"]
    assert summary.correct_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert "; p " in summary.format_difference(found["inheritune"]["to_random"])
    assert found["inheritune"]["at_start"]["mean"] == pytest.approx(9.0 - 9.4 / 3)
    assert summary.add_p_values(summary.make_rows(records[:1], ORDER), {}) == []  # one seed: none


def test_a_comparison_that_is_shown_twice_counts_once(summary):
    """The same pair in both directions, and two runs with the same losses. By hand, the least p of three is
    multiplied by 3."""
    losses = {"reference": (3.0, 3.1, 3.3), "random": (3.2, 3.15, 3.6)}
    losses |= {"grown": (2.9, 2.95, 3.3), "inheritune": (2.9, 2.95, 3.3)}
    records = [made_up(seed, **{run: of[seed] for run, of in losses.items()}) for seed in range(3)]
    rows = summary.make_rows(records, ORDER)
    tested = summary.add_p_values(rows, {})
    found = {row["run"]: row for row in rows}
    assert len(tested) == 3
    p_values = sorted(gap["p"] for gap in tested)
    assert sorted(gap["p_holm"] for gap in tested)[0] == pytest.approx(min(1.0, 3 * p_values[0]))
    for one, other in (
        (found["reference"]["to_random"], found["random"]["to_reference"]),
        (found["grown"]["to_reference"], found["inheritune"]["to_reference"]),
        (found["grown"]["to_random"], found["inheritune"]["to_random"]),
    ):
        assert (one["p"], one["p_holm"]) == (other["p"], other["p_holm"])


def test_a_new_arm_leaves_the_seeds_valid_and_is_said_to_be_not_run(summary):
    """The reported seeds, without the reference that was trained on."""
    experiment = load_experiment(str(EVIDENCE / "cpu.yaml"))
    records, partial = summary.read_records(experiment, EVIDENCE / "cpu")
    assert len(records) >= 3 and not partial
    for record in records:
        record["models"] = [one for one in record["models"] if one["run"] != "reference_longer"]
    rows = summary.make_rows(records, experiment.runs)
    notes = summary.make_notes(experiment, records, rows, {}, [], "origin")
    assert notes[-2:] == ["Not run: the reference trained on.", "origin"]
    assert experiment.run("reference_longer").init.inherit.blocks(12) == [*range(12)]


def test_what_a_seed_ended_with_has_a_row_of_its_own(summary):
    """One seed needed a second stage, whose row is that seed's alone; "as grown" is both seeds', with all
    stages counted."""
    records = [
        made_up(1, reference=3.0, random=3.2, grown__1=3.1, grown__2=2.9),
        made_up(2, reference=3.0, random=2.8, grown__1=2.7),
    ]
    records[0]["growth"], records[1]["growth"] = {"grown": {"stage": 2}}, {"grown": {"stage": 1}}
    rows = {(row["run"], row["stage"]): row for row in summary.make_rows(records, ORDER)}
    assert rows["grown", 2]["seeds"] == [1] and rows["grown", 1]["seeds"] == [1, 2]
    end = rows["grown", "as grown"]
    assert (
        end["seeds"] == [1, 2]
        and end["loss"]["mean"] == pytest.approx((2.9 + 2.7) / 2)
        and end["label"] == "grown, as grown"
    )
    # met in stage 1 already
    assert end["train_flops"] == pytest.approx((2 + 1) / 2) and end["tokens_to_random"] == [500, 500]
    assert rows["grown", 2]["tokens_to_random"] == [500]


def test_inheritune_is_set_beside_its_size_and_the_reference_trained_on(summary):
    """Of a grown run its first stage; the random start of as many steps has a column of its own."""
    records = [
        made_up(s, reference=3.0, random=3.2, other=s, grown__1=3.1, grown__2=2.9, inheritune__1=2.5)
        for s in (2, 4)
    ]
    for record in records:
        record["models"][0]["layers"] = 4
        record["models"] += made_up(record["seed"], reference_longer=2.25)["models"]
        record["models"][-1]["layers"] = 4
    records[1]["models"].pop(3)  # one seed has not grown
    gaps = {run: (gap["mean"], gap["n"]) for run, gap in summary.compare_starts(records).items()}
    assert gaps == {
        "other": (-0.5, 2),
        "grown": (pytest.approx(-0.6), 1),
        "reference_longer": (pytest.approx(0.25), 2),
    }


def test_a_loss_that_is_not_reached_has_no_tokens(summary):
    first, second = made_up(1, grown__1=3.0, grown__2=2.5)["models"]
    assert summary.count_tokens([first], 3.0) == 500 and summary.count_tokens([first], 2.9) is None
    assert summary.count_tokens([first, second], 2.9) == 1500  # the stage before took 1000


def copy_experiment(folder):
    """(path, experiment) of a copy of cpu.yaml in `folder`, whose text counts as prepared."""
    path = folder / "cpu.yaml"
    path.write_text((EVIDENCE / "cpu.yaml").read_text())
    experiment = load_experiment(str(path))
    manifest = get_data_dir(experiment) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    write_json(manifest, {"fingerprint": "this text"})
    return path, experiment


@pytest.mark.parametrize(
    "seeds, why", [([0], "chose the scale"), ([102], "chose the scale"), ([12], "of another text or version")]
)
def test_seeds_that_must_not_be_counted_are_refused_before_they_are_trained(
    seeds, why, summary, own_root, tmp_path
):
    path, experiment = copy_experiment(tmp_path)
    ours = read_json(EVIDENCE / "cpu/seeds/seed11.json")
    ours |= {"key": summary.make_experiment_key(experiment), "text": "this text"}
    write_json(tmp_path / "cpu/seeds/seed11.json", ours)
    assert "12 train" in summary.list_missing(experiment, str(path), "core", [12])[0]
    write_json(tmp_path / "cpu/seeds/seed11.json", {**ours, "text": "another text"})
    with pytest.raises(UserError, match=why):
        summary.list_missing(experiment, str(path), "core", seeds)
    assert "11 train" in summary.list_missing(experiment, str(path), "core", [11])[0]  # which it will replace


def test_a_seed_that_is_not_analyzed_yet_is_not_counted(summary, tmp_path):
    """It does not stand in the way of the others. One that was measured otherwise is refused, before its
    file is written."""
    experiment = load_experiment(str(EVIDENCE / "cpu.yaml"))
    folder = tmp_path / "seeds"
    shutil.copytree(EVIDENCE / "cpu" / "seeds", folder)
    file = folder / "seed13.json"
    record = read_json(file)
    del record["models"][0]["attention"]
    write_json(file, record)
    records, partial = summary.read_records(experiment, tmp_path)
    assert [one["seed"] for one in records] == [11, 12] and [one["seed"] for one in partial] == [13]
    change(record, ("models", 0, "attention"), LAST)
    with pytest.raises(UserError, match=r"has other steps of its attention \(\[3000\]\) than in"):
        summary.read_seeds(tmp_path, now={file: record})
    assert "attention" not in read_json(file)["models"][0]


def test_ranks_of_other_lengths_are_measured_again(summary, own_root, tmp_path):
    """Of the kept steps too; until then none is taken into the seed's numbers."""
    path, experiment = copy_experiment(tmp_path)
    finish(str(path), "reference", 3.0, seed=12)
    layer = {"kind": "layer", "max_rank": {"0.9": 2.0}, "avg_mass": {"0.9": 3.0}, "heads_near_1": 1}
    end = {"kind": "summary", "suggested_layers": 1, "reason": "lazy"}
    weights = summary.list_measured(experiment, "reference")

    def analyze(name: str, **measured) -> None:
        rows = [{"kind": "header", **measured}, layer, end]
        target = summary.get_results_dir(summary.find_weights(experiment, name, 12)).attention
        write_text(target, "".join(json.dumps(row) + "\n" for row in rows))

    def find() -> tuple[list[str], dict]:
        model: dict = {}
        summary._add_attention(model, experiment, "reference", 12)
        listed = summary.list_missing(experiment, str(path), "core", [12])
        return [line.split()[3] for line in listed if " analyze " in line], model

    for name in weights:
        analyze(name, sequences=100, length=100)
    again, model = find()
    assert not again and list(model["attention"]) == ["250", "500", "1000", "2000", "3000"]
    for name in (weights[0], weights[-1]):
        analyze(name, sequences=1, length=2)
        assert find() == ([name], {})
        analyze(name, sequences=100, length=100)


MEASURED = {"max_rank": [1.0], "avg_mass": [1.0], "heads_near_1": 0, "suggested": 1}
LAST = {"3000": MEASURED}
"""The attention of the end alone."""


def change(record: dict, keys: tuple, value) -> None:
    """Set what `keys` lead to in a seed's record."""
    *parents, last = keys
    for key in parents:
        record = record[key]
    record[last] = value


@pytest.mark.parametrize(
    "keys, value, said",
    [
        (("seed",), 12, "has the numbers of seed 12; a seed counts once, so name the file seed12.json"),
        (("seed",), "13", "seed: Input should be a valid integer (got '13')"),
        (("rehearsal",), True, "is a rehearsal's, which is no result"),
        (("models",), [], "models: List should have at least 1 item"),
        (("models", 0, "loss", "mean"), float("nan"), "models.0.loss.mean: Input should be a finite number"),
        (("models", 0, "loss", "mean"), "3.4", "models.0.loss.mean: Input should be a valid number"),
        (
            ("models", 0, "loss", "mean"),
            -5.0,
            "models.0.loss.mean: Input should be greater than or equal to 0",
        ),
        (("models", 0, "loss", "n"), 20, "'reference' in {file} has other validation windows (20) than in"),
        (("models", 0, "layers"), 11, "'reference' in {file} has other layers (11) than in"),
        (("models", 1, "curve"), [], "models.1.curve: List should have at least 2 items"),
        (("models", 1, "curve"), [[0, 7.6], [3000, 3.5]], "has other steps of its curve ([0, 3000]) than in"),
        (("models", 0, "attention"), LAST, "has other steps of its attention ([3000]) than in"),
        (("growth", "smallest", "stage"), 9, "growth.smallest.stage is 9, and its stages are [1, 2, 3]"),
        (("models", 0, "weights"), None, "has the weights of"),
    ],
)
def test_a_seeds_file_that_is_not_as_it_was_written_is_refused_by_name(keys, value, said, summary, tmp_path):
    folder = tmp_path / "seeds"
    shutil.copytree(EVIDENCE / "cpu" / "seeds", folder)
    assert [record["seed"] for record in summary.read_seeds(tmp_path)] == [11, 12, 13]
    record = read_json(folder / "seed13.json")
    if keys[-1] == "weights":
        value = read_json(folder / "seed11.json")["models"][0]["weights"]
    change(record, keys, value)
    file = folder / "seed13.json"
    file.write_text(json.dumps({key: part for key, part in record.items() if key != "seal"}))
    with pytest.raises(UserError) as refusal:
        summary.read_seeds(tmp_path)
    assert said.format(file=file) in str(refusal.value) and str(file) in str(refusal.value)


def test_the_key_is_of_what_changes_a_number(summary, tmp_path):
    """Neither comments, arms nor a default written out; steps and the distance of the curve's points."""

    def key(old: str, new: str) -> str:
        (tmp_path / "cpu.yaml").write_text((EVIDENCE / "cpu.yaml").read_text().replace(old, new))
        return summary.make_experiment_key(load_experiment(str(tmp_path / "cpu.yaml")))

    same = key("", "")
    assert (
        key("train:\n", "train:\n  clip: 1.0\n")
        == key("  window_4: {init", "  window_5: {init: random}\n  window_4: {init")
        == same
    )
    assert key("checkpoint_every: 1000", "checkpoint_every: 500") == same
    assert len({same, key("  steps: 3000", "  steps: 3001"), key("eval_every: 250", "eval_every: 500")}) == 3


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_has_what_is_compared(scale, monkeypatch):
    """The arms that every seed has, all in the table. The random start with the reference's steps added has
    them; the halves are halves, and keep what the paper keeps."""
    monkeypatch.setenv("PYTHON_PACKAGES", "anywhere")
    ours = load_experiment(str(EVIDENCE / f"{scale}.yaml"))
    assert ours.train_of(ours.run("random_longer")).steps == 2 * ours.train.steps
    assert [row.run for row in ours.paper] == list(ours.runs) and set(ours.runs) >= {*CORE}
    depth = ours.model.layers
    blocks = {name: ours.run(name).init.inherit.blocks(depth) for name in ("inheritune", "last_half")}
    assert blocks == {"inheritune": [*range(depth // 2)], "last_half": [*range(depth // 2, depth)]}
    assert ours.run("reference_longer").init.inherit.blocks(depth) == [*range(depth)]
    assert ours.layers_of(ours.run("random")) == depth // 2 == ours.layers_of(ours.run("random_longer"))


def test_the_gpu_scale_differs_in_size_only(monkeypatch):
    monkeypatch.setenv("PYTHON_PACKAGES", "anywhere")
    ours, other = (load_experiment(str(EVIDENCE / f"{name}.yaml")) for name in ("gpu", "cpu"))
    assert list(ours.runs) == list(other.runs)
    assert all(
        ours.runs[n].init == other.runs[n].init and ours.runs[n].grow == other.runs[n].grow for n in ours.runs
    )


@pytest.mark.parametrize("scale", REPORTED)
def test_what_is_reported_is_what_the_seeds_say(scale, summary, monkeypatch):
    """evidence.json and the table follow from the seeds' files, of the experiment as it is; the documents
    show that table."""
    monkeypatch.setenv("PYTHON_PACKAGES", "anywhere")
    folder, experiment = EVIDENCE / scale, load_experiment(str(EVIDENCE / f"{scale}.yaml"))
    records, said = (
        [read_json(path) for path in summary.list_seed_files(folder)],
        read_json(folder / "evidence.json"),
    )
    assert len(records) >= 3 and {record["key"] for record in records} == {
        summary.make_experiment_key(experiment)
    }
    assert all(summary.is_complete(record) and not record["rehearsal"] for record in records)
    assert not {record["seed"] for record in records} & {*summary.CHOOSING, *range(100, 1000)}
    rows, gaps = summary.make_rows(records, experiment.runs), summary.compare_starts(records)
    tested = summary.add_p_values(rows, gaps)
    assert written(gaps) == written(said["beside_inheritune"])
    survive = sum(gap["p_holm"] < summary.LEVEL for gap in tested)
    below = sum(gap["p"] < summary.LEVEL for gap in tested)
    counts = f"{len(tested)} comparisons", f"{below} are below 0.05", f"{survive} after the correction"
    assert all(count in (folder / "table.md").read_text() for count in counts)
    if scale == "cpu":
        page = (REPOSITORY / "docs" / "evidence.md").read_text()
        assert f"of {counts[0]} {counts[1]}, and {counts[2]}" in page
    assert written(rows) == written(said["rows"]) and summary.list_depths(records) == said["depths"]
    table = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [split_row(line) for line in table[1:]] == [summary.make_cells(r) for r in rows]
    assert set(summary.CORE) <= {row["run"] for row in rows}
