"""Layers chosen by measurement or by what is left out: tensor by tensor, on the command line and as the start
of a run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import experiment_dict, write_experiment, write_tokens
from safetensors.torch import load_file
from transformers import GPT2Config

from inheritune.analysis.analyze import run_analyze
from inheritune.cli.program import main
from inheritune.config.experiment import load_experiment
from inheritune.config.layers import RULES, AutoLayers, count_layers, parse_auto, parse_layers
from inheritune.config.reading import read_yaml
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.architectures import find_architecture
from inheritune.models.choice import pick_layers
from inheritune.models.networks import build_config
from inheritune.models.surgery import write_random
from inheritune.runs.job import Job
from inheritune.runs.starts import prepare_start

# --- their names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ("drop:3,7-9", [0, 1, 2, 4, 5, 6]),
        ("drop:0", [*range(1, 10)]),
        ("drop: 8-9, 1", [0, 2, 3, 4, 5, 6, 7]),
        ("drop:4-4,4", [0, 1, 2, 3, 5, 6, 7, 8, 9]),
    ],
)
def test_what_is_dropped_is_counted_from_0_with_both_ends(layers, kept):
    assert parse_layers(layers, 10) == kept and count_layers(layers, 10) == len(kept)


def test_a_choice_has_a_number_and_a_rule():
    assert parse_auto("auto:8") == AutoLayers(8, "cost")
    assert parse_auto("auto:8:influence") == AutoLayers(8, "influence")
    assert parse_auto("0:8") is None and parse_auto([1, 2]) is None
    assert count_layers("auto:8:window", 10) == 8


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("drop:0-9", "selects no layer"),
        ("drop:3,10", "asks for layer 10; the source has 10 layers"),
        ("drop:a", r"drop takes blocks, counted from 0, and ranges of them, as in 3,7-9 \(got 'a'\)"),
        ("drop:", "drop takes blocks"),
        ("drop:1-2-3", "drop takes blocks"),
        ("drop:-1", "drop takes blocks"),
        ("drop:5-3", "drop: 5-3 ends before it begins; write 3-5"),
        ("drop:1-999999", "no model has as many blocks"),
        ("auto:", "auto needs how many blocks to keep, as in auto:8"),
        ("auto:0", "auto needs how many blocks"),
        ("auto:-1", "auto needs how many blocks"),
        ("auto:3:infuence", "unknown rule 'infuence'; did you mean 'influence'"),
        ("auto:11", "asks for 11 blocks; the source has 10"),
    ],
)
def test_malformed_choices_are_refused(layers, words):
    with pytest.raises(UserError, match=words):
        count_layers(layers, 10)


# --- a model and its analysis -------------------------------------------------------------------------------

MEASURE = {"sequences": 4, "length": 16}


def make_experiment(folder: Path, source, **starts) -> str:
    """An experiment whose runs copy layers of `source`."""
    runs = {
        name: {"init": {"inherit": {"source": str(source), "layers": how}}} for name, how in starts.items()
    }
    raw = experiment_dict(paper=[], runs={"reference": {"init": "random"}, **runs})
    path = write_experiment(folder, raw)
    if not get_data_dir(load_experiment(path)).exists():
        write_tokens(get_data_dir(load_experiment(path)))
    return path


@pytest.fixture
def source(tmp_path):
    """A model of six blocks that lies outside every experiment."""
    experiment = load_experiment(write_experiment(tmp_path, experiment_dict()))
    write_random(build_config(experiment.model, 6), tmp_path / "source")
    return tmp_path / "source"


def assert_copied(out: Path, source: Path, kept: list[int]) -> None:
    """Every tensor of `out` is one of the source's, of the blocks `kept`."""
    ours, theirs, table = (
        *(load_file(next(f.glob("*.safetensors"))) for f in (out, source)),
        find_architecture(GPT2Config()),
    )
    assert {inside[0] for name in ours if (inside := table.split_name(name))} == set(range(len(kept)))
    for name, tensor in ours.items():
        inside = table.split_name(name)
        origin = table.block.format(i=kept[inside[0]]) + inside[1] if inside else name
        assert torch.equal(tensor, theirs[origin]), name
    assert read_json(out / "inherited.json")["layers"] == kept


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_the_command_line_drops_and_chooses(source, tmp_path, capsys):
    words = ["inherit", "--source", str(source), "--out"]
    assert main([*words, str(tmp_path / "dropped"), "--drop", "1,3-4"]) == 0
    assert_copied(tmp_path / "dropped", source, [0, 2, 5])

    said = refused(capsys, *words, tmp_path / "chosen", "--layers", "auto:4")
    assert f"there is no analysis of {source}" in said and not (tmp_path / "chosen").exists()
    assert f"first: python -m inheritune analyze --model {source} --data EXPERIMENT" in said

    folder = run_analyze(str(source), make_experiment(tmp_path, source), **MEASURE)
    rows = RunDir(folder).read_attention()
    for rule in RULES:
        assert main([*words, str(tmp_path / rule), "--layers", f"auto:4:{rule}"]) == 0
        kept = pick_layers(rows, AutoLayers(4, rule))
        assert_copied(tmp_path / rule, source, kept)
        assert f"auto:4:{rule} ({','.join(map(str, kept))})" in capsys.readouterr().out
    assert "asks" in refused(capsys, *words, tmp_path / "x", "--drop", "9")
    said = refused(capsys, *words, tmp_path / "x", "--layers", "auto:7")
    assert "7 layers are to be kept" in said and "analyze --model" not in said  # which would not help


