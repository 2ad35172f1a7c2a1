"""Models: counts against the paper, logits against an independent plain GPT-2, initialization."""

import csv
import math
import unittest.mock

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch._dynamo.testing import CompileCounterWithBackend

from inheritune.config.sections import Model
from inheritune.errors import UserError
from inheritune.models.architectures import find_architecture, find_depth_key
from inheritune.models.initialization import make_fresh_tensor
from inheritune.models.networks import (
    build_config,
    build_model,
    count_flops_per_token,
    count_parameters,
    find_linear_weights,
    fuse_gelu,
)
from inheritune.training import losses


def model_of(size, **changes):
    return Model.model_validate({"size": size, **changes})


def paper_sizes():
    sizes = {
        ("GPT-2 XLarge", 1600): "gpt2_xl",
        ("GPT-2 Large", 1280): "gpt2_large",
        ("GPT-2 Large-dagger", 1280): "gpt2_large_fineweb",
        ("GPT-2 Medium", 1024): "gpt2_medium",
        ("GPT-2 Small", 768): "gpt2_small",
    }
    with open(REPOSITORY / "recipes" / "paper" / "table_model_configs.csv") as file:
        for row in csv.DictReader(file):
            size = sizes.get((row["model_family"], int(row["hidden_size"])))
            if size:
                yield pytest.param(
                    size,
                    int(row["layers"]),
                    int(row["params_computed_tied_no_bias"]),
                    id=f"{size}-{row['layers']}",
                )


@pytest.mark.parametrize(("size", "layers", "parameters"), list(paper_sizes()))
def test_gpt2_counts_are_the_papers(size, layers, parameters):
    assert count_parameters(build_config(model_of(size), layers)) == parameters


@pytest.mark.parametrize(
    ("size", "layers", "billions"),  # version 1 of the paper
    [
        ("openllama_3b", 26, 3.426),
        ("openllama_3b", 13, 1.816),
        ("openllama_7b", 6, 1.476),
        ("openllama_7b", 7, 1.679),
    ],
)
def test_llama_counts_are_the_papers(size, layers, billions):
    assert round(count_parameters(build_config(model_of(size), layers)) / 1e9, 3) == billions


def test_other_llama_shapes():
    # both embeddings, and per block 4 d^2 + 3 d m and two norms, and the last norm
    for size, layers, d, m in (
        ("openllama_7b", 32, 4096, 11008),
        ("openllama_13b", 40, 5120, 13824),
        ("llama2_7b", 32, 4096, 11008),
    ):
        assert (
            count_parameters(build_config(model_of(size)))
            == 2 * 32000 * d + layers * (4 * d * d + 3 * d * m + 2 * d) + d
        )


def test_flops_are_six_per_matrix_parameter_plus_attention():
    config = build_config(model_of("gpt2_medium"))
    # four projections and a 4x MLP, and the (tied) head's product
    matrices = 24 * 12 * 1024**2 + 50304 * 1024
    assert count_flops_per_token(config, 1024) == 6 * matrices + 12 * 24 * 1024 * 1024


