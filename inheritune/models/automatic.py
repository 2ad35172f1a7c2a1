"""Rows of the architecture table for families that it lacks, read off a model on device meta.

Such a row places the blocks, the embedding and the head, which is what a plain cut needs: the numbered
tensors of the one module list that has as many entries as the config has layers (as mergekit's automatic
architecture finds them). Parts, modules and fresh starts need a row of architectures.yaml.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from inheritune.errors import UserError, is_machine_limit
from inheritune.models.networks import build_meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HOW_TO = "describe it in inheritune/models/architectures.yaml, a few lines: docs/new_architecture.md"


def find_depth_key(model_type: str) -> str:
    """Return the config key of the depth of a family that transformers has (its own name for it).

    Raises UserError for a family that has no causal language model in transformers."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model family '{model_type}' has no causal language model in the installed transformers; use a "
            f"newer transformers, or a model of a family that it has"
        )
    named: dict[str, str] = CONFIG_MAPPING[model_type].attribute_map
    return named.get("num_hidden_layers", "num_hidden_layers")


@cache
def _describe(key: str) -> dict[str, Any]:
    """Return `detect_row` of the config with the JSON `key`: a model is built once for each."""
    import json

    from transformers import CONFIG_MAPPING

    raw = json.loads(key)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    try:
        model = build_meta_model(config)
    except Exception as error:  # transformers and torch raise many kinds for numbers that make no model
        if is_machine_limit(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the config describes no possible model: {reason}") from None
    return _read_row(model, getattr(config, "num_hidden_layers", 0))


def detect_row(config: "PreTrainedConfig") -> dict[str, Any]:
    """Return the row (as in architectures.yaml) of a family that transformers has and the table lacks.

    Raises UserError where no or several module lists could be the blocks, for an encoder, and where the
    checkpoint's tensors cannot be laid out as the model's."""
    key = find_depth_key(config.model_type)
    if config.to_dict().get("is_decoder") is False:
        raise UserError(
            f"'{config.model_type}' is an encoder (is_decoder is false); only decoders can be sliced"
        )
    row = _describe(config.to_json_string(use_diff=False))
    return {**row, "layers": key}


def _read_row(model: "PreTrainedModel", depth: int) -> dict[str, Any]:
    """Return the row of `model`, which has `depth` blocks, but for the config key of the depth."""
    family = model.config.model_type
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == depth
        and not any(part.isdigit() for part in name.split("."))
    ]
    if len(lists) != 1:
        found = "no list" if not lists else f"{len(lists)} lists ({', '.join(lists[:3])})"
        raise UserError(
            f"model family '{family}' is not in the architecture table, and {found} of {depth} blocks was "
            f"found in it: {HOW_TO}"
        )
    block = f"{lists[0]}.{{i}}."
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if head is None or id(embedding) not in names:
        raise UserError(f"model family '{family}' has no head over its tokens: {HOW_TO}")
    prefix, of_head = model.base_model_prefix, f"{names[id(head)]}."
    outside = [name for name in model.state_dict() if not name.startswith(f"{lists[0]}.")]
    first = f"{of_head}weight"
    return {
        "base_prefix": f"{prefix}." if prefix and block.startswith(f"{prefix}.") else "",
        "block": block,
        "parts": {
            "token_embedding": [f"{names[id(embedding)]}.weight"],
            "head": [first, *(name for name in outside if name.startswith(of_head) and name != first)],
            "others": [name for name in outside if not name.startswith(of_head)],
        },
        "modules": {},
        "published": _find_published(model, lists[0] + "."),
        "automatic": True,
    }


def _find_published(model: "PreTrainedModel", blocks: str) -> dict[str, list[str]]:
    """Return `published` of the row: the model's name of a tensor -> its names in checkpoints.

    transformers itself lays out a small numbered tensor under each name as it would save it; what the row can
    say is that the pieces follow each other in the model's tensor. Raises UserError for any other layout."""
    from transformers.core_model_loading import revert_weight_conversion

    published: dict[str, list[str]] = {}
    for name, tensor in model.state_dict().items():
        inside = name.removeprefix(blocks).partition(".")[2] if name.startswith(blocks) else name
        if inside in published:
            continue
        block = name.removesuffix(inside)
        shape = {0: (), 1: (4,), 2: (4, 3)}.get(tensor.dim(), (2, 4, *[3] * (tensor.dim() - 2)))
        numbered = torch.arange(float(torch.Size(shape).numel())).view(shape)
        try:
            pieces = revert_weight_conversion(model, {name: numbered})
        except Exception:  # a conversion that needs several tensors at once, raising whatever it does
            pieces = {}
        names = sorted(pieces, key=lambda piece: float(pieces[piece].flatten()[0]))
        found = _generalize(names, block)
        whole = torch.cat([pieces[piece].flatten() for piece in names]) if names else numbered[:0]
        if found is None or not torch.equal(whole, numbered.flatten()):
            raise UserError(
                f"model family '{model.config.model_type}' is not in the architecture table, and its "
                f"checkpoints lay out {name} otherwise than its model: {HOW_TO}"
            )
        if found != [inside]:
            published[inside] = found
    return published


def _generalize(names: list[str], block: str) -> list[str] | None:
    """Return `names` of a tensor's pieces inside `block` with {e} for the number of an expert, None if they
    have no such form."""
    if not names or not all(name.startswith(block) for name in names):
        return None
    inside = [name.removeprefix(block) for name in names]
    if len(inside) == 1:
        return inside
    first = [name.replace(".experts.0.", ".experts.{e}.") for name in inside[: len(inside) // 2]]
    again = [name.format(e=e) for e in (0, 1) for name in first]
    return first if "{e}" in first[0] and again == inside else None
