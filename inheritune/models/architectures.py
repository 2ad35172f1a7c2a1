"""Models: Hugging Face GPT-2 and Llama configurations of the paper's shapes, the architecture table, counts
and FLOPs.

The paper's GPT-2 (FACTS section 4) is a plain HF GPT-2 with `scale_attn_by_inverse_layer_idx` and with biases
held at zero: its config carries `frozen_zero_biases`, which every slice of it inherits. A public GPT-2 lacks
the mark and keeps its trainable biases and standard scaling.
"""

import copy
import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xxhash
import yaml

from inheritune.config.experiment import Model
from inheritune.errors import UserError
from inheritune.files import rundir
from inheritune.models import config_files as portable

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
    buffers: list[str] = field(default_factory=list)
    published: dict[str, list[str]] = field(default_factory=dict)
    per_layer: list[str] = field(default_factory=lambda: ["layer_types"])

    @property
    def embedding(self) -> str:
        """Name of the token embedding's matrix."""
        return self.parts["token_embedding"][0]

    @property
    def head(self) -> str:
        """Name of the head's matrix, which is the token embedding's where the head is tied."""
        return self.parts["head"][0]

    def split_name(self, name: str) -> tuple[int, str] | None:
        """(block index, name inside the block) of a tensor, or None for one outside the blocks."""
        prefix, suffix = self.block.split("{i}")
        if not name.startswith(prefix):
            return None
        index, _, rest = name[len(prefix) :].partition(suffix)
        return int(index), rest

    def in_checkpoint(self, name: str, shape: Shape) -> dict[str, Shape]:
        """{name: shape} of the checkpoint's tensors that the model's tensor `name` of `shape` is made of; one
        after the other, their elements are its elements."""
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
        """(part, module) that a tensor belongs to, e.g. ('blocks', 'attn') or ('head', None).

        Raises UserError for a tensor that the table does not place."""
        inside = self.split_name(name)
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


MAX_LAYERS = 10_000  # of a config that is read; far above any model
_TABLE = yaml.safe_load((Path(__file__).parent / "architectures.yaml").read_text(encoding="utf-8"))


def architecture(model_type: str) -> Architecture:
    """The table's row for a config's model_type. Raises UserError with the known families."""
    if model_type not in _TABLE:
        raise UserError(
            f"model family '{model_type}' is not in the architecture table; known: "
            f"{', '.join(sorted(_TABLE))}; "
            f"to add one, describe its tensor names in inheritune/models/architectures.yaml, a few lines: "
            f"README, 'Another "
            f"family'"
        )
    return Architecture(name=model_type, **_TABLE[model_type])


def hf_config(model: Model, layers: int | None = None):
    """Hugging Face configuration of `model`, `layers` blocks deep (default: the reference's depth)."""
    from transformers import GPT2Config, LlamaConfig

    layers = layers or model.layers
    if model.family == "gpt2":
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
            frozen_zero_biases=True,
            architectures=["GPT2LMHeadModel"],
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


RATES = re.compile(r"^(?!summary_|classifier_|seq_|qa_).*(drop|jitter)")


def clear_dropout(config) -> dict[str, float]:
    """Set the dropout rates of `config`, and of what it nests, to 0.  -> {key: rate} of those that were not

    The paper trains without dropout, and so does every run: a loss must not depend on how ranks draw numbers.
    A source brings rates of its own (transformers gives a GPT-2 0.1 where its config says nothing). Those of
    heads that are not a language model's stay: nothing here uses them."""
    cleared = {}
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            cleared |= {f"{key}.{inner}": rate for inner, rate in clear_dropout(value).items()}
        elif RATES.search(key) and type(value) in (int, float) and value:
            cleared[key] = value
            setattr(config, key, 0.0)
    return cleared


