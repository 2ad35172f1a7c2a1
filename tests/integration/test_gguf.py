"""GGUF files as sources: the tensors are those of the file, dequantized, and the tokenizer comes along."""

import numpy as np
import pytest
import torch
from conftest import write_tokens
from tiny_models import random_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaConfig

from inheritune.analysis.attention import measure_model
from inheritune.data.batches import Tokens
from inheritune.errors import UserError
from inheritune.models.gguf_files import find_gguf
from inheritune.models.sources import open_source
from inheritune.models.surgery import inherit

LETTERS = [chr(97 + i) for i in range(26)]
TOKENS = ["<|endoftext|>", *LETTERS, "ab", "cd"]


def write_gguf(
    path, more=lambda writer: None, tokens=TOKENS, merges=("a b", "c d"), pre="gpt-2"
) -> torch.nn.Module:
    """Write a random model as GGUF, its matrices in the format Q8_0, and what `more` adds; return it."""
    gguf = pytest.importorskip("gguf")
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = random_model(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp keeps the halves of a head together
            values = values.reshape(1, 2, 16, 32).swapaxes(1, 2).reshape(32, 32)
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, kind) if tensor.dim() == 2 else values
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_cut_like_any_source(tmp_path, own_root):
    model = write_gguf(tmp_path / "model.gguf")
    inherit(tmp_path, "1:3", tmp_path / "out", dtype="bf16")
    source, cut = open_source(tmp_path / "model.gguf"), open_source(tmp_path / "out")
    assert source.origin == str(tmp_path / "model.gguf") and len(source.names()) == 48
    for name, tensor in model.state_dict().items():
        assert (source.tensor(name) - tensor).abs().max() <= tensor.abs().max() / 127, name
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(cut.tensor(name.format(0)), source.tensor(name.format(1)).bfloat16())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with open(tmp_path / "model.gguf", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(UserError, match=r"cannot be read as a GGUF model") as refusal:
        open_source(tmp_path)
    assert "\n" not in str(refusal.value)


def test_of_several_gguf_files_one_is_to_be_named(tmp_path):
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a.gguf, b.GGUF\); give one of them"):
        find_gguf(tmp_path)
    assert find_gguf(tmp_path / "b.GGUF") == tmp_path / "b.GGUF"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_gguf(tmp_path) is None


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(16, np.float32)), "tensor rope_freqs.weight"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)), "tensor blk.0.attn_q.bias"),
        (lambda w: w.add_string("llama.rope.scaling.type", "linear"), "setting llama.rope.scaling.type"),
        (lambda w: w.add_float32("llama.logit_scale", 0.5), "setting llama.logit_scale"),
    ],
    ids=["rope_freqs", "bias", "rope scaling", "logit scale"],
)
def test_what_would_be_passed_over_is_refused(tmp_path, own_root, more, named):
    """The cut was once another model than the file, without a word."""
    write_gguf(tmp_path / "m.gguf", more)
    with pytest.raises(UserError, match=f"holds the {named}, which transformers does not read"):
        inherit(str(tmp_path / "m.gguf"), "0:2", str(tmp_path / "cut"))
    assert not (tmp_path / "cut").exists()


TEXT = "It's 1234.\n\n1. a\t\t7"
PIECES = {
    "gpt-2": "It|'s| 1234|.|\n|\n|1|.| a|\t|\t|7",
    "smollm": "It|'s| |1|2|3|4|.|\n\n|1|.| a|\t\t|7",
    "qwen2": "It|'s| |1|2|3|4|.\n\n|1|.| a|\t|\t|7",
    "llama-bpe": "It|'s| |123|4|.\n\n|1|.| a|\t|\t|7",
}
"""What each way of splitting makes of TEXT, by hand."""


def write_bytes_model(path, pre: str) -> None:
    """Write a model whose tokenizer has every byte and splits text as `pre`; "cab" is a token of no merge."""
    tokens = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), "ab", "cab"]
    write_gguf(path, tokens=tokens, merges=["a b"], pre=pre)


@pytest.mark.parametrize("pre", PIECES)
def test_a_tokenizer_splits_text_as_the_file_says(tmp_path, own_root, pre):
    """Numbers once got ids that SmolLM2 had never seen: transformers does not know its splitting."""
    write_bytes_model(tmp_path / "m.gguf", pre)
    inherit(str(tmp_path / "m.gguf"), "0:2", str(tmp_path / "cut"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[begin:end] for _, (begin, end) in pieces] == PIECES[pre].split("|")
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], clean_up_tokenization_spaces=False) == TEXT
    assert len(tokenizer("cab")["input_ids"]) == (1 if pre == "llama-bpe" else 2)


def test_a_splitting_that_is_not_known_is_refused(tmp_path, own_root, caplog):
    write_bytes_model(tmp_path / "m.gguf", "viking")
    with pytest.raises(
        UserError, match=r"splits text as 'viking' \(tokenizer.ggml.pre\), which is not known"
    ):
        inherit(str(tmp_path / "m.gguf"), "0:2", str(tmp_path / "cut"))
    write_bytes_model(tmp_path / "m.gguf", "default")
    inherit(str(tmp_path / "m.gguf"), "0:2", str(tmp_path / "cut"))
    assert "does not say how its tokenizer splits text" in caplog.text


def test_what_changes_nothing_is_no_reason_to_refuse(tmp_path, own_root):
    def add(writer):
        writer.add_string("llama.rope.scaling.type", "none")
        writer.add_key_length(32)

    write_gguf(tmp_path / "m.gguf", add)
    inherit(str(tmp_path / "m.gguf"), "0:2", str(tmp_path / "cut"))


def test_a_gguf_file_is_analyzed(tmp_path, own_root):
    """`--layers auto:N` names this command, which could once not open the file."""
    write_gguf(tmp_path / "m.gguf")
    tokens = Tokens(write_tokens(tmp_path / "data", vocab=len(TOKENS)), "val")
    with pytest.raises(UserError, match=r"the tokenizer of \S+m.gguf gives other ids than that of the data"):
        measure_model(str(tmp_path / "m.gguf"), tokens, 2, 8)
    rows = measure_model(str(tmp_path / "m.gguf"), tokens, 2, 8, is_rehearsal=True)
    assert rows[0]["layers"] == 5 and list(rows[0]["files"]) == ["m.gguf"]
