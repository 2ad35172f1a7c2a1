"""Surgery: new checkpoints made of blocks of old ones, tensor by tensor, as the architecture table describes.

- `inherit` keeps chosen blocks of a source (paper, section 3), also doubled (stacking) or placed among random
  blocks.
- `halve_width` keeps all of them at half the width.
- `extend_model` adds blocks of the reference to a model trained before (growth with `from: previous`).
- `write_random` writes the random start.

Each decides for every tensor of the target where it comes from; targets.py writes an ordinary Hugging Face
checkpoint from that. Sources are only read.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from inheritune.config.layers import parse_layers, place_layers
from inheritune.config.run import MODULES, NORMS, PARTS
from inheritune.data.tokenizer_files import check_embedding
from inheritune.errors import UserError, suggest_name
from inheritune.models.architectures import find_architecture
from inheritune.models.config_files import drop_older_keys
from inheritune.models.dtypes import FP32, STORED_AS, Dtype
from inheritune.models.layer_facts import INDEXES, LEADING, PER_LAYER, check_blocks, cut_config
from inheritune.models.networks import list_checkpoint_shapes
from inheritune.models.sizes import halve_heads, scale_width
from inheritune.models.sources import Source, open_source
from inheritune.models.targets import Origin, write_target

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def inherit(
    source: str | Path,
    layers: str | Sequence[int],
    out: str | Path,
    parts: Sequence[str] = PARTS,
    modules: Sequence[str] = MODULES,
    seed: int = 0,
    revision: str | None = None,
    depth: int | None = None,
    at: int = 0,
    copies: int = 1,
    dtype: str | None = None,
) -> dict:
    """Write the blocks `layers` of `source` (a folder or a Hub id) to `out`; returns the manifest.

    They become the target's blocks from index `at` on, of `depth` in all (default: up to the last of them).
    `copies` repeats them, one copy after the other. `parts` names what is copied, and `modules` limits it
    inside the blocks; the rest is that of the random model of this depth and `seed`. A tied head is one
    tensor with the token embedding, copied if either is named. Every tensor keeps the source's dtype (fp32
    for a DeepSpeed checkpoint), or has `dtype` (fp32, bf16 or fp16). Running it again changes nothing.

    Raises UserError for unknown names, layers out of range, a source that cannot be used, an `out` that holds
    something else, and a full disk; then nothing is written."""
    parts, modules = _order_names(parts, PARTS, "parts"), _order_names(modules, MODULES + NORMS, "modules")
    if dtype is not None and dtype not in STORED_AS:
        raise UserError(f"inherit: unknown dtype '{dtype}'; {suggest_name(dtype, STORED_AS)}")
    is_whole = set(parts) == set(PARTS) and set(modules) >= set(MODULES)
    plain = is_whole and dtype is None and depth is None and at == 0
    opened = open_source(source, revision, plain=plain)
    table, n_source = opened.table, getattr(opened.config, opened.table.layers)
    for name in modules:
        if name in NORMS and name not in table.modules:
            raise UserError(
                f"modules: in a block of {table.name} one norm serves attention and MLP, so name norms, not "
                f"{name}"
            )
    beside = opened.config_path.parent
    check_embedding(beside, opened.config.vocab_size)
    once = parse_layers(layers if isinstance(layers, str) else list(layers), n_source)
    indices = place_layers(once * copies, n_source, depth, at)
    config = cut_config(opened.config, indices)
    check_blocks(opened.config, config, indices)
    stored_as = STORED_AS[dtype] if dtype else None
    origins = _inherit_origins(opened, config, indices, once[0], parts, modules, stored_as)
    about = {
        "kind": "inherit" if copies == 1 else "stack",
        **_identify_source(opened),
        "layers": indices,
        "parts": parts,
        "modules": modules,
        "seed": seed,
        "tied_head": bool(opened.config.tie_word_embeddings),
        "moved_blocks": _describe_moves(config, indices),
        **({"dtype": dtype} if dtype else {}),
    }
    return write_target(out, config, origins, about, seed, beside)


def _inherit_origins(
    source: Source,
    config: "PreTrainedConfig",
    layers: Sequence[int | None],
    template: int,
    parts: Sequence[str],
    modules: Sequence[str],
    dtype: Dtype | None,
) -> dict[str, Origin]:
    """Return the origin of every tensor of `config`, whose blocks are `layers` of the source (None: random).

    Tensors are stored in `dtype`, by default in the source's; random blocks then have the dtypes of the
    source's block `template`."""
    table, origins = source.table, {}
    is_plain = set(parts) == set(PARTS) and set(modules) >= set(MODULES) and None not in layers
    for name in list_checkpoint_shapes(config):
        is_copied = is_plain
        if not is_plain:
            part, module = table.part_of(name)
            is_copied = part in parts and (
                module is None or module in modules or (module in NORMS and "norms" in modules)
            )
        if source.config.tie_word_embeddings and name == table.embedding and "head" in parts:
            is_copied = True
        inside, source_name = table.split_name(name), name
        if inside is not None:
            layer = layers[inside[0]]
            is_copied = is_copied and layer is not None
            source_name = table.block.format(i=template if layer is None else layer) + inside[1]
        stored_as = dtype or source.dtype(source_name)
        origins[name] = Origin(stored_as, source, source_name) if is_copied else Origin(stored_as)
    return origins


