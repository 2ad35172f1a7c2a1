"""Tokenizers by name: gpt2 (tiktoken), bpe:N (trained on the source), a sentencepiece .model, any Hugging
Face tokenizer.

`load_tokenizer(data)` finds the one that `data.tokenizer` names; `load_tokenizer(data, folder)` reopens what
`save(folder)` left there, offline, and gives the same ids. A saved folder is an ordinary Hugging Face
tokenizer folder. Text is text: the spelling of a special token inside a document is encoded as ordinary
characters, and nothing is added around it.
"""

import base64
import json
import logging
import os
import re
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from inheritune.config.experiment import Data, resolve_path
from inheritune.data.tokenizer_files import FILES, TEMPLATES, copy_tokenizer, find_files, write_tokenizer
from inheritune.errors import UserError, first_line
from inheritune.files.hub import hub_errors
from inheritune.files.rundir import replacing, root

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
GPT2_SIZE = 50257
GPT2_RANKS_XXH3 = (
    "aa5ef69a716d8a563cb2fbe95939bd2d"  # of the 50,256 lines "base64 rank" that OpenAI publishes
)
GPT2_FILES = ("gpt2.tiktoken", "encoder.json")  # either holds the BPE
PROBE = (
    "def f(x):\n\treturn x  +   1  # naïve café, 12345.67\r\n\n\n  Ünïcödé — “quotes” 漢字 かな 한국어 "
    "العربية "
    "🤗👩‍👧\x00\x7f "
    "https://example.org/a_b?c=d  it's WE'LL    "
)


class Tokenizer:
    """What every kind has: `name` (as in the experiment), `vocab_size`, `end_of_text` (its id), and the
    methods below."""

    name: str
    vocab_size: int
    end_of_text: int

    @property
    def kind(self) -> str:
        return type(self).__name__

    @property
    def dtype(self) -> str:
        """Smallest unsigned type, little-endian, that holds every id."""
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the kind and all that decides ids: two different tokenizers never share one."""
        return xxhash.xxh3_128_hexdigest(f"{self.kind}:{self.end_of_text}:".encode() + self._content())

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, nothing added.  -> one 1-D integer array per text"""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Fill `folder` with a Hugging Face tokenizer of the same ids and with what `load_tokenizer` needs to
        reopen it."""
        raise NotImplementedError

    def _content(self) -> bytes:
        raise NotImplementedError


def encode_each(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[np.ndarray], list[tuple[int, str]]]:
    """Return (ids of each text that can be encoded, [(index, defect)] of those that cannot).

    An encoder may fail at a single text (tiktoken does at a million blanks in a row): that is a property of
    this text, and no reason to lose the others. Memory that is used up is none: that is raised."""
    try:
        return tokenizer.encode_batch(texts), []
    except MemoryError:
        raise
    except Exception:  # the libraries raise nothing more precise
        log.debug("a batch of %d texts cannot be encoded; each by itself", len(texts))
    rows, refused = [], []
    for index, text in enumerate(texts):
        try:
            rows += tokenizer.encode_batch([text])
        except MemoryError:
            raise
        except Exception as error:
            refused.append((index, f"not encoded by the tokenizer ({first_line(error)[:100]})"))
    return rows, refused


# --- GPT-2's BPE by tiktoken --------------------------------------------------------------------------------


def _letters() -> list[str]:
    """The printable letter by which GPT-2's files spell each byte: itself, or one from 256 on."""
    printable = [chr(byte).isprintable() and chr(byte) != " " for byte in range(256)]
    others = iter(range(256, 512))
    return [chr(byte) if printable[byte] else chr(next(others)) for byte in range(256)]


LETTERS = _letters()


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, encoded by tiktoken (several times as fast as the tokenizers library)."""

    def __init__(self, folder: Path | None = None):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        self.name, self.vocab_size, self.end_of_text = "gpt2", GPT2_SIZE, GPT2_SIZE - 1
        self._ranks = _gpt2_ranks(folder)
        special = {END_OF_TEXT: self.end_of_text}
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=self._ranks,
            special_tokens=special,
            explicit_n_vocab=GPT2_SIZE,
        )

    def encode_batch(self, texts):
        # one thread: tiktoken's own pool is slower than processes; numpy: no Python integer per token
        return [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def _content(self):
        return _rank_lines(self._ranks)

    def save(self, folder):
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpt2.tiktoken").write_bytes(_rank_lines(self._ranks))
        vocabulary = {_spell(token): rank for token, rank in self._ranks.items()}
        merges = [
            tuple(map(_spell, _last_merge(self._ranks, token))) for token in self._ranks if len(token) > 1
        ]
        backend = Backend(BPE(vocabulary, merges))
        _byte_level(backend)
        backend.add_special_tokens([END_OF_TEXT])
        _save_backend(backend, folder, END_OF_TEXT)


def gpt2_folder() -> Path:
    """Where GPT-2's BPE is looked for before it is downloaded: $INHERITUNE_GPT2_BPE, or data/gpt2-bpe."""
    return Path(os.environ.get("INHERITUNE_GPT2_BPE") or root() / "data" / "gpt2-bpe").expanduser()


def keep_gpt2(tokenizer: Gpt2Tokenizer) -> None:
    """Leave the ranks in `gpt2_folder()`, if it has none: tiktoken keeps its download in /tmp, which other
    nodes do not see."""
    if not any((gpt2_folder() / name).is_file() for name in GPT2_FILES):
        with replacing(gpt2_folder() / GPT2_FILES[0]) as temporary:
            temporary.write_bytes(_rank_lines(tokenizer._ranks))


def _gpt2_ranks(folder: Path | None) -> dict[bytes, int]:
    """{token bytes: rank} in order of rank: from `folder`, $INHERITUNE_GPT2_BPE, data/gpt2-bpe, or tiktoken's
    download.

    The files are read here, not by tiktoken, whose cache goes by path and keeps what a path once held."""
    asked = folder or os.environ.get("INHERITUNE_GPT2_BPE")
    place = folder or gpt2_folder()
    path = next((place / name for name in GPT2_FILES if (place / name).is_file()), None)
    if path is not None:
        try:
            ranks = dict(sorted(_read_ranks(path).items(), key=lambda item: item[1]))
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ):  # of base64, JSON, or another form
            raise UserError(f"{path} is cut off or not GPT-2's vocabulary; fetch or copy it again") from None
        if xxhash.xxh3_128_hexdigest(_rank_lines(ranks)) != GPT2_RANKS_XXH3:
            raise UserError(
                f"{path} is not GPT-2's vocabulary ({len(ranks)} tokens, other content); replace it"
            )
        return ranks
    if asked:
        raise UserError(
            f"{place} holds neither gpt2.tiktoken nor encoder.json of GPT-2; point INHERITUNE_GPT2_BPE at "
            f"either"
        )
    import requests
    import tiktoken

    try:
        return dict(sorted(tiktoken.get_encoding("gpt2")._mergeable_ranks.items(), key=lambda item: item[1]))
    except requests.RequestException as error:
        raise UserError(
            f"GPT-2's BPE cannot be downloaded ({type(error).__name__}); on a machine with internet run "
            f"'bash tests/fetch_gpt2_bpe.sh {root() / 'data' / 'gpt2-bpe'}', or set INHERITUNE_GPT2_BPE to a "
            f"folder that has it"
        ) from None


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


