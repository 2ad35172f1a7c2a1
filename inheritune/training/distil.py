"""Logit distillation: the teacher beside the student, and how far the student's predictions are from its
own."""

import torch

from inheritune.config.experiment import Distil
from inheritune.engines.engine import fill
from inheritune.errors import UserError
from inheritune.files import rundir
from inheritune.models.architectures import build
from inheritune.models.sources import open_source
from inheritune.runtime import dist
from inheritune.training import validate


class Teacher:
    """The model whose logits a distilled run learns: plain, frozen and whole on every rank (an engine of its
    own would save memory only where the teacher does not fit beside the student; GPT-2 Medium takes 1.4 GB in
    fp32), in the student's precision."""

    def __init__(self, settings: Distil, source: str, revision: str | None):
        """Raises UserError, on every rank, if `source` (path or id) cannot be read or holds nan or inf."""
        self.alpha, self.temperature = settings.alpha, settings.temperature
        dist.on_rank0(lambda: bool(open_source(source, revision)))  # compares the hashes, once for all ranks
        self.source = open_source(source, revision, check=False)
        dist.on_rank0(self.source.check_finite)
        self.files = dist.on_rank0(rundir.hash_folder, self.source.folder, only=self.source.files())

    def load(self, student, length: int, precision: str, device) -> None:
        """Build it and fill it; `student` is the student's configuration, `length` that of its sequences in
        tokens.

        Raises UserError if the teacher's vocabulary is not the student's or it has too few positions."""
        config = self.source.config
        positions = getattr(config, "max_position_embeddings", length)  # Bloom has no limit
        if config.vocab_size != student.vocab_size or positions < length:
            raise UserError(
                f"the teacher {self.source.folder} has {config.vocab_size} tokens and {positions} positions, "
                f"the student "
                f"{student.vocab_size} tokens and sequences of {length}; use a teacher that fits"
            )
        self.model = build(config)
        fill(self.model, self.source, stage=0)
        self.model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_(
            False
        ).eval()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16_autocast")

    def divergences(self, windows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Of each token of (M, T + 1) windows, from the student's logits (M, T, V) on.  -> (M, T)"""
        with torch.no_grad(), self.autocast:
            theirs = self.model(input_ids=windows[:, :-1], use_cache=False).logits  # (M, T, V)
        return validate.token_divergences(logits, theirs, self.temperature)
