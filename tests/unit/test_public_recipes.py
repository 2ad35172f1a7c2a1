"""recipes/public: loaded, checked and planned without a network, from the keys of each model's config.json.

Those that decide the shape are written out here."""

import json

import pytest
from conftest import REPOSITORY

from inheritune.cli import main
from inheritune.config.experiment import load_experiment

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def llama_like(family, layers, width, heads, kv_heads, mlp, positions, vocab, theta, **more) -> dict:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab}
    shared = {"max_position_embeddings": positions, "rope_theta": theta, "tie_word_embeddings": True}
    return {"model_type": family, **sizes, **shared, **more}


GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024}
CONFIGS = {
    "gpt2": GPT2 | {"vocab_size": 50257},
    "smollm2_135m": llama_like("llama", 30, 576, 9, 3, 1536, 8192, 49152, 1e5, rms_norm_eps=1e-5),
    "qwen3_0p6b": llama_like("qwen3", 28, 1024, 16, 8, 3072, 40960, 151936, 1e6, head_dim=128),
    "llama32_1b": llama_like("llama", 16, 2048, 32, 8, 8192, 131072, 128256, 5e5, rope_scaling=LLAMA3),
}
MILLIONS = {"gpt2": 124, "smollm2_135m": 135, "qwen3_0p6b": 596, "llama32_1b": 1236}
"""Parameters, as the cards of the models state them, a tied head counted once."""


def write_cache(hub, experiment: dict, config: dict) -> None:
    """The Hub's cache of `model: {from: ...}` with nothing but its config.json."""
    folder = hub / f"models--{experiment['from'].replace('/', '--')}" / "snapshots" / experiment["revision"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_checked_and_planned_offline(name, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    from inheritune.config.reading import read_yaml
    from inheritune.models.sizes import count_trained_elements

    path = REPOSITORY / "recipes" / "public" / f"{name}.yaml"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_cache(tmp_path / "hub", read_yaml(path)["model"], CONFIGS[name])
    experiment = load_experiment(str(path))
    assert round(count_trained_elements(experiment.model, experiment.model.layers) / 1e6) == MILLIONS[name]
    assert main(["check", str(path)]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["plan", str(path), "--gpus", "1", "--gpu", "H100"]) == 0
    assert "NO" not in capsys.readouterr().out.split(), "every run fits on one GPU"
    source = (experiment.model.from_, experiment.model.revision)
    others = {run: spec.sources() for run, spec in experiment.runs.items()}
    assert all(found == source for found in sum(others.values(), []))
    small = load_experiment(f"public/{name}", rehearse=True)
    assert small.model.from_ is None and small.layers_of(small.runs["inheritune"]) < small.model.layers


def test_they_are_all_here():
    assert {path.stem for path in (REPOSITORY / "recipes" / "public").glob("*.yaml")} == set(CONFIGS)
