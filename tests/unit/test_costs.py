"""What layers are worth, against models changed by hand: a block deleted, an output projection set to zero, a
model cut by surgery."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from tiny_families import family_config
from tiny_models import config_of, random_model
from transformers import AutoModelForCausalLM

from inheritune.analysis import attention, costs
from inheritune.analysis.attention import load_model, measure_model
from inheritune.analysis.blocks import BlockRunner
from inheritune.analysis.costs import CostMeter, find_windows
from inheritune.analysis.layers import suggest_by_cost, summarize_model
from inheritune.analysis.report import describe_rows
from inheritune.analysis.worth import measure_worth
from inheritune.config.layers import RULES, AutoLayers
from inheritune.data.batches import Tokens
from inheritune.errors import UserError
from inheritune.models.architectures import find_architecture
from inheritune.models.choice import pick_layers
from inheritune.models.surgery import inherit

LENGTH = 10
IDS = torch.randint(0, 61, (5, LENGTH), generator=torch.Generator().manual_seed(0))
LAST = {"attn": r"(o_proj|c_proj|dense|out_proj)", "mlp": r"(down_proj|c_proj|fc2|dense_4h_to_h)"}
"""Names of the last projection of a block's attention and MLP."""


def loss_of(model) -> torch.Tensor:
    """Each sequence's mean loss, by torch's own cross-entropy.  -> (5,)"""
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, IDS[:, 1:], reduction="none")
    return losses.double().mean(dim=1)


def list_blocks(model):
    return model.get_submodule(find_architecture(model.config).block.removesuffix(".{i}."))


def without_block(model, layer: int):
    """The model with a block deleted from its list. The others keep their index."""
    cut = copy.deepcopy(model)
    del list_blocks(cut)[layer]
    cut.config.num_hidden_layers -= 1
    if getattr(cut.config, "layer_types", None):
        del cut.config.layer_types[layer]
    return cut


def without_part(model, layer: int, part: str):
    """The model whose attention or MLP ends in a projection of zeros."""
    silent, found = copy.deepcopy(model), 0
    prefixes = tuple(find_architecture(model.config).modules[part])
    for name, parameter in list_blocks(silent)[layer].named_parameters():
        inside = name.replace("mlp.", prefixes[0]) if model.config.model_type == "mixtral" else name
        if inside.startswith(prefixes) and re.search(rf"\.?{LAST[part]}(\.|$)", inside):
            parameter.data.zero_()
            found += 1
    assert found in (1, 2), "the projection's weight, and its bias where there is one"
    return silent


FORMS = {
    "gpt2": "as in the paper",
    "bloom": "a part adds to the residual itself",
    "falcon_40b": "attention and MLP side by side",
    "opt": "the MLP is no module of its own",
    "opt_350m": "norms after each sum",
    "gemma2": "norms around each part",
    "mixtral": "experts, under another name than in checkpoints",
    "qwen3": "windows of attention in some blocks",
    "granite": "parts that are scaled",
}
"""Families whose blocks differ in what matters here."""


@pytest.mark.parametrize("family", FORMS)
def test_costs_are_those_of_deleting_by_hand(family):
    model = random_model(family_config(family))
    meter = CostMeter(model, IDS, batch=3)
    assert meter.missing == ""
    found, layer = meter.measure(), 2
    assert torch.allclose(found.loss_N, loss_of(model), atol=1e-5)
    expected = {"block": loss_of(without_block(model, layer))}
    if family == "opt_350m":  # its norms follow each sum: a block is more than what its parts add
        assert found.missing == {"attn": list(range(5)), "mlp": list(range(5))}
    else:
        assert found.missing == {}
        expected |= {part: loss_of(without_part(model, layer, part)) for part in ("attn", "mlp")}
    for kind, losses in expected.items():
        torch.testing.assert_close(found.without[layer, kind], losses, atol=2e-5, rtol=0)
    differences = {round((losses - found.loss_N).abs().max().item(), 4) for losses in expected.values()}
    assert 0.0 not in differences and len(differences) == len(expected), "each cost should be another"
    torch.testing.assert_close(loss_of(model), found.loss_N, atol=1e-5, rtol=0)  # nothing stays changed