def _rank_lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def _spell(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _last_merge(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """The two parts that BPE joins last when it builds `token`: the merge that made it. tiktoken's file holds
    only ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


# --- the tokenizers library ---------------------------------------------------------------------------------


def _byte_level(backend) -> None:
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def _save_backend(backend, folder: Path, end_of_text: str, **special) -> None:
    """tokenizer.json and the configuration by which AutoTokenizer opens it (written here: transformers would
    load torch)."""
    config = {"eos_token": end_of_text, "bos_token": end_of_text, "unk_token": end_of_text, **special}
    files = {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(config)}
    write_tokenizer(folder, {name: text.encode() for name, text in files.items()}, trained=True)


class FastTokenizer(Tokenizer):
    """One of the tokenizers library ('fast' in transformers), opened from its saved folder: bpe:N or any of
    the Hub.

    transformers is not asked again: it takes seconds and, with torch, half a gigabyte in every worker
    process."""

    FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *TEMPLATES)

    def __init__(self, name: str, folder: Path):
        from tokenizers import Tokenizer as Backend

        if not all((folder / file).is_file() for file in self.FILES[:2]):
            raise UserError(
                f"tokenizer '{name}': {folder} holds no tokenizer.json and tokenizer_config.json; run "
                f"'prepare' first"
            )
        self._files = {file: (folder / file).read_bytes() for file in find_files(folder, self.FILES)}
        try:
            self._backend = Backend.from_buffer(self._files["tokenizer.json"])
            end = json.loads(self._files["tokenizer_config.json"]).get("eos_token")
            end = end["content"] if isinstance(end, dict) else end
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise UserError(
                f"tokenizer '{name}' in {folder} cannot be read ({first_line(error)}); restore it"
            ) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "<|endoftext|>" in a document is ordinary text
        if end is None or self._backend.token_to_id(end) is None:
            raise UserError(
                f"tokenizer '{name}' has no end-of-text (EOS) token, which separates documents; use one that "
                f"has"
            )
        self.name, self.vocab_size = name, max(self._backend.get_vocab().values()) + 1
        self.end_of_text = self._backend.token_to_id(end)

    def encode_batch(self, texts):
        return [
            np.array(row.ids, np.uint32)
            for row in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _content(self):
        parts = json.loads(
            self._backend.to_str()
        )  # padding, truncation, templates and decoding do not decide ids
        added = [(token["id"], token["content"]) for token in parts["added_tokens"]]
        return json.dumps([parts["model"], parts["normalizer"], parts["pre_tokenizer"], added]).encode()

    def save(self, folder):
        write_tokenizer(folder, self._files, trained=True)


def _open_pretrained(name: str, revision: str | None) -> FastTokenizer:
    """The tokenizer in a folder, of the Hub's cache or of the Hub, by transformers, without code from
    elsewhere."""
    from transformers import AutoTokenizer

    local = resolve_path(name)
    if local.is_dir():
        tokenizer = _open_folder(name, local)
    else:
        with hub_errors(f"tokenizer '{name}'", name):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer '{name}' ({type(tokenizer).__name__}) has no 'fast' form (tokenizer.json); use one "
            f"that has"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return FastTokenizer(name, Path(folder))


def _open_folder(name: str, folder: Path):
    """The tokenizer in `folder` by transformers, which cannot read JSON that begins with a byte order mark:
    such a folder is read from a copy without it."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as copy:
        if any(path.read_bytes().startswith(BOM_UTF8) for path in folder.glob("*.json")):
            copy_tokenizer(folder, Path(copy), ["config.json", *FILES])  # the config names the family
            folder = Path(copy)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer '{name}' cannot be opened ({first_line(error)}); restore its folder"
            ) from None


def train_bpe(name: str, texts: Iterable[str], folder: Path) -> None:
    """Train the byte-level BPE `name` (bpe:N, N ids in all, <|endoftext|> the last) on `texts` and save it in
    `folder`.

    Raises UserError if N is not a number above 256 or the text has too few different words for it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import pre_tokenizers, trainers
    from tokenizers.models import BPE

    size = bpe_size(name)
    backend = Backend(BPE())
    _byte_level(backend)
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
    _save_backend(backend, folder, END_OF_TEXT)


def bpe_size(name: str) -> int | None:
    """N of 'bpe:N', None for another kind. Raises UserError if N is no number above 256."""
    if not name.startswith("bpe:"):
        return None
    if not re.fullmatch(r"bpe:[0-9]{1,8}", name) or int(name[4:]) <= 257:
        raise UserError(
            f"tokenizer '{name}': write bpe:N with N above 257 (256 bytes, end of text, merges), e.g. "
            f"bpe:2048"
        )
    return int(name[4:])


# --- sentencepiece ------------------------------------------------------------------------------------------


class SentencePieceTokenizer(Tokenizer):
    """A .model file, encoded by the sentencepiece library itself: converted tokenizers are known to differ
    (OpenLLaMA)."""

    def __init__(self, name: str, revision: str | None = None, folder: Path | None = None):
        import sentencepiece

        path = folder / "tokenizer.model" if folder else _model_file(name, revision)
        self._model = path.read_bytes()
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise UserError(
                f"{path} is not a sentencepiece model, or cut off ({first_line(error)})"
            ) from None
        if not _is_whole_model(self._model):
            raise UserError(
                f"{path} is cut off: it ends before the settings that follow its pieces; fetch or copy it "
                f"again"
            )
        if self._sp.eos_id() < 0:
            raise UserError(
                f"{path} has no end-of-text (</s>) piece, which separates documents; use a model that has"
            )
        self.name, self.vocab_size, self.end_of_text = name, self._sp.vocab_size(), self._sp.eos_id()

    def encode_batch(self, texts):
        return [np.array(self._sp.encode(text), np.uint32) for text in texts]

    def _content(self):
        return self._model

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        backend = self._converted()
        probes = [
            PROBE,
            *(line for line in Path(__file__).read_text(encoding="utf-8").splitlines() if "<" not in line),
        ]
        same = backend is not None and [
            row.ids for row in backend.encode_batch(probes, add_special_tokens=False)
        ] == [*map(self._sp.encode, probes)]
        if same:
            names = ((key, getattr(self._sp, f"{key}_id")()) for key in ("bos", "eos", "unk", "pad"))
            special = {f"{key}_token": self._sp.id_to_piece(number) for key, number in names if number >= 0}
            _save_backend(
                backend, folder, **{"end_of_text": special["eos_token"], "bos_token": None, **special}
            )
            return
        note = (
            f"{self.name}: its Hugging Face conversion gives other ids, so only tokenizer.model is kept: use "
            f"sentencepiece"
        )
        (folder / "README.txt").write_text(note + "\n", encoding="utf-8")
        log.warning("%s", note)

    def _converted(self):
        """The model as a tokenizers.Tokenizer; None for a kind of model that has no counterpart there."""
        from sentencepiece import sentencepiece_model_pb2
        from tokenizers import AddedToken, Regex, decoders, normalizers
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE, Unigram

        proto = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        pieces, trained = [(p.piece, p.score) for p in proto.pieces], proto.trainer_spec
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        if trained.model_type == trained.UNIGRAM:
            backend = Backend(Unigram(pieces, unk_id=self._sp.unk_id(), byte_fallback=trained.byte_fallback))
        elif trained.model_type == trained.BPE:
            merges = [
                (piece[:cut], piece[cut:])
                for piece, _ in sorted(pieces, key=lambda item: -item[1])
                for cut in range(1, len(piece))
                if piece[:cut] in ids and piece[cut:] in ids
            ]
            unknown = self._sp.id_to_piece(self._sp.unk_id())
            backend = Backend(
                BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trained.byte_fallback)
            )
        else:
            return None
        spec = proto.normalizer_spec
        steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
        if spec.remove_extra_whitespaces:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        steps += [normalizers.Prepend("▁")] * spec.add_dummy_prefix + [normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
        decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(decoding + [decoders.Strip(" ", 1, 0)] * spec.add_dummy_prefix)
        control = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
        backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
        return backend


def _is_whole_model(model: bytes) -> bool:
    """Return whether a sentencepiece model has the parts that follow its pieces. One that was cut between two
    pieces loads, and gives other ids."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    return proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")


