"""Tokenizers of the sentencepiece library: a .model file on this machine or on the Hub, and its conversion to
a Hugging Face tokenizer where that gives the same ids.

The conversion is our own, because the converters of transformers 5.23 do not follow the model's normalizer.
LlamaConverter ignores it, and SpmConverter always strips spaces on the right. Both end with an AttributeError
for a BPE model, and `build_tokenizer_from_spm_proto` adds no space in front of a text."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from inheritune.config.paths import resolve_path
from inheritune.data.fast_tokenizer import save_backend
from inheritune.data.tokenizer import PROBE, Tokenizer
from inheritune.errors import UserError, summarize_error
from inheritune.files.hub import translate_hub_errors

log = logging.getLogger(__name__)


class SentencePieceTokenizer(Tokenizer):
    """A .model file, encoded by the sentencepiece library itself: converted tokenizers are known to differ
    (OpenLLaMA)."""

    def __init__(self, name: str, revision: str | None = None, folder: Path | None = None):
        import sentencepiece

        path = folder / "tokenizer.model" if folder else _find_model_file(name, revision)
        self._model = path.read_bytes()
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise UserError(
                f"{path} is not a sentencepiece model, or is cut off ({summarize_error(error)})"
            ) from None
        if not _is_whole_model(self._model):
            raise UserError(
                f"{path} is cut off: it ends before the settings that follow its pieces; fetch or copy it "
                f"again"
            )
        if self._sp.eos_id() < 0:
            raise UserError(
                f"{path} has no end-of-text (</s>) piece, which separates documents; use a model that has one"
            )
        self.name, self.vocab_size, self.end_of_text = name, self._sp.vocab_size(), self._sp.eos_id()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self._sp.encode(text), np.uint32) for text in texts]

    def _content(self) -> bytes:
        return self._model

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        backend = self._converted()
        if backend is not None and self._gives_same_ids(backend):
            names = ((key, getattr(self._sp, f"{key}_id")()) for key in ("bos", "eos", "unk", "pad"))
            special = {f"{key}_token": self._sp.id_to_piece(number) for key, number in names if number >= 0}
            save_backend(backend, folder, special["eos_token"], **{"bos_token": None, **special})
            return
        note = (
            f"{self.name}: its Hugging Face conversion gives other ids, so only tokenizer.model is kept: use "
            f"sentencepiece"
        )
        (folder / "README.txt").write_text(note + "\n", encoding="utf-8")
        log.warning("%s", note)

    def _gives_same_ids(self, backend: Any) -> bool:
        """Return whether a converted tokenizer encodes the probe and the text of the tokenizer modules as
        sentencepiece does."""
        probes = [PROBE]
        for path in sorted(Path(__file__).parent.glob("*tokenizer*.py")):
            # a line with "<" may spell a special token, which the conversion encodes as such
            probes += [line for line in path.read_text(encoding="utf-8").splitlines() if "<" not in line]
        converted = [row.ids for row in backend.encode_batch(probes, add_special_tokens=False)]
        return converted == [self._sp.encode(probe) for probe in probes]

    def _converted(self) -> Any:
        """Return the model as a tokenizers.Tokenizer, None for a kind of model that has no counterpart
        there."""
        from tokenizers import AddedToken

        proto = _parse_model(self._model)
        backend = self._convert_pieces(proto)
        if backend is None:
            return None
        backend.normalizer = _convert_normalizer(proto.normalizer_spec)
        backend.decoder = _make_decoder(proto.normalizer_spec)
        control = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
        backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
        return backend

    def _convert_pieces(self, proto: Any) -> Any:
        """Return a tokenizers.Tokenizer of the model's pieces, None for a kind other than Unigram and BPE."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE, Unigram

        pieces, trained = [(p.piece, p.score) for p in proto.pieces], proto.trainer_spec
        if trained.model_type == trained.UNIGRAM:
            return Backend(Unigram(pieces, unk_id=self._sp.unk_id(), byte_fallback=trained.byte_fallback))
        if trained.model_type != trained.BPE:
            return None
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        merges = [
            (piece[:cut], piece[cut:])
            for piece, _ in sorted(pieces, key=lambda item: -item[1])
            for cut in range(1, len(piece))
            if piece[:cut] in ids and piece[cut:] in ids
        ]
        unknown = self._sp.id_to_piece(self._sp.unk_id())
        return Backend(
            BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trained.byte_fallback)
        )


def _convert_normalizer(spec: Any) -> Any:
    """Return the normalizer of the tokenizers library that does what a sentencepiece normalizer_spec says."""
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)


def _make_decoder(spec: Any) -> Any:
    """Return the decoder of the tokenizers library that undoes `_convert_normalizer`."""
    from tokenizers import decoders

    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _parse_model(model: bytes) -> Any:
    """Return the ModelProto of a sentencepiece model."""
    from sentencepiece import sentencepiece_model_pb2

    # the class is made at import time, which mypy does not see
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]


def _is_whole_model(model: bytes) -> bool:
    """Return whether a sentencepiece model has the parts that follow its pieces.

    A model that was cut between two pieces loads, and gives other ids."""
    proto = _parse_model(model)
    return proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")


def _find_model_file(name: str, revision: str | None) -> Path:
    """Return the path of a .model file on this machine, or of 'owner/repository/file.model' from the Hub or
    its cache."""
    path, place = resolve_path(name), parse_hub_model(name)
    if path.is_file():
        return path
    if place is None:
        raise UserError(f"tokenizer model {path} is missing; give the path of a sentencepiece .model file")
    from huggingface_hub import hf_hub_download

    with translate_hub_errors(f"tokenizer model '{name}'", place[0]):
        return Path(hf_hub_download(*place, revision=revision))


def parse_hub_model(name: str) -> tuple[str, str] | None:
    """Return (owner/repository, file) of a tokenizer 'owner/repository/file.model', None for any other name
    and for a file on this machine."""
    parts = name.split("/", 2)
    if (
        not name.endswith(".model")
        or resolve_path(name).is_file()
        or len(parts) < 3
        or Path(name).is_absolute()
    ):
        return None
    return "/".join(parts[:2]), parts[2]
