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
    ("ernie4_5_moe", {}, [1, 2, 3], {"moe_layer_start_index": 1, "moe_layer_end_index": 2}),
    ("ernie4_5_moe", {}, [2, 4], {"moe_layer_start_index": 0, "moe_layer_end_index": 1}),
    ("ernie4_5_moe", {"moe_layer_end_index": 3}, [3, 4], {"moe_layer_end_index": 0}),
    ("ernie4_5_moe", {}, [0, 1], {"moe_layer_start_index": 2, "moe_layer_end_index": 2}),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, [0, 1, 2, 3], {"moe_layer_start_index": 2}),
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
    ("ernie4_5_moe", {}, [2, 0, 3], r"layer 0 of the source cannot become layer 1: ernie4_5_moe builds it"),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, [1, 2, 3], "layer 3 of the source cannot become layer 2"),
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


GEMMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4}
GEMMA |= {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 6, "sliding_window": 4}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": 61}
NEWEST = {
    "gemma3n_text": {"laurel_rank": 4, "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4},
    "gemma4_text": {"global_head_dim": 8},
}


@pytest.mark.parametrize("family", NEWEST)
def test_a_gemma_with_an_embedding_for_each_block_is_refused(family):
    """Also where its last blocks use the caches of others; the whole model is no cut."""
    for shared in (0, 2):
        sizes = GEMMA | NEWEST[family] | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": shared}
        config = CONFIG_MAPPING[family](**sizes)
        for layers in ([0, 1], [0, 1, 2, 3], [4, 5]):
            with pytest.raises(
                UserError, match=f"a {family} with hidden_size_per_layer_input above 0 cannot"
            ):
                cut_config(config, layers)
        check_blocks(config, cut_config(config, range(6)), range(6))


def gemma4(**changes):
    """A Gemma 4 as the larger ones are, with no embedding for each block."""
    sizes = GEMMA | NEWEST["gemma4_text"] | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    return CONFIG_MAPPING["gemma4_text"](**(sizes | changes))


def test_another_gemma_4_is_cut_to_layers_that_end_with_full_attention():
    found = cut_config(gemma4(), [0, 1, 4, 5])
    check_blocks(gemma4(), found, [0, 1, 4, 5])
    assert found.layer_types == ["sliding_attention", "full_attention"] * 2
    with pytest.raises(
        UserError, match=r"layer 2 of the source cannot become layer 2: .*is_sliding: True, then"
    ):
        check_blocks(gemma4(), cut_config(gemma4(), [0, 1, 2]), [0, 1, 2])


def test_a_gemma_4_whose_last_blocks_use_caches_of_others_is_refused():
    with pytest.raises(
        UserError, match="layer 0 of the source cannot become layer 0: .*store_full_length_kv"
    ):
        check_blocks(config := gemma4(num_kv_shared_layers=2), cut_config(config, [0, 1, 2, 3]), [0, 1, 2, 3])


def test_a_list_of_token_ids_is_no_fact_of_blocks():
    assert cut("llama", [1, 2], eos_token_id=[1, 2, 3, 4, 5]).eos_token_id == [1, 2, 3, 4, 5]
