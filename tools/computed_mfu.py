"""Writes the table of computed MFU into docs/gpu.md: python tools/computed_mfu.py

The time of a step is counted, not measured: FLOPs of products and of attention at their rates, plus bytes of
everything else at the memory's rate. Launches, communication and waiting for the host are taken as free. A
test fails when the table is stale."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / place) for place in ("", "tests/support"))
from written import filled, markdown

from inheritune.config.catalog import GPU_SPECS
from inheritune.config.paths import REPOSITORY
from inheritune.config.sections import Model
from inheritune.models.sizes import count_matrix_elements, count_trained_elements, predict_flops_per_token

PRODUCTS, ATTENTION, MEMORY = 640e12, 330e12, 3.0e12
"""Assumed rates of an H100: FLOP/s of bf16 products (those of docs/gpu.md: 109 ms for the 70e12 of a step),
FLOP/s of attention with the full T x T counted, bytes/s."""
ADAMW = 16 + 12 + 4 + 4
"""Bytes of an optimizer step per parameter: AdamW reads weight, gradient and two moments and writes all but
the gradient; the norm reads the gradient, and it is set to zero."""
CASES = [("gpt2_medium", 24, 16, 2), ("gpt2_medium", 24, 4, 12), ("gpt2_medium", 24, 48, 1)]
CASES += [("gpt2_large", 36, 4, 4), ("gpt2_large", 36, 16, 1), ("gpt2_xl", 48, 4, 4), ("gpt2_xl", 48, 16, 1)]
"""(size, layers, micro batch, micro steps), sequences of 1,024 tokens."""
LENGTH = 1024


@dataclass(frozen=True)
class Way:
    """Bytes of memory traffic beside the products."""

    name: str
    block: int
    """Per token, block and unit of width."""
    logit: int
    weight: int
    """Per matrix element and micro step."""
    once: int = 0
    """Per matrix element and optimizer step."""


# A block of GPT-2 under autocast, operations one after another, with an fp32 residual stream.
# Forward: two norms (8 each), their casts (6), two additions (10), the GELU (16).
# Backward: two norms (20), casts to fp32 (6) and to bf16 (6), additions (12), the GELU (24), and q, k, v
# joined (12).
PLAIN_BLOCK = 2 * (8 + 6 + 10) + 16 + 2 * (20 + 6 + 6 + 12) + 24 + 12
# Norm, cast and addition are one pass: 12 forward, 16 backward.
COMPILED_BLOCK = 2 * 12 + 16 + 2 * 16 + 24 + 12
# Weights are rounded (6), gradients are cast to fp32 (6) and added (12).
EACH_MICRO_STEP, ROUNDED = 6 + 6 + 12, 6
WAYS = [
    Way("plain blocks, the loss in passes", PLAIN_BLOCK, 58, EACH_MICRO_STEP),
    Way("compiled loss", PLAIN_BLOCK, 6, EACH_MICRO_STEP),
    Way("and compiled blocks", COMPILED_BLOCK, 6, EACH_MICRO_STEP),
    Way("and weights rounded once a step", COMPILED_BLOCK, 6, EACH_MICRO_STEP - ROUNDED, ROUNDED),
]


def compute_mfu(size: str, layers: int, micro: int, steps: int, way: Way) -> float:
    """Return the MFU of an optimizer step of `steps` micro steps of `micro` sequences on one H100."""
    model, tokens = Model(size=size), micro * steps * LENGTH
    matrices = count_matrix_elements(model, layers)
    flops = tokens * predict_flops_per_token(model, layers, LENGTH)
    products = 6.0 * matrices * tokens
    traffic = tokens * (way.block * layers * model.width + way.logit * model.vocab_size)
    traffic += matrices * (way.weight * steps + way.once) + ADAMW * count_trained_elements(model, layers)
    seconds = products / PRODUCTS + (flops - products) / ATTENTION + traffic / MEMORY
    return flops / seconds / (GPU_SPECS["H100"]["tflops"] * 1e12)


def document() -> tuple[Path, str]:
    """Return docs/gpu.md and its text with the current table."""
    rows = [
        [f"{size}, {layers} layers", f"{micro} x {steps}"]
        + [f"{compute_mfu(size, layers, micro, steps, way):.0%}" for way in WAYS]
        for size, layers, micro, steps in CASES
    ]
    heads = ["model", "micro batch x micro steps", *(way.name for way in WAYS)]
    file = REPOSITORY / "docs" / "gpu.md"
    return file, filled(file.read_text(encoding="utf-8"), "tools/computed_mfu.py", markdown(heads, rows))


if __name__ == "__main__":
    path, text = document()
    path.write_text(text, encoding="utf-8")
