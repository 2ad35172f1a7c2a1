"""The shipped experiments against the paper: sizes, stages, batches and tokens of every run, and their rehearsals.

The right-hand sides are written out from the paper (FACTS sections 2, 4, 6 and 9), not read from the experiments.
"""

import csv
import re

import pytest
import torch

from inheritune.config import RECIPES, load_experiment, parse_layers
from inheritune.engine import load_json
from inheritune.inherit import cut_config
from inheritune.models import build, count_parameters, hf_config
from inheritune.tokens import GPT2_SIZE, check_vocabulary

# experiment: (row of table_model_configs.csv, batch in tokens, steps, first learning rate)
TRAINED = {
    "gpt2_small_owt": ("GPT-2 Small", 393_216, 100_000, 6e-4),  # the paper gives only the steps
    "gpt2_medium_owt": ("GPT-2 Medium", 393_216, 100_000, 3e-4),
    "gpt2_large_owt": ("GPT-2 Large", 131_072, 100_000, 2e-4),
    "gpt2_xl_owt": ("GPT-2 XLarge", 131_072, 100_000, 1.5e-4),
    "gpt2_medium_fineweb": ("GPT-2 Medium", 61_440, 100_000, 3e-4),
    "gpt2_large_fineweb": ("GPT-2 Large-dagger", 61_440, 100_000, 2e-4),
    "openllama_3b_1b": (None, 131_072, 60_000, 3e-4),  # 64K steps would be 8.4 epochs
    "openllama_7b": (None, 131_072, 381_400, 3e-4),  # 191K steps would be 25B tokens
    "llama2_7b": (None, 131_072, 381_400, 3e-4),
}
# the paper's rounds; where ours has more, they come after these, for a run that is not at parity yet
ROUNDS = {
    "gpt2_small_owt": [4],
    "gpt2_medium_owt": [12, 14, 16],
    "gpt2_large_owt": [18],
    "gpt2_xl_owt": [24],
    "gpt2_medium_fineweb": [16],
    "gpt2_large_fineweb": [16],
}
LLAMA_BILLIONS = {  # FACTS section 9: (reference, inherited), embeddings and head counted
    "openllama_3b_1b": (3.426, 1.816),
    "openllama_7b": (6.738, 1.476),
    "llama2_7b": (6.738, 1.679),
}
CHOSEN = {"gpt2_small_owt": {6, 8}, "gpt2_large_owt": {20, 22}, "gpt2_xl_owt": {26, 28}} | dict.fromkeys(
    ("gpt2_medium_fineweb", "gpt2_large_fineweb"), {18, 20}
)
"""Depths that are ours, for growth beyond the paper's rounds."""


def test_every_experiment_of_the_paper_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*TRAINED, "quickstart"}