def _model_file(name: str, revision: str | None) -> Path:
    """A .model file here, or 'owner/repository/file.model' on the Hub (or in its cache)."""
    path, place = resolve_path(name), on_the_hub(name)
    if path.is_file():
        return path
    if place is None:
        raise UserError(f"tokenizer model {path} is missing; give the path of a sentencepiece .model file")
    from huggingface_hub import hf_hub_download

    with hub_errors(f"tokenizer model '{name}'", place[0]):
        return Path(hf_hub_download(*place, revision=revision))


def on_the_hub(name: str) -> tuple[str, str] | None:
    """(owner/repository, file) of a tokenizer 'owner/repository/file.model' that is no file here; None for
    any other."""
    parts = name.split("/", 2)
    if (
        not name.endswith(".model")
        or resolve_path(name).is_file()
        or len(parts) < 3
        or Path(name).is_absolute()
    ):
        return None
    return "/".join(parts[:2]), parts[2]


# --- by name ------------------------------------------------------------------------------------------------


def load_tokenizer(data: Data, folder: Path | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, reopened from `folder` (a prepared data set's tokenizer/, a
    final/) if given.

    Raises UserError if it cannot be found, has no end of text, or is a bpe:N that is not trained yet (no
    folder)."""
    name = data.tokenizer
    if name == "gpt2":
        return Gpt2Tokenizer(folder)
    if name.endswith(".model"):
        return SentencePieceTokenizer(name, data.tokenizer_revision, folder)
    if folder is not None:
        return FastTokenizer(name, folder)
    if bpe_size(name) is not None:
        raise UserError(
            f"tokenizer '{name}' is trained by 'prepare'; open it from the prepared data's tokenizer/ folder"
        )
    return _open_pretrained(name, data.tokenizer_revision)


def check_vocabulary(tokenizer_size: int, model_size: int, where: str) -> None:
    """Raises UserError if the tokenizer has ids beyond the model's embedding; a padded, larger embedding is
    fine."""
    if tokenizer_size > model_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer_size} ids, the model's vocabulary only {model_size}; set "
            f"model.vocab_size "
            f"to at least {tokenizer_size}, or choose another tokenizer"
        )
