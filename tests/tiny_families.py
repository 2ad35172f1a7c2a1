"""A small random configuration of every family of the architecture table, and of the variants that name tensors otherwise."""

from transformers import CONFIG_MAPPING

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_inner": 44, "n_positions": 32}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "max_position_embeddings": 32}
MLP = {**WIDTHS, "intermediate_size": 44}
LLAMA = {**MLP, "num_key_value_heads": 2}
OPT = {**WIDTHS, "ffn_dim": 44, "dropout": 0.0}
FALCON = {**WIDTHS, "ffn_hidden_size": 44}
WINDOWS = {"sliding_window": 4}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

# name: (config.model_type, what differs from the family's default configuration)
FAMILIES = {
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gpt_bigcode_multi_head": ("gpt_bigcode", {**GPT2, "multi_query": False}),
    "gpt_neox": ("gpt_neox", MLP),
    "gpt_neox_tied": ("gpt_neox", {**MLP, "tie_word_embeddings": True, "use_parallel_residual": False}),
    "opt": ("opt", OPT),
    "opt_350m": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 5, "n_head": 4}),
    "falcon_7b": ("falcon", FALCON),
    "falcon_40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_rw": ("falcon", {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "phi": ("phi", {**LLAMA, "qk_layernorm": True}),
    "phi3": ("phi3", LLAMA),
    "llama": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**LLAMA, **WINDOWS}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 3}),
    "qwen2": ("qwen2", {**LLAMA, **WINDOWS, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**LLAMA, **WINDOWS, "use_sliding_window": True, "layer_types": MIXED, "head_dim": 6}),
    "gemma": ("gemma", {**LLAMA, "head_dim": 6}),
    "gemma2": ("gemma2", {**LLAMA, **WINDOWS, "head_dim": 6}),
    "gemma3": ("gemma3_text", {**LLAMA, **WINDOWS, "head_dim": 6, "sliding_window_pattern": 3}),
    "olmo": ("olmo", {**LLAMA, "clip_qkv": 1.0}),
    "olmo2": ("olmo2", LLAMA),
    "stablelm": ("stablelm", {**LLAMA, "qk_layernorm": True, "use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", {**LLAMA, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {**LLAMA, **WINDOWS}),
    "cohere": ("cohere", {**LLAMA, "use_qk_norm": True}),
    "granite": ("granite", {**LLAMA, "logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
}


def family_config(name: str):
    """Five layers of width 32 with 61 tokens, no dropout."""
    model_type, changes = FAMILIES[name]
    return CONFIG_MAPPING[model_type](vocab_size=61, **NO_TOKENS, **changes)