def paper_parameters() -> dict[tuple[str, int], int]:
    """{(family, layers): parameters} of recipes/paper/table_model_configs.csv, full width only."""
    with open(RECIPES / "paper" / "table_model_configs.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if "half-width" not in row["type"]]
    return {(row["model_family"], int(row["layers"])): int(row["params_computed_tied_no_bias"]) for row in rows}


def depths(experiment, name: str) -> list[int]:
    """Layers of each model that a run makes: one, or one per stage."""
    run, full = experiment.runs[name], experiment.model.layers
    if run.grow:
        return run.grow.depths(run.init.inherit.layers, full)
    return [len(parse_layers(run.init.inherit.layers, full)) if run.init.inherit else run.layers or full]


@pytest.mark.parametrize("name", TRAINED)
def test_every_run_builds_at_full_size_with_the_papers_parameter_count(name):
    experiment, family, published = load_experiment(name), TRAINED[name][0], paper_parameters()
    per_layer = {}
    for run in experiment.runs:
        for layers in depths(experiment, run):
            config = hf_config(experiment.model, layers)
            with torch.device("meta"):
                model = build(config)
            assert config.num_hidden_layers == layers == len(model.base_model.h if family else model.base_model.layers)
            per_layer[layers] = count_parameters(config)
    if family is None:
        full, inherited = LLAMA_BILLIONS[name]
        assert {round(count / 1e9, 3) for count in per_layer.values()} == {full, inherited}
        return
    known = {layers: published.get((family, layers)) for layers in per_layer}
    assert {layers for layers, count in known.items() if count is None} <= CHOSEN.get(name, set())
    assert {layers: per_layer[layers] for layers, count in known.items() if count} == {n: c for n, c in known.items() if c}
    assert known[experiment.model.layers] and known[ROUNDS[name][-1]]


@pytest.mark.parametrize("name", TRAINED)
def test_batch_steps_and_rate_are_the_papers(name):
    experiment, (_, batch, steps, lr) = load_experiment(name), TRAINED[name]
    train = experiment.train
    assert (train.batch_tokens, train.steps, train.lr, train.min_lr) == (batch, steps, lr, 1e-5)
    assert train.betas == ((0.9, 0.999) if "fineweb" in name else (0.9, 0.95))
    assert (train.weight_decay, train.clip, train.schedule) == (0.1, 1.0, "cosine")
    assert train.warmup_steps == (2000 if name.startswith("gpt2") else 1000)
    assert train.precision == "bf16_autocast" and load_json(train.deepspeed)
    longer = {run: spec.train for run, spec in experiment.runs.items() if spec.train}
    if name.endswith("_owt"):
        small = ROUNDS[name][-1]
        assert longer == {f"random_{small}_200k": {"steps": 200_000}} and experiment.runs[f"random_{small}"].layers == small


@pytest.mark.parametrize("name", ROUNDS)
def test_stages_begin_with_the_papers_rounds(name):
    experiment, rounds = load_experiment(name), ROUNDS[name]
    assert experiment.runs["reference"].init.random and depths(experiment, "reference") == [experiment.model.layers]
    for run, parts in (("inheritune", 3), ("inheritune_everything", 5)):
        assert depths(experiment, run)[: len(rounds)] == rounds
        assert set(depths(experiment, run)[len(rounds) :]) == CHOSEN.get(name, set())
        assert len(experiment.runs[run].init.inherit.parts) == parts and experiment.runs[run].grow.from_ == "reference"
        assert experiment.reference_of(experiment.runs[run]) == "reference"


def test_a_public_start_needs_no_trained_reference():
    experiment = load_experiment("gpt2_xl_owt")
    run = experiment.runs["inheritune_public"]
    assert run.init.inherit.source == "openai-community/gpt2-xl" and not run.grow
    # OpenAI's config.json: 50257 tokens, trained biases, standard scaling; what is cut from it stays so, and our tokens fit
    public = hf_config(experiment.model)
    public.vocab_size, public.frozen_zero_biases, public.scale_attn_by_inverse_layer_idx = GPT2_SIZE, False, False
    assert count_parameters(public) == 1_557_611_200
    config = cut_config(public, parse_layers(run.init.inherit.layers, 48))
    assert (config.vocab_size, config.num_hidden_layers, config.scale_attn_by_inverse_layer_idx) == (50257, 24, False)
    check_vocabulary(GPT2_SIZE, config.vocab_size, "the public model")


def test_low_data_runs_count_their_tokens():
    experiment = load_experiment("openllama_3b_1b")
    tokens = {
        name: experiment.train_of(run).steps * experiment.train_of(run).batch_tokens for name, run in experiment.runs.items()
    }
    train_tokens = 1_000_000_000 * (1 - 0.005)
    assert tokens["eight_epochs"] == 8 * tokens["one_epoch"] and 0.98 < tokens["one_epoch"] / train_tokens < 1
    released = experiment.train_of(experiment.runs["released_391m"])
    assert tokens["released_391m"] == 191_000 * 2048 and released.batch_tokens == 8 * 2048  # FACTS: 391M tokens
    assert (released.schedule, released.weight_decay, released.clip, released.betas) == ("constant", 0.01, 0, (0.9, 0.999))
    assert depths(experiment, "eight_epochs") == [13]


@pytest.mark.parametrize("name", ["openllama_7b", "llama2_7b"])
def test_fresh_tokens_are_kept_at_every_ten_billion(name):
    experiment = load_experiment(name)
    run, batch = experiment.runs["inheritune"], experiment.train.batch_tokens
    assert [round(step * batch / 1e9, 1) for step in run.keep_at] == [10, 20, 30, 40, 50]
    windows = (experiment.data.max_tokens - experiment.data.shard_tokens - 1) // experiment.data.sequence_length
    assert experiment.train.steps * batch // experiment.data.sequence_length <= windows
    # the embedding that is inherited belongs to this tokenizer
    assert experiment.data.tokenizer.rpartition("/")[0] == run.init.inherit.source
    assert experiment.data.tokenizer_revision == run.init.inherit.revision


@pytest.mark.parametrize("name", [n for n in TRAINED if "fineweb" in n])
def test_one_pass_has_enough_tokens(name):
    experiment = load_experiment(name)
    for run in experiment.runs.values():
        train = experiment.train_of(run)
        assert train.steps * train.batch_tokens < experiment.data.max_tokens - experiment.data.shard_tokens


@pytest.mark.parametrize("name", TRAINED)
def test_rehearsal_keeps_the_growth_and_the_kept_steps(name):
    small = load_experiment(name, rehearse=True)
    for run, spec in small.runs.items():
        with torch.device("meta"):
            build(hf_config(small.model, depths(small, run)[-1]))
        assert not spec.grow or len(depths(small, run)) >= 2
        assert len(spec.keep_at) == len(load_experiment(name).runs[run].keep_at)


@pytest.mark.parametrize("name", TRAINED)
def test_everything_from_the_hub_is_pinned_to_a_commit(name):
    experiment = load_experiment(name)
    pins = [experiment.data.revision] + [experiment.data.tokenizer_revision] * (experiment.data.tokenizer != "gpt2")
    for run in experiment.runs.values():
        start = run.init.external or run.init.inherit
        if start and start.source not in experiment.runs:
            pins.append(start.revision)
    assert all(re.fullmatch("[0-9a-f]{40}", pin or "") for pin in pins), pins


def test_the_readme_lists_every_experiment_with_its_steps_and_batch():
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.yaml\) \|.*\| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    listed = {
        name: (int(steps.replace(",", "")), int(batch.replace(",", ""))) for name, file, steps, batch in rows if name == file
    }
    experiments = {path.stem: load_experiment(path.stem).train for path in RECIPES.glob("*.yaml")}
    assert listed == {name: (train.steps, train.batch_tokens) for name, train in experiments.items()}
