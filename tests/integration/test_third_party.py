"""A third-party model as a reference on several ranks, and on the Hub at a pinned revision."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import refused, run_verb, write_experiment
from hub_server import COMMIT
from test_fetch import environment, make_hub
from test_own_model import TEXTS, experiment_of, write_source

from inheritune.config.experiment import load_experiment
from inheritune.config.layers import AutoLayers
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.rundir import RunDir, get_analysis_dir
from inheritune.models.choice import pick_layers
from inheritune.runs.changes import find_changes_of_run
from inheritune.runs.pins import check_model, locate_pins, pin_revision, read_pin

pytestmark = pytest.mark.slow


@pytest.fixture
def raw(tmp_path):
    """An experiment on a tiny model in tmp_path/source and a few texts."""
    source, texts = write_source(tmp_path / "source"), tmp_path / "texts"
    texts.mkdir()
    for path in TEXTS:
        shutil.copy(path, texts / f"{path.stem}.txt")
    return experiment_of(source, texts / "*.txt")


def test_growth_evaluates_it_on_two_ranks_as_zero_3_validates_it(raw, tmp_path):
    """Its losses, window by window, are those of one process; and those of the same weights when ZeRO 3
    shards them over the ranks. Seven windows are not a multiple of two ranks."""
    raw["train"] |= {"eval_windows": 7, "final_windows": 7}
    whole = {"inherit": {"source": raw["model"]["from"], "layers": "0:4"}}
    raw["runs"]["whole"] = {"init": whole, "compare": "public"}
    path = write_experiment(tmp_path, raw)
    experiment = load_experiment(path)
    assert load_deepspeed_json(experiment.train.deepspeed)["zero_optimization"]["stage"] == 3
    public, grown, run = (RunDir.of(experiment, name) for name in ("public", "grown", "whole"))
    ds = ("--ds", experiment.train.deepspeed)
    said = run_verb("grow", path, "--run", "grown", *ds, procs=2).stdout
    command = f"$ python -m inheritune evaluate {path} --run public --seed 0 --tasks none {' '.join(ds)}"
    assert command in said and "the weights are in shards by ZeRO 3, over 2 ranks" in said
    two = read_json(public.results)
    assert len(two["window_losses"]) == 7 == read_json(grown.stage(1).results)["difference"]["n"]

    run_verb("train", path, "--run", "whole", procs=2)
    start = next(row["val_loss"] for row in read_jsonl(run.metrics) if "val_loss" in row and row["step"] == 0)
    assert start == pytest.approx(two["validation"]["mean"], abs=1e-6)
    public.results.unlink()
    run_verb("evaluate", path, "--run", "public")
    assert read_json(public.results)["window_losses"] == pytest.approx(two["window_losses"], abs=1e-6)


def test_a_pinned_source_on_the_hub_is_analyzed_chosen_from_and_grown(request, raw, tmp_path, monkeypatch):
    """Each command is offline, with nothing in the cache but that revision: main is not there to fall back
    to."""
    source = tmp_path / "files/models/someone/tiny"
    shutil.copytree(raw["model"]["from"], source)
    hub = environment(make_hub(request, tmp_path / "files"), tmp_path)
    for key, value in hub.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # this process reads only
    pinned = {"source": "someone/tiny", "revision": COMMIT}
    raw["model"] = {"from": pinned["source"], "revision": COMMIT}
    raw["data"] |= {"tokenizer": pinned["source"], "tokenizer_revision": COMMIT}
    raw["runs"] = {
        "chosen": {"init": {"inherit": {**pinned, "layers": "auto:2:influence"}}},
        "grown": {
            "init": {"inherit": {**pinned, "layers": "0:2"}},
            "compare": "public",
            "grow": {"by": 1, "max_layers": 3, "margin": -9.0, "from": "previous"},
        },
    }
    raw["paper"], chosen = [], {"chosen": raw["runs"]["chosen"]}
    without = write_experiment(tmp_path, raw | {"runs": chosen}, name="without")
    raw["runs"]["public"] = {"init": {"external": pinned}}
    path = write_experiment(tmp_path, raw)
    run_verb("fetch", path)
    offline = {"HF_HUB_OFFLINE": 1}
    for file in (path, without):
        run_verb("prepare", file, **offline)

    # the model by its id, with the revision that the advice names; for a run, and for `inherit`
    flags = ("--model", "someone/tiny", "--revision", COMMIT)
    said = refused("train", without, "--run", "chosen", **offline)
    assert said == refused("check", without, "--run", "chosen", **offline)
    assert f"first: python -m inheritune analyze {' '.join(flags)} --data {without}" in said
    run_verb("analyze", *flags, "--data", without, "--sequences", "4", "--length", "16", **offline)
    cut = ("inherit", "--source", "someone/tiny", "--revision", COMMIT, "--layers", "auto:2:influence")
    run_verb(*cut, "--out", tmp_path / "cut", **offline)
    run_verb("check", without, "--run", "chosen", **offline)
    run_verb("train", without, "--run", "chosen", **offline)
    rows = get_analysis_dir("someone/tiny").read_attention()
    for start in (tmp_path / "cut", RunDir.of(load_experiment(without), "chosen").init):
        assert_chosen(start, rows)
    shutil.rmtree(get_analysis_dir("someone/tiny").path)

    # a run of the file that is this model; and stages that continue with its next layers
    said = refused("train", path, "--run", "chosen", **offline)
    assert f"first: python -m inheritune analyze --model public --data {path}" in said
    run_verb("analyze", "--model", "public", "--data", path, "--sequences", "4", "--length", "16", **offline)
    run_verb("train", path, "--run", "chosen", **offline)
    experiment = load_experiment(path)
    assert_chosen(RunDir.of(experiment, "chosen").init, RunDir.of(experiment, "public").read_attention())
    run_verb("grow", path, "--run", "grown", **offline)
    joined = read_json(RunDir.of(experiment, "grown").stage(2).init / "inherited.json")
    assert joined["layers"] == [0, 1, 2] and joined["reference"]["revision"] == COMMIT


def test_its_numbers_are_those_of_the_weights_that_are_there(raw, tmp_path):
    """Weights written anew under the same name, as by another export of the model: what was measured before
    is no longer shown, compared with, or grown against. The command that the refusal names measures it
    again."""
    path = write_experiment(tmp_path, raw)
    experiment = load_experiment(path)
    public, source = RunDir.of(experiment, "public"), raw["model"]["from"]
    run_verb("prepare", path)
    run_verb("evaluate", path, "--run", "public")
    run_verb("analyze", "public", path, "--sequences", "2", "--length", "8", "--ranks-only")
    before = read_json(public.results)["validation"]["mean"]
    run_verb("table", path)
    rewrite(source)
    again = f"python -m inheritune evaluate {Path(path).name} --run public"
    for call in (("table", path), ("report", path), ("grow", path, "--run", "grown")):
        assert f"{public.results} was measured before the weights in {source} were rewritten" in (
            said := refused(*call)
        )
        assert again in said
    seen = run_verb("status", path).stdout
    assert again in seen and "all that is finished" not in seen
    run_verb("evaluate", path, "--run", "public")
    assert "all that is finished" in run_verb("status", path).stdout
    assert f"measure again: python -m inheritune analyze public {Path(path).name}" in refused("report", path)
    assert read_json(public.results)["validation"]["mean"] != before
    run_verb("analyze", "public", path, "--sequences", "2", "--length", "8", "--ranks-only")
    for verb in ("table", "report"):
        run_verb(verb, path)
    (Path(source) / "model.safetensors").unlink()  # a laptop, to which no weights were copied
    run_verb("table", path)


OLD, NEW = "a" * 40, "b" * 40
"""Two commits of someone/moving."""


@pytest.fixture
def moving(raw, tmp_path, monkeypatch):
    """A Hub's cache with two commits of a model, and an experiment that gives no revision of it; what moves
    a branch, main if not another, to one of them."""
    cache = tmp_path / "home" / "hub" / "models--someone--moving"
    for seed, commit in enumerate((OLD, NEW), 1):
        write_source(cache / "snapshots" / commit, seed)
    (cache / "refs").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    raw = json.loads(json.dumps(raw).replace(raw["model"]["from"], "someone/moving"))
    raw["runs"]["grown"]["grow"]["max_layers"] = 2
    return raw, lambda commit, branch="main": (cache / "refs" / branch).write_text(commit)


def name_branch(raw, branch: str):
    """The part `raw` of an experiment with this branch wherever it reads the model."""
    if not isinstance(raw, dict):
        return raw
    named = {key: name_branch(value, branch) for key, value in raw.items()}
    is_model = "someone/moving" in (raw.get("source"), raw.get("from"))
    return named | {"revision": branch} if is_model else named


def rewrite(source: str) -> None:
    """Write other weights in the place of a model, as another export of it does."""
    shutil.rmtree(source)
    write_source(Path(source), seed=5)


def grow_further(raw: dict, tmp_path) -> str:
    """Let the experiment have another stage, as if the growth had been killed before it; its path."""
    raw["runs"]["grown"]["grow"]["max_layers"] = 3
    path = write_experiment(tmp_path, raw)
    RunDir.of(load_experiment(path), "grown").done.unlink()
    return path


def test_a_branch_given_as_revision_stays_at_the_commit_of_its_first_use(moving, tmp_path):
    raw, move_branch = moving
    raw = name_branch(raw, "v2")
    move_branch(OLD, "v2")
    experiment = load_experiment(write_experiment(tmp_path, raw))
    assert read_pin(experiment, "someone/moving", "v2") == "v2"
    assert pin_revision(experiment, "someone/moving", "v2") == OLD
    check_model(experiment)
    move_branch(NEW, "v2")
    assert {pin(experiment, "someone/moving", "v2") for pin in (pin_revision, read_pin)} == {OLD}
    assert pin_revision(experiment, "someone/moving", NEW) == NEW
    assert read_json(locate_pins(experiment)) == {"someone/moving@v2": OLD}
    with pytest.raises(UserError, match=f"someone/moving@v2, .* is at commit {NEW} now.* read {OLD}"):
        check_model(experiment)
    assert find_changes_of_run({"model": {"revision": "v2"}}, {"model": {"revision": OLD}}) == []
    assert find_changes_of_run({"model": {"revision": OLD}}, {"model": {"revision": NEW}})


def test_a_branch_that_moves_does_not_mix_two_models(moving, tmp_path):
    """The experiment stays with the commit of its first use, for all that it reads of the model."""
    raw, move_branch = moving
    move_branch(OLD)
    path = write_experiment(tmp_path, raw)
    run_verb("prepare", path)
    run_verb("grow", path, "--run", "grown")
    move_branch(NEW)
    path = grow_further(raw, tmp_path)
    run_verb("grow", path, "--run", "grown")
    run_verb("evaluate", path, "--run", "public", "--tasks", "none")
    run_verb("analyze", "public", path, "--sequences", "2", "--length", "8", "--ranks-only")
    run = {name: RunDir.of(load_experiment(path), name) for name in ("public", "grown")}
    starts = [read_json(run["grown"].stage(number).init / "inherited.json") for number in (1, 2)]
    assert [start["revision"] for start in starts] == [OLD, OLD]
    assert run["public"].read_results()["weights"] == OLD
    assert run["public"].read_attention()[0]["revision"] == OLD
    assert read_json(locate_pins(load_experiment(path))) == {"someone/moving": OLD}
    run_verb("table", path)

    # a random start has the config that `model` names
    said = refused("train", path, "--run", "random")
    assert (
        f"is at commit {NEW} now, and its runs read {OLD}" in said and f"'revision: {OLD}' to 'model'" in said
    )
    raw["model"]["revision"] = OLD
    path = write_experiment(tmp_path, raw)
    run_verb("train", path, "--run", "random")
    run_verb("grow", path, "--run", "grown")
    run_verb("table", path)


def test_an_analysis_of_another_commit_chooses_no_layers(moving, tmp_path):
    raw, move_main = moving
    path = write_experiment(tmp_path, raw)
    move_main(OLD)
    run_verb("prepare", path)
    measured = ("analyze", "--model", "someone/moving", "--data", path, "--sequences", "4", "--length", "16")
    run_verb(*measured)
    cut = ("inherit", "--source", "someone/moving", "--layers", "auto:2:influence", "--out", tmp_path / "cut")
    move_main(NEW)
    said = refused(*cut)
    assert f"was measured on another model than someone/moving at {NEW}; move it away" in said
    assert f"not on someone/moving@{NEW}, and is left as it is" in refused(*measured)
    run_verb(*cut, "--revision", OLD)  # the commit that main was
    assert read_json(tmp_path / "cut" / "inherited.json")["revision"] == OLD


@pytest.mark.parametrize("measured_before", [True, False])
def test_a_cut_is_not_compared_with_other_weights_than_it_was_cut_from(raw, tmp_path, measured_before):
    """By the commands that the refusals name: the reference is measured again, then the cut."""
    raw["runs"]["cut"] = {
        "init": {"inherit": {"source": raw["model"]["from"], "layers": "0:2"}},
        "compare": "public",
    }
    raw["paper"].append({"run": "cut", "label": "cut"})
    path = write_experiment(tmp_path, raw)
    run_verb("prepare", path)
    if measured_before:
        run_verb("evaluate", path, "--run", "public", "--tasks", "none")
    run_verb("train", path, "--run", "cut")
    rewrite(raw["model"]["from"])
    run_verb("evaluate", path, "--run", "public", "--tasks", "none")
    other = "was started from weights of run 'public', which has other weights by now"
    for call in (("table", path), ("report", path), ("evaluate", path, "--run", "cut", "--tasks", "none")):
        assert other in refused(*call)


def test_two_commits_are_not_compared_where_the_record_of_the_first_is_gone(moving, tmp_path):
    raw, move_main = moving
    path = write_experiment(tmp_path, raw)
    move_main(OLD)
    run_verb("prepare", path)
    run_verb("evaluate", path, "--run", "public", "--tasks", "none")
    pins = locate_pins(load_experiment(path))
    for odd in ([], {"someone/moving": 5}, {"someone/moving": ""}, {"someone/moving": "main"}):
        pins.write_text(json.dumps(odd))
        assert f"{pins} does not give a commit for each Hub id" in refused("grow", path, "--run", "grown")
    pins.unlink()
    move_main(NEW)
    assert "which has other weights by now" in refused("grow", path, "--run", "grown")


def test_stages_are_cut_from_one_model(raw, tmp_path):
    """A folder that is written anew between two stages; then the reference is measured again, as advised."""
    raw["runs"]["grown"]["grow"]["max_layers"] = 2
    path = write_experiment(tmp_path, raw)
    run_verb("prepare", path)
    run_verb("grow", path, "--run", "grown")
    source = raw["model"]["from"]
    rewrite(source)
    measure = ("evaluate", path, "--run", "grown/stage1", "--tasks", "none")
    assert f"was measured before the weights in {source} were rewritten" in refused(*measure)
    run_verb("evaluate", path, "--run", "public", "--tasks", "none")
    other = "was started from weights of run 'public', which has other weights by now"
    assert other in refused(*measure)
    assert other in refused("grow", grow_further(raw, tmp_path), "--run", "grown")
    assert not RunDir.of(load_experiment(path), "grown").stage(2).init.exists()


def assert_chosen(start, rows) -> None:
    """The start has the two blocks of the model on the Hub that `rows`, its analysis, name by influence."""
    found = read_json(start / "inherited.json")
    assert found["layers"] == pick_layers(rows, AutoLayers(2, "influence"))
    assert (found["source"], found["revision"]) == ("someone/tiny", COMMIT) and rows[0]["revision"] == COMMIT