def test_every_forward_is_counted_and_few_are_needed():
    meter, calls = CostMeter(random_model(config_of("llama")), IDS, batch=2), []
    meter.advance = lambda: calls.append(1)
    meter.measure()
    meter.measure_cut([0, 2])
    assert len(calls) == meter.count_forwards(1) == 3 * (1 + 4 * 4 + 1)


def test_a_loss_that_is_not_finite_is_a_large_number():
    """JSON has no inf."""
    model = random_model(config_of("llama"))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
        assert BlockRunner(model).read_losses(IDS).tolist() == [1e4] * 5


def test_a_block_with_a_forward_of_its_own_keeps_it():
    model = random_model(config_of("llama"))
    block = list_blocks(model)[2]
    block.forward = own = block.forward
    CostMeter(model, IDS, batch=5).measure()
    assert block.forward is own and "forward" not in vars(list_blocks(model)[1])


def test_a_model_of_one_block():
    model = random_model(config_of("llama", layers=1))
    meter = CostMeter(model, IDS, batch=5)
    assert meter.missing == ""
    found = meter.measure()
    assert torch.equal(found.without[0, "block"], found.first[0]) and find_windows(found.distance) == []


@pytest.fixture(scope="module", params=["paper", "public", "llama"])
def model(request):
    return random_model(config_of(request.param))


