"""How the tokenizer of a GGUF file splits text before it merges.

The file names it (`tokenizer.ggml.pre`, llama.cpp's pre-tokenizer types). transformers knows some of the
names, and splits as GPT-2 for the others: SmolLM2 would get other ids for numbers after line breaks.
"""

from pathlib import Path
from typing import Any

from inheritune.errors import UserError
from inheritune.runtime.log import logger

AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
"""Names of the splitting of GPT-2."""
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names of a splitting that takes each digit alone, and the rest as GPT-2."""
WORDS_UNMERGED = ("llama-bpe", "llama3", "llama-v3")
"""Names of tokenizers of which a word that is a token is that token, whatever the merges make of it."""


def mend_splitting(reader: Any, tokenizer: Any, file: Path) -> None:
    """Let `tokenizer`, as transformers read it from a GGUF file, split text as the file says.

    `reader` is gguf's. A tokenizer that does not merge bytes, as SentencePiece's, is left as it is. Raises
    UserError for a name that neither transformers nor this module knows."""
    fields = {key: reader.fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")}
    found = {key: field.contents() if field is not None else "" for key, field in fields.items()}
    if found["model"] != "gpt2":
        return
    from tokenizers import pre_tokenizers

    name, backend = found["pre"], tokenizer.backend_tokenizer
    if name in ("", "default"):
        logger.warning(
            "%s does not say how its tokenizer splits text (tokenizer.ggml.pre): compare some ids with those "
            "of the model's own tokenizer",
            file,
        )
        return
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in AS_GPT2:
        backend.pre_tokenizer = gpt2
    elif name in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    elif name not in _list_known_names():
        raise UserError(
            f"{file}: its tokenizer splits text as '{name}' (tokenizer.ggml.pre), which is not known here: "
            f"texts would get ids that the model never saw; use the safetensors of this model"
        )
    if name in WORDS_UNMERGED:
        backend.model.ignore_merges = True


def _list_known_names() -> set[str]:
    """Return the names by which transformers splits; those before 5.23 know none."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)
