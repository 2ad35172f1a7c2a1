"""portable.py: the words in which configs and tokenizers are written, key by key (test_versions.py opens
them)."""

import json
from pathlib import Path

import pytest
from tiny_families import FAMILIES, POSITIONS, family_config, positions_config
from tiny_tokenizers import write_chat_tokenizer

from inheritune.data.tokenizer_files import (
    convert_special_tokens,
    convert_tokenizer_config,
    convert_trained_config,
    copy_tokenizer,
    write_tokenizer,
)
from inheritune.errors import UserError
from inheritune.models.config_files import (
    add_older_keys,
    copy_settings,
    drop_older_keys,
    extract_settings,
    load_config,
    write_config,
)
from inheritune.models.dtypes import BF16, FP32

BOTH = ["input_ids", "attention_mask"]
BPE = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}


@pytest.mark.parametrize("name", [*FAMILIES, *POSITIONS])
def test_config_that_is_read_and_written_again_is_the_same(tmp_path, name):
    config = positions_config(name) if name in POSITIONS else family_config(name)
    write_config(tmp_path / "once.json", config, BF16)
    read = load_config(tmp_path / "once.json")
    incidental = {"dtype": None, "architectures": None}
    assert drop_older_keys(read.to_dict() | incidental) == drop_older_keys(config.to_dict() | incidental)
    write_config(tmp_path / "twice.json", read, BF16)
    once, twice = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("once", "twice"))
    assert once == twice and once["torch_dtype"] == once["dtype"] == "bfloat16"


def test_older_keys_agree_with_the_newer_where_a_source_has_both():
    both = {
        "model_type": "llama",
        "dtype": "float32",
        "torch_dtype": "bfloat16",
        "rope_theta": 1.0,
        "rope_scaling": {"factor": 9},
    }
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    assert add_older_keys({**both, "rope_parameters": linear}) == {
        "model_type": "llama",
        "dtype": "float32",
        "torch_dtype": "float32",
        "rope_parameters": linear,
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }


def test_config_with_positions_of_both_kinds_is_written_as_it_is_computed(tmp_path):
    """transformers computes with rope_parameters; what its older keys said before must not reach others."""
    raw = {
        "model_type": "llama",
        "rope_theta": 77.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 99.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_config(tmp_path / "written.json", load_config(tmp_path / "config.json"), FP32)
    written = json.loads((tmp_path / "written.json").read_text())
    assert (
        written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 99.0
        and "rope_scaling" not in written
    )


# --- tokenizers ---------------------------------------------------------------------------------------------

NEWEST = {
    "backend": "tokenizers",
    "is_local": True,
    "local_files_only": False,
    "tokenizer_class": "TokenizersBackend",
    "name_or_path": "/home/me/model",
    "tokenizer_file": "/home/me/model/tokenizer.json",
    "cache_dir": "/scratch/hub",
    "extra_special_tokens": ["<|user|>"],
    "model_specific_special_tokens": {"image_token": "<|image|>"},
    "clean_up_tokenization_spaces": True,
    "eos_token": "</s>",
    "auto_map": {"AutoTokenizer": "own.Own"},
}


def test_words_of_one_version_or_machine_are_replaced_or_dropped():
    assert convert_tokenizer_config(NEWEST, BPE) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|user|>"],
        "eos_token": "</s>",
        "extra_special_tokens": {"image_token": "<|image|>"},
        "clean_up_tokenization_spaces": True,
        "model_input_names": BOTH,
    }
    # no tokenizer.json: the family's own class, and its code if there is any
    without = convert_tokenizer_config(NEWEST)
    assert "tokenizer_class" not in without and without["auto_map"] == NEWEST["auto_map"]
    assert convert_trained_config(NEWEST, BPE) == convert_tokenizer_config(NEWEST, BPE) | {
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": True,
    }
    once = convert_trained_config(NEWEST, BPE)
    assert convert_trained_config(once, BPE) == once


def test_class_that_both_versions_have_stays_with_a_source():
    for name in ("GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"):
        assert convert_tokenizer_config({"tokenizer_class": name}, BPE)["tokenizer_class"] == name
        assert (
            convert_trained_config({"tokenizer_class": name}, BPE)["tokenizer_class"]
            == "PreTrainedTokenizerFast"
        )
    assert convert_tokenizer_config({}, BPE) == {"model_input_names": BOTH}


def test_inputs_that_a_tokenizer_names_are_kept_where_the_model_takes_them():
    stated = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    assert convert_tokenizer_config(stated, BPE, token_types=True) == stated
    assert convert_tokenizer_config(stated, BPE)["model_input_names"] == BOTH
    assert convert_tokenizer_config({}, BPE, token_types=True)["model_input_names"] == BOTH
    assert convert_tokenizer_config({"model_input_names": ["input_ids"]}, BPE)["model_input_names"] == [
        "input_ids"
    ]


def test_special_tokens_map_in_words_of_both():
    assert convert_special_tokens({"eos_token": "x", "extra_special_tokens": ["a"]}) == {
        "eos_token": "x",
        "additional_special_tokens": ["a"],
    }
    kept = {
        "eos_token": "x",
        "additional_special_tokens": ["a"],
        "extra_special_tokens": {"image_token": "b"},
    }
    assert convert_special_tokens(kept) == kept


def test_every_file_of_a_tokenizer_is_copied_and_no_other(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    write_chat_tokenizer(source, model_input_names=BOTH)
    names = [
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    ]
    for name in [*names, "added_tokens.json", "training_args.bin", "additional_chat_templates/notes.txt"]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"{}")
    copied = copy_tokenizer(source, target)
    assert sorted(copied) == sorted([*names, "added_tokens.json", "tokenizer.json", "tokenizer_config.json"])
    assert {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()} == set(copied)
    # nothing to be changed
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_byte_order_mark_is_read_and_not_written(tmp_path):
    files = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "é"}', "vocab.json": '{"a": 1}'}
    write_tokenizer(tmp_path, {name: text.encode("utf-8-sig") for name, text in files.items()})
    assert all(not (tmp_path / name).read_bytes().startswith(b"\xef") for name in files)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "é"
    for broken in (b"{", b"[]", b"\xff"):
        with pytest.raises(UserError, match="tokenizer_config.json of the tokenizer .*restore it"):
            write_tokenizer(tmp_path, {"tokenizer_config.json": broken})


# --- generation ---------------------------------------------------------------------------------------------


def test_settings_that_a_config_of_transformers_4_states_become_a_file(tmp_path):
    raw = {
        "model_type": "llama",
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "temperature": 0.6,
        "do_sample": True,
        "top_p": 0.9,
    }
    wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}
    assert extract_settings(raw) == wanted
    assert extract_settings({"model_type": "llama", "eos_token_id": 2, "use_cache": True}) == {}
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    assert copy_settings(source, target) == ["generation_config.json"]
    assert json.loads((target / "generation_config.json").read_text()) == wanted
    (source / "generation_config.json").write_text('\ufeff{"temperature": 0.1}')
    assert copy_settings(source, target) == ["generation_config.json"]
    assert Path(target / "generation_config.json").read_text() == '{"temperature": 0.1}'
