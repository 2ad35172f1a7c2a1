"""Models that transformers builds from a configuration: their tensors, parameter and FLOP counts.

The paper's GPT-2 (its Table 6) is a plain Hugging Face GPT-2 with `scale_attn_by_inverse_layer_idx` and
with biases held at zero. Its config carries `frozen_zero_biases`, which every slice of it inherits. A public
GPT-2 lacks this key and keeps its trainable biases and standard scaling.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune.config.source_shape import find_config
from inheritune.errors import UserError, is_machine_limit
from inheritune.models.architectures import Shape, find_architecture, find_depth_key
from inheritune.models.config_files import load_config
from inheritune.models.plain_configs import PlainConfig
from inheritune.models.sizes import compute_flops_per_token

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from inheritune.config.sections import Model

# --- configurations -----------------------------------------------------------------------------------------


def build_config(model: Model, layers: int | None = None) -> PreTrainedConfig:
    """Return the transformers configuration of `model`, `layers` blocks deep (default: the reference's).

    Raises UserError if `model` has the shape of another one that has fewer blocks."""
    from transformers import GPT2Config, LlamaConfig

    layers = layers or model.layers
    if model.from_:
        return _cut_source_config(model, layers)
    if model.family == "gpt2":
        own: dict[str, Any] = {"frozen_zero_biases": True}  # our key, unknown to transformers
        return GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.positions,
            n_embd=model.width,
            n_layer=layers,
            n_head=model.heads,
            n_inner=model.mlp_width,
            activation_function="gelu_new",
            layer_norm_epsilon=model.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=model.tied_head,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            architectures=["GPT2LMHeadModel"],
            **own,
        )
    return LlamaConfig(
        vocab_size=model.vocab_size,
        max_position_embeddings=model.positions,
        hidden_size=model.width,
        num_hidden_layers=layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        intermediate_size=model.mlp_width,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tied_head,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        architectures=["LlamaForCausalLM"],
    )


def _cut_source_config(model: Model, layers: int) -> PreTrainedConfig:
    """Return the configuration of the model that `model` has its shape from, with its first `layers`
    blocks."""
    from inheritune.models.layer_facts import cut_config  # which builds models too

    config = load_config(find_config(str(model.from_), model.revision))
    depth = getattr(config, find_depth_key(config.model_type))
    if layers > depth:
        raise UserError(f"{layers} layers were asked for, and {model.from_} has {depth}; ask for fewer")
    return cut_config(config, range(layers))


DROPOUT_RATES = re.compile(r"^(?!summary_|classifier_|seq_|qa_).*(drop|jitter)")
"""Config keys of dropout rates. Those of heads that are not a language model's are left out: nothing here
uses them."""


def clear_dropout(config: PreTrainedConfig) -> dict[str, float]:
    """Set the dropout rates of `config`, and of the configs nested in it, to 0; return those that were not.

    The paper trains without dropout, and so does every run: a loss must not depend on how ranks draw random
    numbers. A source can have rates of its own: transformers gives a GPT-2 0.1 where its config is silent."""
    cleared: dict[str, float] = {}
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            cleared |= {f"{key}.{inner}": rate for inner, rate in clear_dropout(value).items()}
        elif DROPOUT_RATES.search(key) and type(value) in (int, float) and value:
            cleared[key] = value
            setattr(config, key, 0.0)
    return cleared


# --- models -------------------------------------------------------------------------------------------------


def build_model(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """Build a model of `config` in fp32 with uninitialized weights, biases frozen where the config says so.

    It is built on the current default device; inside `deepspeed.zero.Init` its parameters are partitioned as
    they are made. `attention` is transformers' name of an implementation; None is SDPA, where the family has
    it (Gemma 2 and Bloom do not)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    find_depth_key(config.model_type)  # raises UserError for an unknown family
    config = copy.deepcopy(config)  # from_config writes the attention implementation into its argument
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.tie_weights()
    if getattr(config, "frozen_zero_biases", False):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.requires_grad_(False)
    return model


CAUSAL_ATTENTION = "inheritune_causal"
"""Name under which `find_training_attention` makes its implementation known to transformers."""


def find_training_attention(config: PreTrainedConfig) -> str | None:
    """Return the attention for batches without padding: SDPA that is only told `is_causal`; None where the
    family has no SDPA, or layers that see a window of the past only.

    It has the kernels and bits of transformers' own choice. That one looks in each forward for several texts
    in one sequence, and the host waits for the GPU's answer."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kinds_of_layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_windowed = getattr(config, "sliding_window", None) or kinds_of_layers != {"full_attention"}
    if is_windowed or not (kind._supports_sdpa and kind._supports_attention_backend):
        return None

    def attend(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        factor = getattr(module, "query_factor", None)  # set where blocks are compiled
        return sdpa_attention_forward(module, query if factor is None else query * factor, *rest, **options)

    AttentionInterface.register(CAUSAL_ATTENTION, attend)  # and no mask function: no mask
    return CAUSAL_ATTENTION


def build_meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model of `config` on device meta: shapes without data."""
    import torch

    with torch.device("meta"):
        return build_model(config)


def fuse_gelu(model: torch.nn.Module) -> None:
    """Compute GELU (gelu_new) with one kernel instead of the operations that transformers writes out.

    The function is the same to rounding (1e-7 in fp32). It is faster and keeps two tensors for backward
    instead of five."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is NewGELUActivation:
                setattr(parent, name, GELUTanh())


def takes_token_types(config: PreTrainedConfig) -> bool:
    """Return whether the family's model takes token_type_ids, as GPT-2 does to add an embedding for each."""
    if isinstance(config, PlainConfig):
        return config.takes_token_types
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "token_type_ids" in inspect.signature(kind.forward).parameters


# --- their tensors ------------------------------------------------------------------------------------------


def list_saved_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of what a checkpoint of `model` holds: parameters, a tied one once, and buffers.

    Only persistent buffers are meant, such as the correction of DeepSeek's router, which no gradient reaches
    (`e_score_correction_bias`). Under ZeRO 3 they are whole on every rank."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: own[name] for name in model.state_dict() if name in own}


def list_model_shapes(config: PreTrainedConfig, where: str | Path = "the config") -> dict[str, Shape]:
    """Return {name: shape} of every tensor of a model of `config`, in the model's order and by its names.

    A tied head is left out. Raises UserError (naming `where`) if no model can be built from the config."""
    if isinstance(config, PlainConfig):
        return config.list_shapes()
    try:
        state = build_meta_model(config).state_dict()
    except Exception as error:  # transformers and torch raise many kinds for numbers that make no model
        if is_machine_limit(error):
            raise
        raise UserError(
            f"{where} describes no possible model: {' '.join(str(error).split())[:300]}"
        ) from None
    table = find_architecture(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if not config.tie_word_embeddings:
        return shapes
    return {
        name: shape for name, shape in shapes.items() if table.head not in table.in_checkpoint(name, shape)
    }


def list_checkpoint_shapes(config: PreTrainedConfig, where: str | Path = "the config") -> dict[str, Shape]:
    """Return {name: shape} of every tensor of a checkpoint of `config`, in the model's order.

    A tied head is left out. Raises UserError as `list_model_shapes` does."""
    table, shapes = find_architecture(config), list_model_shapes(config, where)
    return {
        piece: piece_shape
        for name, shape in shapes.items()
        for piece, piece_shape in table.in_checkpoint(name, shape).items()
    }


def find_linear_weights(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return {name: parameter} of the weights that are decayed: the matrices that multiply activations.

    A head tied to the embedding is left out (as in nanoGPT, embeddings, the tied head and norms are not
    decayed)."""
    import torch

    embedding = model.get_input_embeddings().weight
    return {
        f"{name}.{key}": weight
        for name, module in model.named_modules()
        if not isinstance(module, torch.nn.Embedding)
        and "Norm" not in type(module).__name__  # Cohere's norms are matrices too
        for key, weight in module.named_parameters(recurse=False)
        if len(getattr(weight, "ds_shape", weight.shape)) > 1  # ZeRO 3 leaves weights flat
        and weight is not embedding
    }


def count_parameters(config: PreTrainedConfig) -> int:
    """Return the number of trainable parameters: a tied head counted once, biases held at zero not counted.

    This is the count of the paper's Table 6."""
    return count_trained(build_meta_model(config))


def count_trained(network: torch.nn.Module) -> int:
    """Return what `count_parameters` does, of a model that is built already."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def count_flops_per_token(config: PreTrainedConfig, sequence_length: int) -> float:
    """Return the training FLOPs per token of a model of `config`, by sizes.compute_flops_per_token."""
    model = build_meta_model(config)
    # A token passes through some of the experts only, the first dimension of their weights.
    chosen = getattr(config, "num_experts_per_tok", 1)
    matrices = sum(
        p.numel() * (min(1.0, chosen / p.shape[0]) if ".experts." in name else 1.0)
        for name, p in find_linear_weights(model).items()
    )
    if config.tie_word_embeddings:  # find_linear_weights leaves the tied head to the embedding
        matrices += model.get_output_embeddings().weight.numel()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return compute_flops_per_token(matrices, config.num_hidden_layers, width, sequence_length)
