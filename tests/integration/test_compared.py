"""What results are compared with: the same windows of the same text, and a reference that is still the one it
was."""

import copy
import shutil
from pathlib import Path

import pytest
from conftest import experiment_dict, refused, run_verb, write_experiment, write_tokens

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir, get_data_dir

START = {"inherit": {"source": "reference", "layers": "0:1"}}
RUNS = {
    "reference": {"init": "random", "keep_at": [3]},
    "other": {"init": "random", "layers": 2, "compare": "reference"},
    "grown": {"init": START, "grow": {"by": 1, "max_layers": 2, "margin": -9.0}},
    "beside": {"init": "random", "layers": 2, "compare": "grown"},
}
PAPER = [{"run": "reference", "label": "reference"}, {"run": "other", "label": "other"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, experiment as a dict): all but `beside` finished; `reference` of seed 1 too."""
    folder = tmp_path_factory.mktemp("compared")
    raw = experiment_dict(paper=PAPER, runs=RUNS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(folder / "root"))
        path = write_experiment(folder, raw)
        write_tokens(get_data_dir(load_experiment(path)))
        run_verb("train", path, "--run", "reference,other")
        run_verb("train", path, "--run", "reference", "--seed", "1")
        run_verb("grow", path, "--run", "grown")
    return folder, raw


def run_of(path: str, name: str, seed: int = 0) -> RunDir:
    return RunDir.of(load_experiment(path), name, seed)


def replace_reference(path: str) -> None:
    """As if the reference had been trained anew under other settings."""
    old, new = run_of(path, "reference"), run_of(path, "reference", 1)
    shutil.rmtree(old.path)
    shutil.copytree(new.path, old.path)


def test_a_table_does_not_show_a_difference_to_a_reference_that_is_gone(again):
    path = again()
    assert "other" in run_verb("table", path).stdout
    replace_reference(path)
    said = refused("table", path)
    assert (
        "other/results.json compares with weights of run 'reference', which has been trained anew since"
        in said
    )
    assert "python -m inheritune evaluate small --run other" in said
    run_verb("evaluate", path, "--run", "other", "--tasks", "none")
    assert (
        run_of(path, "other").read_results()["compared_weights"] == run_of(path, "reference").weights_hash()
    )
    run_verb("table", path)


def test_growth_does_not_go_on_against_another_reference(again):
    path = again()
    grown = run_of(path, "grown")
    for gone in (grown.done, grown.stage(2).path):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    replace_reference(path)
    assert "grown/stage1/results.json compares with weights of run 'reference'" in refused(
        "grow", path, "--run", "grown"
    )
    run_verb("evaluate", path, "--run", "grown/stage1", "--tasks", "none")
    said = refused("train", path, "--run", "grown", "--stage", "2")  # stage 1 still comes from the old one
    assert (
        f"{grown.path} was started from weights of run 'reference', which has been trained anew since" in said
    )


@pytest.mark.parametrize("change", [{"data": {"sequence_length": 16}}, {"train": {"final_windows": 8}}])
def test_a_finished_run_is_measured_on_its_own_windows(again, change):
    path = again(**change)
    before = run_of(path, "other").results.read_bytes()
    (section, keys), *_ = change.items()
    (key, value), *_ = keys.items()
    said = refused("evaluate", path, "--run", "other")
    assert f"was trained with {section}.{key} = " in said and f"the experiment now has {value}" in said
    assert run_of(path, "other").results.read_bytes() == before


def test_a_run_on_other_windows_is_not_compared(again):
    path = again(
        data={"sequence_length": 16}, runs={"new": {"init": "random", "layers": 2, "compare": "reference"}}
    )
    said = refused("train", path, "--run", "new")
    assert "was measured with windows" in said and "of 32 tokens" in said and "of 16 tokens" in said
    assert not run_of(path, "new").experiment.exists()


def test_older_results_name_no_windows_and_no_weights(again):
    """They are compared and shown as before."""
    path = again()
    for name in ("reference", "other"):
        facts = read_json(run_of(path, name).results)
        write_json(
            run_of(path, name).results,
            {k: v for k, v in facts.items() if k not in ("windows", "compared_weights")},
        )
    run_verb("evaluate", path, "--run", "other", "--tasks", "none")
    run_verb("table", path)


def test_a_run_is_compared_with_a_grown_one(again):
    path = again()
    run_verb("train", path, "--run", "beside")
    chosen = run_of(path, "grown").chosen()
    results = run_of(path, "beside").read_results()
    assert (results["compared_with"], results["compared_weights"]) == ("grown", chosen.weights_hash())
    theirs = chosen.read_results()["validation"]["mean"]
    assert results["difference"]["mean"] == pytest.approx(results["validation"]["mean"] - theirs, abs=1e-9)


def test_a_finished_growth_says_what_has_changed(again):
    deeper = copy.deepcopy(RUNS["grown"])
    deeper["grow"] |= {"margin": -8.0, "max_layers": 3}
    path = again(runs={"grown": deeper})
    done = run_of(path, "grown").done
    said = run_verb("grow", path, "--run", "grown").stdout
    assert "note: this run was grown with margin -9.0, the experiment now has -8.0" in said
    assert "max_layers 2, the experiment now has 3" in said and f"delete {done}" in said
    done.unlink()
    run_verb("grow", path, "--run", "grown")
    assert read_json(done)["max_layers"] == 3 and run_of(path, "grown").stage(3).is_done()


def test_kept_weights_of_an_earlier_attempt_are_kept_anew(again):
    path = again()
    run = run_of(path, "reference")
    before = read_json(run.kept(3) / "COMPLETE")["files"]
    for gone in (run.checkpoints, run.final, run.experiment, run.done, run.results, run.provenance):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    path = again_with_rate(path)
    run_verb("train", path, "--run", "reference")
    after = read_json(run.kept(3) / "COMPLETE")
    assert after["files"] != before and after["run"]["train"]["lr"] == 0.02


def again_with_rate(path: str) -> str:
    text = Path(path).read_text()
    assert "lr: 0.001" in text
    Path(path).write_text(text.replace("lr: 0.001", "lr: 0.02"))
    return path
