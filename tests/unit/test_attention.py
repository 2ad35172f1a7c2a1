"""Attention measures against hand-made answers, float64 numpy decompositions and transformers' own attention
maps."""

import gc
import json

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from inheritune.analysis import analyze, attention, layers
from inheritune.analysis.attention import measure_model, watch_attention
from inheritune.analysis.layers import suggest_layers
from inheritune.analysis.measures import approximate_rank, column_mass, measure_uniform
from inheritune.analysis.thresholds import TAUS
from inheritune.config.experiment import load_experiment
from inheritune.data.batches import Tokens
from inheritune.errors import UserError
from inheritune.files.json_files import read_jsonl
from inheritune.files.rundir import RunDir

VOCAB, LENGTH, HEADS = 64, 24, 4


# --- the measures -------------------------------------------------------------------------------------------


def causal_uniform(T):
    return torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]


def first_column(T):
    A = torch.zeros(T, T)
    A[:, 0] = 1
    return A


def previous_token(T):
    A = torch.zeros(T, T)
    A[0, 0] = 1
    A[torch.arange(1, T), torch.arange(T - 1)] = 1
    return A


SANITY = {  # T = 100 -> (k* at the four taus or at 0.90, m* at eta 0.90): the definitions worked out by hand
    "uniform": (torch.full((100, 100), 0.01), (1, 1, 1, 1), 90),
    "causal uniform": (causal_uniform(100), (3, 4, 5, 8), 30),
    "identity": (torch.eye(100), (80, 85, 90, 95), 90),
    "first column": (first_column(100), (1, 1, 1, 1), 1),
    "half sink": ((first_column(100) + causal_uniform(100)) / 2, (1, 1, 1, None), 1),
    "previous token": (previous_token(100), (None, None, 89, None), None),
}


@pytest.mark.parametrize("name", SANITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sanity_values(name, dtype):
    A, ranks, mass = SANITY[name]
    A = A[None, None].to(dtype)
    for got, expected in zip(approximate_rank(A).flatten().tolist(), ranks, strict=True):
        assert expected in (None, got)
    assert mass in (None, column_mass(A).item())


def numpy_rank(A, tau):
    squares = np.linalg.svd(np.asarray(A, np.float64), compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(squares) >= (tau - 1e-9) * squares.sum())) + 1


def numpy_mass(A, eta):
    shares, total, count = (
        sorted((np.asarray(A, np.float64) ** 2).sum(axis=0))[::-1],
        (np.asarray(A, np.float64) ** 2).sum(),
        0,
    )
    reached = 0.0
    while reached < (eta - 1e-9) * total:
        reached, count = reached + shares[count], count + 1
    return count


def adversarial_maps(T=50):
    """Causal maps with equal, tiny, repeated and steep singular values."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.full((T, T), -torch.inf).triu(1)
    maps = [
        torch.softmax(torch.randn(T, T, generator=generator) * scale + mask, -1)
        for scale in (0, 0.1, 1, 3, 10, 100)
    ]
    blocks = torch.block_diag(*[torch.ones(5, 5) / 5] * (T // 5))  # 10 equal singular values, the others 0
    sink = first_column(T) * (1 - 1e-7) + torch.eye(T) * 1e-7
    logits = torch.randn(T, T, generator=generator) + mask
    logits[:, 0] += torch.linspace(-4, 12, T)  # a sink that opens row by row
    return torch.stack([*maps, blocks, sink, torch.softmax(logits, -1), previous_token(T), torch.eye(T)])[
        None
    ]


def assert_equal_to_numpy(A_NHTT):
    etas = (0.5, 0.9, 0.99)
    ranks, masses = approximate_rank(A_NHTT), column_mass(A_NHTT, etas)
    for n, h in np.ndindex(*A_NHTT.shape[:2]):
        assert ranks[:, n, h].tolist() == [numpy_rank(A_NHTT[n, h], tau) for tau in TAUS]
        assert masses[:, n, h].tolist() == [numpy_mass(A_NHTT[n, h], eta) for eta in etas]


def test_adversarial_maps_agree_with_numpy():
    assert_equal_to_numpy(adversarial_maps())


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3, 1e-5])
def test_second_singular_value_is_bounded(eps):
    """Section H: rows with at least 1 - eps on one column -> distance to rank 1, and second singular value,
    <= eps sqrt(2T)."""
    generator = torch.Generator().manual_seed(1)
    for T in (2, 10, 60):
        for column in (0, T // 2):
            rest = torch.rand(T, T, generator=generator, dtype=torch.float64) ** 8
            rest[:, column] = 0
            share = eps * torch.rand(T, 1, generator=generator, dtype=torch.float64)
            A = share * rest / rest.sum(dim=1, keepdim=True)
            A[:, column] = 1 - share[:, 0]
            assert torch.linalg.svdvals(A)[1] <= eps * np.sqrt(2 * T)
            if eps * eps * 2 * T < 0.05 * (1 - eps) ** 2 * T:  # then the first value holds 95%, whatever T is
                assert approximate_rank(A[None, None]).tolist() == [[[1]]] * len(TAUS)


# --- models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder by hand: 6000 validation tokens that repeat a pattern, so that attention has
    something to learn."""
    folder = tmp_path_factory.mktemp("data")
    values = np.random.default_rng(0).integers(0, VOCAB, 40)
    stream = np.concatenate([np.roll(values, shift)[:12] for shift in range(500)]).astype(np.uint16)
    stream.tofile(folder / "val.bin")
    splits = {"val": {"shards": [{"file": "val.bin", "tokens": len(stream)}]}, "train": {"shards": []}}
    manifest = {"fingerprint": "f" * 32, "tokenizer": {"vocab_size": VOCAB}, "dtype": "<u2", "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def trained(model, data, steps=30):
    """A few steps of training and larger query weights: maps that are neither uniform nor alike."""
    tokens = Tokens(data, "val")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = torch.from_numpy(np.stack([tokens.read(step * 40 + i * 600, LENGTH) for i in range(8)]))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name or "q_proj.weight" in name:
                parameter *= 4
    return model.eval()


NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}


