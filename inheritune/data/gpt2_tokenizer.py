"""GPT-2's tokenizer, encoded by tiktoken, and the places where its byte pair encoding is kept."""

import base64
import json
import os
from pathlib import Path

import numpy as np
import xxhash

from inheritune.data.fast_tokenizer import save_backend, set_byte_level
from inheritune.data.tokenizer import END_OF_TEXT, Tokenizer
from inheritune.errors import UserError
from inheritune.files.storage import find_root
from inheritune.files.writing import replace_atomically

GPT2_SIZE = 50257
GPT2_RANKS_XXH3 = "aa5ef69a716d8a563cb2fbe95939bd2d"
"""xxh3-128 of the 50,256 lines "base64 rank" that OpenAI publishes."""
GPT2_FILES = ("gpt2.tiktoken", "encoder.json")
"""Files that hold the ranks; either is enough."""


def _assign_letters() -> list[str]:
    """Return the printable letter by which GPT-2's files spell each byte: itself, or one from 256 on."""
    printable = [chr(byte).isprintable() and chr(byte) != " " for byte in range(256)]
    others = iter(range(256, 512))
    return [chr(byte) if printable[byte] else chr(next(others)) for byte in range(256)]


LETTERS = _assign_letters()


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, encoded by tiktoken (several times as fast as the tokenizers library)."""

    def __init__(self, folder: Path | None = None):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        self.name, self.vocab_size, self.end_of_text = "gpt2", GPT2_SIZE, GPT2_SIZE - 1
        self._ranks = _load_ranks(folder)
        special = {END_OF_TEXT: self.end_of_text}
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=self._ranks,
            special_tokens=special,
            explicit_n_vocab=GPT2_SIZE,
        )

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        # one thread: tiktoken's own pool is slower than processes; numpy: no Python integer per token
        return [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def _content(self) -> bytes:
        return _format_ranks(self._ranks)

    def save(self, folder: Path) -> None:
        """Write the ranks, and the tokenizer.json of GPT-2 with its published merges.

        transformers 5.23 converts no GPT2Tokenizer, since the class has no slow form. Its TikTokenConverter
        gives the same ids, but lists every split of a token as a merge: 108,299 in place of 50,000."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpt2.tiktoken").write_bytes(_format_ranks(self._ranks))
        vocabulary = {_spell_token(token): rank for token, rank in self._ranks.items()}
        merges = []
        for token in self._ranks:
            if len(token) > 1:
                left, right = _find_last_merge(self._ranks, token)
                merges.append((_spell_token(left), _spell_token(right)))
        backend = Backend(BPE(vocabulary, merges))
        set_byte_level(backend)
        backend.add_special_tokens([END_OF_TEXT])
        save_backend(backend, folder, END_OF_TEXT)


def find_gpt2_folder() -> Path:
    """Return where GPT-2's BPE is looked for before it is downloaded: $INHERITUNE_GPT2_BPE, or
    data/gpt2-bpe."""
    return Path(os.environ.get("INHERITUNE_GPT2_BPE") or find_root() / "data" / "gpt2-bpe").expanduser()


def save_gpt2_ranks(tokenizer: Gpt2Tokenizer) -> None:
    """Write the ranks into `find_gpt2_folder()`, unless it has them.

    tiktoken keeps its download in /tmp, which other nodes do not see."""
    if _find_ranks_file(find_gpt2_folder()) is None:
        with replace_atomically(find_gpt2_folder() / GPT2_FILES[0]) as temporary:
            temporary.write_bytes(_format_ranks(tokenizer._ranks))


def _find_ranks_file(folder: Path) -> Path | None:
    """Return the file in `folder` that holds the ranks, None if there is none."""
    return next((folder / name for name in GPT2_FILES if (folder / name).is_file()), None)


def _load_ranks(folder: Path | None) -> dict[bytes, int]:
    """Return {token bytes: rank} in order of rank: from `folder`, $INHERITUNE_GPT2_BPE, data/gpt2-bpe, or
    tiktoken's download.

    The files are read here and not by tiktoken, whose cache goes by path and keeps what a path once held."""
    asked = folder or os.environ.get("INHERITUNE_GPT2_BPE")
    place = folder or find_gpt2_folder()
    path = _find_ranks_file(place)
    if path is not None:
        return _read_checked_ranks(path)
    if asked:
        raise UserError(
            f"{place} holds neither gpt2.tiktoken nor encoder.json of GPT-2; point INHERITUNE_GPT2_BPE at "
            f"either"
        )
    return _download_ranks()


def _read_checked_ranks(path: Path) -> dict[bytes, int]:
    """Return {token bytes: rank} of a file, in order of rank. Raises UserError unless they are GPT-2's."""
    try:
        ranks = _sort_by_rank(_read_ranks(path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not base64, JSON or this form
        raise UserError(f"{path} is cut off or not GPT-2's vocabulary; fetch or copy it again") from None
    if xxhash.xxh3_128_hexdigest(_format_ranks(ranks)) != GPT2_RANKS_XXH3:
        raise UserError(f"{path} is not GPT-2's vocabulary ({len(ranks)} tokens, other content); replace it")
    return ranks


def _download_ranks() -> dict[bytes, int]:
    """Return {token bytes: rank} in order of rank, from tiktoken's cache or its download."""
    import requests
    import tiktoken

    try:
        return _sort_by_rank(tiktoken.get_encoding("gpt2")._mergeable_ranks)
    except requests.RequestException as error:
        raise UserError(
            f"GPT-2's BPE cannot be downloaded ({type(error).__name__}); on a machine with internet run "
            f"'bash tests/fetch_gpt2_bpe.sh {find_root() / 'data' / 'gpt2-bpe'}', or set INHERITUNE_GPT2_BPE "
            f"to a "
            f"folder that has it"
        ) from None


def _sort_by_rank(ranks: dict[bytes, int]) -> dict[bytes, int]:
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return {token bytes: rank} of a gpt2.tiktoken or encoder.json. Raises ValueError, KeyError, TypeError
    or AttributeError for what is neither."""
    if path.name == "gpt2.tiktoken":
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        return {base64.b64decode(token): int(rank) for token, rank in pairs}
    byte_of = {letter: byte for byte, letter in enumerate(LETTERS)}
    encoder = json.loads(path.read_text(encoding="utf-8-sig"))
    encoder.pop(END_OF_TEXT, None)
    return {bytes(byte_of[letter] for letter in token): rank for token, rank in encoder.items()}


def _format_ranks(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def _spell_token(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _find_last_merge(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """Return the two parts that BPE joins last when it builds `token`, that is, the merge that made it.

    tiktoken's file holds only ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts
