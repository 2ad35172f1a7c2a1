"""Tiny tokenizers as others leave them: for chats (transformers 4 and 5), of a class with a pre-tokenizer of
its own."""

from pathlib import Path

from conftest import REPOSITORY

from inheritune.data.bpe_training import train_bpe
from inheritune.files.json_files import read_json, write_json

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


def write_chat_tokenizer(folder: Path, **stated) -> dict:
    """A tokenizer as transformers 4 leaves one that was trained for chats: named tokens, a template and a
    padding token. Returns its configuration."""
    train_bpe("bpe:300", [(REPOSITORY / "inheritune" / "config" / "experiment.py").read_text()], folder)
    backend = read_json(folder / "tokenizer.json")
    added = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    names = ["<|begin|>", "<|pad|>", "<|end|>", "<|user|>", "<|image|>"]
    decoder = {
        str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in backend["added_tokens"]
    }
    decoder |= {str(300 + number): {"content": name, **added} for number, name in enumerate(names)}
    backend["added_tokens"] = [{"id": int(number), **entry} for number, entry in decoder.items()]
    start = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|begin|>": {"id": "<|begin|>", "ids": [300], "tokens": ["<|begin|>"]}}
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": start,
        "pair": start,
        "special_tokens": special,
    }
    write_json(folder / "tokenizer.json", backend, seal=False)
    tokens = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<|user|>"],
        "chat_template": TEMPLATE,
        **tokens,
    }
    config |= {
        "extra_special_tokens": {"image_token": "<|image|>"},
        "image_token": "<|image|>",
        "model_max_length": 64,
    }
    config |= {"clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast", **stated}
    write_json(folder / "tokenizer_config.json", config, seal=False)
    return config


def save_by_newest(folder: Path, to: Path) -> None:
    """The tokenizer in `folder` as the installed transformers saves it, with a second template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": TEMPLATE, "tool": "{{ messages }}"}
    tokenizer.save_pretrained(to)


def write_qwen_tokenizer(folder: Path) -> None:
    """A tokenizer of the Qwen 2 class, whose pre-tokenizer is its own."""
    from transformers import Qwen2Tokenizer

    words = [path.read_text() for path in sorted((REPOSITORY / "inheritune").rglob("*.py"))[:3]]
    Qwen2Tokenizer().train_new_from_iterator(words, 300).save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json")
    kept = {key: config[key] for key in ("eos_token", "pad_token", "unk_token", "model_max_length")}
    write_json(folder / "tokenizer_config.json", {**kept, "tokenizer_class": "Qwen2Tokenizer"}, seal=False)
