"""The two toy models of the authors' notebook, written anew, with two definitions of rank.

The notebook averages the attention maps of a batch and takes the rank of the mean. The paper's definition is
the mean of the ranks of single sequences. Both are measured here, on the same maps.
"""

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from inheritune.analysis.measures import approximate_rank
from inheritune.analysis.thresholds import MAIN_THRESHOLD

NOTEBOOK_SEED = 42
EVERY = 50
"""Steps between two measurements of the trained layer, as in the notebook."""


def measure_both_ranks(A_NHTT: torch.Tensor) -> dict[str, float]:
    """Return {batch_mean, sequence}: the rank of the mean map of the batch, and the mean rank of its maps,
    both as means over the heads.  (N, H, T, T)"""
    taus = (float(MAIN_THRESHOLD),)
    mean_1HTT = A_NHTT.mean(dim=0, keepdim=True)
    ranks = {"batch_mean": approximate_rank(mean_1HTT, taus), "sequence": approximate_rank(A_NHTT, taus)}
    return {name: rank.double().mean().item() for name, rank in ranks.items()}


@torch.no_grad()
def measure_random_heads(
    seed: int = NOTEBOOK_SEED,
    n_heads: int = 32,
    shown: int = 2,
    width: int = 2048,
    length: int = 1024,
    batch: int = 8,
) -> dict[str, dict[str, float]]:
    """Return the ranks before and after the softmax of heads with random weights on random input.

    `shown` of the `n_heads` heads are measured: they differ by one or two ranks. The notebook draws the
    weights of all heads as one tensor (heads, width, head width) with Kaiming's rule, whose fan-in is then
    width x head width: logits have a deviation of 0.03, and the softmax is close to uniform."""
    torch.manual_seed(seed)
    head = width // n_heads
    x_NTC = torch.randn(batch, length, width)
    W_Q, W_K = (
        torch.nn.init.kaiming_normal_(torch.empty(n_heads, width, head), nonlinearity="relu") for _ in "QK"
    )
    q_NHTD, k_NHTD = (torch.einsum("ntc,hcd->nhtd", x_NTC, W[:shown]) for W in (W_Q, W_K))
    logits_NHTT = q_NHTD @ k_NHTD.mT / math.sqrt(head)
    return {
        "before_softmax": measure_both_ranks(logits_NHTT),
        "after_softmax": measure_both_ranks(logits_NHTT.softmax(dim=-1)),
    }


class AttentionLayer(torch.nn.Module):
    """Self-attention without mask, bias or residual, initialized by Kaiming's rule."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        names = ("query", "key", "value", "output")
        linears = {name: torch.nn.Linear(width, width, bias=False) for name in names}
        self.maps = torch.nn.ModuleDict(linears)
        for linear in linears.values():
            torch.nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")

    def forward(self, x_NTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (output, attention maps).  (N, T, C) -> (N, T, C), (N, H, T, T)"""
        q, k, v = (
            self.maps[name](x_NTC).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )  # (N, H, T, D)
        A_NHTT = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.maps["output"]((A_NHTT @ v).transpose(1, 2).flatten(-2)), A_NHTT


def train_layer(
    seed: int = NOTEBOOK_SEED,
    steps: int = 1000,
    width: int = 512,
    n_heads: int = 8,
    length: int = 128,
    batch: int = 16,
) -> Iterator[dict[str, float]]:
    """Yield {step, batch_mean, sequence} after every 50th step of training one layer on noise.

    Input and target are fresh normal noise in each step (mean squared error, Adam at 1e-3), so there is
    nothing to learn but an output of zero. Ranks are measured on one fixed batch. Steps count from 0, and the
    ranks of step 0 are those after one update, as in the notebook."""
    torch.manual_seed(seed)
    layer = AttentionLayer(width, n_heads)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    fixed_NTC = torch.randn(batch, length, width)
    for step in range(steps):
        output = layer(torch.randn(batch, length, width))[0]
        loss = F.mse_loss(output, torch.randn_like(output))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 or step == steps - 1:
            with torch.no_grad():
                yield {"step": step, **measure_both_ranks(layer(fixed_NTC)[1])}
