"""Validation on one fixed set of windows, the same for every run of an experiment, with per-window losses.

Because the windows are shared, two models can be compared window by window (comparison.py).
"""

import math

import numpy as np
import torch
import xxhash

from inheritune.data.batches import Tokens
from inheritune.errors import UserError
from inheritune.runtime.dist import all_sum, rank, world
from inheritune.runtime.log import progress

EVAL_BATCH = 8
"""Windows per forward, fixed: then a window's loss does not move with the number of ranks or the micro
batch."""


def final_windows(tokens: Tokens, length: int, count: int) -> np.ndarray:
    """Starts of min(all, count) evenly spaced, non-overlapping windows of the validation text.  -> (n,) int64

    Raises UserError if the text is shorter than two windows: one has no deviation, and so no interval."""
    available = tokens.n_windows(length)
    if available < 1:
        raise UserError(
            f"the validation text of {tokens.folder} has {tokens.n_tokens} tokens, fewer than one window of "
            f"{length} + 1; "
            f"hold out more (data.validation.fraction) or shorten data.sequence_length"
        )
    if available < 2:
        raise UserError(
            f"the validation text of {tokens.folder} has {tokens.n_tokens} tokens, one window of {length} + "
            f"1; an "
            f"interval needs two: hold out more (data.validation.fraction) or shorten data.sequence_length"
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
    """Indices of the `count` of the final windows that the loss curve uses, evenly spaced among them.  ->
    (m,) int64"""
    m = min(n_final, count)
    return np.arange(m) * n_final // m


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token in nats, in fp32.  logits (B, T, V), targets (B, T) -> (B, T)"""
    return _TokenLosses.apply(logits.flatten(0, 1), targets.flatten()).view_as(targets)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy, tokens taken a few at a time: nothing of the logits' size is made in fp32, neither here
    (where torch makes two such tensors under autocast) nor in backward (two more), which takes the softmax
    again.

    Legend: N = tokens, V = vocabulary, C = tokens of a chunk."""

    CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}
    """Elements: 16 MB in fp32, within a processor's last cache; on a GPU 268 MB, so that starting kernels
    costs nothing."""

    @staticmethod
    def chunks(logits_NV: torch.Tensor, *others: torch.Tensor):
        size = max(1, _TokenLosses.CHUNK["cuda" if logits_NV.is_cuda else "cpu"] // logits_NV.shape[1])
        return zip(*(tensor.split(size) for tensor in (logits_NV, *others)), strict=True)

    @staticmethod
    def forward(ctx, logits_NV, targets_N):
        sums_N = torch.cat(
            [part_CV.float().logsumexp(dim=-1) for (part_CV,) in _TokenLosses.chunks(logits_NV)]
        )
        ctx.save_for_backward(logits_NV, targets_N, sums_N)
        return sums_N - logits_NV.gather(1, targets_N[:, None]).squeeze(1).float()

    @staticmethod
    def backward(ctx, grads_N):
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
    """temperature^2 * KL(teacher || student) of every token in nats, in fp32, both softmaxes at `temperature`
    (Hinton et al., arXiv 1503.02531: the factor keeps the gradient's size).  logits, teacher_logits (B, T, V)
    -> (B, T)"""
    ours, theirs = (
        torch.log_softmax(each.float() / temperature, dim=-1) for each in (logits, teacher_logits)
    )
    return (
        torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
        * temperature**2
    )


@torch.no_grad()
def window_losses(
    model, tokens: Tokens, length: int, starts: np.ndarray, device, stop=None
) -> np.ndarray | None:
    """Mean loss in nats per token of each window, on every rank.  -> (len(starts),) float64, or None if
    `stop`, a function asked after each forward that answers the same on every rank, broke it off.

    Batch j goes to rank j mod W; a rank without one repeats a batch, since under ZeRO-3 all ranks must run
    the same number of forwards. `model` is an engine or a module; it is left in the mode it was in."""
    training = model.training
    model.eval()
    losses = torch.zeros(len(starts), dtype=torch.float64, device=device)
    n_batches = math.ceil(len(starts) / EVAL_BATCH)
    rounds = progress(range(math.ceil(n_batches / world())), "validating", "batch")
    for turn in rounds:
        batch = turn * world() + rank()
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
    return all_sum(losses).cpu().numpy()