def halve_width(source: str | Path, out: str | Path, revision: str | None = None) -> dict:
    """Write all blocks of `source` at half its heads and half its width (`halve_config`) to `out`.

    Of every tensor the first rows and columns are kept: of queries, keys and values those of the first half
    of the heads, of embeddings, norms and projections those of the first half of the width. Returns the
    manifest. Raises UserError as `inherit` does."""
    opened = open_source(source, revision)
    config = halve_config(opened.config)
    origins = {
        name: Origin(opened.dtype(name), opened, name, 3 if ".attn.c_attn." in name else 1)
        for name in list_checkpoint_shapes(config)
    }
    layers = list(range(getattr(config, opened.table.layers)))
    about = {
        "kind": "half_width",
        **_identify_source(opened),
        "layers": layers,
        "heads": config.num_attention_heads,
        "width": config.hidden_size,
        "moved_blocks": _describe_moves(config, layers),
    }
    return write_target(out, config, origins, about, beside=opened.config_path.parent)


def extend_model(
    previous: str | Path,
    reference: str | Path,
    layers_from: int,
    layers_to: int,
    out: str | Path,
    revision: str | None = None,
) -> dict:
    """Write `previous` (of `layers_from` blocks), followed by blocks of `reference`, to `out`. `revision`:
    the Hub's commit of `reference`.

    These are the blocks [layers_from, layers_to), in `previous`'s dtype. Embeddings, final norm and head are
    `previous`'s. Returns the manifest. Raises UserError if the two models differ in more than depth, and as
    `inherit` does."""
    old, new = open_source(previous), open_source(reference, revision)
    if old.config.model_type != new.config.model_type:
        raise UserError(
            f"{previous} is a {old.config.model_type} and {reference} a {new.config.model_type}: they cannot "
            f"be joined"
        )
    n_old, n_new = getattr(old.config, old.table.layers), getattr(new.config, new.table.layers)
    if n_old != layers_from:
        raise UserError(
            f"{previous} has {n_old} layers, not {layers_from}; give the stage that is to be extended"
        )
    if not layers_from < layers_to <= n_new:
        raise UserError(f"cannot extend {layers_from} layers to {layers_to}: {reference} has {n_new}")
    _check_joinable(old, new, previous, reference)
    config = cut_config(new.config, range(layers_to))
    check_blocks(new.config, config, range(layers_to))
    origins = {}
    for name in list_checkpoint_shapes(config):
        inside = old.table.split_name(name)
        source = old if inside is None or inside[0] < layers_from else new
        origins[name] = Origin(old.dtype(old.table.embedding), source, name)
    about = {
        "kind": "extend",
        "previous": _identify_source(old),
        "reference": _identify_source(new),
        "layers": list(range(layers_to)),
        "layers_from": layers_from,
        "moved_blocks": _describe_moves(config, range(layers_to)),
    }
    return write_target(out, config, origins, about, beside=old.config_path.parent)


