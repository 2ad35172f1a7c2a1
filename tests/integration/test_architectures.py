"""Every family of the architecture table: what is sliced, what is fresh, what is measured, and that it
trains.

The models are small random ones of transformers' own classes, saved by transformers in shards.
"""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import experiment_dict, run_verb, write_experiment, write_tokens
from launching import train_runs
from safetensors import safe_open
from test_train import losses_of
from tiny_families import FAMILIES, FURTHER, MIXED, family_config
from tiny_models import random_model
from transformers import AutoModelForCausalLM, masking_utils
from transformers.core_model_loading import revert_weight_conversion

from inheritune.analysis.attention import measure_model, read_windows
from inheritune.analysis.measures import approximate_rank
from inheritune.analysis.thresholds import TAUS
from inheritune.config.experiment import load_experiment
from inheritune.config.paths import REPOSITORY
from inheritune.config.run import MODULES, NORMS, PARTS
from inheritune.data.batches import Tokens
from inheritune.errors import UserError
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models import architectures as models
from inheritune.models import initialization
from inheritune.models.architectures import find_architecture
from inheritune.models.networks import (
    build_model,
    count_flops_per_token,
    find_linear_weights,
    find_training_attention,
    list_checkpoint_shapes,
    list_saved_tensors,
)
from inheritune.models.sources import open_source
from inheritune.models.surgery import inherit, write_random
from inheritune.paper.attention_plots import plot_avg_mass, plot_heat_map

NAMED = (
    "gpt2 gpt_neox gpt_bigcode opt bloom falcon phi phi3 llama mistral mixtral qwen2 qwen3 gemma gemma2 "
    "gemma3_text olmo"
)
NAMED += " olmo2 stablelm starcoder2 cohere granite"


def test_the_table_has_the_families_and_each_is_tested():
    table = yaml.safe_load((REPOSITORY / "inheritune" / "models" / "architectures.yaml").read_text())
    tested = {model_type for model_type, _ in FAMILIES.values()}
    assert tested == set(NAMED.split()) and set(table) == tested | set(FURTHER)


@pytest.mark.parametrize("family", FURTHER)
def test_a_family_that_is_only_cut_is_described_rightly(family):
    """Every tensor has a place, checkpoints have the names that transformers gives them, and fresh tensors
    are as transformers draws them."""
    config = family_config(family)
    table = find_architecture(config)
    pieces = list_checkpoint_shapes(config)
    places = {table.part_of(name) for name in pieces}
    assert {("blocks", "attn"), ("blocks", "mlp"), ("token_embedding", None)} <= places
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    assert set(pieces) == set(revert_weight_conversion(theirs, list_saved_tensors(theirs)))
    for name, value in revert_weight_conversion(theirs, list_saved_tensors(theirs)).items():
        ours = initialization.make_fresh_tensor(name, tuple(value.shape), config, seed=0)
        if value.unique().numel() == 1:
            assert torch.allclose(ours, value.float(), rtol=0.01), name
        elif value.numel() > 30:
            assert 0.3 < float(ours.std() / value.std()) < 3.0, name


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    """(family, random model of five layers, its folder of sharded safetensors)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(family_config(request.param))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return request.param, model, folder


def truncated(model, kept: list[int]):
    """The model with only the blocks `kept`, cut by hand: ModuleList and configuration."""
    cut = copy.deepcopy(model)
    blocks = cut.get_submodule(find_architecture(model.config).block.removesuffix(".{i}."))
    chosen = [blocks[i] for i in kept]
    del blocks[:]
    blocks.extend(chosen)
    cut.config.num_hidden_layers = len(kept)
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = [cut.config.layer_types[i] for i in kept]
    return cut


def logits(model) -> torch.Tensor:
    """Logits of two fixed sequences, three windows of attention long.  -> (2, 12, 61)"""
    with torch.no_grad():
        return model(
            torch.randint(0, 61, (2, 12), generator=initialization.make_generator("ids")), use_cache=False
        ).logits


WITHOUT_PLAIN_CAUSAL = {"bloom", "falcon_7b", "falcon_40b", "falcon_rw", "stablelm", "stablelm_parallel"}
WITHOUT_PLAIN_CAUSAL |= {"mistral", "qwen2", "qwen3", "gemma2", "gemma3", "starcoder2"}
"""No SDPA, attention that is no function of its own, or windows of attention (in these configurations)."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_of_training_has_the_same_bits_and_reads_nothing_back(family, monkeypatch):
    """transformers looks in each forward for several texts in a sequence: the host waits for the GPU."""
    config = family_config(family)
    attention = find_training_attention(config)
    assert (attention is None) == (family in WITHOUT_PLAIN_CAUSAL)
    if attention is None:
        return
    weights = random_model(config).state_dict()
    asked, find = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *a: asked.append(1) or find(*a))
    found = []
    for name in (None, attention):
        model = build_model(config, name).eval()
        model.load_state_dict(weights)
        found.append((logits(model), len(asked)))
    (default, before), (ours, after) = found
    assert torch.equal(ours, default) and default.abs().max() > 0
    assert before == after and (before > 0 or config.model_type == "opt")  # it makes a mask before


