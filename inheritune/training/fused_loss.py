"""The cross-entropy of each token in one pass over the logits forward and one backward, by torch.compile: on
a GPU 6 bytes of memory traffic per bf16 logit, where operations one after the other need 58.

Legend: N = tokens, V = vocabulary."""

import functools
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


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
