"""What a layer is worth: the loss without it, what it does to its input, and the loss after a cut.

All is measured on the windows on which attention is measured. A forward without part of block i begins at
block i, from states that one whole forward has left, so it costs half a forward on average.

Legend of suffixes: N = sequences, B = sequences of one batch, T = tokens, C = width, H = heads, L = layers.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from inheritune.analysis.blocks import PARTS, BlockRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_ELEMENTS = 1 << 27
"""Elements of a batch's logits, and of its states: 0.5 GB each in fp32."""
KINDS = ("block", *PARTS)


@dataclass
class Costs:
    """What `measure_costs` found. Losses are in nats per token, one per sequence."""

    loss_N: torch.Tensor
    without: dict[tuple[int, str], torch.Tensor]
    """(layer, kind of KINDS) -> the loss without it, (N,); what could not be measured is not in it."""
    first: list[torch.Tensor]
    """Loss of the first n blocks with the final norm and head, n = 0 to L, each (N,)."""
    influence: list[float]
    """Of each layer, 1 - cosine between the input and the output of a block, mean over all tokens (ShortGPT,
    arXiv 2403.03853, equation 1)."""
    distance: torch.Tensor
    """(L + 1, L + 1): angular distance of the residual stream before two blocks (the last: after the last
    block), arccos(cosine) / pi at a sequence's last token, mean over sequences (arXiv 2403.17887)."""
    head_norm: list[list[float] | None]
    """Of each layer, each head's mean L2 norm of its output, before the projection (arXiv 2504.03889)."""
    missing: dict[str, list[int]] = field(default_factory=dict)
    """{attn or mlp: the layers for which its cost is not known}"""

    def layer_keys(self, layer: int) -> dict:
        """Return the keys of a layer's row: costs in nats per token, each with its standard error over the
        sequences."""
        found = {kind: self.without.get((layer, kind)) for kind in KINDS}
        added = {kind: None if loss_N is None else loss_N - self.loss_N for kind, loss_N in found.items()}
        return {
            "cost": {kind: None if d is None else round(d.mean().item(), 6) for kind, d in added.items()},
            "cost_error": {kind: None if d is None else round(_error(d), 6) for kind, d in added.items()},
            "influence": round(self.influence[layer], 6),
            "head_norm": self.head_norm[layer],
        }


def _error(values_N: torch.Tensor) -> float:
    """Return the standard error of a mean; 0 of a single value."""
    return values_N.std().item() / math.sqrt(len(values_N)) if len(values_N) > 1 else 0.0


def find_windows(distance_LL: torch.Tensor) -> list[dict]:
    """Return for each k below the depth the k adjacent blocks that move the residual stream least.

    Rows of kind `window`: k, the half-open range [first, end), and its angular distance."""
    depth = len(distance_LL) - 1
    rows = []
    for k in range(1, depth):
        moved = [distance_LL[i, i + k].item() for i in range(depth - k + 1)]
        first = min(range(len(moved)), key=moved.__getitem__)
        rows.append(
            {"kind": "window", "k": k, "first": first, "end": first + k, "distance": round(moved[first], 6)}
        )
    return rows