def keys(folder) -> set[str]:
    """Names of all tensors in the safetensors files of `folder`."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("layers, kept", [("0:3", [0, 1, 2]), ("3,1", [3, 1])], ids=["first", "moved"])
def test_slice_equals_the_model_cut_by_hand(source, tmp_path, layers, kept):
    family, model, folder = source
    manifest = inherit(folder, kept if "," in layers else layers, tmp_path / "out")
    ours, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    expected = truncated(model, kept)
    assert torch.equal(logits(ours.eval()), logits(expected))
    # the order of the blocks matters
    assert not torch.equal(logits(ours), logits(truncated(model, kept[::-1])))
    expected.save_pretrained(tmp_path / "theirs")
    assert keys(tmp_path / "out") == set(manifest["tensors"]) == keys(tmp_path / "theirs")
    assert all("copied" in row for row in manifest["tensors"].values())
    if family == "qwen3":
        assert ours.config.layer_types == [MIXED[i] for i in kept]


PLACES = [
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", "attn"),
    ("gpt_neox", "embed_out.weight", "head"),
    ("gpt_bigcode", "transformer.h.0.attn.c_attn.bias", "attn"),
    ("phi3", "model.layers.4.mlp.gate_up_proj.weight", "mlp"),
    ("phi", "lm_head.bias", "head"),
    ("bloom", "transformer.word_embeddings_layernorm.bias", "token_embedding"),
    ("opt", "model.decoder.layers.1.final_layer_norm.weight", "mlp_norm"),
    ("opt", "model.decoder.final_layer_norm.weight", "final_norm"),
    ("opt", "model.decoder.layers.1.fc2.bias", "mlp"),
    ("opt", "model.decoder.embed_positions.weight", "position_embedding"),
    ("opt_350m", "model.decoder.project_in.weight", "token_embedding"),
    ("opt_350m", "model.decoder.project_out.weight", "head"),
    ("falcon_7b", "transformer.h.0.input_layernorm.weight", "norms"),
    ("falcon_40b", "transformer.h.0.ln_mlp.weight", "mlp_norm"),
    ("falcon_rw", "transformer.h.0.post_attention_layernorm.weight", "mlp_norm"),
    ("mixtral", "model.layers.2.block_sparse_moe.experts.2.w3.weight", "mlp"),
    ("mixtral", "model.layers.2.block_sparse_moe.gate.weight", "mlp"),
    ("gemma3", "model.layers.1.post_feedforward_layernorm.weight", "mlp_norm"),
    ("gemma2", "model.layers.1.post_attention_layernorm.weight", "attn_norm"),
    ("llama", "model.layers.1.post_attention_layernorm.weight", "mlp_norm"),
    ("olmo2", "model.layers.1.post_attention_layernorm.weight", "attn_norm"),
    ("cohere", "model.layers.1.input_layernorm.weight", "norms"),
    ("gemma3", "model.layers.1.self_attn.q_norm.weight", "attn"),
    ("stablelm", "model.layers.1.self_attn.q_layernorm.norms.3.weight", "attn"),
    ("stablelm", "model.norm.bias", "final_norm"),
]


@pytest.mark.parametrize("family, name, place", PLACES)
def test_every_tensor_has_its_part_and_module(family, name, place):
    config = family_config(family)
    assert name in list_checkpoint_shapes(config)
    assert find_architecture(config).part_of(name) == (
        ("blocks", place) if place in MODULES + NORMS else (place, None)
    )


def test_what_is_not_named_is_fresh_as_transformers_draws_it(source, tmp_path):
    """Constants are the same, the spread of the others is; and with all parts but one, just that one is
    fresh."""
    family, model, folder = source
    write_random(model.config, tmp_path / "random")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "random").state_dict()
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(model.config).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value.unique().numel() == 1:
            assert torch.equal(ours[name], value), name
        elif value.numel() > 600:  # the error of a measured spread is 1 / sqrt(2 n): 3% here
            assert 0.8 < float(ours[name].std() / value.std()) < 1.25, name
        else:
            assert 0.4 < float(ours[name].std() / value.std()) < 2.5, name
    table = find_architecture(model.config)
    rows = inherit(folder, "1:3", tmp_path / "out", parts=[part for part in PARTS if part != "final_norm"])[
        "tensors"
    ]
    fresh = {name for name, row in rows.items() if "fresh" in row}
    assert fresh == {name for name in rows if table.part_of(name)[0] == "final_norm"}
    assert bool(fresh) == (family not in ("olmo", "opt_350m"))  # whose final norms have no weights


def test_only_matrices_that_multiply_activations_are_decayed(source):
    _, model, _ = source
    decayed = set(find_linear_weights(build_model(model.config)))
    names = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert decayed == {
        n for n in names if not any(word in n for word in ("embed", "wte", "wpe", "q_norm", "k_norm"))
    }


def test_flops_count_the_experts_that_a_token_passes_through():
    one, three = family_config("mixtral"), family_config("mixtral")
    one.num_local_experts = one.num_experts_per_tok = 1
    expert, router = 5 * 3 * 32 * 44, 5 * 32
    assert count_flops_per_token(three, 8) - count_flops_per_token(one, 8) == pytest.approx(
        6 * (expert + 2 * router)
    )


def test_experts_in_one_tensor_are_read_and_written_one_by_one(tmp_path):
    """A checkpoint with the model's own names (training writes those) is the same source as a published
    one."""
    model = random_model(family_config("mixtral"))
    model.save_pretrained(tmp_path / "published")
    (tmp_path / "own").mkdir()
    model.config.save_pretrained(tmp_path / "own")
    torch.save(model.state_dict(), tmp_path / "own" / "pytorch_model.bin")
    published, own = open_source(tmp_path / "published"), open_source(tmp_path / "own")
    name, experts = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.block_sparse_moe.experts."
    assert published.names() == own.names() and experts + "2.w3.weight" in own.names()
    for source in (published, own):
        assert torch.equal(source.tensor(name), model.state_dict()[name])
        assert torch.equal(source.tensor(experts + "2.w3.weight"), model.state_dict()[name][2, 44:])


# --- measured and trained -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens", vocab=61)


def test_analyze_measures_the_maps_that_transformers_returns(source, data, tmp_path):
    family, model, folder = source
    tokens = Tokens(data, "val")
    rows = measure_model(str(folder), tokens, n_sequences=3, length=12, maps=[(4, 3)])
    layers = [row for row in rows if row["kind"] == "layer"]
    with torch.no_grad():
        maps = model(read_windows(tokens, 3, 12, seed=0), output_attentions=True, use_cache=False).attentions
    assert len(layers) == len(maps) == 5
    for row, A_BHTT in zip(layers, maps, strict=True):
        assert [row["rank"][f"{tau:g}"] for tau in TAUS] == approximate_rank(A_BHTT).double().mean(
            dim=1
        ).tolist()
    # of Figures 11, 15, 21 and 22: LLaMA-3, OpenLLaMA, Cerebras-GPT too
    if family in ("llama", "falcon_7b", "olmo", "gpt2"):
        plot_heat_map(rows, tmp_path / "ranks.png", family)
        plot_avg_mass([(family, rows)], tmp_path / "mass.png")
        assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("ranks.png", "mass.png"))


@pytest.mark.slow
def test_every_family_trains_from_a_slice(tmp_path, own_root):
    """Two steps from three of five layers at ZeRO 3 on two ranks; the first loss is that of the slice
    itself."""
    ds = tmp_path / "zero3.json"
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ds.write_text(json.dumps({"train_micro_batch_size_per_gpu": 10, "zero_optimization": stage}))
    raw, runs = experiment_dict(paper=[]), {}
    for name in FAMILIES:
        random_model(family_config(name)).save_pretrained(tmp_path / name)
        runs[name] = {"init": {"inherit": {"source": str(tmp_path / name), "layers": "0:3"}}}
    raw["runs"] = runs
    raw["train"] |= {"steps": 2, "warmup_steps": 1, "eval_every": 2, "final_windows": 8, "deepspeed": str(ds)}
    raw["model"] |= {"vocab_size": 61}
    raw["data"] |= {"tokenizer": "bpe:300"}
    path = write_experiment(tmp_path, raw)
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment), vocab=61)
    train_runs([f"{path}:{name}" for name in FAMILIES], 2, own_root)
    for name in FAMILIES:
        run = RunDir.of(experiment, name)
        losses = losses_of(run)
        assert run.is_done() and len(losses) == 2 and np.isfinite(losses).all(), name
        start, final = open_source(run.init), open_source(run.final)
        assert keys(run.final) == keys(run.init), name
        moved = {n for n in final.names() if not torch.equal(start.tensor(n), final.tensor(n))}
        assert moved, name


# --- refused ------------------------------------------------------------------------------------------------


def test_adapter_is_refused_with_exit_code_2(tmp_path):
    """An adapter's folder has a config of its own and tensors that are no model."""
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/name", "peft_type": "LORA"})
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    done = run_verb(
        "inherit", "--source", tmp_path, "--layers", "0:2", "--out", tmp_path / "out", check=False
    )
    assert done.returncode == 2 and "is an adapter without the model" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


