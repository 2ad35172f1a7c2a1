"""Validation on one fixed set of windows, the same for every run of an experiment, with per-window losses.

Because the windows are the same, two models can be compared window by window (comparison.py).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash

from inheritune.data.batches import Tokens
from inheritune.errors import UserError
from inheritune.models.sizes import LOSS_CHUNK
from inheritune.runtime.dist import get_rank, get_world_size, sum_over_ranks
from inheritune.runtime.log import make_progress_bar
from inheritune.training import fused_loss

EVAL_BATCH = 8
"""Windows per forward. It is fixed so that a window's loss does not depend on the number of ranks or the
micro batch."""


def final_windows(tokens: Tokens, length: int, count: int) -> np.ndarray:
    """Return the starts of min(all, count) evenly spaced, non-overlapping windows of the validation text.
    -> (n,) int64

    Raises UserError if the text is shorter than two windows: one window has no deviation, and so no
    interval."""
    available = tokens.n_windows(length)
    if available < 1:
        raise UserError(
            f"the validation text of {tokens.folder} has {tokens.n_tokens} tokens, fewer than one window of "
            f"{length} + 1; hold out more (data.validation.fraction) or shorten data.sequence_length"
        )
    if available < 2:
        raise UserError(
            f"the validation text of {tokens.folder} has {tokens.n_tokens} tokens, one window of {length} + "
            f"1; an interval needs two: hold out more (data.validation.fraction) or shorten "
            f"data.sequence_length"
        )
    n = min(available, count)
    return (np.arange(n) * available // n) * length


def describe_windows(starts: np.ndarray, length: int) -> str:
    """Return what tells these windows (their first positions, their length in tokens) from others of the same
    text. Losses are paired only window by window."""
    return (
        f"{len(starts)} of {length} tokens, {xxhash.xxh3_64_hexdigest(np.asarray(starts, '<i8').tobytes())}"
    )


def curve_windows(n_final: int, count: int) -> np.ndarray:
    """Return the indices of the final windows that the loss curve uses: `count`, evenly spaced among them.
    -> (m,) int64"""
    m = min(n_final, count)
    return np.arange(m) * n_final // m


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of every token in nats, in fp32.

    logits (B, T, V), targets (B, T) -> (B, T)"""
    # on a CPU chunks that stay in the cache are faster
    is_fused = logits.is_cuda and fused_loss.can_compile(logits.device)
    function = fused_loss.FusedTokenLosses if is_fused else _TokenLosses
    return function.apply(logits.flatten(0, 1), targets.flatten()).view_as(targets)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy, computed for a few tokens at a time, so that no tensor of the logits' size is made in
    fp32. Under autocast torch makes two such tensors in forward and two more in backward. Backward computes
    the softmax anew.

    Legend: N = tokens, V = vocabulary, C = tokens of a chunk."""

    CHUNK = {"cpu": 1 << 22, "cuda": LOSS_CHUNK}
    """Elements; on a CPU 16 MB in fp32, within a processor's last cache."""

    @staticmethod
    def chunks(logits_NV: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Cut tensors of N rows into the same chunks."""
        size = max(1, _TokenLosses.CHUNK["cuda" if logits_NV.is_cuda else "cpu"] // logits_NV.shape[1])
        return zip(*(tensor.split(size) for tensor in (logits_NV, *others)), strict=True)

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        sums_N = torch.cat(
            [part_CV.float().logsumexp(dim=-1) for (part_CV,) in _TokenLosses.chunks(logits_NV)]
        )
        ctx.save_for_backward(logits_NV, targets_N, sums_N)
        return sums_N - logits_NV.gather(1, targets_N[:, None]).squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, grads_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_NV, targets_N, sums_N = ctx.saved_tensors
        result_NV = torch.empty_like(logits_NV)
        for part, targets, sums, grads, out in _TokenLosses.chunks(
            logits_NV, targets_N, sums_N, grads_N, result_NV
        ):
            softmax_CV = (part - sums[:, None]).exp_()  # fp32, as the sums are
            softmax_CV.scatter_add_(1, targets[:, None], torch.full_like(softmax_CV[:, :1], -1.0))
            out.copy_(softmax_CV.mul_(grads[:, None]))
        return result_NV, None


def token_divergences(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return temperature^2 * KL(teacher || student) of every token in nats, in fp32, with both softmaxes at
    `temperature`.  logits, teacher_logits (B, T, V) -> (B, T)

    The factor keeps the size of the gradient (Hinton et al., arXiv 1503.02531)."""
    log_student, log_teacher = (
        torch.log_softmax(each.float() / temperature, dim=-1) for each in (logits, teacher_logits)
    )
    return (
        torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)
        * temperature**2
    )


@torch.no_grad()
def window_losses(
    model: Any,
    tokens: Tokens,
    length: int,
    starts: np.ndarray,
    device: torch.device,
    stop: Callable[[], object] | None = None,
) -> np.ndarray | None:
    """Return the mean loss in nats per token of each window, on every rank.  -> (len(starts),) float64

    `stop` is called after each forward and must return the same on every rank; if that is true, validation
    ends and None is returned. Batch j goes to rank j mod W. A rank without a batch repeats one, since under
    ZeRO 3 all ranks must run the same number of forwards. `model` is an engine or a module; its mode is
    restored."""
    training = model.training
    model.eval()
    losses = torch.zeros(len(starts), dtype=torch.float64, device=device)
    n_batches = math.ceil(len(starts) / EVAL_BATCH)
    rounds = make_progress_bar(range(math.ceil(n_batches / get_world_size())), "validating", "batch")
    for turn in rounds:
        batch = turn * get_world_size() + get_rank()
        chosen = slice(min(batch, n_batches - 1) * EVAL_BATCH, (min(batch, n_batches - 1) + 1) * EVAL_BATCH)
        windows = torch.from_numpy(np.stack([tokens.read(int(s), length + 1) for s in starts[chosen]])).to(
            device
        )
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits  # (8, T, V)
        if batch < n_batches:
            losses[chosen] = token_losses(logits, windows[:, 1:]).double().mean(dim=1)
        if stop is not None and stop():
            model.train(training)
            return None
    model.train(training)
    return sum_over_ranks(losses).cpu().numpy()
