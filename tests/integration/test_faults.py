"""Faults inside the real train loop, on two ranks: numbers that are not finite are never trained on nor
saved, a batch that was skipped can be read again, a loss spike is reported, and a rank that hangs ends the
job with the stack of every rank."""

import math
import random
import re

import numpy as np
import pytest
from conftest import run_verb
from test_stop import make, record, start
from test_train import plain_loop

from inheritune.config.experiment import load_experiment
from inheritune.data.batches import Order, Tokens
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.markers import check_files, hash_folder
from inheritune.files.rundir import RunDir
from inheritune.runtime.watchdog import describe_lag
from inheritune.training.record import SPIKE_ROWS, Metrics

pytestmark = pytest.mark.slow

STAGES = [
    pytest.param(stage, marks=pytest.mark.slow if stage == 3 else pytest.mark.drill) for stage in range(4)
]


def faulty(path, root, when: str, **environment) -> tuple[list[int], str]:
    return start(path, root, when, worker="fault_worker.py", **environment)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """{stage: (experiment's path, root, RunDir)} of runs without a fault, each trained when first asked
    for."""
    made = {}

    def of(stage: int):
        if stage not in made:
            made[stage] = make(tmp_path_factory.mktemp(f"stage{stage}"), stage)
            run_verb("train", made[stage][0], "--run", "reference", procs=2, INHERITUNE_ROOT=made[stage][1])
        return made[stage]

    return of


def difference(run: RunDir, experiment, broken: str) -> float:
    """The largest between the losses of a run without its fourth step's and those of the plain loop."""
    losses = [row["loss"] for row in read_jsonl(run.metrics) if "loss" in row]
    return np.abs(np.delete(plain_loop(run, experiment, broken)[0], 3) - losses).max()


# --- nan and inf --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_one_bad_batch_is_skipped_told_and_kept_for_replay(tmp_path, monkeypatch, stage):
    path, root, run = make(tmp_path, stage)
    codes, said = faulty(path, root, "loss@4:1")
    assert codes == [0, 0] and run.is_done(), said
    assert (
        "the loss of rank 1 (" in said
        and "is not finite at step 4" in said
        and "the step was skipped" in said
    )
    # nothing of the step is left behind: its losses are those of a plain loop that leaves the fourth step
    # out, and only those
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    far = {broken: difference(run, load_experiment(path), broken) for broken in ("fourth step not taken", "")}
    assert far["fourth step not taken"] < 1e-5 and far[""] > 1e-4
    rows = [row for row in read_jsonl(run.metrics) if row["step"] == 4 and "val_loss" not in row]
    assert rows == [{"step": 4, "tokens": 4 * 640, "skipped_steps": 1}]
    kept = read_json(run.bad_batch)
    tokens = Tokens(kept["data"], "train")
    order = Order(tokens, "random_windows", 32, 20, kept["seed"])
    (step,) = kept["steps"]
    assert step["step"] == 4 and [rank["losses"][0] is None for rank in step["ranks"]] == [False, True]
    assert [w for rank in step["ranks"] for w in rank["windows"]] == order.starts(3).tolist()
    assert (
        kept["data_fingerprint"] == tokens.fingerprint
        and len(tokens.read(order.starts(3)[0], kept["window_tokens"])) == 33
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_weight_that_is_nan_ends_the_run_and_the_next_start_has_the_bits_of_an_unbroken_one(
    tmp_path, unbroken, stage
):
    path, root, run = make(tmp_path, stage)
    codes, said = faulty(path, root, "weight@6:1", INHERITUNE_JOB=str(tmp_path / "job"))
    assert codes == [2, 2] and "Traceback" not in said, said
    assert (
        "is not finite at step 8" in said
        and "3 steps in a row" in said
        and "that of step 5 is the last checkpoint" in said
    )
    assert (tmp_path / "job" / "failure").read_text().endswith("\n2\n")
    assert [step["step"] for step in read_json(run.bad_batch)["steps"]] == [6, 7, 8]
    assert run.complete_checkpoints() == [5] and not run.stopped.exists()
    check_files(run.checkpoint(5), read_json(run.checkpoint(5) / "COMPLETE")["files"])
    assert (
        "resumed at step 5 of 12"
        in run_verb("train", path, "--run", "reference", procs=2, INHERITUNE_ROOT=root).stdout
    )
    assert record(run) == record(unbroken(stage)[2])
    assert hash_folder(run.final) == hash_folder(unbroken(stage)[2].final)


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("weight@4:1", "the validation loss is not finite after step 4"),
        ("unsaved@5:1", "a weight is not finite after step 5; there is no"),
    ],
    ids=["validation", "saving"],
)
def test_weights_that_are_not_finite_are_neither_validated_nor_saved(tmp_path, when, says):
    path, root, run = make(tmp_path, 3)
    codes, said = faulty(path, root, when)
    assert (
        codes == [2, 2] and says in said and "there is no checkpoint yet" in said and "Traceback" not in said
    ), said
    assert run.complete_checkpoints() == []
    assert all(math.isfinite(row["val_loss"]) for row in read_jsonl(run.metrics) if "val_loss" in row)


