"""At ZeRO 3 weights are gathered in bf16 where autocast rounds them anyway: half the bytes, the same bits."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import experiment_dict, write_experiment, write_tokens
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from launching import launch_locally
from test_stop import record
from tiny_families import AUTOMATIC, FAMILIES, FURTHER, family_config

from inheritune.config.experiment import load_experiment
from inheritune.engines.checkpoint import TAG
from inheritune.engines.gathers import find_rounded_weights
from inheritune.files.json_files import read_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.deepspeed_files import read_deepspeed
from inheritune.models.extents import read_tensor
from inheritune.models.networks import build_model, clear_dropout, find_training_attention
from inheritune.models.sources import open_source

SHAPES = {
    "gpt2": {"size": "gpt2_tiny", "heads": 2},
    "llama": {"size": "llama_tiny", "heads": 2, "mlp_width": 44},
}
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}
NONE_STAYS = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
OTHERS = {
    "checkpointing": ({}, {"activation_checkpointing": True}),
    "persistent": ({"stage3_param_persistence_threshold": 2000}, {}),
    "apart": ({"contiguous_gradients": False, "reduce_scatter": False}, {}),
    "sequential": ({"stage3_allgather_sequential": True}, {}),
    "offloaded": ({"offload_param": {"device": "cpu", "pin_memory": False}}, {}),
    "optimizer_away": ({"offload_optimizer": {"device": "cpu", "pin_memory": False}}, {}),
    "hierarchical": ({"zero_hpz_partition_size": 2}, {}),
}
"""What is changed in zero_optimization, and in our own block."""


def train(folder: Path, shape: str, jsons: dict[str, tuple[dict, dict]]) -> tuple[dict[str, RunDir], dict]:
    """Train a run under each JSON on two ranks.  -> ({name: its folder}, {name: {type: gathered bytes}})"""
    runs = {}
    for name, (zero, own) in jsons.items():
        settings = {
            "train_micro_batch_size_per_gpu": 3,
            "zero_optimization": {**ZERO, **zero},
            "inheritune": own,
        }
        (folder / f"{name}.json").write_text(json.dumps(settings))
        runs[name] = {"init": "random", "train": {"deepspeed": str(folder / f"{name}.json")}}
    raw = experiment_dict(runs=runs, paper=[])
    raw["model"] |= SHAPES[shape]
    raw["train"] |= {"precision": "bf16_autocast", "lr": 1e-2, "batch_tokens": 12 * 32}
    path = write_experiment(folder, raw)
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment))
    out = folder / "gathered.json"
    launch_locally(["tests/support/gather_worker.py", path, str(out), *runs], 2, INHERITUNE_ROOT=folder)
    return {name: RunDir.of(experiment, name) for name in runs}, read_json(out)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_half_the_bytes_are_gathered_for_the_same_bits(tmp_path, monkeypatch, shape):
    """In losses, norms, final weights and optimizer states; also for a run that changes over half way."""
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path))
    rounded = {"gather_in_bf16": True}
    jsons = {"fp32": ({}, {}), "bf16": ({}, rounded), "resumed": ({}, rounded)}
    twins = {"bf16": "fp32", "resumed": "fp32"}
    for name, (zero, own) in OTHERS.items() if shape == "gpt2" else ():
        twins[name] = f"{name}_fp32"
        jsons |= {name: (zero, own | rounded), twins[name]: (zero, own)}
    runs, gathered = train(tmp_path, shape, jsons)
    for name, twin in twins.items():
        run, plain = runs[name], runs[twin]
        assert len(record(run)) > 6 and record(run) == record(plain), name
        assert hash_folder(run.final) == hash_folder(plain.final), name
        newest = plain.complete_checkpoints()[-1]
        for what in ("master", "exp_avg", "exp_avg_sq"):
            new, old = (read_deepspeed(each.checkpoint(newest) / TAG, what) for each in (run, plain))
            assert new.keys() == old.keys() and len(new) > 10
            assert all(torch.equal(read_tensor(new[key]), read_tensor(old[key])) for key in new), (name, what)
        assert set(gathered[twin]) == {"torch.float32"}
        if name != "resumed":  # embeddings and norms are gathered as before
            left = gathered[name]["torch.float32"]
            saved = gathered[twin]["torch.float32"] - left
            assert saved == 2 * gathered[name]["torch.bfloat16"] > left / 2, name


def test_a_step_gathers_each_weight_once_where_all_may_stay(tmp_path, monkeypatch):
    """In each of its two micro steps, though a validation came first, and in a run that goes on.
    A later validation leaves the weights gathered. Where none may stay, backward gathers them again."""
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path))
    jsons = {"fp32": ({}, {}), "resumed": ({}, {}), "none": (NONE_STAYS, {})}
    runs, gathered = train(tmp_path, "gpt2", jsons)
    weights = open_source(str(runs["fp32"].final))
    whole = sum(4 * 2 * -(-math.prod(weights.shape(name)) // 2) for name in weights.names())  # on two ranks
    steps = {name: gathered[f"{name} by step"] for name in jsons}
    assert len(steps["fp32"]) > 4 and set(steps["fp32"][1:]) == {whole, 2 * whole}
    assert len(steps["resumed"]) > 1 and set(steps["resumed"][1:]) <= {whole, 2 * whole}
    assert min(steps["none"]) > 3 * whole
    assert record(runs["fp32"]) == record(runs["resumed"]) == record(runs["none"])
    assert hash_folder(runs["fp32"].final) == hash_folder(runs["none"].final)


@pytest.mark.parametrize(
    "family",
    [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in (*FURTHER, *AUTOMATIC))],
)
@pytest.mark.parametrize("linear", [torch._C._nn.linear, zero3_linear_wrap], ids=["torch's", "DeepSpeed's"])
def test_rounded_weights_change_no_bit_of_a_familys_logits_and_gradients(family, linear, monkeypatch):
    """With torch's linear function, and with the one that DeepSpeed puts in its place at ZeRO 3."""
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    config = family_config(family)
    clear_dropout(config)  # as a run does
    results = []
    for is_rounded in (False, True):
        model = build_model(config, find_training_attention(config))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
        chosen = find_rounded_weights(model)
        for parameter in chosen if is_rounded else ():
            parameter.data = parameter.data.bfloat16()
        ids = torch.arange(24).view(2, 12) % 61
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
        gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits, gradients))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert [n for n, value in results[0][1].items() if not torch.equal(value, results[1][1][n])] == []
    # falcon's linear layers are of a class of their own
    assert bool(chosen) == (not family.startswith("falcon_") or family == "falcon_mamba")
