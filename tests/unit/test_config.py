"""Experiments: strict loading, all problems at once, rehearsal."""

import json

import pytest
import yaml
from conftest import experiment_dict, write_experiment

from inheritune.config.experiment import load_experiment
from inheritune.config.layers import parse_layers
from inheritune.config.paths import RECIPES
from inheritune.errors import UserError
from inheritune.runs.job import Job


def load(tmp_path, raw):
    return load_experiment(write_experiment(tmp_path, raw))


def problem(tmp_path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, experiment_dict(**changes))
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_what_a_run_is_stored_as_is_read_back_equal(path):
    """In YAML (experiment.yaml) and in JSON (COMPLETE): a start compares the two with what it has now."""
    for rehearse in (False, True):
        experiment = load_experiment(path.stem, rehearse=rehearse)
        for name in experiment.runs:
            job = Job(experiment, name)
            stored = job.resolved(job.settings)
            assert json.loads(json.dumps(stored)) == stored == yaml.safe_load(yaml.safe_dump(stored))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_experiment_loads_and_rehearses(path):
    experiment = load_experiment(path.stem)
    small = load_experiment(path.stem, rehearse=True)
    assert small.rehearsal and not experiment.rehearsal
    assert set(small.runs) == set(experiment.runs)
    assert small.train.precision == "fp32" and small.data.source == "embedded"


def test_unknown_keys_are_refused_with_the_nearest_one_and_all_at_once(tmp_path):
    raw = experiment_dict()
    raw["train"]["lerning_rate"] = 1
    raw["data"]["tokeniser"] = "gpt2"
    raw["runs"]["grown"]["grow"]["form"] = "previous"
    message = problem(tmp_path, **raw)
    assert "data.tokeniser: unknown key; did you mean 'tokenizer'?" in message
    assert "runs.grown.grow.form: unknown key; did you mean 'from'?" in message
    assert "train.lerning_rate: unknown key" in message


def test_unknown_key_of_a_runs_override_is_refused(tmp_path):
    raw = experiment_dict()
    raw["runs"]["reference"]["train"] = {"step": 3}
    assert "runs.reference.train.step: unknown key; did you mean 'steps'?" in problem(tmp_path, **raw)


def test_unknown_run_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'reference'"):
        load(tmp_path, experiment_dict()).run("refrence")


def test_unknown_size_names_the_nearest(tmp_path):
    assert "did you mean 'gpt2_medium'" in problem(tmp_path, model={"size": "gpt2_medum"})


def test_batch_that_is_no_whole_number_of_sequences_is_refused(tmp_path):
    raw = experiment_dict()
    raw["train"]["batch_tokens"] = 650
    assert "batch_tokens (650) is not a multiple of sequence_length (32); the nearest is 640" in problem(
        tmp_path, **raw
    )


def test_sequence_beyond_the_positions_is_refused(tmp_path):
    raw = experiment_dict()
    raw["data"]["sequence_length"] = 64
    assert "beyond the model's 32 positions" in problem(tmp_path, **raw)


def test_number_written_as_text_is_a_number(tmp_path):
    raw = experiment_dict()
    raw["train"]["lr"] = "3e-4"  # PyYAML reads 3e-4 as text
    assert load(tmp_path, raw).train.lr == 3e-4


def test_missing_file_and_broken_yaml_are_sentences(tmp_path):
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_experiment("quickstrat")
    (tmp_path / "broken.yaml").write_text("train: {steps: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_experiment(str(tmp_path / "broken.yaml"))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0:4", [0, 1, 2, 3]), (":2", [0, 1]), ("-2:", [4, 5]), ("2:4", [2, 3]), ([0, 2, 5], [0, 2, 5])],
)
def test_layer_ranges_are_half_open(layers, expected):
    assert parse_layers(layers, 6) == expected


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("0:7", "asks for layer 6; the source has 6 layers"),
        ("2:2", "selects no layer"),
        ([], "selects no layer"),
        ([-1], "asks for layer -1"),
        ("a:b", "neither a half-open range"),
        ("1:2:3", "neither a half-open range"),
        ("4", r"could mean the first 4 \(write 0:4\) or block 4 alone \(write 4:5\)"),
    ],
)
def test_layer_ranges_that_make_no_sense_are_refused(layers, words):
    with pytest.raises(UserError, match=words):
        parse_layers(layers, 6)


def test_rehearsal_keeps_what_can_go_wrong_at_size(tmp_path):
    raw = experiment_dict(model={"size": "gpt2_xl"})
    raw["runs"] = {
        "reference": {"init": "random", "keep_at": [3, 6]},
        "grown": {
            "init": {"inherit": {"source": "reference", "layers": "0:12"}},
            "grow": {"by": 2, "max_layers": 24},
        },
        "list": {"init": {"inherit": {"source": "reference", "layers": [0, 24, 47]}}},
        "short": {
            "init": "random",
            "train": {
                "steps": 1,
                "warmup_steps": 0,
                "precision": "bf16",
                "deepspeed": "ds_configs/zero2.json",
            },
        },
    }
    raw["data"]["sequence_length"] = 32
    small = load_experiment(write_experiment(tmp_path, raw), rehearse=True)
    assert small.model.layers == 16 and small.model.heads % 2 == 1 and small.model.tied_head
    sequences = small.train.batch_tokens // small.data.sequence_length
    assert sequences % 2 and sequences % 4
    grown = small.runs["grown"]
    assert parse_layers(grown.init.inherit.layers, 16) == list(range(4)) and grown.grow.max_layers == 8
    assert max(small.runs["list"].init.inherit.layers) < small.model.layers
    short = small.train_of(small.runs["short"])
    assert short.steps >= short.warmup_steps and (short.precision, short.deepspeed) == (
        "fp32",
        "ds_configs/cpu.json",
    )
