"""Bytes that autograd keeps of a micro batch between its forward and its backward pass."""

from inheritune.config.sections import Model
from inheritune.models.sizes import LOSS_CHUNK, count_matrix_elements


def get_element_sizes(precision: str) -> tuple[int, int]:
    """Return the bytes of an element of (the weights and the residual stream, the inputs of a matrix
    product)."""
    return {"fp32": (4, 4), "bf16": (2, 2)}.get(precision, (4, 2))


def count_block_activations(
    model: Model, precision: str, length: int, keeps_inputs: bool = False, eager: bool = False
) -> float:
    """Return the bytes per token that autograd saves in one block.

    Attention is flash or memory-efficient attention unless `eager`. `keeps_inputs`: under ZeRO 3 DeepSpeed's
    linear function saves its input before autocast rounds it."""
    r, e = get_element_sizes(precision)
    d, f = model.width, model.mlp_width
    attention = 4 * model.heads  # the log-sum-exp of each query
    if eager:  # the softmax, in fp32 under autocast or pure bf16, and its copy for the product
        attention = model.heads * length * (4 if precision == "fp32" else 6)
    if model.family == "gpt2":
        norms = 2 * (r + e) * d + 16
        return norms + 4 * e * d + attention + 2 * e * f  # before and after the GELU
    kv = d * model.kv_heads // model.heads
    norms = 2 * (4 + r + (r if keeps_inputs else e)) * d + 8
    return norms + 2 * e * (d + kv) + attention + 4 * e * f  # q, k, v, out; gate, its SiLU, up, their product


def count_activations(
    model: Model,
    layers: int,
    precision: str,
    tokens: int,
    length: int,
    checkpointing: bool,
    stage: int = 0,
    eager: bool = False,
) -> dict[str, float]:
    """Return the bytes {activations, autocast weights, logits, loss} of a micro batch of `tokens` at the end
    of its forward pass.

    At the start of backward the loss adds the gradient of the logits and the softmax of one chunk of them."""
    r, e = get_element_sizes(precision)
    keeps_inputs = stage == 3 and model.family == "llama"  # DeepSpeed does not replace GPT-2's Conv1D
    block = count_block_activations(model, precision, length, keeps_inputs, eager)
    last = (r + e + (0 if model.family == "gpt2" else 4)) * model.width  # the final norm
    saved = layers * r * model.width + block if checkpointing else layers * block
    # Autocast keeps the rounded copy of each matrix for backward; with checkpointing only until forward ends.
    rounded = 2 * count_matrix_elements(model, layers) if (r, e) == (4, 2) and not keeps_inputs else 0
    return {
        "activations": tokens * (saved + last),
        "autocast weights": rounded,
        "logits": tokens * model.vocab_size * e,
        "loss": tokens * model.vocab_size * e + 4 * min(tokens * model.vocab_size, LOSS_CHUNK),
    }
