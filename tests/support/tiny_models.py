"""Tiny real models for tests: the paper's GPT-2, a public GPT-2, and Llama with grouped queries, tied or
not."""

import torch
from transformers import GPT2Config, LlamaConfig

from inheritune.config.sections import Model
from inheritune.models import initialization, networks


def config_of(kind: str, layers: int = 4):
    """Configuration by name: paper, public, llama (untied) or llama_tied. Odd sizes, so that nothing divides
    by chance."""
    if kind == "paper":
        sizes = {
            "layers": layers,
            "width": 15,
            "heads": 3,
            "mlp_width": 33,
            "positions": 12,
            "vocab_size": 61,
        }
        return networks.build_config(Model(size="gpt2_tiny", **sizes))
    no_tokens = {"bos_token_id": None, "eos_token_id": None}
    if kind == "public":
        return GPT2Config(vocab_size=61, n_positions=12, n_embd=15, n_layer=layers, n_head=3, **no_tokens)
    return LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=27,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=12,
        tie_word_embeddings=kind == "llama_tied",
        **no_tokens,
    )


def random_model(config, seed: int = 1) -> torch.nn.Module:
    """A model of `config` in evaluation mode whose every tensor differs from every fresh one (GPT-2's frozen
    biases stay zero)."""
    model = networks.build_model(config, "eager").eval()
    for name, tensor in networks.list_saved_tensors(model).items():
        values = torch.randn(tensor.shape, generator=initialization.make_generator(seed, name)) * 0.3
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        is_zero = config.model_type == "gpt2" and is_parameter and not tensor.requires_grad
        tensor.data.copy_(torch.zeros_like(values) if is_zero else values)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint of `model` lists: a tied head is left out."""
    tied = model.config.tie_word_embeddings
    return {
        name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of two fixed sequences."""
    with torch.no_grad():
        return model(
            torch.randint(0, 61, (2, 12), generator=initialization.make_generator("ids"))
        ).logits  # (2, 12, 61)
