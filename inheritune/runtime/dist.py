"""The process group: joining it under srun, torchrun, `deepspeed`, mpirun or alone, leaving it, and the few
collectives that are used.

`get_rank`, `get_world_size` and `get_device` can be imported from here too, as in torch.distributed.

Nothing here needs a compiler: DeepSpeed's shared-memory CPU collective, the one op it would build at the
start, is turned off.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from inheritune.errors import Stopped, UserError
from inheritune.runtime.devices import get_device
from inheritune.runtime.launcher import read_launch
from inheritune.runtime.ranks import NodeError, get_rank, get_world_size
from inheritune.runtime.rendezvous import find_free_port, forget_store, join_group, use_loopback

if TYPE_CHECKING:
    import torch

__all__ = [
    "NodeError",
    "agree_on_stop",
    "barrier",
    "gather_objects",
    "get_device",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "leave_group",
    "run_on_rank0",
    "sum_over_ranks",
]

Result = TypeVar("Result")


def init_distributed() -> None:
    """Choose the device and join the process group; call once, before anything imports deepspeed.

    Raises UserError if the launch is not understood, or a GPU is present that torch cannot use."""
    _silence_libraries()
    launch = read_launch(os.environ)
    os.environ.update(launch.variables(find_free_port()))
    if launch.local:
        use_loopback()
    if not Path("/proc/self/stat").is_file():
        raise NodeError("/proc is not mounted, which DeepSpeed needs; mount it (mount -t proc proc /proc)")
    get_device()
    import deepspeed
    import torch

    if get_device().type == "cpu":  # this op would be compiled for half a minute, or fail without g++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    _import_muon()
    if get_device().type == "cuda":
        torch.cuda.set_device(get_device())
    if not torch.distributed.is_initialized():
        join_group(launch)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def leave_group() -> None:
    """Leave the process group, together with all other ranks: NCCL would wait for one that is still in a
    collective."""
    forget_store()
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _import_muon() -> None:
    """Import DeepSpeed's Muon without its decorators. The engine imports it at every start, and the
    decorators would load torch's compiler, which takes seconds, for an optimizer that no run uses."""
    from deepspeed.runtime import compiler

    usual, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = usual


def _silence_libraries() -> None:
    """Hide warnings of libraries that a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed|transformers)(\.|$)")


def agree_on_stop(reason: Result | None) -> Result | None:
    """Return on every rank the first reason to stop that any rank has, or None. One small collective."""
    import torch

    if get_world_size() == 1:
        return reason
    flag = torch.tensor([1.0 if reason else 0.0], device=get_device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return next(filter(None, gather_objects(reason))) if flag.item() else None


def barrier() -> None:
    """Wait until every rank has come here."""
    import torch

    if get_world_size() > 1:
        torch.distributed.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of `tensor` over the ranks, computed in place."""
    import torch

    if get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    import torch

    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def run_on_rank0(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call `function` on rank 0 only; its result, or its UserError or Stopped, reaches every rank."""
    import torch

    outcome: list[Any] = [None, None]  # the result, and what was raised instead
    failure = None
    if get_rank() == 0:
        try:
            outcome[0] = function(*args, **kwargs)
        except Stopped as error:
            outcome[1] = error
        except UserError as error:
            outcome[1] = str(error)
        except Exception as error:
            failure, outcome[1] = error, f"rank 0 failed: {error!r}"
    if get_world_size() > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if isinstance(outcome[1], Stopped):
        raise outcome[1]
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