def make_gpt2(**changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "n_positions": 32,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": HEADS,
        "resid_pdrop": 0.0,
    }
    scaled = {"scale_attn_by_inverse_layer_idx": True, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**shape, **scaled, **NO_SPECIAL, **changes}))


def make_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        **NO_SPECIAL,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def checkpoint(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    trained({"gpt2": make_gpt2, "llama": make_llama}[request.param](), data).save_pretrained(folder)
    return folder


def all_maps(folder, ids):
    """Attention as transformers itself returns it, all layers at once: a list of (B, H, T, T)."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return list(model(input_ids=ids, output_attentions=True).attentions)


def test_hooks_see_the_maps_that_transformers_returns(checkpoint, data):
    ids = attention.read_windows(Tokens(data, "val"), 5, LENGTH, seed=3)
    model = attention.load_model(str(checkpoint))
    seen = []
    with watch_attention(model, LENGTH, lambda layer, A: seen.append((layer, A.cpu()))), torch.no_grad():
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    expected = all_maps(checkpoint, ids)
    assert [layer for layer, _ in seen] == [0, 1, 2]
    for (_, got), wanted in zip(seen, expected, strict=True):
        assert got.shape == (5, HEADS, LENGTH, LENGTH)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert not any(
        module._forward_hooks for module in model.modules() if "Attention" in type(module).__name__
    )


def test_rows_follow_from_transformers_maps(checkpoint, data):
    tokens = Tokens(data, "val")
    rows = measure_model(
        str(checkpoint), tokens, n_sequences=7, length=LENGTH, seed=3, maps=[(2, 1)], batch=3
    )
    maps = all_maps(checkpoint, attention.read_windows(tokens, 7, LENGTH, seed=3))
    layers = [row for row in rows if row["kind"] == "layer"]
    assert [row["kind"] for row in rows] == ["header"] + ["layer"] * 3 + ["group"] * 5 + ["map", "summary"]
    for row, A in zip(layers, maps, strict=True):
        assert_equal_to_numpy(A)
        k = np.array([[numpy_rank(A[n, h], 0.9) for h in range(HEADS)] for n in range(7)])
        m = np.array([[numpy_mass(A[n, h], 0.9) for h in range(HEADS)] for n in range(7)])
        assert row["rank"]["0.9"] == k.mean(axis=0).tolist() and row["mass"]["0.9"] == m.mean(axis=0).tolist()
        assert row["max_rank"]["0.9"] == k.mean(axis=0).max()
        assert row["max_rank_std"]["0.9"] == pytest.approx(k[:, k.mean(axis=0).argmax()].std(), abs=1e-6)
        assert row["avg_mass"]["0.9"] == pytest.approx(m.mean(), abs=1e-6)
        assert row["avg_mass_std"]["0.9"] == pytest.approx(m.mean(axis=1).std(), abs=1e-6)
        assert list(row["max_rank"].values()) == sorted(row["max_rank"].values()), "k* grows with tau"
        assert row["heads_rank_1"] == (k.mean(axis=0) == 1).sum()
    assert len({tuple(row["rank"]["0.9"]) for row in layers}) > 1, "the test's maps should differ"
    shown = next(row for row in rows if row["kind"] == "map")
    np.testing.assert_allclose(shown["mean"], maps[2][:3, 1].mean(dim=0), atol=1e-4)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_seed_and_batch(checkpoint, data):
    tokens = Tokens(data, "val")
    one = measure_model(str(checkpoint), tokens, n_sequences=6, length=LENGTH, seed=0, batch=1)
    assert measure_model(str(checkpoint), tokens, n_sequences=6, length=LENGTH, seed=0, batch=6) == one
    windows = attention.read_windows(tokens, 20, LENGTH, 0)
    assert not torch.equal(windows, attention.read_windows(tokens, 20, LENGTH, 1))


def test_one_layer_in_memory(checkpoint, data):
    """When a layer is measured, no other (B, H, T, T) tensor is alive."""
    model = attention.load_model(str(checkpoint))
    ids = attention.read_windows(Tokens(data, "val"), 5, LENGTH, seed=0).to(model.device)
    alive = []

    def count(layer, A):
        gc.collect()
        maps = [
            x
            for x in gc.get_objects()
            if issubclass(type(x), torch.Tensor) and x.shape == (5, HEADS, LENGTH, LENGTH)
        ]
        alive.append(len({x.untyped_storage().data_ptr() for x in maps}))

    with watch_attention(model, LENGTH, count), torch.no_grad():
        model(input_ids=ids, use_cache=False, output_attentions=True)  # which would keep every layer's map
    assert alive == [1, 1, 1]


def test_inverse_layer_scaling_is_honoured(data, tmp_path):
    """The same weights with and without the scaling differ in every layer but the first."""
    model = trained(make_gpt2(), data, steps=5)
    ranks = {}
    for scaled in (True, False):
        model.config.scale_attn_by_inverse_layer_idx = scaled
        model.save_pretrained(tmp_path / str(scaled))
        maps = all_maps(tmp_path / str(scaled), torch.arange(LENGTH)[None])
        hidden = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(0))
        loaded = attention.load_model(str(tmp_path / str(scaled)))
        layer = loaded.transformer.h[2]
        q, k, _ = layer.attn.c_attn(layer.ln_1(hidden.to(loaded.device))).split(32, dim=2)
        q, k = (x.view(1, LENGTH, HEADS, 8).transpose(1, 2) for x in (q, k))
        logits = q @ k.mT / 8**0.5 / (3 if scaled else 1)
        logits = logits.masked_fill(
            torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=logits.device).triu(1), -torch.inf
        )
        seen = []
        causal = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min, device=logits.device).triu(1)[
            None, None
        ]
        with watch_attention(loaded, LENGTH, lambda _, A, seen=seen: seen.append(A)), torch.no_grad():
            layer(hidden.to(loaded.device), attention_mask=causal)
        torch.testing.assert_close(seen[0], logits.softmax(-1).detach(), rtol=1e-4, atol=1e-6)
        ranks[scaled] = maps
    assert torch.equal(ranks[True][0], ranks[False][0]) and not torch.allclose(
        ranks[True][2], ranks[False][2], atol=1e-3
    )


def test_sinks_are_lazy_and_uniform_attention_is_not(data, tmp_path):
    """Every head of layer 1 (from 0) looks at the first token, layer 2 has the same keys everywhere: ranks 1
    and 3."""
    model = make_gpt2(scale_attn_by_inverse_layer_idx=False)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = (
            100.0  # marks the first token; survives the layer norm as about sqrt(width)
        )
        for block in model.transformer.h[1:]:
            block.attn.c_attn.weight[:, :64] = 0
        sink = model.transformer.h[1].attn.c_attn
        sink.weight[0, 32:64] = 1.0  # keys read the mark
        sink.bias[:32] = 100.0  # queries, the same for every token, ask for it
    model.save_pretrained(tmp_path / "m")
    rows = measure_model(str(tmp_path / "m"), Tokens(data, "val"), n_sequences=3, length=LENGTH)
    layers = [row for row in rows if row["kind"] == "layer"]
    assert rows[-1]["lazy_layers"] == [1] and layers[1]["heads_rank_1"] == HEADS
    assert layers[1]["avg_mass"]["0.9"] == 1 and layers[1]["max_rank_std"]["0.9"] == 0
    assert layers[2]["max_rank"]["0.9"] == numpy_rank(causal_uniform(LENGTH), 0.9) > 1
    assert rows[-1]["uniform_layers"] == [0, 2], "layer 0 is as small random weights leave it"


@pytest.mark.parametrize("length", [24, 100])
def test_uniform_attention_has_the_rank_and_mass_of_its_map(length):
    A = causal_uniform(length)
    assert measure_uniform(length) == (numpy_rank(A, 0.9), numpy_mass(A, 0.9))
    assert length != 100 or measure_uniform(length) == (5, 30)


def test_a_layer_is_uniform_if_most_of_its_heads_are():
    def mark(ranks_H, masses_H, uniform=(5, 30)):
        ranks_FNH = np.broadcast_to(np.array(ranks_H), (len(TAUS), 9, len(ranks_H)))
        masses_FNH = np.broadcast_to(np.array(masses_H), (1, 9, len(masses_H)))
        row = layers.summarize_layer(0, ranks_FNH, masses_FNH, uniform)
        return row["heads_uniform"], row["uniform"]

    assert mark([5, 4, 6, 7], [30, 24, 36, 30]) == (3, True)  # each within a fifth
    assert mark([5, 5, 5, 5], [30, 30, 1, 90]) == (2, False)  # the rank alone does not say so
    assert mark([1, 1], [1, 1], uniform=(1, 1)) == (0, False)  # nor can so few tokens


def test_lazy_is_exact():
    """MaxRank of 1.02 is near 1, and counted as such, but not lazy; and of two heads the larger mean
    decides."""
    ranks = np.ones((len(TAUS), 50, 2), int)
    masses = np.ones((1, 50, 2), int)
    assert layers.summarize_layer(0, ranks, masses)["lazy"]
    ranks[2:, 7, 1] = 2  # at tau 0.90 and above
    row = layers.summarize_layer(0, ranks, masses)
    assert (row["lazy"], row["near_lazy"], row["heads_rank_1"], row["heads_near_1"]) == (False, True, 1, 2)
    assert row["max_rank"]["0.9"] == 1.02 and row["max_rank_std"]["0.9"] == pytest.approx(0.14, abs=1e-6)


# --- suggestion ---------------------------------------------------------------------------------------------


def layers_of(*max_ranks):
    return [
        {"kind": "layer", "layer": i, "max_rank": {"0.9": float(rank)}} for i, rank in enumerate(max_ranks)
    ]


@pytest.mark.parametrize(
    "ranks, n",
    [
        ((8, 6, 4, 1, 1, 1), 3),
        ((8, 6, 1, 5, 1, 1.2, 1, 1), 2),  # AvgRank of the last six is 1.7: still a lazy group
        ((8, 1, 9, 9, 1, 1), 4),  # a lazy layer among potent ones begins no lazy tail
        ((8, 6, 4, 2.5), 2),  # no lazy tail: half
        ((1, 1, 1, 1), 1),  # all lazy: at least one layer stays
        ((5,), 1),
        ((9, 3, 1, 1, 1, 1, 1, 1, 1, 1), 2),  # 3 is potent, although the tail with it has AvgRank 1.2
        ((9, 8, 7, 0.99 + 1, 1.0, 1.9), 3),
    ],
)
def test_suggested_layers(ranks, n):
    got, reason = suggest_layers(layers_of(*ranks))
    assert got == n and f"--layers 0:{n}" in reason and reason.count("\n") == 0


def test_paper_curves_suggest_about_half():
    """MaxRank read off the paper's Figure 1 (Medium, layers 3 to 24; the first two, not drawn there, as
    6)."""
    medium = [6, 6, 1.77, 6.19, 5.8, 33.58, 1.03, 8.5, 8.5, 6.39, 3.14, 1.18, 1.67, 2.75, 1.97, 1.08, 1.67]
    medium += [1.05, 1.11, 1.18, 1.08, 1.72, 1.05, 1.08]
    assert suggest_layers(layers_of(*medium))[0] == 11


def test_groups():
    rows = layers.summarize_groups(layers_of(9, 5, 3, 1, 1.5, 1))
    assert [(row["first"], row["end"], row["lazy"]) for row in rows] == [
        (0, 3, False),
        (3, 6, True),
        (0, 2, False),
        (2, 4, False),
        (4, 6, True),
    ]
    assert rows[1]["avg_rank"] == pytest.approx(3.5 / 3, abs=1e-6)


# --- refusals and the verb ----------------------------------------------------------------------------------


def test_refusals(checkpoint, data, tmp_path):
    tokens, model = Tokens(data, "val"), str(checkpoint)
    with pytest.raises(UserError, match="beyond the 32 positions"):
        measure_model(model, tokens, n_sequences=3, length=33)
    with pytest.raises(UserError, match="use --sequences 250"):
        measure_model(model, tokens, n_sequences=251, length=LENGTH)
    with pytest.raises(UserError, match="at least 1 sequence"):
        measure_model(model, tokens, n_sequences=0, length=LENGTH)
    with pytest.raises(UserError, match=r"map \(3, 0\)"):
        measure_model(model, tokens, n_sequences=3, length=LENGTH, maps=[(3, 0)])
    with pytest.raises(UserError, match="no model folder"):
        measure_model(str(tmp_path / "nothing"), tokens, n_sequences=3, length=LENGTH)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        measure_model(str(tmp_path), tokens, n_sequences=3, length=LENGTH)
    tokens.vocab_size = VOCAB + 1
    with pytest.raises(UserError, match=f"vocabulary of {VOCAB + 1} tokens"):
        measure_model(model, tokens, n_sequences=3, length=LENGTH)


def test_models_without_attention_maps_are_refused(data, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    mamba.save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="no attention to analyze"):
        measure_model(str(tmp_path / "mamba"), Tokens(data, "val"), n_sequences=3, length=LENGTH)


def test_attention_that_is_not_returned_is_refused(checkpoint, data, monkeypatch):
    load = attention.load_model

    def with_sdpa(model, revision=None):
        loaded = load(model, revision)
        loaded.set_attn_implementation("sdpa")
        return loaded

    monkeypatch.setattr(attention, "load_model", with_sdpa)
    with pytest.raises(UserError, match="0 attention maps came out of the 3 layers"):
        measure_model(str(checkpoint), Tokens(data, "val"), n_sequences=3, length=LENGTH)


def test_damaged_weights_are_refused(data, tmp_path):
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"layer 1 \(from 0\) is not finite"):
        measure_model(str(tmp_path / "nan"), Tokens(data, "val"), n_sequences=3, length=LENGTH)

    state = {k: v for k, v in make_gpt2().state_dict().items() if "h.2.mlp" not in k}
    model.save_pretrained(tmp_path / "short", state_dict=state)
    with pytest.raises(UserError, match="lacks the weights"):
        measure_model(str(tmp_path / "short"), Tokens(data, "val"), n_sequences=3, length=LENGTH)


def test_the_verb(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path))
    run = tmp_path / "runs" / "e" / "seed0" / "reference"
    make_gpt2().save_pretrained(run / "final")
    make_gpt2().save_pretrained(run / "at_00000010")

    folder = analyze.run_analyze(str(run / "final"), str(data), sequences=4, length=LENGTH)
    assert folder == run and sorted(p.name for p in run.iterdir()) == [
        "at_00000010",
        "attention.jsonl",
        "final",
    ]
    rows = read_jsonl(run / "attention.jsonl")
    assert rows[0]["sequences"] == 4 and rows[0]["data"] == "f" * 32 and rows[0]["rehearsal"] is False
    table = capsys.readouterr().out
    assert (
        "MaxRank" in table
        and "AvgRank of half 2 of 2 (layers 2 to 3)" in table
        and rows[-1]["reason"] in table
    )

    kept = analyze.run_analyze(str(run / "at_00000010"), str(data), sequences=4, length=LENGTH)
    assert kept == tmp_path / "runs" / "analysis" / "reference--at_00000010"
    assert (
        analyze.run_analyze(str(run / "final"), str(data), str(tmp_path / "o"), 4, LENGTH) == tmp_path / "o"
    )
    with pytest.raises(UserError, match="no experiment"):
        analyze.run_analyze(str(run / "final"), "no_such_experiment")


def test_a_rehearsal_is_marked_and_as_short_as_its_sequences(data, tmp_path, monkeypatch):
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path))
    experiment = load_experiment("quickstart", rehearse=True)
    run = RunDir.of(experiment, "reference")
    make_gpt2(n_positions=64).save_pretrained(run.final)
    run.experiment.write_text(yaml.safe_dump(experiment.model_dump(mode="json", by_alias=True)))
    assert analyze.run_analyze(str(run.final), str(data), sequences=3) == run.path
    header = read_jsonl(run.attention)[0]
    assert header["rehearsal"] is True and header["length"] == 64
