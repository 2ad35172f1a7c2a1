"""The tokenizer that an experiment names: gpt2 (tiktoken), bpe:N (trained on the documents), a sentencepiece
.model, or any Hugging Face tokenizer.

`load_tokenizer(data)` finds the one that `data.tokenizer` names. `load_tokenizer(data, folder)` reopens what
`save(folder)` wrote there, offline, and gives the same ids. A saved folder is an ordinary Hugging Face
tokenizer folder.
"""

from pathlib import Path

from inheritune.config.sections import Data
from inheritune.data.bpe_training import parse_bpe_size
from inheritune.data.fast_tokenizer import FastTokenizer, open_pretrained
from inheritune.data.gpt2_tokenizer import Gpt2Tokenizer
from inheritune.data.sentencepiece_tokenizer import SentencePieceTokenizer
from inheritune.data.tokenizer import Tokenizer
from inheritune.errors import UserError


def load_tokenizer(data: Data, folder: Path | None = None) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names, reopened from `folder` if given: the tokenizer/ of
    prepared data, or a run's final/.

    Raises UserError if it cannot be found, lacks an end of text, or is a bpe:N that is not trained yet (no
    folder)."""
    name = data.tokenizer
    if name == "gpt2":
        return Gpt2Tokenizer(folder)
    if name.endswith(".model"):
        return SentencePieceTokenizer(name, data.tokenizer_revision, folder)
    if folder is not None:
        return FastTokenizer(name, folder)
    if parse_bpe_size(name) is not None:
        raise UserError(
            f"tokenizer '{name}' is trained by 'prepare'; open it from the prepared data's tokenizer/ folder"
        )
    return open_pretrained(name, data.tokenizer_revision)