def build(config, attention: str | None = None) -> torch.nn.Module:
    """A model of `config` in fp32 whose weights are not initialized yet, biases frozen where the config says
    so.

    Built on the current default device; inside `deepspeed.zero.Init` its parameters are partitioned as they
    are made. attention: transformers' name of an implementation; None is SDPA, where the family has it (Gemma
    2 and Bloom do not)."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    architecture(config.model_type)
    config = copy.deepcopy(config)  # from_config writes the attention kind into the object that it is given
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.tie_weights()
    if getattr(config, "frozen_zero_biases", False):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.requires_grad_(False)
    return model


def fuse_gelu(model: torch.nn.Module) -> None:
    """Let one kernel compute the GELU that transformers writes out (gelu_new): the same function to rounding
    (1e-7 in fp32), faster, and it keeps two tensors for backward instead of five."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is NewGELUActivation:
                setattr(parent, name, GELUTanh())


def model_shapes(config, where="the config") -> dict[str, Shape]:
    """{name: shape} of every tensor of a model of `config`, in its order and under its names; a tied head is
    left out.

    Raises UserError (naming `where`) if no model can be built from the config."""
    try:
        with torch.device("meta"):
            state = build(config).state_dict()
    except Exception as error:  # transformers and torch raise many kinds for numbers that make no model
        raise UserError(
            f"{where} describes no possible model: {' '.join(str(error).split())[:300]}"
        ) from None
    table = architecture(config.model_type)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config.tie_word_embeddings:
        shapes = {
            name: shape
            for name, shape in shapes.items()
            if table.head not in table.in_checkpoint(name, shape)
        }
    return shapes


def tensor_shapes(config, where="the config") -> dict[str, Shape]:
    """{name: shape} of every tensor of a checkpoint of `config`, in the model's order; a tied head is left
    out.

    Raises UserError as `model_shapes` does."""
    table, shapes = architecture(config.model_type), model_shapes(config, where)
    return {
        piece: its
        for name, shape in shapes.items()
        for piece, its in table.in_checkpoint(name, shape).items()
    }


def load_config(path: Path):
    """The transformers configuration in `path`, by the classes of transformers alone (code beside it is never
    run).

    Raises UserError for a family outside the architecture table and for a model that is quantized, an
    encoder-decoder, or of a class that transformers does not have."""
    import transformers
    from transformers import CONFIG_MAPPING

    raw = rundir.read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UserError(f"{path} names no 'model_type'; it is not a Hugging Face model config")
    if raw.get("quantization_config") is not None:
        raise UserError(
            f"{path} describes a quantized model (quantization_config); inherit from the unquantized weights"
        )
    if raw.get("is_encoder_decoder"):
        raise UserError(
            f"{path} describes an encoder-decoder ({raw['model_type']}); only decoder-only models can be "
            f"sliced"
        )
    named = raw.get("architectures")
    foreign = [
        str(name)
        for name in (named if isinstance(named, list) else [])
        if not hasattr(transformers, str(name))
    ]
    if raw.pop("auto_map", None) and (
        foreign or raw["model_type"] not in CONFIG_MAPPING
    ):  # else transformers has the code
        what = ", ".join(foreign) or raw["model_type"]
        raise UserError(
            f"{path} needs code that comes with the model (auto_map: {what}), which is never run; only "
            f"families "
            f"of transformers itself can be sliced"
        )
    layers = raw.get(architecture(raw["model_type"]).layers, 1)
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:  # building such a model would not end
        raise UserError(
            f"{path} describes a model of {str(layers)[:50]} layers; 1 to {MAX_LAYERS} can be sliced"
        )
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # transformers raises many kinds for a value that it did not expect
        raise UserError(
            f"{path} is not a valid {raw['model_type']} config: {' '.join(str(error).split())[:300]}"
        ) from None


def write_config(path: Path, config, dtype: torch.dtype) -> None:
    """config.json of a causal language model stored in `dtype`, as transformers 4 and 5 both read it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = copy.deepcopy(config)
    config.dtype = dtype
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    described = portable.add_older_keys(json.loads(config.to_json_string()))
    rundir.write_text(path, json.dumps(described, indent=2, sort_keys=True) + "\n")


def takes_token_types(config) -> bool:
    """Whether the family's model takes token_type_ids, as GPT-2 does (it adds an embedding for each)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return "token_type_ids" in inspect.signature(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].forward).parameters