class CostMeter:
    """Measures a model's blocks on windows (N, T) of tokens, some windows at a time.

    missing: why nothing can be measured; empty if it can. advance: called after each forward."""

    def __init__(self, model: "PreTrainedModel", windows_NT: torch.Tensor, batch: int):
        self.runner, self.windows_NT = BlockRunner(model), windows_NT.to(model.device)
        self.advance: Callable[[], object] = lambda: None
        config, length = model.config.get_text_config(), windows_NT.shape[1]
        depth = len(self.runner.blocks)
        widest = max(config.vocab_size, (depth + 1) * config.hidden_size)
        self.batch = max(1, min(batch, BATCH_ELEMENTS // (length * widest)))
        self.missing = "its blocks were not found"
        if depth:
            with torch.inference_mode():
                self.missing = self.runner.inspect_blocks(self.windows_NT[:1])

    def count_forwards(self, n_cuts: int = 0) -> int:
        """Return how many forwards `measure` takes, with `measure_cut` of `n_cuts` cuts."""
        kinds = sum(1 + len(parts) for parts in self.runner.parts)
        return -(-len(self.windows_NT) // self.batch) * (1 + kinds + len(self.runner.blocks) + n_cuts)

    @torch.inference_mode()
    def measure(self) -> Costs:
        """Return all that is measured block by block."""
        depth = len(self.runner.blocks)
        losses: dict[tuple, list[torch.Tensor]] = defaultdict(list)
        norms: dict[int, list[torch.Tensor]] = defaultdict(list)
        influences, distances = [], []
        for ids_BT in self.windows_NT.split(self.batch):
            states, heads = self._run_whole(ids_BT, losses)
            for layer, norm_BH in heads.items():
                norms[layer].append(norm_BH)
            influences.append(_compute_influence(states))
            distances.append(_compute_distance(states))
            self._run_without(ids_BT, states, losses)
        joined = {key: torch.cat(parts) for key, parts in losses.items()}
        return Costs(
            loss_N=joined["first", depth],
            without={(layer, kind): joined[layer, kind] for layer, kind in joined if kind in KINDS},
            first=[joined["first", n] for n in range(depth + 1)],
            influence=torch.cat(influences, dim=1).mean(dim=1).tolist(),
            distance=torch.cat(distances).mean(dim=0),
            head_norm=[
                [round(norm, 6) for norm in torch.cat(norms[layer]).mean(dim=0).tolist()]
                if layer in norms
                else None
                for layer in range(depth)
            ],
            missing={
                part: layers
                for part in PARTS
                if (layers := [i for i, parts in enumerate(self.runner.parts) if part not in parts])
            },
        )

    @torch.inference_mode()
    def measure_cut(self, kept: Sequence[int]) -> float:
        """Return the loss of the model with the blocks `kept` only."""
        dropped = sorted(set(range(len(self.runner.blocks))) - set(kept))
        losses = []
        for ids_BT in self.windows_NT.split(self.batch):
            with self.runner.leave_out(dropped):
                losses.append(self._read(ids_BT))
        return torch.cat(losses).mean().item()

    def _read(self, ids_BT: torch.Tensor) -> torch.Tensor:
        losses_B = self.runner.read_losses(ids_BT)
        self.advance()
        return losses_B

    def _run_whole(self, ids_BT: torch.Tensor, losses: dict) -> tuple[list[torch.Tensor], dict]:
        """Run the whole model. Returns the states between blocks and {layer: norms of its heads (B, H)}."""
        norms: dict[int, torch.Tensor] = {}

        def keep(layer: int, args: tuple) -> None:
            heads_BTHD = args[0].reshape(*ids_BT.shape, self.runner.n_heads, -1)
            norms[layer] = heads_BTHD.norm(dim=-1).double().mean(dim=1).cpu()

        with ExitStack() as hooks:
            states = hooks.enter_context(self.runner.record_states())
            for i, module in enumerate(self.runner.outputs):
                if module is not None:
                    handle = module.register_forward_pre_hook(lambda _, args, i=i: keep(i, args))
                    hooks.callback(handle.remove)
            losses["first", len(self.runner.blocks)].append(self._read(ids_BT))
        return states, norms

    def _run_without(self, ids_BT: torch.Tensor, states: list[torch.Tensor], losses: dict) -> None:
        """Run the model without each block and each part of it, and with its first blocks only."""
        depth, runner = len(self.runner.blocks), self.runner
        for i in range(depth):
            with runner.leave_out(range(i + 1), states[i].clone()):
                losses[i, "block"].append(self._read(ids_BT))
            for part, module in runner.parts[i].items():
                with runner.leave_out(range(i), states[i].clone()), runner.silence([module]):
                    losses[i, part].append(self._read(ids_BT))
            with runner.leave_out(range(depth), states[i].clone()):
                losses["first", i].append(self._read(ids_BT))


def _compute_influence(states: list[torch.Tensor]) -> torch.Tensor:
    """Return 1 - cosine between the input and the output of each block.  -> (L, B * T)"""
    pairs = zip(states, states[1:], strict=False)
    return torch.stack(
        [1 - torch.cosine_similarity(a.double(), b.double(), dim=-1).flatten().cpu() for a, b in pairs]
    )


def _compute_distance(states: list[torch.Tensor]) -> torch.Tensor:
    """Return the angular distance of all pairs of states at the last token.  -> (B, L + 1, L + 1)"""
    last_BLC = torch.stack([state[:, -1].double().cpu() for state in states], dim=1)
    unit_BLC = torch.nn.functional.normalize(last_BLC, dim=-1)
    return (unit_BLC @ unit_BLC.mT).clamp(-1, 1).arccos() / math.pi
