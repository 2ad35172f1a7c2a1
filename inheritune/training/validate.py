"""Validation on one fixed set of windows, the same for every run of an experiment, with per-window losses.

Because the windows are the same, two models can be compared window by window (comparison.py).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xxhash

from inheritune.data.batches import Tokens
from inheritune.engines.engine import validating
from inheritune.errors import UserError
from inheritune.models.sizes import EVAL_BATCH
from inheritune.runtime.dist import get_rank, get_world_size, sum_over_ranks
from inheritune.runtime.log import make_progress_bar
from inheritune.training import losses


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


def describe_windows(tokens: Tokens, starts: np.ndarray, length: int) -> str:
    """Return what tells these windows (their first positions, their length in tokens, a start token) from
    others of the same text. Losses are paired only window by window."""
    begin = "" if tokens.first_token is None else f", beginning with token {tokens.first_token}"
    positions = xxhash.xxh3_64_hexdigest(np.asarray(starts, "<i8").tobytes())
    return f"{len(starts)} of {length} tokens, {positions}{begin}"


def curve_windows(n_final: int, count: int) -> np.ndarray:
    """Return the indices of the final windows that the loss curve uses: `count`, evenly spaced among them.
    -> (m,) int64"""
    m = min(n_final, count)
    return np.arange(m) * n_final // m


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
    means = torch.zeros(len(starts), dtype=torch.float64, device=device)
    n_batches = math.ceil(len(starts) / EVAL_BATCH)
    rounds = make_progress_bar(range(math.ceil(n_batches / get_world_size())), "validating", "batch")
    with validating(model):
        for turn in rounds:
            batch = turn * get_world_size() + get_rank()
            first = min(batch, n_batches - 1) * EVAL_BATCH
            chosen = slice(first, first + EVAL_BATCH)
            windows = torch.from_numpy(
                np.stack([tokens.read_window(int(s), length + 1) for s in starts[chosen]])
            ).to(device)
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits  # (8, T, V)
            if batch < n_batches:
                means[chosen] = losses.token_losses(logits, windows[:, 1:]).double().mean(dim=1)
            if stop is not None and stop():
                return None
    return sum_over_ranks(means).cpu().numpy()