def test_exactly_one_of_layers_and_drop(source, tmp_path, capsys):
    words = ["inherit", "--source", source, "--out", tmp_path / "x"]
    said = refused(capsys, *words)
    assert "inherit needs either --layers A:B" in said
    assert refused(capsys, *words, "--layers", "0:2", "--drop", "1") == said
    assert not (tmp_path / "x").exists()


def test_an_analysis_of_other_weights_is_refused(source, tmp_path, capsys):
    words = ["inherit", "--source", source, "--out", tmp_path / "x", "--layers", "auto:4"]
    folder = run_analyze(str(source), make_experiment(tmp_path, source), **MEASURE, costs=False)
    assert "has no cost of the layers; analyze the model again with costs" in refused(capsys, *words)
    (source / "inherited.json").unlink()  # else the changed file is refused by its hash
    weights = next(source.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())
    assert f"{source} has changed since {folder}" in refused(capsys, *words)
    assert f"measured before the weights in {source} were rewritten" in refused_by_reader(folder)
    rows = RunDir(folder).read_attention(to_renew=True)
    rows[0]["model"] = "another"
    (folder / "attention.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "was measured on another model than" in refused(capsys, *words)
    assert not (tmp_path / "x").exists()


def refused_by_reader(folder) -> str:
    with pytest.raises(UserError) as refusal:
        RunDir(folder).read_attention()
    return str(refusal.value)


def test_a_run_starts_from_chosen_blocks(source, tmp_path):
    """One line of YAML: blocks by influence, by cost, around the best window, and all but some."""
    starts = {f"by_{rule}": f"auto:4:{rule}" for rule in RULES} | {"most": "drop:0,2"}
    path = make_experiment(tmp_path, source, **starts)
    experiment = load_experiment(path)
    assert [experiment.layers_of(experiment.runs[name]) for name in starts] == [4, 4, 4, 2]  # of model's 4
    with pytest.raises(UserError, match=f"analyze --model {source} --data {path}$"):
        prepare_start(Job(experiment, "by_cost"))
    assert not Job(experiment, "by_cost").dir.init.exists()
    rows = RunDir(run_analyze(str(source), path, **MEASURE)).read_attention()
    for rule in RULES:
        kept = pick_layers(rows, AutoLayers(4, rule))
        assert_copied(prepare_start(Job(experiment, f"by_{rule}")), source, kept)
    assert_copied(prepare_start(Job(experiment, "most")), source, [1, 3, 4, 5])


def test_a_run_of_the_file_is_chosen_from_by_its_own_analysis(tmp_path):
    path = make_experiment(tmp_path, "reference", picked="auto:2", stale="auto:3")
    experiment = load_experiment(path)
    run = RunDir.of(experiment, "reference")
    write_random(build_config(experiment.model, 4), run.final)
    write_json(run.done, {"final": hash_folder(run.final)})
    with pytest.raises(UserError, match=f"analyze --model reference --data {path}$"):
        prepare_start(Job(experiment, "picked"))
    assert run_analyze("reference", path, **MEASURE) == run.path
    kept = pick_layers(run.read_attention(), AutoLayers(2, "cost"))
    assert_copied(prepare_start(Job(experiment, "picked")), run.final, kept)
    write_json(run.done, {"final": {"other": "weights"}})
    with pytest.raises(UserError, match="was measured on other weights"):
        prepare_start(Job(experiment, "stale"))


def test_a_third_party_run_of_the_file_lends_its_analysis(source, tmp_path):
    """`analyze --model public` writes into the run's folder, where other starts once did not look."""
    path = make_experiment(tmp_path, source, picked="auto:2", by_influence="auto:4:influence")
    raw = read_yaml(Path(path))
    raw["runs"] |= {"public": {"init": {"external": {"source": str(source)}}}}
    experiment = load_experiment(write_experiment(tmp_path, raw))
    with pytest.raises(UserError, match=f"analyze --model public --data {path} --seed 3$"):
        prepare_start(Job(experiment, "picked", seed=3))
    assert run_analyze("public", path, **MEASURE) == RunDir.of(experiment, "public").path
    rows = RunDir.of(experiment, "public").read_attention()
    for name, choice in (("picked", AutoLayers(2, "cost")), ("by_influence", AutoLayers(4, "influence"))):
        assert_copied(prepare_start(Job(experiment, name)), source, pick_layers(rows, choice))


def test_a_choice_is_rehearsed_and_cannot_grow(tmp_path):
    path = make_experiment(tmp_path, "reference", picked="auto:2:window", most="drop:0,3")
    small = load_experiment(path, rehearse=True)
    assert small.runs["picked"].init.inherit.layers == "auto:1:window"
    assert small.runs["most"].init.inherit.layers == "drop:0"
    raw = experiment_dict()
    raw["runs"]["grown"]["init"]["inherit"]["layers"] = "auto:2"
    with pytest.raises(UserError, match=r"must inherit the first layers, '0:n' \(got auto:2\)"):
        load_experiment(write_experiment(tmp_path, raw))
    raw["runs"]["grown"]["init"]["inherit"]["layers"] = "auto:"
    with pytest.raises(UserError, match="auto needs how many blocks"):
        load_experiment(write_experiment(tmp_path, raw))