def plain_gpt2(weights: dict, tokens: np.ndarray, layers: int, heads: int) -> np.ndarray:
    """The paper's GPT-2 written out in numpy float64: no biases, attention logits divided by sqrt(d_head) and
    (layer + 1)."""

    def norm(x, gain):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain

    (length,) = tokens.shape
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:length]
    width = x.shape[-1]
    for i in range(layers):
        p = f"transformer.h.{i}."
        q, k, v = np.split(norm(x, w[p + "ln_1.weight"]) @ w[p + "attn.c_attn.weight"], 3, axis=-1)
        out = np.zeros_like(x)
        for h in range(heads):
            cut = slice(h * width // heads, (h + 1) * width // heads)
            scores = q[:, cut] @ k[:, cut].T / math.sqrt(width // heads) / (i + 1)
            scores[np.triu_indices(length, 1)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, cut] = scores / scores.sum(-1, keepdims=True) @ v[:, cut]
        x = x + out @ w[p + "attn.c_proj.weight"]
        hidden = norm(x, w[p + "ln_2.weight"]) @ w[p + "mlp.c_fc.weight"]
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + hidden @ w[p + "mlp.c_proj.weight"]
    return norm(x, w["transformer.ln_f.weight"]) @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_an_independent_implementation(attention):
    config = build_config(model_of("gpt2_tiny", layers=5, width=60, heads=5))
    model = build_model(config, attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(make_fresh_tensor(name, parameter.shape, config, seed=0))
            if name.endswith("weight"):
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    model = model.double().eval()
    tokens = np.random.default_rng(0).integers(0, 1024, 50)
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    with torch.no_grad():
        ours = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    theirs = plain_gpt2(weights, tokens, layers=5, heads=5)
    assert np.abs(ours - theirs).max() < 1e-10
    assert np.abs(ours).max() > 0.1  # not trivially equal


def test_biases_are_frozen_zeros_in_the_papers_gpt2_only():
    from transformers import GPT2Config

    paper = build_model(build_config(model_of("gpt2_tiny")))
    assert all(p.requires_grad != name.endswith(".bias") for name, p in paper.named_parameters())
    public = build_model(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=16))
    assert all(p.requires_grad for p in public.parameters())


def test_only_linear_weights_are_decayed():
    tied = build_model(build_config(model_of("gpt2_tiny", layers=1)))
    assert sorted(find_linear_weights(tied)) == [
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    untied = build_model(build_config(model_of("llama_tiny", layers=1)))
    assert "lm_head.weight" in find_linear_weights(untied) and len(find_linear_weights(untied)) == 8


def test_initialization_follows_the_paper():
    config = build_config(model_of("gpt2_tiny", width=256, layers=8))
    embedding = make_fresh_tensor("transformer.wte.weight", (1024, 256), config, seed=0)
    projection = make_fresh_tensor("transformer.h.3.mlp.c_proj.weight", (1024, 256), config, seed=0)
    assert abs(float(embedding.std()) - 0.02) < 2e-4 and abs(float(projection.std()) - 0.02 / 4) < 5e-5
    assert torch.equal(make_fresh_tensor("transformer.ln_f.weight", (256,), config, 0), torch.ones(256))
    assert torch.equal(make_fresh_tensor("transformer.ln_f.bias", (256,), config, 0), torch.zeros(256))
    # keyed by seed, name and shape, not by what was drawn before
    assert torch.equal(embedding, make_fresh_tensor("transformer.wte.weight", (1024, 256), config, seed=0))
    assert not torch.equal(
        embedding, make_fresh_tensor("transformer.wte.weight", (1024, 256), config, seed=1)
    )
    assert not torch.equal(embedding, make_fresh_tensor("lm_head.weight", (1024, 256), config, seed=0))


def test_family_without_a_causal_language_model_is_refused():
    with pytest.raises(UserError, match="family 't5' has no causal language model in the installed"):
        find_depth_key("t5")


def test_every_tensor_of_both_families_has_a_part():
    for size in ("gpt2_tiny", "llama_tiny"):
        model = build_model(build_config(model_of(size, layers=2)))
        table = find_architecture(model.config)
        parts = {table.part_of(name) for name in model.state_dict()}
        blocks = {("blocks", m) for m in ("attn", "mlp", "attn_norm", "mlp_norm")}
        assert blocks | {("token_embedding", None), ("final_norm", None)} <= parts
        with pytest.raises(UserError, match="has no place"):
            table.part_of("transformer.unknown.weight")


@pytest.mark.parametrize("function", [losses.ChunkedTokenLosses, losses.FusedTokenLosses])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_token_losses_and_their_gradient_are_torchs(monkeypatch, dtype, function):
    """In chunks as on a CPU, and compiled as on a GPU."""
    # 4 tokens at a time, of 21: the last chunk is shorter
    monkeypatch.setitem(losses.ChunkedTokenLosses.CHUNK, "cpu", 4 * 50 + 7)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 7, 50, generator=generator) * 5).to(dtype).requires_grad_(True)
    targets, weights = (
        torch.randint(0, 50, (3, 7), generator=generator),
        torch.rand(3, 7, generator=generator),
    )
    monkeypatch.setattr(losses, "ChunkedTokenLosses", function)
    ours = losses.token_losses(logits, targets)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    exact = logits.detach().double().requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(
        exact.flatten(0, 1), targets.flatten(), reduction="none"
    ).view(3, 7)
    (its,) = torch.autograd.grad((expected * weights).sum(), exact)
    assert ours.dtype == torch.float32 and torch.allclose(ours.double(), expected, rtol=0, atol=4e-6)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert gradient.dtype == dtype and torch.allclose(gradient.double(), its, rtol=rounding, atol=1e-6)


def test_the_fused_loss_is_compiled_once_for_any_number_of_tokens():
    """Training, validation and the last windows have batches of their own."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    functions = [torch.compile(f, backend=counter) for f in (losses.compute_losses, losses.compute_gradient)]
    with unittest.mock.patch.object(losses, "compile_functions", lambda: functions):
        for tokens in (12, 6, 9):
            logits = torch.randn(tokens, 50, dtype=torch.bfloat16, requires_grad=True)
            targets = torch.randint(0, 50, (tokens,))
            losses.FusedTokenLosses.apply(logits, targets).sum().backward()
            with torch.no_grad():
                losses.FusedTokenLosses.apply(logits, targets)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_fused_gelu_is_the_one_written_out():
    model = build_model(build_config(model_of("gpt2_tiny")))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(40)[None]
    before = model(input_ids=ids).logits
    fuse_gelu(model)
    assert "NewGELUActivation" not in str(model) and "GELUTanh" in str(model)
    assert torch.allclose(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