def test_influence_and_distance_follow_from_the_states(model):
    states = []
    hook = list_blocks(model)[-1].register_forward_hook(
        lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():  # transformers' own list ends with the state after the final norm
        inner = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    states = [state.double().numpy() for state in (*inner[:-1], states[0])]
    found = CostMeter(model, IDS, batch=2).measure()

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    for layer in range(4):
        assert found.influence[layer] == pytest.approx(
            1 - cosine(*states[layer : layer + 2]).mean(), abs=1e-6
        )
    for first, end in ((0, 2), (1, 4), (3, 4)):
        angles = np.arccos(cosine(states[first][:, -1], states[end][:, -1])) / np.pi
        assert found.distance[first, end].item() == pytest.approx(angles.mean(), abs=1e-6)


def test_the_best_window_is_the_one_that_moves_least():
    distance = torch.tensor([[0, 0.5, 0.6, 0.9], [0, 0, 0.2, 0.4], [0, 0, 0, 0.3], [0, 0, 0, 0]])
    rows = find_windows(distance)
    assert [(row["k"], row["first"], row["end"]) for row in rows] == [(1, 1, 2), (2, 1, 3)]
    assert [row["distance"] for row in rows] == pytest.approx([0.2, 0.4])


def test_norms_are_those_of_attention_times_values():
    model = random_model(config_of("public"))
    with torch.no_grad():
        out = model(input_ids=IDS, output_attentions=True, output_hidden_states=True, use_cache=False)
        block = model.transformer.h[1]
        values = block.attn.c_attn(block.ln_1(out.hidden_states[1])).split(15, dim=2)[2]
    heads = out.attentions[1] @ values.view(5, LENGTH, 3, 5).transpose(1, 2)  # (B, H, T, D)
    expected = heads.norm(dim=-1).mean(dim=(0, 2))
    assert CostMeter(model, IDS, batch=5).measure().head_norm[1] == pytest.approx(expected.tolist(), rel=1e-4)


def test_blocks_that_hand_on_more_than_their_states_have_no_costs(monkeypatch):
    """A block that reads what an earlier one left aside cannot be run alone: it is noticed, not measured
    wrongly."""
    model = random_model(config_of("llama"))
    blocks, kept = list_blocks(model), {}
    blocks[0].register_forward_hook(lambda _, __, out: kept.update(first=out))
    blocks[3].register_forward_hook(lambda _, __, out: out + kept.pop("first", 0))
    meter = CostMeter(model, IDS, batch=5)
    assert meter.missing == "its blocks hand on more than their states"


def test_a_family_without_an_entry_has_the_costs_of_whole_blocks(monkeypatch):
    def unknown(model_type):
        raise UserError("not in the table")

    model = random_model(config_of("llama"))
    expected = CostMeter(model, IDS, batch=5).measure()
    monkeypatch.setattr("inheritune.analysis.blocks.find_architecture", unknown)
    found = CostMeter(model, IDS, batch=5).measure()
    assert torch.equal(found.without[1, "block"], expected.without[1, "block"])
    assert found.missing == {"attn": [0, 1, 2, 3], "mlp": [0, 1, 2, 3]}
    assert found.layer_keys(1)["cost"]["attn"] is None and found.head_norm == [None] * 4


# --- rows, and cuts by each rule ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared data by hand: 600 validation tokens."""
    folder = tmp_path_factory.mktemp("data")
    np.random.default_rng(0).integers(0, 61, 600).astype(np.uint16).tofile(folder / "val.bin")
    splits = {"val": {"shards": [{"file": "val.bin", "tokens": 600}]}, "train": {"shards": []}}
    manifest = {"fingerprint": "f" * 32, "tokenizer": {"vocab_size": 61}, "dtype": "<u2", "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Tokens(folder, "val")


@pytest.fixture(scope="module", params=["public", "llama"])
def analyzed(request, data, tmp_path_factory):
    """(folder of a model, the rows of its analysis)"""
    folder = tmp_path_factory.mktemp(request.param)
    random_model(config_of(request.param, layers=6)).save_pretrained(folder)
    return folder, measure_model(str(folder), data, n_sequences=5, length=LENGTH, costs=True)


def test_the_loss_after_a_cut_is_that_of_the_cut_model(analyzed, data, tmp_path):
    folder, rows = analyzed
    ids = attention.read_windows(data, 5, LENGTH, seed=0)
    cuts = [row for row in rows if row["kind"] == "cut"]
    assert {row["rule"] for row in cuts} == {"first", *RULES} and {3} <= {row["n"] for row in cuts}
    for i, row in enumerate(cuts):
        inherit(folder, row["layers"], tmp_path / str(i))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(i)).eval()
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
    first = next(row["loss"] for row in rows if row["kind"] == "first")
    assert len(first) == 7 and first[6] == rows[0]["loss"]


def test_all_lazy_layers_are_left_out_together(analyzed, data):
    """Two layers that are marked as lazy, 2 and 5: the loss is that of the model without both."""
    folder, rows = analyzed
    assert not [row for row in rows if row["kind"] == "without_lazy"]  # none is lazy
    model = load_model(str(folder))
    ids = attention.read_windows(data, 5, LENGTH, seed=0)
    layers = [row | {"near_lazy": row["layer"] in (1, 4)} for row in rows if row["kind"] == "layer"]
    header, more = measure_worth(model, ids, 5, layers, progress=False)
    row = next(row for row in more if row["kind"] == "without_lazy")
    cut = without_block(without_block(model, 4), 1)
    with torch.no_grad():
        loss = cut(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert row["layers"] == [1, 4] and row["loss"] == pytest.approx(loss, abs=1e-5)
    said = describe_rows([rows[0] | header, *layers, *more, rows[-1]])
    assert f"without all layers of MaxRank below 1.5 (2, 5): {row['loss']:.4f}" in said


def test_rows_are_json_and_batches_do_not_matter(analyzed, data):
    folder, rows = analyzed
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    again = measure_model(str(folder), data, n_sequences=5, length=LENGTH, costs=True, batch=2)
    for row, other in zip(rows, again, strict=True):
        assert row.keys() == other.keys()
        if row["kind"] == "layer":
            assert row["cost"] == pytest.approx(other["cost"], abs=1e-5)
            assert row["influence"] == pytest.approx(other["influence"], abs=1e-5)


def test_the_table_is_narrow_and_says_what_was_measured(analyzed):
    _, rows = analyzed
    table = describe_rows(rows)
    lines = table.splitlines()
    assert max(map(len, lines[1:-9])) <= 100  # the first line has the path
    assert all(f"  {row['cost']['block']:.4f}"[:9] in table for row in rows if row["kind"] == "layer")
    assert "loss right after a cut to n layers" in table and "of little use" in table
    plain = [row for row in rows if row["kind"] not in ("first", "window", "cut")]
    plain[0] = {key: value for key, value in plain[0].items() if key != "loss"}
    plain[-1] = {key: value for key, value in plain[-1].items() if key != "suggested_by_cost"}
    assert "cut to n" not in describe_rows(plain) and "MaxRank" in describe_rows(plain)


def make_layers(*costs_of_blocks, ranks=()):
    return [
        {
            "kind": "layer",
            "layer": i,
            "cost": {"block": cost, "attn": None, "mlp": None},
            "influence": -cost,
            "max_rank": {"0.9": float(ranks[i] if ranks else 9)},
            "rank": {"0.9": [1.0]},
            **dict.fromkeys(("heads_rank_1", "heads_near_1", "heads_uniform"), 0),
            **dict.fromkeys(("lazy", "near_lazy", "uniform"), False),
        }
        for i, cost in enumerate(costs_of_blocks)
    ]


@pytest.mark.parametrize(
    ("blocks", "n"),
    [
        ((2, 1, 0.5, 0.02, 0.01), 3),
        ((2, 1, 0.02, 0.5), 4),  # a costly last layer: nothing at the end can go
        ((0.0, 0.0), 1),  # one layer stays
        ((2, 1, -0.1, 0.039), 2),  # 1% of a loss of 4
        ((2, 1, -0.1, 0.04), 4),
    ],
)
def test_the_suggestion_by_cost(blocks, n):
    assert suggest_by_cost(make_layers(*blocks), loss=4.0) == n


def test_the_summary_counts_what_is_of_little_use():
    found = summarize_model(make_layers(2, 0.001, 1, 0.0), loss=4.0)
    assert found["little_use_layers"] == [1, 3] and found["suggested_by_cost"] == 3
    assert found["suggested_layers"] == 2, "by rank no tail is lazy: half"
    assert "suggested_by_cost" not in summarize_model(make_layers(1, 1))


def test_blocks_are_picked_by_each_rule():
    rows = [*make_layers(3, 0.1, 0.5, 0.1, 2), {"kind": "window", "k": 2, "first": 1, "end": 3}]
    assert pick_layers(rows, AutoLayers(3, "cost")) == [0, 2, 4]
    assert pick_layers(rows, AutoLayers(4, "cost")) == [0, 1, 2, 4], "of equal ones the earlier is kept"
    assert pick_layers(rows, AutoLayers(2, "influence")) == [1, 3]
    assert pick_layers(rows, AutoLayers(3, "window")) == [0, 3, 4]
    assert pick_layers(rows, AutoLayers(5, "window")) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="has no window"):
        pick_layers(rows, AutoLayers(4, "window"))
    with pytest.raises(UserError, match="6 layers are to be kept, but the model has 5"):
        pick_layers(rows, AutoLayers(6, "cost"))
    with pytest.raises(UserError, match="has no cost of the layers"):
        pick_layers([{"kind": "layer", "layer": i} for i in range(3)], AutoLayers(2, "cost"))


def test_large_vocabularies_are_read_in_smaller_batches(monkeypatch):
    monkeypatch.setattr(costs, "BATCH_ELEMENTS", 61 * LENGTH * 3)
    assert CostMeter(random_model(config_of("public", layers=2)), IDS, batch=5).batch == 3