CHANGES = {
    "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "own code": {"model_type": "mine", "auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}},
    "encoder-decoder": {"model_type": "t5", "is_encoder_decoder": True},
}


@pytest.mark.parametrize("case", CHANGES)
def test_analyze_refuses_what_inherit_refuses(case, tmp_path, data):
    random_model(family_config("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **CHANGES[case]}))
    with pytest.raises(UserError, match="cannot be loaded as a causal LM") as refusal:
        measure_model(str(tmp_path), Tokens(data, "val"), n_sequences=1, length=8)
    assert "\n" not in str(refusal.value)


def test_example_of_the_documents_describes_its_family(monkeypatch):
    """A family that is not in the table: only whole blocks are cut, and with the lines of the documents every
    tensor is placed."""
    page = (REPOSITORY / "docs" / "new_architecture.md").read_text(encoding="utf-8")
    example = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    config = family_config("codegen")
    with pytest.raises(UserError, match="not in the architecture table, so only whole blocks"):
        find_architecture(config).part_of("lm_head.weight")
    monkeypatch.setattr(models, "_TABLE", {**models._TABLE, **example})
    places = {find_architecture(config).part_of(name) for name in list_checkpoint_shapes(config)}
    assert places == {("blocks", m) for m in MODULES} | {
        (p, None) for p in ("token_embedding", "final_norm", "head")
    }
