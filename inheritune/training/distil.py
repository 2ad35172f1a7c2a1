"""Logit distillation: the teacher, and the divergence of the student's predictions from the teacher's."""

from typing import TYPE_CHECKING

import torch

from inheritune.config.run import Distil
from inheritune.engines.engine import fill_parameters
from inheritune.errors import UserError
from inheritune.files import markers
from inheritune.models.networks import build_model
from inheritune.models.sources import open_source
from inheritune.runtime import dist
from inheritune.training import losses

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Teacher:
    """The model whose logits a distilled run learns, in the student's precision.

    It is a frozen module without an engine, whole on every rank. An engine would only help where the teacher
    does not fit alongside the student; GPT-2 Medium takes 1.4 GB in fp32."""

    def __init__(self, settings: Distil, source: str, revision: str | None):
        """Raise UserError, on every rank, if `source` (path or id) cannot be read or holds nan or inf."""
        self.alpha, self.temperature = settings.alpha, settings.temperature
        # compares the hashes, once for all ranks
        dist.run_on_rank0(lambda: bool(open_source(source, revision)))
        self.source = open_source(source, revision, check=False)
        dist.run_on_rank0(self.source.check_finite)
        self.files = dist.run_on_rank0(markers.hash_folder, self.source.folder, only=self.source.files())

    def load(self, student: "PretrainedConfig", length: int, precision: str, device: torch.device) -> None:
        """Build the model and load its weights. `student` is the student's configuration, `length` the
        length of its sequences in tokens.

        Raises UserError if the teacher's vocabulary is not the student's or it has too few positions."""
        config = self.source.config
        positions = getattr(config, "max_position_embeddings", length)  # Bloom has no limit
        if config.vocab_size != student.vocab_size or positions < length:
            raise UserError(
                f"the teacher {self.source.folder} has {config.vocab_size} tokens and {positions} positions, "
                f"the student {student.vocab_size} tokens and sequences of {length}; use a teacher that fits"
            )
        self.model = build_model(config)
        fill_parameters(self.model, self.source, stage=0)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # transformers wraps it untyped
        self.model.requires_grad_(False).eval()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16_autocast")

    def divergences(self, windows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the divergence of the student's `logits` (M, T, V) from the teacher's at each token of
        `windows` (M, T + 1).  -> (M, T)"""
        with torch.no_grad(), self.autocast:
            teacher_logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits  # (M, T, V)
        return losses.token_divergences(logits, teacher_logits, self.temperature)
