"""A model run without some of its blocks, without the attention or MLP of one, or from a state in their
midst.

A block that is left out is replaced by one that hands on its input. The others keep their index, on which
the scaling of attention or a window of it may depend.

Legend of suffixes: B = sequences of one batch, T = tokens, C = width, H = heads.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inheritune.errors import UserError
from inheritune.models.architectures import Architecture, find_architecture
from inheritune.training.losses import token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORST_LOSS = 1e4
"""Nats per token that stand for a loss which is not finite: without a block, states can grow past fp32."""
PARTS = ("attn", "mlp")
"""What a block adds to its input, by their names in the architecture table."""


class BlockRunner:
    """The blocks of a model, with what is known of each after `inspect_blocks`.

    blocks: the modules, in order. parts: of each block, {attn or mlp: the module whose output is the part's
    contribution to the residual stream}. outputs: of each block, the attention's last projection, whose input
    is the output of the heads side by side; None where it was not found."""

    def __init__(self, model: "PreTrainedModel"):
        config = model.config.get_text_config()
        try:
            table: Architecture | None = find_architecture(config)
        except UserError:  # ranks are measured without a table; so are whole blocks
            table = None
        self.model, self.n_heads = model, config.num_attention_heads
        self.blocks = _find_blocks(model, table, config.num_hidden_layers)
        self.parts: list[dict[str, nn.Module]] = [
            {part: module for part in PARTS if table and (module := _find_part(block, table, part))}
            for block in self.blocks
        ]
        self.outputs: list[nn.Module | None] = [None] * len(self.blocks)
        self._n_outputs: list[int | None] = [None] * len(self.blocks)  # of a block's tuple; None: a tensor

    def read_losses(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return each sequence's mean loss in nats per predicted token.  -> (B,) float64, on the CPU"""
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        losses_B = token_losses(logits_BTV[:, :-1], ids_BT[:, 1:]).double().mean(dim=1).cpu()
        return losses_B.nan_to_num(nan=WORST_LOSS, posinf=WORST_LOSS).clamp(max=WORST_LOSS)

    @contextmanager
    def record_states(self) -> Iterator[list[torch.Tensor]]:
        """Yield a list that holds, after a forward, the input of the first block and each block's output.

        They are L + 1 tensors (B, T, C) of the residual stream."""
        states: list[torch.Tensor] = []

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            states[:] = [_get_states(args, kwargs)]

        def leave(index: int, output: Any) -> None:
            self._n_outputs[index] = len(output) if isinstance(output, tuple) else None
            states.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            add = self.blocks[0].register_forward_pre_hook
            hooks.callback(add(enter, with_kwargs=True).remove)
            for i, block in enumerate(self.blocks):
                handle = block.register_forward_hook(lambda _, __, output, i=i: leave(i, output))
                hooks.callback(handle.remove)
            yield states

    @contextmanager
    def leave_out(self, indices: Iterable[int], state: torch.Tensor | None = None) -> Iterator[None]:
        """Leave out blocks inside the context. `state` is what block 0 then hands on in place of its input:
        with the input of block i, and the blocks before it left out, a forward begins at block i.

        Call it after a forward in `record_states`, which shows what kind of output a block has."""
        with ExitStack() as changed:
            for i in indices:
                own = vars(self.blocks[i])
                changed.callback(_restore_forward, own, own.get("forward"))
                own["forward"] = _make_hand_on(self._n_outputs[i], state if i == 0 else None)
            yield

    @contextmanager
    def silence(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let `modules`, taken from `parts`, add nothing to the residual stream inside the context."""
        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_hook(_add_nothing, with_kwargs=True).remove)
            yield

    def inspect_blocks(self, ids_BT: torch.Tensor) -> str:
        """Find out on a few tokens what can be measured, and keep only that in `parts` and `outputs`.

        Returns why no cost can be measured at all; empty if the whole blocks' can."""
        projections = self._watch_projections(ids_BT)
        with self.record_states() as states:
            whole = self.read_losses(ids_BT)
        if not all(
            state.shape == states[0].shape == (*ids_BT.shape, states[0].shape[-1]) for state in states
        ):
            return "its blocks do not hand on one state per token"
        last = len(self.blocks) - 1
        if last:
            with self.leave_out(range(last), states[last].clone()):
                begun_late = self.read_losses(ids_BT)
            if not torch.allclose(whole, begun_late, atol=1e-4):
                return "its blocks hand on more than their states"
        with self.silence(module for parts in self.parts for module in parts.values()):
            with self.record_states() as silenced:
                self.read_losses(ids_BT)
        for i, (before, after) in enumerate(zip(silenced, silenced[1:], strict=False)):
            if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
                self.parts[i] = {}  # the block does more than to add its attention and its MLP
        self.outputs = projections
        return ""

    def _watch_projections(self, ids_BT: torch.Tensor) -> list[nn.Module | None]:
        """Return of each block the last projection that its attention calls, if its input divides into
        heads."""
        last: list[nn.Module | None] = [None] * len(self.blocks)

        def enter(index: int, module: nn.Module, args: tuple) -> None:
            last[index] = module if args and args[0].shape[-1] % self.n_heads == 0 else None

        with ExitStack() as hooks:
            for i, parts in enumerate(self.parts):
                for module in parts["attn"].modules() if "attn" in parts else ():
                    if getattr(getattr(module, "weight", None), "ndim", 0) == 2:
                        handle = module.register_forward_pre_hook(lambda m, args, i=i: enter(i, m, args))
                        hooks.callback(handle.remove)
            self.read_losses(ids_BT)
        return last


def _find_blocks(model: "PreTrainedModel", table: Architecture | None, depth: int) -> list[nn.Module]:
    """Return the model's blocks: those that the table names, else the first list of `depth` modules."""
    if table:
        return list(table.get_blocks(model))
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return list(lists[0]) if lists else []


def _find_part(block: nn.Module, table: Architecture, part: str) -> nn.Module | None:
    """Return the module whose output is the block's attention or MLP; None where there is none."""
    for prefix in reversed(table.modules.get(part, [])):  # OPT's MLP is fc1 and fc2: the last one's output
        names = [prefix.rstrip(".")]
        for name, published in table.published.items():  # a model may call it otherwise than checkpoints do
            if published[0].startswith(prefix):
                names.append(name.partition(".")[0])
        for name in names:
            if name in dict(block.named_children()):
                return block.get_submodule(name)
    return None


def _get_states(args: tuple, kwargs: dict) -> torch.Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _make_hand_on(n_outputs: int | None, state: torch.Tensor | None) -> Any:
    """Return a block's forward that returns its input, or `state`, in the form of the block's own output."""

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        states = _get_states(args, kwargs) if state is None else state
        return states if n_outputs is None else (states, *[None] * (n_outputs - 1))

    return hand_on


def _restore_forward(own: dict, before: Any) -> None:
    """Give a block back its forward: that of its class, or the one that a library has put before it."""
    del own["forward"]
    if before is not None:
        own["forward"] = before


def _add_nothing(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Return the output with which a part adds nothing: zeros, or the residual where the part itself adds to
    it (Bloom)."""
    value = output[0] if isinstance(output, tuple) else output
    signature = inspect.signature(module.forward)
    if "residual" in signature.parameters:
        nothing = signature.bind(*args, **kwargs).arguments["residual"]
    else:
        nothing = torch.zeros_like(value)
    return (nothing, *output[1:]) if isinstance(output, tuple) else nothing
