"""The architecture table: how each model family names its tensors (architectures.yaml). Torch is not needed.

`find_architecture(config)` returns one family's row. The row places every tensor: in which block it lies,
which part of the model it belongs to, and what published checkpoints call it. Families that the table lacks
have a row that a model on device meta gives (automatic.py, which needs torch), for plain cuts.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml

from inheritune.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """One family's row of architectures.yaml."""

    name: str
    layers: str
    base_prefix: str
    block: str
    parts: dict[str, list[str]]
    modules: dict[str, list[str]]
    residual: list[str] = field(default_factory=list)
    norm_weight: float = 1.0
    constants: dict[str, float] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    published: dict[str, list[str]] = field(default_factory=dict)
    per_layer: list[str] = field(default_factory=list)
    automatic: bool = False
    """Whether the row was read off a model: blocks, embedding and head are known, parts and modules not."""

    @property
    def embedding(self) -> str:
        """Name of the token embedding's matrix."""
        return self.parts["token_embedding"][0]

    @property
    def head(self) -> str:
        """Name of the head's matrix. A tied head shares the token embedding's matrix."""
        return self.parts["head"][0]

    def get_blocks(self, model: "PreTrainedModel") -> "torch.nn.ModuleList":
        """Return the list of blocks of a model of this family."""
        return cast("torch.nn.ModuleList", model.get_submodule(self.block.removesuffix(".{i}.")))

    def split_name(self, name: str) -> tuple[int, str] | None:
        """Return (block index, name inside the block) of a tensor, or None for one outside the blocks."""
        prefix, suffix = self.block.split("{i}")
        if not name.startswith(prefix):
            return None
        index, _, rest = name[len(prefix) :].partition(suffix)
        return int(index), rest

    def in_checkpoint(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Return {name: shape} of the checkpoint's tensors that make up the model's tensor `name` of `shape`.

        Their elements, concatenated in this order, are the elements of the model's tensor."""
        inside = self.split_name(name)
        block, key = ("", name) if inside is None else (self.block.format(i=inside[0]), inside[1])
        names = self.published.get(key)
        if names is None:
            return {name: shape}
        if "{e}" not in names[0]:
            return {block + names[0]: shape}
        piece = (shape[1] // len(names), *shape[2:])  # of one expert
        return {block + n.format(e=e): piece for e in range(shape[0]) for n in names}

    def part_of(self, name: str) -> tuple[str, str | None]:
        """Return the (part, module) that a tensor belongs to, e.g. ('blocks', 'attn') or ('head', None).

        Raises UserError for a tensor that the table does not place."""
        inside = self.split_name(name)
        if self.automatic:
            raise UserError(
                f"model family '{self.name}' is not in the architecture table, so only whole blocks can be "
                f"cut from it, with all parts and modules; for more, describe it in "
                f"inheritune/models/architectures.yaml, a few lines: docs/new_architecture.md"
            )
        if inside is None:
            for part, names in self.parts.items():
                if name in names:
                    return part, None
        else:
            for module, prefixes in self.modules.items():
                if any(inside[1].startswith(prefix) for prefix in prefixes):
                    return "blocks", module
        raise UserError(
            f"tensor {name} has no place in the architecture table of {self.name} "
            f"(inheritune/models/architectures.yaml)"
        )


_TABLE = yaml.safe_load((Path(__file__).parent / "architectures.yaml").read_text(encoding="utf-8"))


def find_architecture(config: "PreTrainedConfig") -> Architecture:
    """Return the row of a config's family: the table's, or the one that automatic.py detects.

    Raises UserError for a family that transformers does not have as a causal language model, and for one
    whose blocks cannot be told."""
    if config.model_type in _TABLE:
        return Architecture(name=config.model_type, **_TABLE[config.model_type])
    from inheritune.models.automatic import detect_row

    return Architecture(name=config.model_type, **detect_row(config))


def find_depth_key(model_type: str) -> str:
    """Return the config key of the depth of a family. Raises UserError for an unknown family."""
    if model_type in _TABLE:
        return str(_TABLE[model_type]["layers"])
    from inheritune.models.automatic import find_depth_key as ask_transformers

    return ask_transformers(model_type)
