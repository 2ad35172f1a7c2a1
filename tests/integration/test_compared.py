"""What results are compared with: the same windows of the same text, and a reference that is still the one it
was."""

import copy
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import experiment_dict, refused, run_verb, write_experiment, write_tokens

from inheritune.config import names
from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir, get_data_dir

pytestmark = pytest.mark.slow

START = {"inherit": {"source": "reference", "layers": "0:1"}}
RUNS = {
    "reference": {"init": "random", "keep_at": [3]},
    "other": {"init": "random", "layers": 2, "compare": "reference"},
    "grown": {"init": START, "grow": {"by": 1, "max_layers": 2, "margin": -9.0}},
    "stacked": {"init": {"stack": {"source": "other", "layers": "0:2"}}},
    "beside": {"init": "random", "layers": 2, "compare": "grown"},
}
PAPER = [{"run": name, "label": name} for name in ("reference", "other", "stacked")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, experiment as a dict): all but `beside` finished; `reference` of seed 1 too."""
    folder = tmp_path_factory.mktemp("compared")
    raw = experiment_dict(paper=PAPER, runs=RUNS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(folder / "root"))
        path = write_experiment(folder, raw)
        write_tokens(get_data_dir(load_experiment(path)))
        run_verb("train", path, "--run", "reference,other,stacked")
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
    old.experiment.write_text(new.experiment.read_text().replace("seed: 1", "seed: 0"))
    write_json(old.results, read_json(new.results) | {"seed": 0})


def test_a_table_does_not_show_a_difference_to_a_reference_that_is_gone(again):
    path = again()
    assert "other" in run_verb("table", path).stdout
    replace_reference(path)
    said = refused("table", path)
    assert (
        "other/results.json compares with weights of run 'reference', which has been made anew since" in said
    )
    command = re.search("compare again: python -m inheritune (.*)", said)[1]
    words = [sys.executable, "-m", "inheritune", *shlex.split(command), "--tasks", "none"]
    subprocess.run(words, cwd=Path(path).parent, check=True)  # pasted where the experiment's file is
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
    gone = f"{grown.path} was started from weights of run 'reference', which has other weights by now"
    said = refused("grow", path, "--run", "grown")
    assert gone in said and "compare again" not in said  # which cannot make it a cut of the new one
    # stage 1 still comes from the old one: it is no cut of the new one, and is not grown further
    assert gone in refused("evaluate", path, "--run", "grown/stage1", "--tasks", "none")
    assert gone in refused("train", path, "--run", "grown", "--stage", "2")


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"sequence_length": 16}},
        {"data": {"window_start": "end_of_text"}},
        {"train": {"final_windows": 8}},
    ],
)
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


def test_a_run_whose_windows_begin_otherwise_is_not_compared(again):
    runs = {"new": {"init": "random", "layers": 2, "compare": "reference"}}
    said = refused("train", again(data={"window_start": "end_of_text"}, runs=runs), "--run", "new")
    assert "was measured with windows" in said and "beginning with token" in said


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


# --- tables, figures and analyses show the runs that the experiment describes -------------------------------


def test_a_difference_to_another_run_than_the_tables_reference_names_it(again):
    path = again()
    table = run_verb("table", path).stdout
    (row,) = [line for line in table.splitlines() if line.startswith("| stacked")]
    gap = run_of(path, "stacked").read_results()["difference"]
    assert f"| to other: {gap['mean']:+.4f} (" in row
    (row,) = [line for line in table.splitlines() if line.startswith("| other")]
    assert "to other" not in row and "to reference" not in row


def test_a_run_finished_before_its_reference_is_compared_in_the_table(again):
    path = again()
    reference, aside = run_of(path, "reference").path, run_of(path, "aside").path
    known = run_of(path, "other").read_results()
    reference.rename(aside)
    shutil.rmtree(run_of(path, "other").path)
    run_verb("train", path, "--run", "other")  # the reference is not there yet
    assert "difference" not in run_of(path, "other").read_results()
    aside.rename(reference)
    for verb in ("table", "report"):
        shown = run_verb(verb, path).stdout
        text = shown if verb == "table" else run_of(path, "report.html").path.read_text()
        text = text.replace("<small>", " ")
        assert f"{known['difference']['mean']:+.4f} ({known['difference']['low']:+.4f} to" in text
        assert "noise unknown" not in text


def test_weights_that_a_finished_run_does_not_have_are_told(again):
    path = again()
    said = refused("evaluate", path, "--run", "grown/stage9", "--tasks", "none")
    assert "'grown' of small (seed 0) is finished and has no stage 9; its stages are 1, 2" in said
    path = again(runs={"other": {**RUNS["other"], "keep_at": [5]}})  # after it was trained
    for name, kept in (("other@5", "none"), ("reference@5", "3"), ("grown@5", "none")):
        said = refused("evaluate", path, "--run", name, "--tasks", "none")
        assert "has no weights of step 5; the steps it kept" in said and said.strip().endswith(f": {kept}")


def test_a_stage_or_step_of_a_third_party_model_is_refused(again):
    """It would be measured as the model itself."""
    path = again(runs={"ext": {"init": {"external": {"source": "folder"}}}})
    for name in ("ext@7", "ext/stage2"):
        for words in (
            ["evaluate", path, "--run", name, "--tasks", "none"],
            ["analyze", "--model", name, "--data", path],
        ):
            assert "'ext' of small is a third-party model, which has no stages" in refused(*words)


def test_rows_on_other_windows_share_no_table(again):
    """Also those that are compared with nothing."""
    fewer = {"init": "random", "layers": 2, "train": {"final_windows": 8}}
    path = again(runs={"fewer": fewer})
    raw = yaml.safe_load(Path(path).read_text())
    raw["paper"].append({"run": "fewer", "label": "fewer"})
    Path(path).write_text(yaml.safe_dump(raw))
    run_verb("train", path, "--run", "fewer")
    for verb in ("table", "report"):
        said = refused(verb, path)
        assert "'reference' was measured with" in said and "windows 16 of 32 tokens" in said
        assert "'fewer' with" in said and "windows 8 of 32 tokens" in said and "the same settings" in said


@pytest.mark.parametrize("verb", ["table", "report"])
def test_a_row_in_another_precision_is_named(again, verb):
    """An experiment may compare precisions: recipes/openllama_3b_1b.yaml does."""
    path = again(runs={"rounded": {"init": "random", "layers": 2, "train": {"precision": "bf16"}}})
    raw = yaml.safe_load(Path(path).read_text())
    raw["paper"].append({"run": "rounded", "label": "rounded"})
    Path(path).write_text(yaml.safe_dump(raw))
    run_verb("train", path, "--run", "rounded")
    said = run_verb(verb, path).stdout
    text = said if verb == "table" else (run_of(path, "rounded").path.parent / "report.html").read_text()
    sentence = "the loss of 'rounded' was measured in bf16, that of 'reference' in fp32"
    assert sentence in html.unescape(text) and "the loss of 'other'" not in html.unescape(text)


def test_a_run_that_was_copied_is_not_shown_as_another(again):
    path = again()
    seeds = run_of(path, "reference").path.parent.parent
    shutil.copytree(seeds / "seed0", seeds / "seed7")
    for words in (["table", path], ["figure", path], ["evaluate", path, "--run", "other", "--tasks", "none"]):
        assert "holds another run than small describes: its seed is 0, the experiment's is 7" in refused(
            *words, "--seed", "7"
        )
    other, stacked = run_of(path, "other"), run_of(path, "stacked")
    shutil.rmtree(stacked.path)
    shutil.copytree(other.path, stacked.path)
    assert "its run_name is other, the experiment's is stacked" in refused("table", path)
    path = again(runs={"other": {**RUNS["other"], "layers": 3}})
    shutil.rmtree(stacked.path)
    assert "its run.layers is 2, the experiment's is 3" in refused("table", path)


def test_a_run_of_other_settings_than_now_is_shown_with_a_note(again):
    path = again(train={"lr": 5e-4})
    for words in (["table", path], ["figure", path], ["evaluate", path, "--run", "other", "--tasks", "none"]):
        assert (
            "it was trained with train.lr = 0.001, the experiment now has 0.0005" in run_verb(*words).stdout
        )


def test_a_stage_of_unchanged_settings_has_no_note(again):
    path = again()
    for run in ("grown", "grown/stage1", "reference@3"):
        assert "was trained with" not in run_verb("evaluate", path, "--run", run, "--tasks", "none").stdout


def test_a_stage_is_not_compared_with_a_reference_that_it_was_not_cut_from(again):
    path = again()
    replace_reference(path)
    said = refused("evaluate", path, "--run", "grown/stage1", "--tasks", "none")
    assert "was started from weights of run 'reference', which has other weights by now" in said
    run_verb("evaluate", path, "--run", "other", "--tasks", "none")  # from random: it has no origin


def test_an_analysis_is_of_the_weights_that_lie_beside_it(again):
    path = again()
    other = run_of(path, "other")
    measure = ["--length", "16", "--sequences", "4"]
    run_verb("analyze", "--model", "other", "--data", path, *measure)
    kept = other.attention.read_bytes()
    said = refused("analyze", "--model", "other", "--data", path, *measure, "--ranks-only")
    assert "has the costs of the layers" in said and other.attention.read_bytes() == kept
    shutil.rmtree(other.final)
    shutil.copytree(run_of(path, "stacked").final, other.final)
    done = read_json(run_of(path, "stacked").done)
    write_json(other.done, done)
    assert "was measured on other weights than those of" in refused("figure", path)
    assert other.attention.read_bytes() == kept


def test_an_analysis_on_another_text_leaves_the_runs_own(again):
    path = again()
    other = run_of(path, "other")
    run_verb("analyze", "--model", "other", "--data", path, "--length", "16", "--sequences", "4")
    own = other.attention.read_bytes()
    foreign = copy.deepcopy(experiment_dict(paper=[], runs={"reference": {"init": "random"}}))
    foreign["data"]["name"] = "foreign"
    text = write_experiment(other.path.parents[3] / "recipes", foreign, "foreign")
    write_tokens(get_data_dir(load_experiment(text)), fingerprint="foreign")
    run_verb("analyze", "--model", other.final, "--data", text, "--length", "16", "--sequences", "4")
    assert other.attention.read_bytes() == own and (other.path / "on_foreign" / "attention.jsonl").is_file()


def test_models_analyzed_differently_share_no_plot(again):
    path = again()
    run_verb("analyze", "--model", "other", "--data", path, "--length", "16", "--sequences", "4")
    run_verb("analyze", "--model", "stacked", "--data", path, "--length", "8", "--sequences", "4")
    said = refused("figure", path)
    assert "'stacked, 4 layers' was analyzed with length 8, 'other, 2 layers' with 16" in said


def test_an_analysis_does_not_replace_that_of_a_model_of_the_same_name(again):
    path = again()
    first = run_of(path, "reference").kept(3)
    second = run_of(path, "reference", 1).kept(3)
    measure = ["--data", path, "--length", "16", "--sequences", "4"]
    run_verb("analyze", "--model", first, *measure)
    (made,) = (run_of(path, "reference").path.parents[2] / "analysis").glob("*/attention.jsonl")
    kept = made.read_bytes()
    assert f"was measured on {first}, not on {second}" in refused("analyze", "--model", second, *measure)
    assert made.read_bytes() == kept
    run_verb("analyze", "--model", first, *measure)  # again, it renews its own


def test_an_analysis_that_is_sent_into_a_run_is_not_taken_for_its_own(again, tmp_path):
    path = again()
    other, stacked = run_of(path, "other"), run_of(path, "stacked")
    measure = ["--model", "stacked", "--data", path, "--length", "16", "--sequences", "4"]
    run_verb("analyze", *measure, "--out", other.path)  # nothing was there
    assert "weights" not in other.read_attention()[0]
    other.attention.unlink()
    for plot in names.PLOTS:
        (other.path / plot).unlink(missing_ok=True)
    run_verb("analyze", "--model", "other", *measure[2:])
    own = other.attention.read_bytes()
    said = refused("analyze", *measure, "--out", other.path)
    assert f"was measured on {other.final}, not on {stacked.final}" in said
    assert other.attention.read_bytes() == own


def copy_results(path: str) -> None:
    """The results of the run `other` in the folder of the reference, as a careless copy leaves them."""
    mine, others = run_of(path, "reference"), run_of(path, "other")
    for part in ("results.json", "metrics.jsonl", "DONE"):
        shutil.copy(others.path / part, mine.path / part)
    for part in ("validation", "final"):
        shutil.rmtree(mine.path / part)
        shutil.copytree(others.path / part, mine.path / part)


@pytest.mark.parametrize("verb", ["table", "report", "figure", "evaluate"])
def test_results_of_another_run_are_not_shown_as_a_runs_own(again, verb):
    path = again()
    copy_results(path)
    words = ("--run", "reference", "--tasks", "none") if verb == "evaluate" else ()
    said = refused(verb, path, *words)
    assert f"{run_of(path, 'reference').results} holds the results of another run: its run is other" in said


def test_a_finished_run_that_does_not_say_what_it_is_is_not_shown(again):
    path = again()
    run_of(path, "other").experiment.unlink()
    for verb in ("table", "report"):
        assert f"{run_of(path, 'other').path} has no experiment.yaml" in refused(verb, path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"validation": None}, "validation: "),
        ({"validation": {"mean": "5.1", "low": 5.0, "high": 5.2, "n": 4}}, "validation.mean: "),
        ({"validation": {"mean": float("nan"), "low": 5.0, "high": 5.2, "n": 4}}, "validation.mean: "),
        ({"validation": {"mean": float("inf"), "low": 5.0, "high": 5.2, "n": 4}}, "validation.mean: "),
        ({"validation": {"mean": -3.0, "low": -4.0, "high": 5.2, "n": 4}}, "validation.mean: "),
        ({"validation": {"mean": 5.1, "low": 5.2, "high": 5.0, "n": 4}}, "are not in this order"),
        ({"layers": 0}, "layers: "),
        ({"train_flops": "many"}, "train_flops: "),
        ({"difference": {"mean": 1.0}}, "difference.low: "),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(again, change, said):
    """A results.json that was edited by hand, without its seal: a sentence that names file and key."""
    path = again()
    file = run_of(path, "other").results
    facts = {key: value for key, value in read_json(file).items() if key != "seal"} | change
    file.write_text(json.dumps(facts))
    for verb in ("table", "report"):
        found = refused(verb, path)
        assert f"{file} is not as it was written; restore it" in found and said in found