def count_parameters(config) -> int:
    """Trainable parameters, a tied head counted once, biases held at zero not counted (FACTS section 4); meta
    device."""
    with torch.device("meta"):
        model = build(config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops_per_token(config, sequence_length: int) -> float:
    """Training FLOPs (forward and backward) per token: 6 per matrix parameter plus 12 L d T for attention's
    two products.

    The count of PaLM (appendix B) and nanoGPT: full T x T attention, embeddings look-ups free, the head's
    product counted."""
    with torch.device("meta"):
        model = build(config)
    # a token passes through some experts only, whose weights are three-dimensional: (experts, outputs,
    # inputs)
    active = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    matrices = sum(p.numel() * (active if p.dim() == 3 else 1) for p in linear_weights(model).values())
    if config.tie_word_embeddings:  # linear_weights leaves the tied head to the embedding
        matrices += model.get_output_embeddings().weight.numel()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 6.0 * matrices + 12.0 * config.num_hidden_layers * width * sequence_length


def linear_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """{name: parameter} of the weights that are decayed: the matrices that multiply activations, a head tied
    to the embedding left out (FACTS section 4: embeddings, the tied head and norms are not decayed)."""
    embedding = model.get_input_embeddings().weight
    return {
        f"{name}.{key}": weight
        for name, module in model.named_modules()
        if not isinstance(module, torch.nn.Embedding)
        and "Norm" not in type(module).__name__  # Cohere's are matrices too
        for key, weight in module.named_parameters(recurse=False)
        if len(getattr(weight, "ds_shape", weight.shape)) > 1
        and weight is not embedding  # ZeRO 3 leaves weights flat
    }


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names of modules that torch.compile, FSDP and activation checkpointing put around another one."""


def strip_wrappers(names: Iterable[str], where) -> list[str]:
    """`names` of a checkpoint's tensors without what wrappers of the trained model put into them, and without
    the `module.` of DistributedDataParallel where all names begin with it.

    Raises UserError (naming `where`) if two tensors then have one name."""
    plain = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    twice = next((name for name, count in Counter(plain).items() if count > 1), None)
    if twice:
        raise UserError(
            f"{where} holds {twice} both of a compiled or wrapped model and of a plain one; keep one of them"
        )
    return plain


INFINITY = {
    torch.float64: 0x7FF0 << 48,
    torch.float32: 0x7F80 << 16,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}
"""The bits of inf in each dtype."""


def count_not_finite(data, dtype: torch.dtype) -> int:
    """How many of the floats of `dtype` in the buffer `data` are nan or inf.

    Their bits are at or above those of inf, of either sign: two maxima of integers find none at the speed of
    reading."""
    size, infinity = dtype.itemsize, INFINITY[dtype]
    bits, sign = np.frombuffer(data, f"u{size}"), 1 << (8 * size - 1)
    if not bits.size or (bits.view(f"i{size}").max() < infinity and bits.max() < sign + infinity):
        return 0
    return int(np.count_nonzero((bits & infinity) == infinity))


def seeded(*parts) -> torch.Generator:
    """A CPU generator keyed by `parts`: the same on every rank, whatever was drawn before."""
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(repr(parts).encode()) & (2**63 - 1))


def fresh_tensor(name: str, shape: Shape, config, seed: int) -> torch.Tensor:
    """Initial fp32 value of one tensor, from a generator keyed by (seed, name, shape): norms one, biases
    zero, the rest N(0, 0.02), for projections onto the residual stream N(0, 0.02 / sqrt(2 layers)) (FACTS
    section 4)."""
    table = architecture(config.model_type)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1 or "norm." in name:  # Cohere's norms of queries and keys are matrices
        return torch.full(shape, float(table.norm_weight))
    std = getattr(config, "initializer_range", None) or getattr(
        config, "init_std", 0.02
    )  # init_std: OPT's word for it
    if any(name.endswith(suffix) for suffix in table.residual):
        std /= math.sqrt(2 * getattr(config, table.layers))
    return torch.randn(shape, generator=seeded(seed, name, tuple(shape))).mul_(std)
