"""A plain cut needs neither torch nor transformers, and writes the bytes that it writes with them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tiny_families import FAMILIES, FURTHER, POSITIONS, family_config, positions_config
from tiny_models import config_of, random_model
from transformers import CONFIG_MAPPING, GenerationConfig, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from inheritune.errors import UserError
from inheritune.models import config_files, plain_configs
from inheritune.models.networks import list_model_shapes, takes_token_types
from inheritune.models.plain_configs import PlainConfig, describe_plain
from inheritune.models.surgery import inherit

TABLE = plain_configs._read_table()
ROWS = TABLE["families"]


def test_the_table_is_of_the_version_that_is_installed():
    assert TABLE["transformers"] == __version__
    assert TABLE["settings"] == list(GenerationConfig().to_dict())


@pytest.mark.parametrize("family", ROWS)
def test_fields_and_defaults_are_those_of_the_config_class(family):
    row, kind = ROWS[family], CONFIG_MAPPING[family]
    base = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family].__mro__[1])}
    own = {field.name: field.default for field in dataclasses.fields(kind) if field.name not in base}
    assert own == row["fields"] and [type(v) for v in own.values()] == [*map(type, row["fields"].values())]
    theta = row.get("rope", {}).get("rope_theta", [None, None])[1]
    assert theta in (None, kind.default_theta)
    assert MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__ == row["class"]
    assert takes_token_types(kind()) == row.get("token_types", False)


# --- configs ------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 44}
SIZES |= {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}
OLDER = {"torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True}
PUBLISHED = {
    "GPT-2": {
        **{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"},
        **{"n_ctx": 32, "n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 32, "vocab_size": 61},
        **{"bos_token_id": 60, "eos_token_id": 60, "resid_pdrop": 0.1, "summary_activation": None},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "SmolLM2": {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, **OLDER},
        **{
            "num_key_value_heads": 2,
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_scaling": None,
        },
        **{"rope_theta": 100000, "tie_word_embeddings": True, "pretraining_tp": 1, "eos_token_id": [2, 3]},
    },
    "Pythia": {
        **{"model_type": "gpt_neox", **SIZES, **OLDER, "rotary_emb_base": 10000, "rotary_pct": 0.5},
        **{"use_parallel_residual": True, "layer_norm_eps": 1e-5},
    },
    "Mistral": {"model_type": "mistral", **SIZES, **OLDER, "sliding_window": None, "num_key_value_heads": 2},
    "Qwen2.5": {
        **{"model_type": "qwen2", **SIZES, **OLDER, "sliding_window": 32768, "use_sliding_window": False},
        **{"max_window_layers": 3, "num_key_value_heads": 2, "rope_theta": 1000000.0},
    },
    "Qwen3": {
        **{"model_type": "qwen3", **SIZES, **OLDER, "head_dim": 8, "sliding_window": None},
        **{"attention_bias": True, "max_window_layers": 5, "num_key_value_heads": 2},
    },
    "OLMo 2": {"model_type": "olmo2", **SIZES, **OLDER, "rms_norm_eps": 1e-6, "pad_token_id": 0},
    "biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
}
"""Configs as published checkpoints of each family state them, smaller."""


def compare_with_transformers(raw: dict) -> None:
    """Assert that `raw`, which plain_families.yaml covers, is to us what it is to transformers."""
    plain, whole = describe_plain(raw), CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    assert isinstance(plain, PlainConfig)
    describe = config_files._describe_config
    dtype = plain_configs.DTYPES["BF16"]
    assert describe(plain, dtype) == json.loads(json.dumps(describe(whole, dtype)))
    assert describe(PlainConfig.from_dict(plain.to_dict()), dtype) == describe(plain, dtype)
    assert list(list_model_shapes(plain).items()) == list(list_model_shapes(whole).items())


VALUES = (None, True, 0, 3, -1, 61, 0.5, 1.5, float("nan"), "gelu", [1], {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_config_that_is_covered_is_read_as_transformers_reads_it(name):
    """Each key in turn has other values, also such that no model has."""
    raw = PUBLISHED[name]
    compare_with_transformers(raw)
    covered = 0
    keys = {*raw, *ROWS[raw["model_type"]]["fields"], "rope_theta", "rope_scaling", "id2label", "own"}
    for key in sorted(keys - {"model_type"}):
        for value in VALUES:
            if describe_plain(changed := {**raw, key: value}) is not None:
                compare_with_transformers(changed)
                covered += 1
    assert covered > 20


# --- cuts ---------------------------------------------------------------------------------------------------


def write_source(config, folder: Path, **saving) -> Path:
    """A checkpoint of random values with a tokenizer, in `folder`."""
    model = random_model(config)
    model.save_pretrained(folder, **saving)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 32, "name_or_path": "/there"}')
    return folder


def cut(folder: Path, layers, out: Path, monkeypatch, plain: bool) -> dict[str, bytes] | str:
    """What a cut writes to `out`, which is removed, or what it refuses with."""
    with monkeypatch.context() as patch:
        if not plain:
            patch.setattr(config_files, "describe_plain", lambda raw: None)
        try:
            inherit(folder, layers, out)
        except UserError as refusal:
            return str(refusal)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    return written


CONFIGS = {name: lambda name=name: family_config(name) for name in [*FAMILIES, *FURTHER]}
CONFIGS |= {name: lambda name=name: positions_config(name) for name in POSITIONS}
CONFIGS |= {name: lambda name=name: config_of(name, 5) for name in ("paper", "public", "llama_tied")}
CONFIGS |= {
    name: lambda raw=raw: CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    for name, raw in PUBLISHED.items()
}
COVERED = {"paper", "public", "llama_tied", "gpt2", "gpt_neox", "gpt_neox_tied", "llama", "mistral", "olmo2"}
COVERED |= {"gpt_neox, own names", "mistral, theta", *PUBLISHED}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_are_the_same_with_and_without_transformers(name, tmp_path, monkeypatch):
    config = CONFIGS[name]()
    covered = isinstance(describe_plain(json.loads(config.to_json_string())), PlainConfig)
    assert covered == (name in COVERED)
    if not covered:  # then transformers reads it, and there is one way only
        return
    shards = {"max_shard_size": "9KB"} if name in ("paper", "SmolLM2", "Pythia") else {}
    source = write_source(config, tmp_path / "source", **shards)
    if name in PUBLISHED:
        (source / "config.json").write_text(json.dumps(PUBLISHED[name]))
    for layers in ("0:2", [0, 2, 1], [2]):
        one, other = (cut(source, layers, tmp_path / "out", monkeypatch, plain) for plain in (True, False))
        assert isinstance(one, dict) and one == other


def change_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


DAMAGE = {
    "deeper": lambda folder: change_config(folder, num_hidden_layers=6),
    "shallower": lambda folder: change_config(folder, num_hidden_layers=4),
    "wider": lambda folder: change_config(folder, hidden_size=48),
    "fewer heads of keys": lambda folder: change_config(folder, num_key_value_heads=1),
    "vocabulary": lambda folder: change_config(folder, vocab_size=62),
    "bias": lambda folder: change_config(folder, attention_bias=True),
    "untied": lambda folder: change_config(folder, tie_word_embeddings=False),
    "quantized": lambda folder: change_config(folder, quantization_config={"bits": 4}),
    "heads": lambda folder: change_config(folder, num_attention_heads=5),
    "unknown activation": lambda folder: change_config(folder, hidden_act="sine"),
    "no layers": lambda folder: change_config(folder, num_hidden_layers=0),
    "another tokenizer": lambda folder: (folder / "tokenizer.json").write_text(
        '{"model": {"vocab": {"a": 61}}}'
    ),
    "cut off": cut_off,
    "none": lambda folder: (folder / "model.safetensors").unlink(),
    "layers out of range": lambda folder: None,
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_source(config_of("llama_tied", 5), tmp_path_factory.mktemp("tied") / "source")


@pytest.mark.parametrize("damage", DAMAGE)
def test_refusals_are_the_same_with_and_without_transformers(damage, tied, tmp_path, monkeypatch):
    source = shutil.copytree(tied, tmp_path / "source")
    DAMAGE[damage](source)
    layers = "0:9" if damage == "layers out of range" else "0:2"
    one, other = (cut(source, layers, tmp_path / "out", monkeypatch, plain) for plain in (True, False))
    assert isinstance(one, str) and one == other and not (tmp_path / "out").exists()
