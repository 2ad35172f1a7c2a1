"""What lies in a run's folder is used only if it belongs to the run that is asked for."""

import copy
import os
import pickle
import shutil
import subprocess

import pytest
import torch
from conftest import (
    REPOSITORY,
    experiment_dict,
    last_step,
    one_sentence,
    refused,
    run_verb,
    write_experiment,
    write_tokens,
)
from fork_server import FORKS

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, read_jsonl, write_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.runs.job import Job
from inheritune.runs.starts import prepare_start

pytestmark = pytest.mark.slow

RUNS = {
    "reference": {"init": "random"},
    "other": {"init": "random"},
    "third": {"init": "random", "layers": 3},
    "cut": {"init": {"inherit": {"source": "reference", "layers": "0:2"}}},
    "grown": {
        "init": {"inherit": {"source": "reference", "layers": "0:1"}},
        "grow": {"by": 1, "max_layers": 2, "margin": -9.0},
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, experiment as a dict): `reference`, `third` and stage 1 of `grown` finished; `other` stopped
    after step 4."""
    folder = tmp_path_factory.mktemp("world")
    raw = experiment_dict(paper=[], runs=RUNS)
    raw["train"] |= {"steps": 6, "checkpoint_every": 2, "keep_last": 9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(folder / "root"))
        path = write_experiment(folder, raw)
        write_tokens(get_data_dir(load_experiment(path)))
        for run in ("reference,other,third", "grown"):
            run_verb("train", path, "--run", run, *(["--stage", "1"] if run == "grown" else []))
        stopped = RunDir.of(load_experiment(path), "other")
    for left in (stopped.final, stopped.checkpoint(6)):
        shutil.rmtree(left, ignore_errors=True)
    for file in (stopped.done, stopped.results):
        file.unlink()
    return folder, raw


def run_of(path: str, name: str) -> RunDir:
    return RunDir.of(load_experiment(path), name)


def test_a_start_of_another_model_is_refused(again):
    path = again(model={"heads": 1}, runs={"new": {"init": "random"}})
    said = refused("train", path, "--run", "new")
    assert (
        "random_init_4_layers holds another model than small describes: its n_head is 2, the experiment's 1"
        in said
    )
    assert not run_of(path, "new").experiment.exists()


def test_a_source_of_another_shape_is_refused(again):
    path = again(model={"norm_eps": 1e-6})
    assert "holds another model than small describes: its layer_norm_epsilon" in refused(
        "train", path, "--run", "cut"
    )


def test_a_start_that_was_made_before_the_run_began_is_made_anew(again):
    path = again()
    assert prepare_start(Job(load_experiment(path), "cut")) == run_of(path, "cut").init
    path = again(runs={"cut": {"init": {"inherit": {"source": "reference", "layers": "1:4"}}}})
    assert read_json(prepare_start(Job(load_experiment(path), "cut")) / "inherited.json")["layers"] == [
        1,
        2,
        3,
    ]


def test_a_stage_is_trained_as_the_first_was(again):
    path = again(train={"lr": 5e-4})
    said = refused("train", path, "--run", "grown", "--stage", "2")
    assert "stage 1 of" in said and "was trained with train.lr = 0.001, now it is 0.0005" in said
    deeper = copy.deepcopy(RUNS["grown"])
    deeper["grow"] |= {"max_layers": 3, "margin": -8.0}  # no stage is another for it
    path = again(runs={"grown": deeper})
    run_verb("train", path, "--run", "grown", "--stage", "2")


@pytest.mark.parametrize("source", ["third", pytest.param("seed", marks=pytest.mark.drill)])
def test_a_checkpoint_of_another_run_is_refused(again, source):
    path = again()
    run = run_of(path, "other")
    if source == "seed":
        run_verb("train", path, "--run", "reference", "--seed", "1")
        theirs, key = (
            RunDir.of(load_experiment(path), "reference", 1),
            "run_name is reference there and other here",
        )
    else:
        theirs, key = run_of(path, "third"), "run_name is third there and other here"
    shutil.rmtree(run.checkpoint(4))
    shutil.copytree(theirs.checkpoint(4), run.checkpoint(4))
    said = refused("train", path, "--run", "other")
    assert f"checkpoint {run.checkpoint(4)} is of another run: {key}" in said
    assert not run.is_done() and run.complete_checkpoints() == [2, 4]


def test_a_change_of_the_data_is_told_before_the_data_is_looked_for(again):
    path = again(data={"name": "other-text"})
    assert "was started with data.name = " in refused("train", path, "--run", "other")


def test_a_run_whose_source_was_trained_anew_is_refused(again):
    path = again()
    cut, reference = run_of(path, "cut"), run_of(path, "reference")
    run_verb("train", path, "--run", "cut")
    (origin,) = (start["start_weights"] for start in read_json(cut.provenance)["starts"])
    assert origin == {"reference": reference.weights_hash()}
    shutil.rmtree(cut.final)
    cut.done.unlink()
    run_verb("train", path, "--run", "reference", "--seed", "1")  # with the same seed it has the same bits
    shutil.rmtree(reference.path)
    shutil.copytree(RunDir.of(load_experiment(path), "reference", 1).path, reference.path)
    said = refused("train", path, "--run", "cut")
    assert "was started from weights of run 'reference', which has other weights by now" in said
    cut.path.rename(cut.path.parent / "moved.away")
    run_verb("train", path, "--run", "cut")


def test_a_run_without_its_experiment_is_compared_with_its_checkpoint(again):
    path = again(train={"lr": 5e-4})
    run = run_of(path, "other")
    run.experiment.unlink()
    assert "is of another run: train.lr is 0.001 there and 0.0005 here" in refused(
        "train", path, "--run", "other"
    )


def test_a_finished_run_says_what_has_changed_since(again):
    said = run_verb("train", again(train={"lr": 5e-4}), "--run", "reference").stdout
    assert (
        "is finished" in said
        and "note: it was trained with train.lr = 0.001, the experiment now has 0.0005" in said
    )
    assert "note:" not in run_verb("train", again(), "--run", "reference").stdout


def put(run: RunDir, change) -> None:
    """Change the marker of checkpoint 4, and seal it anew."""
    marker = run.checkpoint(4) / "COMPLETE"
    write_json(marker, change(read_json(marker)))


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: {k: v for k, v in facts.items() if k != "ranks"},
        lambda facts: {k: v for k, v in facts.items() if k != "deepspeed"},
        lambda facts: {k: v for k, v in facts.items() if k != "deepspeed_version"},
        lambda facts: facts | {"layout": None},
        lambda facts: facts | {"deepspeed": "zero3.json"},
        lambda facts: facts | {"ranks": "many"},
    ],
)
def test_a_marker_that_lacks_something_is_one_sentence(again, change):
    path = again()
    put(run_of(path, "other"), change)
    assert "COMPLETE lacks fields of a marker, or holds them in another form" in refused(
        "train", path, "--run", "other"
    )


def test_a_json_of_another_deepspeed_is_read_by_name(again):
    path = again()
    run = run_of(path, "other")
    newer = {"deepspeed_version": "99.0", "layout": {}}
    put(
        run,
        lambda facts: (
            facts
            | newer
            | {"deepspeed": {**facts["deepspeed"], "zero_optimization": {"stage": 3, "new_key": 1}}}
        ),
    )
    said = refused("train", path, "--run", "other")
    assert "was written with zero_optimization.new_key = 1" in said


class Trap:
    def __reduce__(self):
        return open, ("trapped", "w")


def test_a_state_of_generators_runs_no_code(again):
    path = again()
    run = run_of(path, "other")
    (run.checkpoint(4) / "rng_00000.pt").write_bytes(pickle.dumps({"cpu": Trap()}))
    put(run, lambda facts: facts | {"files": hash_folder(run.checkpoint(4))})
    said = refused("train", path, "--run", "other")
    assert (
        "rng_00000.pt holds no state of random generators" in said and not (REPOSITORY / "trapped").exists()
    )
    torch.save({"gpu": torch.zeros(3)}, run.checkpoint(4) / "rng_00000.pt")
    put(run, lambda facts: facts | {"files": hash_folder(run.checkpoint(4))})
    assert "rng_00000.pt holds no state" in refused("train", path, "--run", "other")


def test_a_start_does_not_count_bad_steps_anew(small, tmp_path):
    raw = experiment_dict(paper=[], runs={"reference": {"init": "random"}})
    raw["train"] |= {"steps": 12, "eval_every": 12, "checkpoint_every": 1, "keep_last": 9}
    path = write_experiment(tmp_path, raw)
    run = RunDir.of(load_experiment(path), "reference")
    for _ in range(3):
        command = [
            FORKS.python(),
            str(REPOSITORY / "tests" / "support" / "fault_worker.py"),
            path,
            "reference",
            "losses@3:0",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ, cwd=REPOSITORY, check=False
        )
        assert "3 steps in a row" in one_sentence(done)
        assert last_step(run) == 5 and not run.is_done()
    assert [row["step"] for row in read_jsonl(run.metrics) if "loss" in row] == [1, 2]
