"""Every family is cut in the middle and at the end: the logits are those of the source with the other blocks
removed by hand, to the last bit, in both transformers versions.

Families that are cut only are tested here; test_architectures.py has those that are measured and trained too.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import cut_worker
import pytest
import torch
from conftest import experiment_dict, run_verb, write_experiment, write_tokens
from launching import train_runs
from tiny_families import AUTOMATIC, FAMILIES, FURTHER, family_config
from tiny_models import random_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from inheritune.config.experiment import load_experiment
from inheritune.data.bpe_training import train_bpe
from inheritune.errors import UserError
from inheritune.evaluation.loading import load_weights
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.architectures import find_architecture
from inheritune.models.config_files import add_older_keys
from inheritune.models.sources import open_source
from inheritune.models.surgery import inherit

CUT = [*FURTHER, *AUTOMATIC]
LAYERS = {"middle": [1, 2, 3], "end": [2, 3, 4]}


def make_cuts(name: str, folder: Path) -> dict:
    """A job of cut_worker.py: a source of the family and cuts of it in `folder`."""
    config = family_config(name)
    random_model(config).save_pretrained(folder / "source")
    described = add_older_keys(read_json(folder / "source" / "config.json"))
    write_json(folder / "source" / "config.json", described, seal=False)
    for place, kept in LAYERS.items():
        inherit(folder / "source", kept, folder / place)
    blocks = find_architecture(config).block.removesuffix(".{i}.")
    cuts = {str(folder / place): kept for place, kept in LAYERS.items()}
    return {"family": config.model_type, "source": str(folder / "source"), "blocks": blocks, "cuts": cuts}


@pytest.fixture(scope="module")
def job_of(tmp_path_factory):
    """A function from a family to its job, made once."""
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda name: make_cuts(name, folder / name))


def assert_equal(result: dict) -> None:
    """The result of one job: no difference, of logits that are something."""
    assert "error" not in result, result["error"]
    assert len(result) == len(LAYERS)
    for difference, largest in result.values():
        assert difference == 0.0 and largest > 0.0


@pytest.fixture(scope="module")
def result_of(job_of):
    """A function from a family to the result of its job in the installed transformers, computed once."""
    return cache(lambda name: cut_worker.run_jobs([job_of(name)])[0])


def run_inherit(source: Path, folder: Path) -> subprocess.CompletedProcess:
    return run_verb("inherit", "--source", source, "--layers", "0:2", "--out", folder / "out", check=False)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    random_model(family_config("llama")).save_pretrained(tmp_path / "source")
    train_bpe("bpe:300", [Path(__file__).read_text()], tmp_path / "source")
    done = run_inherit(tmp_path / "source", tmp_path)
    assert done.returncode == 2 and "has 300 ids and the model's embedding 61 rows" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_dtype_casts_what_is_copied(tmp_path):
    model = random_model(family_config("llama"))
    model.save_pretrained(tmp_path / "source")
    inherit(tmp_path / "source", "1:3", tmp_path / "out", dtype="bf16")
    source, cut = open_source(tmp_path / "source"), open_source(tmp_path / "out")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(cut.tensor(name.format(0)), source.tensor(name.format(1)).bfloat16())
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        inherit(tmp_path / "source", "1:3", tmp_path / "other", dtype="int8")


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_the_text_part_of_a_wrapper_is_cut(kind, tmp_path):
    """The encoder of images is left out, and the cut is an ordinary model of the text part's family."""
    text = family_config("llama" if kind == "llava" else "gemma3")
    encoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    encoder |= {"image_size": 8, "patch_size": 4}
    encoder |= {"model_type": "clip_vision_model" if kind == "llava" else "siglip_vision_model"}
    config = CONFIG_MAPPING[kind](
        text_config=text.to_dict(), vision_config=encoder, image_token_index=60, mm_tokens_per_image=4
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "source")
    inherit(tmp_path / "source", "2:5", tmp_path / "cut")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", attn_implementation="eager").eval()
    assert cut.config.model_type == text.model_type and cut.config.num_hidden_layers == 3
    language = model.model.language_model
    del language.layers[:2]
    language.config.num_hidden_layers = 3
    if kind == "gemma3":
        language.config.layer_types = language.config.layer_types[2:]
    assert torch.equal(cut_worker.compute_logits(cut), cut_worker.compute_logits(model))