def write_random(config: "PreTrainedConfig", out: str | Path, seed: int = 0) -> dict:
    """Write the random start of `config` to `out`: every tensor fresh, fp32; returns the manifest.

    Raises UserError as `inherit` does."""
    origins = {name: Origin(FP32) for name in list_checkpoint_shapes(config)}
    described = {key: value for key, value in config.to_dict().items() if key not in INCIDENTAL}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True, default=str).encode())
    about = {
        "kind": "random",
        "config": digest,
        "layers": getattr(config, find_architecture(config).layers),
        "seed": seed,
    }
    return write_target(out, config, origins, about, seed)


# --- configurations -----------------------------------------------------------------------------------------

INCIDENTAL = ("dtype", "architectures", "transformers_version", "_name_or_path", "use_cache")
"""Config keys that say nothing about what the model computes."""
MLP_WIDTH = {"gpt2": "n_inner", "llama": "intermediate_size"}
"""Families that can be halved, and the config key of the width of their MLP."""


def halve_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return a copy of `config` with half the heads, and width and MLP scaled down in the same proportion.

    Each head keeps its width. Of an odd number of heads the smaller half is kept: of GPT-2 XL's 25 heads of
    64, width 1600, these are 12, width 768. Raises UserError for a family other than GPT-2 and Llama, and for
    a single head of keys and values."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    if config.model_type not in MLP_WIDTH or kv_heads < 2:
        what = f"family {config.model_type} with {kv_heads} key and value head(s)"
        raise UserError(
            f"half width can be cut from gpt2 and llama models with at least 2 heads, not from {what}"
        )
    half, mlp_key = copy.deepcopy(config), MLP_WIDTH[config.model_type]
    kept, kept_kv = halve_heads(heads, kv_heads)
    half.num_attention_heads, half.hidden_size = kept, scale_width(config.hidden_size, kept, heads)
    if hasattr(config, "num_key_value_heads"):
        half.num_key_value_heads = kept_kv
    if (mlp_width := getattr(config, mlp_key)) is not None:
        setattr(half, mlp_key, scale_width(mlp_width, kept, heads))
    return half


# --- manifests ----------------------------------------------------------------------------------------------


def _identify_source(source: Source) -> dict:
    """Return what distinguishes a source from another one, and from itself after it was written anew."""
    return {
        "source": source.origin,
        "revision": source.revision,
        "source_kind": source.kind,
        "source_config": source.config_hash,
        "source_files": source.files(),
    }


def _describe_moves(config: "PreTrainedConfig", layers: Sequence[int | None]) -> dict:
    """Return which blocks compute something else than in the source because their index changed."""
    moved = [{"block": i, "source_block": layer} for i, layer in enumerate(layers) if layer not in (i, None)]
    if not getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return {
            "changed": False,
            "blocks": [],
            "meaning": "a block computes the same at any index of this model",
        }
    meaning = "every block keeps its index and computes what it did in the source"
    if moved:
        meaning = (
            "attention logits are divided by (index + 1), so these blocks attend otherwise than they did in "
            "the source"
        )
    return {"changed": bool(moved), "blocks": moved, "meaning": meaning}


# --- checks -------------------------------------------------------------------------------------------------


def _order_names(names: str | Sequence[str], valid: Sequence[str], what: str) -> list[str]:
    """Return `names` in the order of `valid`. Raises UserError for an unknown one and for none."""
    given = names.split(",") if isinstance(names, str) else list(names)
    for name in given:
        if name not in valid:
            raise UserError(f"{what}: unknown name '{name}'; {suggest_name(name, valid)}")
    if not given:
        raise UserError(f"{what} is empty, so nothing would be copied; leave it out to copy everything")
    return [name for name in valid if name in given]


def _check_joinable(old: Source, new: Source, previous: str | Path, reference: str | Path) -> None:
    """Raise UserError if the configs of the sources `previous` and `reference` differ in more than depth."""
    ignored = {old.table.layers, *old.table.per_layer, *PER_LAYER, *INDEXES, *LEADING, *INCIDENTAL}
    before, after = drop_older_keys(old.config.to_dict()), drop_older_keys(new.config.to_dict())
    for key in sorted((before.keys() | after.keys()) - ignored):
        if before.get(key) != after.get(key):
            raise UserError(
                f"{previous} and {reference} differ in {key} ({before.get(key)} and {after.get(key)}), so "
                f"they cannot be joined"
            )
