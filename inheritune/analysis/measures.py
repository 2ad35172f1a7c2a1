"""The paper's two measures of an attention map: approximate rank and column mass (section 2 and appendix C).
Pure functions of tensors.

Legend of suffixes: N = sequences, B = sequences of one batch, H = heads, T = tokens, F = fractions (tau or
eta), M = matrices.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from inheritune.analysis.thresholds import ETAS, MAIN_THRESHOLD, TAUS


def approximate_rank(A_NHTT: torch.Tensor, taus: Sequence[float] = TAUS) -> torch.Tensor:
    """Return k*, the smallest k such that the k largest squared singular values reach tau of their total
    (paper, section 2).

    (N, H, T, T) -> (F, N, H) int64. The squared singular values are the eigenvalues of A A^T, in float64:
    errors of about 1e-14 of the total, at a third of the cost of a decomposition of A."""
    A_NHTT = A_NHTT.detach().double()
    ascending_NHT = _eigenvalues((A_NHTT @ A_NHTT.mT).flatten(0, 1)).unflatten(0, A_NHTT.shape[:2])
    return _count_to_reach(ascending_NHT.flip(-1).clamp(min=0), taus)


def _eigenvalues(G_MTT: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues of M symmetric matrices in ascending order.  (M, T, T) -> (M, T)

    On a CPU each core decomposes matrices of its own: LAPACK's threads inside one 100 x 100 matrix made this
    10 times slower on a busy machine."""
    cores = torch.get_num_threads()
    if G_MTT.is_cuda or cores == 1:
        return torch.linalg.eigvalsh(G_MTT)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            return torch.cat(list(pool.map(torch.linalg.eigvalsh, G_MTT.chunk(cores))))
    finally:
        torch.set_num_threads(cores)


def column_mass(A_NHTT: torch.Tensor, etas: Sequence[float] = ETAS) -> torch.Tensor:
    """Return m*, the smallest number of columns, largest first, whose squared L2 norms reach eta of the
    squared Frobenius norm.

    (N, H, T, T) -> (F, N, H) int64 (paper, section C)."""
    columns_NHT = A_NHTT.double().square().sum(dim=-2)
    return _count_to_reach(columns_NHT.sort(dim=-1, descending=True).values, etas)


def _count_to_reach(parts_NHT: torch.Tensor, fractions: Sequence[float]) -> torch.Tensor:
    """Count how many of the descending `parts` add up to each fraction of their sum.  -> (F, N, H)

    A sum that misses the fraction by 1e-9 of the total counts as having reached it, so that 90 equal parts
    of 100 are 0.90 despite rounding."""
    sums_NHT = parts_NHT.cumsum(dim=-1)
    total_NH1 = sums_NHT[..., -1:]
    return torch.stack([(sums_NHT < (fraction - 1e-9) * total_NH1).sum(dim=-1) + 1 for fraction in fractions])


def measure_uniform(length: int) -> tuple[int, int]:
    """Return (k*, m*) of causal uniform attention over `length` tokens, at tau = eta = 0.90: 5 and 30 of
    100."""
    A_1TT = torch.ones(1, length, length).tril()
    A_1TT = A_1TT / A_1TT.sum(dim=-1, keepdim=True)
    main = (float(MAIN_THRESHOLD),)
    return int(approximate_rank(A_1TT[None], main).item()), int(column_mass(A_1TT[None], main).item())
