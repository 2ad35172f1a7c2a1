"""Sizes of a model without torch: its parameters, FLOPs per token, and the rule of half width.

The counts are those of the paper's two families (`Model.family`), computed from the numbers of an experiment
alone. networks.py counts the same things for any family, from the tensors that transformers builds; a test
compares the two. A model described by `from` is counted there.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from inheritune.config.sections import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORWARD_SHARE = 1 / 3
"""Of a training step's FLOPs those of its forward pass, which is all that a teacher computes."""
LOSS_CHUNK = 1 << 26
"""Elements of the logits that the loss converts to fp32 at once on a GPU where torch.compile does not work:
268 MB, so that starting kernels costs nothing."""
EVAL_BATCH = 8
"""Windows per forward of a validation. It is fixed so that a window's loss does not depend on the number of
ranks or the micro batch."""


@dataclass(frozen=True)
class Parameter:
    """A parameter: its elements, whether it is trained, and whether it is decayed (AdamW's first group)."""

    numel: int
    trained: bool = True
    decayed: bool = False


def list_parameters(model: Model, layers: int) -> list[Parameter]:
    """Return the parameters of `model`, `layers` blocks deep, in the model's order; a tied head once."""
    if model.from_:
        return _list_built_parameters(model, layers)
    d, f = model.width, model.mlp_width
    embedding = Parameter(model.vocab_size * d)
    head = [] if model.tied_head else [Parameter(embedding.numel, decayed=True)]
    if model.family == "gpt2":  # biases are held at zero
        norm = [Parameter(d), Parameter(d, trained=False)]

        def list_linear(n: int, m: int) -> list[Parameter]:
            return [Parameter(n * m, decayed=True), Parameter(m, trained=False)]

        attention = [*list_linear(d, 3 * d), *list_linear(d, d)]
        block = [*norm, *attention, *norm, *list_linear(d, f), *list_linear(f, d)]
        return [embedding, Parameter(model.positions * d), *block * layers, *norm, *head]
    kv = d * model.kv_heads // model.heads
    matrices = [Parameter(n * d, decayed=True) for n in (d, kv, kv, d, f, f, f)]
    block = [*matrices, Parameter(d), Parameter(d)]
    return [embedding, *block * layers, Parameter(d), *head]


@cache
def _list_built_parameters(model: Model, layers: int) -> list[Parameter]:
    """Return `list_parameters` of a model whose shape is another model's, as transformers builds it."""
    from inheritune.models.networks import build_config, build_meta_model

    return list_network_parameters(build_meta_model(build_config(model, layers)))


def list_network_parameters(network: "PreTrainedModel") -> list[Parameter]:
    """Return the parameters of a model that transformers built, in the model's order; a tied head once."""
    from inheritune.models.networks import find_linear_weights

    decayed = {id(weight) for weight in find_linear_weights(network).values()}
    return [Parameter(p.numel(), p.requires_grad, id(p) in decayed) for p in network.parameters()]


def count_trained_elements(model: Model, layers: int) -> int:
    """Return the number of trained parameters, as networks.count_parameters counts them."""
    return sum(p.numel for p in list_parameters(model, layers) if p.trained)


def count_matrix_elements(model: Model, layers: int) -> int:
    """Return the number of elements of the matrices that multiply a token, the head's included."""
    elements = sum(p.numel for p in list_parameters(model, layers) if p.decayed)
    if model.tied_head:  # it is the embedding, which is not decayed
        elements += model.vocab_size * model.width
    return elements


def predict_flops_per_token(model: Model, layers: int, sequence_length: int) -> float:
    """Return the training FLOPs per token, as networks.count_flops_per_token counts them."""
    if model.from_:
        from inheritune.models.networks import build_config, count_flops_per_token

        return count_flops_per_token(build_config(model, layers), sequence_length)
    matrices = count_matrix_elements(model, layers)
    return compute_flops_per_token(matrices, layers, model.width, sequence_length)


def compute_flops_per_token(
    matrix_elements: float, layers: int, attention_width: int, sequence_length: int
) -> float:
    """Return the training FLOPs (forward and backward) per token of a model with these sizes.

    6 per matrix element, plus 12 L d T for the two products of attention, where d is all heads together. This
    is the count of PaLM (appendix B) and nanoGPT: attention is the full T x T, look-ups of embeddings are
    free, and the head's product is counted."""
    return 6.0 * matrix_elements + 12.0 * layers * attention_width * sequence_length


def halve_heads(heads: int, kv_heads: int) -> tuple[int, int]:
    """Return (heads, key and value heads) of a model at half width.

    Half of the key and value heads are kept, of an odd number the smaller half, each with its group of query
    heads: of 25 heads these are 12."""
    kept = kv_heads // 2
    return heads // kv_heads * kept, kept


def scale_width(width: int, kept_heads: int, heads: int) -> int:
    """Return `width` in proportion to the heads that are kept; each head keeps its own width."""
    return width * kept_heads // heads


def halve_model(model: Model) -> Model:
    """Return `model` with half the heads, and width and MLP scaled down in the same proportion.

    surgery.halve_config does the same to a configuration of transformers. The result is described by its
    numbers alone, also where `model` has those of another one."""
    heads, kv_heads = halve_heads(model.heads, model.kv_heads)
    sizes = {
        "from_": None,
        "heads": heads,
        "kv_heads": kv_heads,
        "width": scale_width(model.width, heads, model.heads),
        "mlp_width": scale_width(model.mlp_width, heads, model.heads),
    }
    return model.model_copy(update=sizes)
