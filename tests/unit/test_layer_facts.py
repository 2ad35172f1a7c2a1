"""What a config says of single blocks is cut with them, or the cut is refused."""

import pytest
from tiny_families import family_config
from transformers import CONFIG_MAPPING

from inheritune.errors import UserError
from inheritune.models.layer_facts import check_blocks, cut_config


def cut(name: str, layers: list[int], **changes):
    config = family_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    found = cut_config(config, layers)
    check_blocks(config, found, layers)
    return found


CUTS = [
    ("qwen3_moe", {}, [2, 1, 4], {"mlp_only_layers": [1]}),
    ("qwen2_moe", {}, [1, 2, 3], {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
    ("deepseek_v3", {}, [2, 3, 4], {"first_k_dense_replace": 1}),
    ("deepseek_v3", {}, [3, 4], {"first_k_dense_replace": 0}),
    ("deepseek_v3", {}, [0, 1], {"first_k_dense_replace": 2}),
    ("smollm3", {}, [2, 3, 4], {"no_rope_layers": [1, 0, 1]}),
    ("lfm2", {}, [1, 2, 3], {"layer_types": ["full_attention", "conv", "full_attention"]}),
    ("llama4_text", {}, [1, 2, 3], {"moe_layers": [0, 1, 2]}),
    ("gpt_neo", {}, [1, 2, 4], {"attention_types": [[["local", "global", "global"], 1]]}),
    ("qwen2", {"max_window_layers": 2}, [1, 2, 3], {"max_window_layers": 1}),
]


@pytest.mark.parametrize("name, changes, layers, expected", CUTS)
def test_facts_of_blocks_are_cut_with_them(name, changes, layers, expected):
    found = cut(name, layers, **changes)
    assert {key: getattr(found, key) for key in expected} == expected


REFUSED = [
    ("deepseek_v3", {}, [3, 0, 1], r"first 3 layers are of another kind \(first_k_dense_replace\)"),
    ("llama", {"some_list": [1, 2, 3, 4, 5]}, [1, 2], "some_list, a list of 5 entries, as many as there are"),
]


@pytest.mark.parametrize("name, changes, layers, message", REFUSED)
def test_facts_that_cannot_be_cut_are_refused_in_one_sentence(name, changes, layers, message):
    with pytest.raises(UserError, match=message) as refusal:
        cut(name, layers, **changes)
    assert "\n" not in str(refusal.value)


def test_a_block_that_its_index_changes_is_refused():
    """DiffLlama computes a constant from the index."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4}
    config = CONFIG_MAPPING["diffllama"](**sizes, num_key_value_heads=2, num_hidden_layers=5)
    check_blocks(config, cut_config(config, [0, 1, 2]), [0, 1, 2])
    with pytest.raises(UserError, match=r"layer 2 of the source cannot become layer 0.*lambda_init"):
        check_blocks(config, cut_config(config, [2, 3]), [2, 3])


@pytest.mark.parametrize(
    "layers, message", [([0, 1], "has no model of these 2"), ([0, 1, 2, 3, 4, 5], "store_")]
)
def test_gemma_3n_whose_last_blocks_use_caches_of_others_is_refused(layers, message):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 8, "num_kv_shared_layers": 4}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 4, "laurel_rank": 4}
    sizes |= {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8}
    config = CONFIG_MAPPING["gemma3n_text"](**sizes, activation_sparsity_pattern=[0.5] * 2 + [0.0] * 6)
    with pytest.raises(UserError, match=message):
        check_blocks(config, cut_config(config, layers), layers)


def test_a_list_of_token_ids_is_no_fact_of_blocks():
    assert cut("llama", [1, 2], eos_token_id=[1, 2, 3, 4, 5]).eos_token_id == [1, 2, 3, 4, 5]
