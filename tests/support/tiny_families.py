"""A small random configuration of every family of the architecture table, and of the variants that name
tensors otherwise."""

import copy

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
    "falcon_rw": (
        "falcon",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
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
    "granite": (
        "granite",
        {**LLAMA, "logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
}

GROUPS = {"n_routed_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
GROUPS |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 3}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
HEADS = {**LLAMA, "head_dim": 8}
GEMMA4 = {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
GEMMA4 |= {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2}  # the last one has to be full
ERNIE = {"moe_num_shared_experts": 1, "moe_layer_start_index": 2}

# Families that are cut only, in both versions of transformers. Of the table:
FURTHER = {
    "apertus": LLAMA,
    "arcee": LLAMA,
    "cohere2": {**LLAMA, **WINDOWS},
    "deepseek_v2": {**LLAMA, **LATENT, **GROUPS},
    "deepseek_v3": {**LLAMA, **LATENT, **GROUPS},
    "ernie4_5": LLAMA,
    "ernie4_5_moe": {**LLAMA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, **ERNIE},
    "exaone4": {**LLAMA, **WINDOWS, "sliding_window_pattern": 4},
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**HEADS, **GROUPS},
    "gpt_oss": {**HEADS, **LOCAL, **WINDOWS},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "lfm2": {**LLAMA, "full_attn_idxs": [1, 3]},
    "ministral": {**HEADS, **WINDOWS},
    "nanochat": LLAMA,
    "nemotron": LLAMA,
    "olmo3": {**LLAMA, **WINDOWS},
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 2},
    "qwen3_moe": {**HEADS, **EXPERTS, "mlp_only_layers": [1]},
    "seed_oss": HEADS,
    "smollm3": LLAMA,
}
# Found on device meta:
AUTOMATIC = {
    "afmoe": {**HEADS, **EXPERTS, "num_dense_layers": 2, "sliding_window": 4},
    "biogpt": MLP,
    "bitnet": LLAMA,
    "codegen": {**GPT2, "rotary_dim": 4},
    "doge": LLAMA,
    "exaone_moe": {**HEADS, **EXPERTS, **WINDOWS},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 5},
    "flex_olmo": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {**HEADS, **WINDOWS, **GEMMA4},
    "gpt_neo": {**WIDTHS, "attention_types": [[["global", "local"], 2], [["global"], 1]], "window_size": 4},
    "gptj": {**GPT2, "rotary_dim": 4},
    "granitemoe": {**LLAMA, **LOCAL},
    "granitemoeshared": {**LLAMA, **LOCAL},
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": 2},
    "hyperclovax": LLAMA,
    "jais2": HEADS,
    "jetmoe": {**LLAMA, **LOCAL, "kv_channels": 8},
    "lfm2_moe": {
        **LLAMA,
        **EXPERTS,
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
        "num_dense_layers": 2,
    },
    "llama4_text": {**HEADS, **LOCAL, "intermediate_size_mlp": 44, "num_experts_per_tok": 1},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 5},
    "mellum": {**HEADS, **EXPERTS},
    "minimax_m2": {**HEADS, **LOCAL},
    "ministral3": HEADS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 5, "max_seq_len": 32},
    "persimmon": MLP,
    "phimoe": {**LLAMA, **LOCAL},
    "solar_open": {**HEADS, **GROUPS},
    "vaultgemma": {**HEADS, **WINDOWS},
    "xglm": {"d_model": 32, "num_layers": 5, "attention_heads": 4, "ffn_dim": 44, "dropout": 0.0},
}
FAMILIES_CUT = {name: (name, sizes) for name, sizes in (FURTHER | AUTOMATIC).items()}


def family_config(name: str):
    """Five layers of width 32 with 61 tokens, no dropout."""
    model_type, changes = (FAMILIES | FAMILIES_CUT)[name]
    return CONFIG_MAPPING[model_type](vocab_size=61, **NO_TOKENS, **copy.deepcopy(changes))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 2.0, 1.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LINEAR = {"rope_type": "linear", "factor": 4.0}

# Positions (RoPE) that are not the default, in every family that has them.
# name: (name above or config.model_type, keys of a config of transformers 4)
POSITIONS = {
    "llama, llama3": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama, linear": ("llama", {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama, dynamic": (
        "llama",
        {
            "rope_theta": 77.0,
            "rope_scaling": {"type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 8,
        },
    ),
    "llama, yarn": (
        "llama",
        {
            "rope_theta": 77.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "rope_theta": 77.0,
            "original_max_position_embeddings": 8,
            "rope_scaling": {"type": "longrope", **LONG},
        },
    ),
    "phi3, partial": ("phi3", {"rope_theta": 77.0, "partial_rotary_factor": 0.5}),
    "phi, partial": ("phi", {"rope_theta": 77.0, "partial_rotary_factor": 0.25}),
    "stablelm, partial": ("stablelm", {"rope_theta": 77.0, "partial_rotary_factor": 0.5}),
    "gpt_neox, own names": ("gpt_neox", {"rotary_emb_base": 77, "rotary_pct": 0.5}),
    "gemma3, two of them": (
        "gemma3",
        {"rope_theta": 99.0, "rope_local_base_freq": 77.0, "rope_scaling": LINEAR},
    ),
    "olmo, linear": ("olmo", {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "olmo2, dynamic": ("olmo2", {"rope_theta": 77.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "falcon, linear": ("falcon_7b", {"rope_theta": 77.0, "rope_scaling": LINEAR}),
    **{f"{name}, theta": (name, {"rope_theta": 77.0}) for name in ("gemma", "gemma2", "mistral", "mixtral")},
    **{
        f"{name}, linear": (name, {"rope_theta": 77.0, "rope_scaling": LINEAR})
        for name in ("cohere", "granite", "qwen2", "qwen3", "starcoder2")
    },
}


def positions_config(name: str):
    """As `family_config`, with the positions of that name."""
    family, keys = POSITIONS[name]
    model_type, changes = FAMILIES.get(family, (family, LLAMA))
    raw = {"model_type": model_type, "vocab_size": 61, **NO_TOKENS, **changes, **keys}
    # transformers writes into what it is given
    return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(raw))
