"""What a config says of single blocks, when blocks are cut: lists, indexes and counts are cut alike.

What cannot be cut is refused: no such fact is carried over to another block. `cut_config` deals with what the
config states; `check_blocks` compares what transformers then builds, block by block, so that a rule that this
module does not know (a period, caches that blocks share) is found too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inheritune.errors import UserError, is_machine_limit
from inheritune.models.architectures import Architecture, find_architecture
from inheritune.models.networks import build_meta_model
from inheritune.models.plain_configs import PlainConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

PER_LAYER = {
    "activation_sparsity_pattern",
    "attention_layers",
    "indexer_types",
    "intermediate_size",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
}
"""Config lists with one entry per block; architectures.yaml can name more."""
INDEXES = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
"""Config lists of the indexes of blocks."""
LEADING = {
    "first_k_dense_replace": ("mlp_layer_types", "dense"),
    "num_dense_layers": ("mlp_layer_types", "dense"),
    "max_window_layers": ("layer_types", "full_attention"),
}
"""Config keys that count the first blocks of a kind -> the list that rules instead where there is one, and
the name of that kind in it."""
FIRST_EXPERTS, LAST_EXPERTS = "moe_layer_start_index", "moe_layer_end_index"
"""Config keys of the first and the last block with experts (Ernie 4.5)."""
EMBEDDED_WIDTH = "hidden_size_per_layer_input"
"""Config key of a width, above 0 where one tensor has an embedding of each token for each block (Gemma 3n,
the small models of Gemma 4)."""
OF_TOKENS = ("_token_id", "_token_ids")
"""Ends of the keys of lists that have nothing to do with blocks."""
OWN_INDEX = {"layer_idx", "layer_id", "layer_number", "layer_index"}
"""Attributes of modules by which a block finds its cache."""

Layers = Sequence[int | None]


def cut_config(config: "PreTrainedConfig", layers: Layers) -> "PreTrainedConfig":
    """Return a copy of `config` with the blocks `layers` (None: a new one, as the source's of its place).

    Raises UserError where a fact about the blocks cannot be cut."""
    table, raw = find_architecture(config), config.to_dict()
    n = raw[table.layers] = len(layers)
    last = getattr(config, table.layers) - 1
    kept = [min(i, last) if layer is None else layer for i, layer in enumerate(layers)]
    is_whole = kept == list(range(last + 1))
    if raw.get(EMBEDDED_WIDTH) and not is_whole:
        raise UserError(
            f"a {config.model_type} with {EMBEDDED_WIDTH} above 0 cannot be cut: it has an embedding of each "
            f"token for each layer, all in one tensor; take a model without it"
        )
    for key, value in raw.items():
        if key in INDEXES and isinstance(value, list | tuple):
            raw[key] = [i for i, layer in enumerate(kept) if layer in value]
        elif not (isinstance(value, list | tuple) and len(value) == last + 1) or is_whole:
            continue
        elif key in PER_LAYER or key in table.per_layer:
            raw[key] = [value[layer] for layer in kept]
        elif key != "architectures" and not key.endswith(OF_TOKENS):
            raise UserError(
                f"config.json of the source has {key}, a list of {last + 1} entries, as many as there are "
                f"layers, and it is not known whether they belong to the layers; if so, name it under "
                f"per_layer of {config.model_type} in inheritune/models/architectures.yaml"
            )
    _cut_sparse_step(raw, kept)
    _cut_counts(raw, kept)
    _cut_expert_range(raw, kept)
    if raw.get("attention_types") and raw.get("attention_layers"):  # GPT-Neo states them twice
        raw["attention_types"] = [[raw["attention_layers"], 1]]
    try:
        return type(config).from_dict(raw)
    except Exception as error:  # transformers raises many kinds for values that do not go together
        if is_machine_limit(error):
            raise
        raise UserError(
            f"{config.model_type} has no model of the {n} layers {kept}: {' '.join(str(error).split())[:300]}"
        ) from None


def _cut_sparse_step(raw: dict[str, Any], kept: Sequence[int]) -> None:
    """Turn `decoder_sparse_step` (each so many blocks have experts) into a list of those without."""
    step = raw.get("decoder_sparse_step")
    if step and step > 1 and isinstance(raw.get("mlp_only_layers"), list | tuple):
        dense = [i for i, layer in enumerate(kept) if (layer + 1) % step]
        raw["mlp_only_layers"] = sorted({*raw["mlp_only_layers"], *dense})
        raw["decoder_sparse_step"] = 1


def _cut_expert_range(raw: dict[str, Any], kept: Sequence[int]) -> None:
    """Name the first and the last block with experts anew.

    Where each so many blocks have experts, or those of `kept` do not follow each other, `check_blocks` finds
    that a block has changed its kind."""
    first, end = raw.get(FIRST_EXPERTS), raw.get(LAST_EXPERTS)
    if not isinstance(first, int) or not isinstance(end, int) or raw.get("moe_layer_interval", 1) != 1:
        return
    sparse = [i for i, layer in enumerate(kept) if first <= layer <= end]
    raw[FIRST_EXPERTS], raw[LAST_EXPERTS] = (sparse[0], sparse[-1]) if sparse else (len(kept), len(kept))


def _cut_counts(raw: dict[str, Any], kept: Sequence[int]) -> None:
    """Count the first blocks anew. Raises UserError where the blocks of the kind are no longer the first."""
    for key, (ruling, kind) in LEADING.items():
        count = raw.get(key)
        if not isinstance(count, int):
            continue
        rules = isinstance(raw.get(ruling), list)
        is_kind = [entry == kind for entry in raw[ruling]] if rules else [layer < count for layer in kept]
        first = next((i for i, flag in enumerate(is_kind) if not flag), len(is_kind))
        if any(is_kind[first:]) and not rules:
            raise UserError(
                f"the source's first {count} layers are of another kind ({key}), and among the layers "
                f"{list(kept)} they are not the first; choose layers so that they come first"
            )
        raw[key] = first


# --- what transformers builds -------------------------------------------------------------------------------


def _describe_block(block: "torch.nn.Module") -> dict[str, object]:
    """Return what tells a block from another: kinds of modules, shapes of tensors, plain attributes."""
    found: dict[str, object] = {n: tuple(tensor.shape) for n, tensor in block.state_dict().items()}
    for name, module in block.named_modules():
        found[f"{name} (kind)"] = type(module).__name__
        for key, value in vars(module).items():
            if key[0] != "_" and key not in OWN_INDEX and isinstance(value, bool | int | float | str | None):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


def _describe_blocks(config: "PreTrainedConfig", table: Architecture) -> list[dict[str, object]]:
    """Return `_describe_block` of each block of a model of `config`.

    Raises UserError if transformers builds no such model."""
    try:
        model = build_meta_model(config)
    except Exception as error:  # transformers raises many kinds for blocks that do not go together
        if is_machine_limit(error):
            raise
        raise UserError(
            f"{config.model_type} has no model of these {getattr(config, table.layers)} layers: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    return [_describe_block(block) for block in table.get_blocks(model)]


def check_blocks(source: "PreTrainedConfig", cut: "PreTrainedConfig", layers: Layers) -> None:
    """Raise UserError unless each block of `cut` is built as the block of `source` that it is a copy of.

    The one exception is the scaling by the block's index, which the manifest describes."""
    if isinstance(source, PlainConfig):  # whose blocks are all alike, but for that scaling
        return
    table = find_architecture(source)
    before, after = _describe_blocks(source, table), _describe_blocks(cut, table)
    is_scaled = getattr(source, "scale_attn_by_inverse_layer_idx", False)
    for i, layer in enumerate(layers):
        if layer is None:
            continue
        old, new = before[layer], after[i]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and not (is_scaled and key.endswith(".scaling")):
                raise UserError(
                    f"layer {layer} of the source cannot become layer {i}: {source.model_type} builds it "
                    f"otherwise there ({key}: {old.get(key)}, then {new.get(key)}); choose layers that keep "
                    f"their kind"
                )