# --- spikes -------------------------------------------------------------------------------------------------


def test_a_loss_spike_is_reported_once_and_nothing_else_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("inheritune.runtime.log.logger.propagate", True)
    noise = random.Random(0)
    rows = [
        {"step": s, "tokens": s, "loss": 3 + 7 * math.exp(-s / 300) + noise.gauss(0, 0.05)}
        for s in range(1, 3001)
    ]
    rows[1999]["loss"] += 1.0  # 20 of the noise's standard deviations
    run = RunDir(tmp_path)
    metrics = Metrics(run, -1)
    for row in rows:
        metrics.add(row)
    metrics.close()
    found = [row for row in read_jsonl(run.metrics) if "spike" in row]
    assert [row["step"] for row in found] == [2000] and 12 < found[0]["spike"] < 30
    assert [r.message for r in caplog.records if "standard deviations above the mean" in r.message] and len(
        caplog.records
    ) == 1
    # a start that resumes just before it, with the record that its checkpoint keeps, sees the same
    run.checkpoint(1999).mkdir(parents=True)
    kept = run.metrics.read_text().splitlines(keepends=True)[:1999]
    (run.checkpoint(1999) / "metrics.jsonl").write_text("".join(kept))
    again = Metrics(run, 1999)
    again.add(rows[1999])
    again.close()
    assert read_jsonl(run.metrics)[-1] == found[0] and len(again._losses) == SPIKE_ROWS


# --- a rank that hangs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["sleep", *(pytest.param(kind, marks=pytest.mark.drill) for kind in ("stopped", "held"))]
)
def test_a_rank_that_hangs_ends_the_job_with_every_stack_and_is_named(tmp_path, kind):
    path, root, run = make(tmp_path, stage=1)
    codes, said = faulty(path, root, f"{kind}@3:1", INHERITUNE_JOB=str(tmp_path / "job"))
    assert codes[0] == 1 and f"struck: {kind}@3:1" in said, said
    assert "(rank 0) has been at 'step 3: forward, backward and update'" in said and "in train_step" in said
    sentence = (tmp_path / "job" / "failure").read_text()
    if kind == "sleep":
        assert (
            codes[1] == 1 and "(rank 1) has been at 'step 3: reading its batch'" in said and "in hang" in said
        )
        assert "is still at 'step 3: reading its batch', the others wait at 'step 3: forward" in sentence
    else:
        assert "does not answer, the others wait at 'step 3: forward" in sentence
        # C's thread prints the stack of who keeps the interpreter to itself
        assert ("in hang" in said) == (kind == "held")
    assert "no progress: rank 1 on " in sentence and sentence.endswith("\n1\n")
    assert run.complete_checkpoints() == []


@pytest.mark.slow
def test_a_disk_that_is_slow_on_one_rank_costs_time_only(tmp_path, unbroken):
    path, root, run = make(tmp_path, 3)
    codes, said = faulty(path, root, "slow@0:1")
    assert codes == [0, 0], said
    assert record(run) == record(unbroken(3)[2])
    assert hash_folder(run.final) == hash_folder(unbroken(3)[2].final)
    saves = [float(seconds) for seconds in re.findall(r"written in ([\d.]+) s", said)]
    # every file reaches the disk before the marker, half of them by this rank
    assert saves and min(saves) >= 1, saves


def test_who_lags_is_who_passed_fewest_places_or_does_not_answer():
    nodes = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}
    waiting = dict.fromkeys(nodes, (7, "step 3: forward"))
    assert "rank 2 on n2 is still at 'step 2'" in describe_lag({**waiting, 2: (6, "step 2")}, nodes)
    assert "rank 1, 3 on n1, n2 does not answer, the others wait at 'step 3: forward'" in describe_lag(
        {0: waiting[0], 2: waiting[2]}, nodes
    )
    assert "all ranks are at 'step 3: forward'" in describe_lag(waiting, nodes)
