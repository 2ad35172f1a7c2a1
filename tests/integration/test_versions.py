"""What leaves here is opened by others: transformers 4.57 and 5 read every config and every tokenizer alike,
and as we do.

The folders are opened by each version's own AutoTokenizer and AutoModelForCausalLM, and the model gets the
tokenizer's own output (open_worker.py)."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GPT2_BPE, experiment_dict, has_gpt2_bpe, run_verb, write_experiment, write_tokens
from tiny_families import FAMILIES, LLAMA, LLAMA3, LONG, NO_TOKENS, POSITIONS, family_config, positions_config
from tiny_models import random_model
from tiny_tokenizers import save_by_newest, write_chat_tokenizer, write_qwen_tokenizer
from transformers import CONFIG_MAPPING
from versions import assert_alike, assert_close, open_in_both

from inheritune.config.experiment import load_experiment
from inheritune.data.bpe_training import train_bpe
from inheritune.data.tokenizer import PROBE
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.evaluation.loading import load_weights
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.sources import open_source
from inheritune.models.surgery import inherit

pytestmark = pytest.mark.slow

# --- configs of every family --------------------------------------------------------------------------------

IDS = [[7, 3, 60, 1, 1, 22, 41, 9, 58, 0, 13, 2, 35, 6, 17, 44, 8, 29, 50, 31]]


@pytest.fixture(scope="module")
def families(older, tmp_path_factory) -> dict:
    """{case: (slice, result of transformers 4.57, result of the installed one)} of a slice of every family
    and position."""
    folder = tmp_path_factory.mktemp("families")
    configs = {name: family_config(name) for name in FAMILIES} | {
        name: positions_config(name) for name in POSITIONS
    }
    jobs = []
    for number, (name, config) in enumerate(configs.items()):
        random_model(config).save_pretrained(folder / f"source{number}")
        inherit(folder / f"source{number}", "0:4", folder / f"slice{number}")
        jobs.append({"folder": str(folder / f"slice{number}"), "ids": IDS})
        if "gemma2" in name:  # its attention has a cap that SDPA leaves out in transformers 4
            jobs[-1]["attention"] = "eager"
    results = zip(*open_in_both(jobs, older, folder / "opened"), strict=True)
    return {
        name: (Path(job["folder"]), *pair) for name, job, pair in zip(configs, jobs, results, strict=True)
    }


@pytest.mark.parametrize("name", [*FAMILIES, *POSITIONS])
def test_both_versions_read_every_familys_config_alike(families, name):
    folder, older, newer = families[name]
    assert_alike(older, newer)
    with torch.no_grad():
        assert_close(load_weights(open_source(folder))(torch.tensor(IDS)).logits, newer["logits"])


# --- tokenizers and models together -------------------------------------------------------------------------

TEXTS = ["def f(x)", "Hello, world! It's 12345.", PROBE, "import os\n\n\nclass A:\n\treturn  None"]
SETTINGS = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "eos_token_id": [299, 302],
    "pad_token_id": 301,
}


def write_source(folder: Path, model_type: str, **keys) -> None:
    """A random model with its config as transformers 4 writes it."""
    sizes = FAMILIES["gemma3" if model_type == "gemma3_text" else model_type][1]
    raw = {
        "model_type": model_type,
        "vocab_size": 310,
        **NO_TOKENS,
        **sizes,
        "torch_dtype": "float32",
        **keys,
    }
    random_model(CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(raw))).save_pretrained(folder)
    described = {
        key: value
        for key, value in read_json(folder / "config.json").items()
        if key not in ("rope_parameters", "dtype")
    }
    write_json(folder / "config.json", described | raw, seal=False)


LLAMA3_KEYS = {
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3,
    "bos_token_id": 300,
    "eos_token_id": 302,
    "pad_token_id": 301,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, sentencepiece_models) -> Path:
    """Folders of third-party models, as others leave them."""
    folder = tmp_path_factory.mktemp("sources")
    write_source(folder / "llama of 4", "llama", **LLAMA3_KEYS)
    write_chat_tokenizer(folder / "llama of 4")
    write_json(folder / "llama of 4" / "generation_config.json", SETTINGS, seal=False)

    config = CONFIG_MAPPING["llama"].from_dict(copy.deepcopy({"vocab_size": 310, **LLAMA, **LLAMA3_KEYS}))
    random_model(config).save_pretrained(folder / "llama of 5")
    save_by_newest(folder / "llama of 4", folder / "llama of 5")

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "n_positions": 64,
        "vocab_size": 310,
    }
    random_model(CONFIG_MAPPING["gpt2"](**sizes, **NO_TOKENS)).save_pretrained(folder / "gpt2")
    train_bpe("bpe:300", [Path(__file__).read_text()], folder / "gpt2")
    silent = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "tokenizer_file": "/home/me/t.json",
    }
    write_json(folder / "gpt2" / "tokenizer_config.json", silent, seal=False)

    for family, keys in (("qwen2", {}), ("qwen3", {}), ("phi3", {"original_max_position_embeddings": 8})):
        keys |= {"rope_scaling": {"type": "longrope", **LONG}} if family == "phi3" else {}
        write_source(folder / family, family, rope_theta=77.0, **keys)
        write_qwen_tokenizer(folder / family) if family[0] == "q" else write_chat_tokenizer(folder / family)
    write_source(
        folder / "gemma3_text", "gemma3_text", vocab_size=600, rope_theta=99.0, rope_local_base_freq=77.0
    )
    for kind, at in (("llama", "gemma3_text"), ("open_llama", "sentencepiece")):
        load_tokenizer(_data(str(sentencepiece_models[kind]))).save(folder / at)
    write_source(folder / "sentencepiece", "llama", vocab_size=600)
    if has_gpt2_bpe():
        random_model(CONFIG_MAPPING["gpt2"](**{**sizes, "vocab_size": 50257})).save_pretrained(
            folder / "gpt2 of OpenAI"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INHERITUNE_GPT2_BPE", str(GPT2_BPE))
            load_tokenizer(_data("gpt2")).save(folder / "gpt2 of OpenAI")
        write_json(
            folder / "gpt2 of OpenAI" / "tokenizer_config.json", {"model_max_length": 1024}, seal=False
        )
    return folder


def _data(tokenizer: str):
    from inheritune.config.sections import Data

    raw = experiment_dict()["data"] | {"tokenizer": tokenizer}
    return Data.model_validate(raw)


SLICES = [
    "llama of 4",
    "llama of 5",
    "gpt2",
    "gpt2 of OpenAI",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma3_text",
    "sentencepiece",
]
LEFT = ["init/", "at_1/", "final/", "export"]
"""What a run and `export` leave, of a run that starts from the first of them."""


@pytest.fixture(scope="module")
def opened(older, sources, tmp_path_factory) -> dict:
    """{case: (folder, result of transformers 4.57, result of the installed one)} of slices and of what a run
    leaves."""
    folder, folders = tmp_path_factory.mktemp("opened"), {}
    for name in filter(lambda name: (sources / name).is_dir(), SLICES):
        inherit(sources / name, "0:2" if name.startswith("gpt2") else "0:3", folder / name)
        folders[name] = folder / name
    run = train_from(sources / "llama of 4", folder)
    folders |= dict(zip(LEFT, (run.init, run.kept(1), run.final, folder / "exported"), strict=True))
    run_verb("export", run.path, "--to", folders["export"])
    jobs = [{"folder": str(path), "texts": TEXTS} for path in folders.values()]
    results = zip(*open_in_both(jobs, older, folder / "results"), strict=True)
    return {name: (path, *pair) for (name, path), pair in zip(folders.items(), results, strict=True)}


def train_from(source: Path, folder: Path) -> RunDir:
    """A run of two steps from the first three blocks of a Llama, on data of its own tokenizer."""
    raw = experiment_dict(
        paper=[],
        runs={"cut": {"init": {"inherit": {"source": str(source), "layers": "0:3"}}, "keep_at": [1]}},
    )
    raw["data"] |= {"tokenizer": str(source)}
    raw["model"] = {"from": str(source)}
    raw["train"] |= {"steps": 2, "warmup_steps": 1, "eval_every": 2, "final_windows": 8}
    path = write_experiment(folder, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(folder / "root"))
        data = write_tokens(get_data_dir(load_experiment(path)))
        shutil.rmtree(data / "tokenizer")
        load_tokenizer(_data(str(source))).save(data / "tokenizer")
        run_verb("train", path, "--run", "cut")
        return RunDir.of(load_experiment(path), "cut")


@pytest.mark.parametrize("name", [*SLICES, *LEFT])
def test_both_versions_open_it_alike_and_as_we_do(opened, sentencepiece_models, request, name):
    if name == "gpt2 of OpenAI":
        request.getfixturevalue("gpt2_bpe")  # skips where it is not there
    folder, older, newer = opened[name]
    assert_alike(older, newer)
    assert newer["outputs"] == ["attention_mask", "input_ids"] and newer["stored"] == "torch.float32"
    names = {
        "gemma3_text": str(sentencepiece_models["llama"]),
        "sentencepiece": str(sentencepiece_models["open_llama"]),
    }
    names |= {"gpt2": "bpe:300", "gpt2 of OpenAI": "gpt2"}
    ours = load_tokenizer(_data(names.get(name, "any")), None if name == "gpt2 of OpenAI" else folder)
    assert newer["plain_ids"] == [row.tolist() for row in ours.encode_batch(TEXTS)]
    with torch.no_grad():
        assert_close(
            load_weights(open_source(folder))(torch.tensor([newer["ids"][0]])).logits, newer["logits"]
        )
    if name.startswith("llama") or name in LEFT:
        assert newer["chat"] == f"<|user|>{TEXTS[0]}<|end|>"
        assert newer["ids"][0][0] == 300 and newer["tokens"][:3] == ["<|begin|>", "<|end|>", "<|pad|>"]
    if name == "llama of 4" or name in LEFT:  # which started from it
        assert newer["generation"] == SETTINGS | ({"bos_token_id": 300} if name == "export" else {})
