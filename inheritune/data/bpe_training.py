"""Training of the tokenizer bpe:N on an experiment's own documents."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from inheritune.data.fast_tokenizer import save_backend, set_byte_level
from inheritune.data.tokenizer import END_OF_TEXT
from inheritune.errors import UserError

LONGEST_WORD = 10_000  # letters: the standard library's longest has 138


def parse_bpe_size(name: str) -> int | None:
    """Return N of 'bpe:N', None for another kind. Raises UserError if N is not a number above 257."""
    if not name.startswith("bpe:"):
        return None
    if not re.fullmatch(r"bpe:[0-9]{1,8}", name) or int(name[4:]) <= 257:
        raise UserError(
            f"tokenizer '{name}': write bpe:N with N from 258 (256 bytes, end of text, merges) to 99999999, "
            f"e.g. "
            f"bpe:2048"
        )
    return int(name[4:])


def train_bpe(name: str, texts: Iterable[str], folder: Path) -> None:
    """Train the byte-level BPE `name` (bpe:N, N ids in all, <|endoftext|> the last) on `texts` and save it in
    `folder`.

    Raises UserError if N is not a number above 257 or the text has too few different words for it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import pre_tokenizers, trainers
    from tokenizers.models import BPE

    size = parse_bpe_size(name)
    if size is None:
        raise ValueError(f"'{name}' is not of the form bpe:N")
    backend = Backend(BPE())
    set_byte_level(backend)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
        ),
    )
    if backend.get_vocab_size() != size - 1:
        raise UserError(
            f"tokenizer '{name}': the text yields only {backend.get_vocab_size() + 1} tokens; choose a "
            f"smaller N"
        )
    backend.add_special_tokens([END_OF_TEXT])
    save_backend(backend, folder, END_OF_TEXT)


def cut_long_words(text: str) -> Iterator[str]:
    """Yield `text` in pieces that hold no run of LONGEST_WORD letters without a blank, or of blanks without a
    letter. An ordinary text is one piece.

    The time to train a BPE grows with the square of its longest word: 8 MB of base64 take days."""
    start = 0
    for run in re.finditer(rf"(?<!\S)\S{{{LONGEST_WORD},}}|(?<!\s)\s{{{LONGEST_WORD},}}", text):
        for end in range(run.start() + LONGEST_WORD, run.end() + 1, LONGEST_WORD):
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]