@pytest.mark.parametrize("name", ["deepseek_v3", "apertus"])
def test_a_loaded_model_has_the_saved_buffers(name, tmp_path):
    model = random_model(family_config(name))
    model.save_pretrained(tmp_path)
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    loaded = dict(load_weights(open_source(tmp_path)).named_buffers())
    assert buffers and all(torch.equal(loaded[n], buffer) for n, buffer in buffers.items())


@pytest.mark.slow
@pytest.mark.parametrize("family, stage", [("deepseek_v3", 1), ("deepseek_v3", 3), ("ernie4_5_moe", 3)])
def test_buffers_are_trained_around_and_saved(family, stage, tmp_path, own_root):
    """Two steps on two ranks: parameters move, the router's correction does not, and is in final/. It is a
    buffer in DeepSeek, and a parameter without a gradient in Ernie."""
    random_model(family_config(family)).save_pretrained(tmp_path / "source")
    source = str(tmp_path / "source")
    settings = {"train_micro_batch_size_per_gpu": 10, "zero_optimization": {"stage": stage}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    raw = experiment_dict(paper=[], runs={"cut": {"init": {"inherit": {"source": source, "layers": "1:5"}}}})
    raw["train"] |= {"steps": 2, "warmup_steps": 1, "eval_every": 2, "final_windows": 8}
    raw["train"] |= {"deepspeed": str(tmp_path / "ds.json")}
    raw["model"] |= {"vocab_size": 61}
    path = write_experiment(tmp_path, raw)
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment), vocab=61)
    train_runs([f"{path}:cut"], 2, own_root)
    run = RunDir.of(experiment, "cut")
    start, final = open_source(run.init), open_source(run.final)
    last = open_source(run.checkpoint(2)) if run.checkpoint(2).is_dir() else final
    corrections = [name for name in final.names() if name.endswith("e_score_correction_bias")]
    assert len(corrections) == {"deepseek_v3": 2, "ernie4_5_moe": 3}[family]
    for name in corrections:
        assert torch.equal(start.tensor(name), final.tensor(name))
        assert torch.equal(last.tensor(name), final.tensor(name)) and final.tensor(name).abs().min() > 0
    moved = [name for name in final.names() if not torch.equal(start.tensor(name), final.tensor(name))]
    assert "model.layers.3.mlp.experts.0.up_proj.weight" in moved


@pytest.mark.parametrize("name", CUT)
def test_a_cut_has_the_logits_of_the_source_without_the_other_blocks(result_of, name):
    assert find_architecture(family_config(name)).automatic == (name in AUTOMATIC)
    assert_equal(result_of(name))


@pytest.fixture(scope="module")
def in_older(job_of, older, tmp_path_factory) -> dict[str, dict | None]:
    """{family: the result of its job in transformers 4.57}, None for a family that it lacks"""
    folder = tmp_path_factory.mktemp("older")
    jobs = {name: job_of(name) for name in [*FAMILIES, *CUT]}
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    worker, environment = Path(cut_worker.__file__), {**os.environ, "PYTHONPATH": str(older)}
    command = [sys.executable, str(worker), str(folder / "jobs.json"), str(folder / "results.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "results.json").read_text())
    assert found["version"].startswith("4.57.")
    return dict(zip(jobs, found["results"], strict=True))


NEWER = {"afmoe", "exaone_moe", "hyperclovax", "jais2", "mellum", "minimax_m2", "ministral3", "nanochat"}
NEWER |= {"gemma4_text", "lfm2_moe", "solar_open"}
"""Families that transformers 4.57 does not have."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *CUT])
def test_it_has_them_in_transformers_4_57_too(in_older, result_of, name):
    """And the same model: largest logits agree, which they would not with another theta, say."""
    older = in_older[name]
    assert (older is None) == (name in NEWER)
    if older is not None:
        assert_equal(older)
        newest = [row[1] for row in result_of(name).values()]
        near = 2e-3 if name == "apertus" else 1e-4  # 4.57 keeps two numbers of each of its MLPs in bf16
        assert [row[1] for row in older.values()] == pytest.approx(newest, rel=near)


def test_at_least_forty_families_are_cut_in_both_versions():
    assert len(({model_type for model_type, _ in FAMILIES.values()} | {*CUT}) - NEWER) >= 40
