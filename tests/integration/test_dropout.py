"""Every run trains without dropout, whatever its start brings along."""

import pytest
from conftest import experiment_dict, run_verb, write_experiment, write_tokens

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.networks import clear_dropout


def test_rates_of_dropout_are_cleared_wherever_they_stand():
    from transformers import GPT2Config, LlamaConfig, MixtralConfig

    assert clear_dropout(GPT2Config()) == {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    assert clear_dropout(LlamaConfig(attention_dropout=0.2)) == {"attention_dropout": 0.2}
    assert clear_dropout(MixtralConfig(router_jitter_noise=0.1)) == {"router_jitter_noise": 0.1}
    config = GPT2Config()
    clear_dropout(config)
    assert clear_dropout(config) == {} and config.summary_first_dropout == 0.1  # of a head that is not used


@pytest.mark.slow
def test_a_start_with_dropout_trains_without_it(tmp_path):
    """Its losses are the same on any number of ranks, and those of the same start whose config says 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 320, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
    rates = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "with")
    for rate in rates:
        setattr(model.config, rate, 0.0)
    model.save_pretrained(tmp_path / "without")
    runs = {
        name: {"init": {"inherit": {"source": str(tmp_path / name), "layers": "0:2"}}}
        for name in ("with", "without")
    }
    path = write_experiment(
        tmp_path, experiment_dict(runs=runs, paper=[], model={"from": str(tmp_path / "with")})
    )
    loaded = load_experiment(path)
    write_tokens(get_data_dir(loaded))
    said = run_verb("train", path, "--run", "with,without").stdout
    assert (
        "dropout of the start is off, as in every run: resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1"
        in said
    )
    assert said.count("dropout") == 1
    losses = {
        name: [row["loss"] for row in read_jsonl(RunDir.of(loaded, name).metrics) if "loss" in row]
        for name in runs
    }
    assert losses["with"] == losses["without"] and len(losses["with"]) > 2
    config = read_json(RunDir.of(loaded, "with").final / "config.json")
    assert all(config[rate] == 0 for rate in rates)
