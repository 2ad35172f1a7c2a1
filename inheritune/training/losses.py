"""The loss of each token: the cross-entropy with the targets, and the divergence from a teacher.

`token_losses` chooses between two ways to compute the cross-entropy. On a GPU, torch.compile makes one pass
over the logits forward and one backward: 6 bytes of memory traffic per bf16 logit, where operations one after
the other need 58. On a CPU, and where torch.compile does not work, a few tokens are computed at a time.

Legend: N = tokens, V = vocabulary, C = tokens of a chunk."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch

from inheritune.models.sizes import LOSS_CHUNK

logger = logging.getLogger(__name__)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of every token in nats, in fp32.

    logits (B, T, V), targets (B, T) -> (B, T)"""
    # on a CPU chunks that stay in the cache are faster
    is_fused = logits.is_cuda and can_compile(logits.device)
    function = FusedTokenLosses if is_fused else ChunkedTokenLosses
    return function.apply(logits.flatten(0, 1), targets.flatten()).view_as(targets)


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


# --- in chunks ---------------------------------------------------------------------------------------------


class ChunkedTokenLosses(torch.autograd.Function):
    """Cross-entropy, computed for a few tokens at a time, so that no tensor of the logits' size is made in
    fp32. Under autocast torch makes two such tensors in forward and two more in backward. Backward computes
    the softmax anew."""

    CHUNK = {"cpu": 1 << 22, "cuda": LOSS_CHUNK}
    """Elements; on a CPU 16 MB in fp32, within a processor's last cache."""

    @staticmethod
    def chunks(logits_NV: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Cut tensors of N rows into the same chunks."""
        size = max(1, ChunkedTokenLosses.CHUNK["cuda" if logits_NV.is_cuda else "cpu"] // logits_NV.shape[1])
        return zip(*(tensor.split(size) for tensor in (logits_NV, *others)), strict=True)

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        sums_N = torch.cat(
            [part_CV.float().logsumexp(dim=-1) for (part_CV,) in ChunkedTokenLosses.chunks(logits_NV)]
        )
        ctx.save_for_backward(logits_NV, targets_N, sums_N)
        return sums_N - logits_NV.gather(1, targets_N[:, None]).squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, grads_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_NV, targets_N, sums_N = ctx.saved_tensors
        result_NV = torch.empty_like(logits_NV)
        for part, targets, sums, grads, out in ChunkedTokenLosses.chunks(
            logits_NV, targets_N, sums_N, grads_N, result_NV
        ):
            softmax_CV = (part - sums[:, None]).exp_()  # fp32, as the sums are
            softmax_CV.scatter_add_(1, targets[:, None], torch.full_like(softmax_CV[:, :1], -1.0))
            out.copy_(softmax_CV.mul_(grads[:, None]))
        return result_NV, None


# --- compiled ----------------------------------------------------------------------------------------------


def compute_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy and the log-sum-exp of each token, in fp32.  -> (N,), (N,)"""
    logits = logits_NV.float()
    sums_N = logits.logsumexp(dim=-1)
    return sums_N - logits.gather(1, targets_N[:, None]).squeeze(1), sums_N


def compute_gradient(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, sums_N: torch.Tensor, grads_N: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of the logits, in their type: (softmax - one-hot target) * gradient.  -> (N, V)"""
    is_target = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N[:, None]
    softmax = (logits_NV.float() - sums_N[:, None]).exp()
    return ((softmax - is_target.float()) * grads_N[:, None]).to(logits_NV.dtype)


@functools.cache
def compile_functions() -> tuple[Any, Any]:
    """Return both functions compiled; torch does it at the first call of each."""
    return torch.compile(compute_losses), torch.compile(compute_gradient)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works on `device`; where not, say so once."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x.float().exp().sum(dim=-1)

    try:
        torch.compile(probe)(torch.zeros(4, 16, device=device))
    except Exception as error:  # no C compiler, no Python headers, no Triton: of many types
        logger.warning(
            "torch.compile does not work on %s (%s): the loss takes several passes over the logits",
            device,
            " ".join(str(error).split())[:200],
        )
        return False
    return True


class FusedTokenLosses(torch.autograd.Function):
    """`compute_losses` with its gradient, both compiled."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        losses_N, ctx.sums_N = compile_functions()[0](*_mark_rows(logits_NV, targets_N))
        return losses_N

    @staticmethod
    def backward(ctx: Any, grads_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = _mark_rows(*ctx.saved_tensors, ctx.sums_N, grads_N.contiguous())
        return compile_functions()[1](*rows), None


def _mark_rows(*tensors_N: torch.Tensor) -> list[torch.Tensor]:
    """Detach tensors of N rows, and tell torch.compile that N may be any number: one compilation serves
    training, validation and the last windows."""
    rows = [tensor.detach() for tensor in tensors_N]
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return rows
