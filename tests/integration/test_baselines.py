"""The paper's baselines: every surgery tensor by tensor against tensors cut by hand, logit distillation
against plain PyTorch, and what their sections of an experiment refuse."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import experiment_dict, run_verb, write_experiment, write_tokens
from launching import train_runs
from test_train import losses_of
from tiny_models import config_of, logits, random_model, weights_of
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from inheritune.config.experiment import load_experiment
from inheritune.config.sections import Model
from inheritune.data.batches import Order, Tokens
from inheritune.engines.adamw import compute_learning_rate
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, read_jsonl, write_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.architectures import find_architecture
from inheritune.models.initialization import make_generator
from inheritune.models.networks import (
    build_config,
    build_model,
    count_flops_per_token,
    count_parameters,
    find_linear_weights,
)
from inheritune.models.sources import open_source
from inheritune.models.surgery import halve_config, halve_width, inherit, write_random

KINDS = ("paper", "public", "llama", "llama_tied")


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    """(model of six layers, its folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(config_of(request.param, layers=6))
    model.save_pretrained(folder)
    return model, folder


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def renumbered(model, name: str, blocks: list[int]) -> torch.Tensor:
    """The tensor of `model` that belongs at `name` of a model made of its blocks `blocks`."""
    name = re.sub(r"(?<=\.)\d+(?=\.)", lambda index: str(blocks[int(index[0])]), name, count=1)
    return model.state_dict()[name]


# --- stacking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, once", [("0:3", [0, 1, 2]), ([4, 1], [4, 1])], ids=str)
def test_stacked_blocks_are_the_sources_twice(source, tmp_path, layers, once):
    model, folder = source
    manifest, blocks = inherit(folder, layers, tmp_path / "out", copies=2), once * 2
    ours = opened(tmp_path / "out")
    for name, tensor in weights_of(ours).items():
        assert torch.equal(tensor, renumbered(model, name, blocks)), name
        assert "copied" in manifest["tensors"][name]
    assert (manifest["kind"], manifest["layers"]) == ("stack", blocks)
    half = len(once)
    last = ours.base_model.h[half] if model.config.model_type == "gpt2" else ours.base_model.layers[half]
    first = ours.base_model.h[0] if model.config.model_type == "gpt2" else ours.base_model.layers[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters(), strict=True))
    scaled = bool(getattr(model.config, "scale_attn_by_inverse_layer_idx", False))
    assert manifest["moved_blocks"]["changed"] == scaled
    assert {"block": half, "source_block": once[0]} in manifest["moved_blocks"]["blocks"] or not scaled


def test_a_block_stacked_at_half_depth_attends_otherwise_only_under_scaling_by_layer(tmp_path):
    """The same weights at index 0 and 3: equal for a public GPT-2, logits of attention divided by 4 for the
    paper's."""
    states = torch.randn(1, 7, 15, generator=make_generator("states"))
    for kind in ("public", "paper"):
        random_model(config_of(kind, layers=6)).save_pretrained(tmp_path / kind)
        inherit(tmp_path / kind, "0:3", tmp_path / f"{kind}_stacked", copies=2)
        blocks = opened(tmp_path / f"{kind}_stacked").transformer.h
        with torch.no_grad():
            first, fourth = (blocks[i](states)[0] for i in (0, 3))
            assert torch.equal(first, fourth) == (kind == "public")
            if kind == "paper":  # queries of block 0 made as small as those of block 3 are by the scaling
                blocks[0].attn.c_attn.weight[:, :15] /= 4
                torch.testing.assert_close(blocks[0](states)[0], fourth)


# --- blocks at chosen places --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "depth, at, blocks",
    [
        (7, 2, [None, None, 3, 4, None, None, None]),
        (None, 3, [None] * 3 + [3, 4]),
        (4, 0, [3, 4, None, None]),
    ],
)
def test_placed_blocks_are_copied_and_the_others_random(source, tmp_path, depth, at, blocks):
    model, folder = source
    manifest = inherit(folder, "3:5", tmp_path / "out", depth=depth, at=at, seed=5)
    target = open_source(tmp_path / "out")
    write_random(target.config, tmp_path / "random", seed=5)
    random, table = open_source(tmp_path / "random"), target.table
    assert manifest["layers"] == blocks and getattr(target.config, table.layers) == len(blocks)
    for name in target.names():
        inside = table.split_name(name)
        copied = inside is None or blocks[inside[0]] is not None
        expected = renumbered(model, name, blocks) if copied else random.tensor(name)
        assert torch.equal(target.tensor(name), expected), name
        assert list(manifest["tensors"][name]) == (["copied"] if copied else ["fresh", "xxh3"]), name
    moved = [(row["block"], row["source_block"]) for row in manifest["moved_blocks"]["blocks"]]
    scaled = bool(getattr(model.config, "scale_attn_by_inverse_layer_idx", False))
    assert moved == (
        [(i, layer) for i, layer in enumerate(blocks) if layer not in (None, i)] if scaled else []
    )


def test_blocks_at_their_own_places_keep_what_they_compute(tmp_path):
    """Figure 23 in small: the last blocks where they were, so nothing of them changes under scaling by
    layer."""
    random_model(config_of("paper", layers=6)).save_pretrained(tmp_path / "source")
    run_verb(
        "inherit",
        "--source",
        tmp_path / "source",
        "--layers",
        "4:6",
        "--out",
        tmp_path / "out",
        "--depth",
        6,
        "--at",
        4,
    )
    manifest = read_json(tmp_path / "out" / "inherited.json")
    assert manifest["layers"] == [None] * 4 + [4, 5] and not manifest["moved_blocks"]["changed"]
    assert "fresh" in manifest["tensors"]["transformer.h.3.mlp.c_fc.weight"]


def test_places_that_do_not_fit_are_refused(source, tmp_path):
    for options in ({"at": -1}, {"depth": 1}, {"depth": 3, "at": 2}):
        with pytest.raises(UserError, match="2 layers .* do not fit into depth"):
            inherit(source[1], "3:5", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# --- submodules ---------------------------------------------------------------------------------------------

SUBMODULES = {  # of Table 3: what is copied of a block, by its names
    ("attn", "attn_norm"): {"gpt2": ("attn.", "ln_1."), "llama": ("self_attn.", "input_layernorm.")},
    ("mlp", "mlp_norm"): {"gpt2": ("mlp.", "ln_2."), "llama": ("mlp.", "post_attention_layernorm.")},
    ("attn", "mlp"): {"gpt2": ("attn.", "mlp."), "llama": ("self_attn.", "mlp.")},
}


@pytest.mark.parametrize("modules", SUBMODULES, ids=str)
def test_submodules_are_copied_with_their_own_norm(source, tmp_path, modules):
    model, folder = source
    inherit(folder, "0:2", tmp_path / "out", parts=["blocks"], modules=list(modules), seed=3)
    target, prefixes = open_source(tmp_path / "out"), SUBMODULES[modules][model.config.model_type]
    write_random(target.config, tmp_path / "random", seed=3)
    random, found = open_source(tmp_path / "random"), set()
    for name in target.names():
        inside = target.table.split_name(name)
        copied = inside is not None and inside[1].startswith(prefixes)
        assert torch.equal(
            target.tensor(name), model.state_dict()[name] if copied else random.tensor(name)
        ), name
        found.add(copied)
    assert found == {True, False}


def test_one_norm_of_two_is_refused_where_there_is_only_one(tmp_path):
    from tiny_families import family_config

    write_random(family_config("phi"), tmp_path / "source")
    with pytest.raises(UserError, match="one norm serves attention and MLP, so name norms, not attn_norm"):
        inherit(tmp_path / "source", "0:2", tmp_path / "out", modules=["attn", "attn_norm"])
    assert not (tmp_path / "out").exists()


# --- half width ---------------------------------------------------------------------------------------------


def halved_by_hand(name: str, tensor: torch.Tensor, sizes: dict) -> torch.Tensor:
    """The part of a tensor that a half-wide model keeps, written out by the kinds of tensors. D = width, F =
    MLP width."""
    D, F = sizes["D"], sizes["F"]
    if ".c_attn." in name:
        return torch.cat([third[..., :D] for third in tensor.chunk(3, dim=-1)], dim=-1)[
            : D if tensor.dim() > 1 else None
        ]
    if ".attn.c_proj.weight" in name or ".q_proj." in name or ".o_proj." in name:
        return tensor[:D, :D]
    if ".c_fc.weight" in name or ".down_proj." in name:
        return tensor[:D, :F]
    if ".c_fc.bias" in name:
        return tensor[:F]
    if ".mlp.c_proj.weight" in name or ".up_proj." in name or ".gate_proj." in name:
        return tensor[:F, :D]
    if ".k_proj." in name or ".v_proj." in name:
        return tensor[: sizes["KV"], :D]
    return tensor[..., :D]  # embeddings, head, norms, biases onto the residual stream


# kind: (heads, D, F, KV) of half of config_of(kind); GPT-2 has 3 heads of 5, Llama 4 of 6 and 2 of keys and
# values
SIZES = {
    "paper": (1, 5, 11, None),
    "public": (1, 5, 20, None),
    "llama": (2, 12, 13, 6),
    "llama_tied": (2, 12, 13, 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_half_width_equals_a_cut_by_hand(tmp_path, kind):
    model = random_model(config_of(kind, layers=3))
    model.save_pretrained(tmp_path / "source")
    manifest = halve_width(tmp_path / "source", tmp_path / "out")
    ours, (heads, *sizes) = opened(tmp_path / "out"), SIZES[kind]
    sizes = dict(zip(["D", "F", "KV"], sizes, strict=True))
    expected = {name: halved_by_hand(name, tensor, sizes) for name, tensor in weights_of(model).items()}
    for name, tensor in weights_of(ours).items():
        assert torch.equal(tensor, expected[name]), name
        whole = list(model.state_dict()[name].shape)
        assert f"the first {list(tensor.shape)} of {whole}" in manifest["tensors"][name]["copied"]["cut"], (
            name
        )
    if "llama" not in kind:
        assert (
            "in each of 3 parts" in manifest["tensors"]["transformer.h.0.attn.c_attn.weight"]["copied"]["cut"]
        )
    assert (manifest["kind"], manifest["heads"], manifest["width"], manifest["layers"]) == (
        "half_width",
        heads,
        sizes["D"],
        [0, 1, 2],
    )
    config = {"num_attention_heads": heads, "hidden_size": sizes["D"]}
    config |= (
        {"n_inner": sizes["F"]}
        if "llama" not in kind
        else {"intermediate_size": sizes["F"], "num_key_value_heads": 1}
    )
    by_hand = config_of(kind, layers=3)
    for key, value in config.items():
        setattr(by_hand, key, value)
    hand = build_model(by_hand, "eager").eval()
    hand.load_state_dict(expected, strict=False)
    assert torch.equal(logits(ours), logits(hand))


def doubled(small, config):
    """A model of twice the width and heads that computes twice the logits of `small`: both halves of its
    residual stream are `small`'s, read from the first half by the first half of the heads and of the MLP;
    what the other halves compute (random numbers) nobody reads."""
    big = random_model(config, seed=9)
    weights = {}
    for name, ours in small.state_dict().items():
        value, noise = ours.clone(), big.state_dict()[name].clone()
        # Linear is outputs x inputs
        reads, writes = (1, 0) if ours.dim() > 1 and "llama" in config.model_type else (0, 1)
        if ours.dim() == 1 and (".c_attn." in name or ".c_fc." in name):
            sections = 3 if ".c_attn." in name else 1
            noise = noise.unflatten(0, (sections, -1))
            noise[:, : len(value) // sections] = value.unflatten(0, (sections, -1))
            value = noise.flatten()
        elif any(key in name for key in ("wte", "wpe", "embed_tokens", "lm_head")) or ours.dim() == 1:
            value = torch.cat([value, value], dim=-1)
        elif "c_proj" in name or "o_proj" in name or "down_proj" in name:  # onto the residual stream
            value = torch.cat([value, torch.zeros_like(value)], dim=reads)
            value = torch.cat([value, value], dim=writes)
        else:
            sections = 3 if ".c_attn." in name else 1
            parts = zip(value.chunk(sections, dim=writes), noise.chunk(sections, dim=writes), strict=True)
            whole = []
            for part, other in parts:
                part = torch.cat([part, torch.zeros_like(part)], dim=reads)
                whole += [part, other.narrow(writes, part.shape[writes], part.shape[writes])]
            value = torch.cat(whole, dim=writes)
        weights[name] = value
    big.load_state_dict(weights)
    return big


@pytest.mark.parametrize("kind", ["public", "llama", "llama_tied"])
def test_half_width_keeps_the_first_half_of_the_heads(tmp_path, kind):
    """Not by slices again but by what is computed: `halve` finds in the doubled model the small one."""
    if kind == "public":
        sizes = {
            "vocab_size": 61,
            "n_positions": 12,
            "n_layer": 3,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        small, config = GPT2Config(n_embd=15, n_head=3, **sizes), GPT2Config(n_embd=30, n_head=6, **sizes)
    else:
        small, config = config_of(kind, layers=3), config_of(kind, layers=3)
        for key, factor in {
            "hidden_size": 2,
            "intermediate_size": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }.items():
            setattr(config, key, factor * getattr(small, key))
        assert isinstance(config, LlamaConfig) and config.head_dim == small.head_dim
    small = random_model(small)
    big = doubled(small, config)
    torch.testing.assert_close(logits(big), 2 * logits(small), rtol=1e-4, atol=1e-4)
    big.save_pretrained(tmp_path / "big")
    halve_width(tmp_path / "big", tmp_path / "out")
    assert torch.equal(logits(opened(tmp_path / "out")), logits(small))


def test_half_width_of_a_llama_without_grouped_queries_computes(tmp_path):
    config = build_config(Model(size="llama_tiny", layers=2, width=16, heads=4, mlp_width=24, vocab_size=64))
    assert config.num_key_value_heads == config.num_attention_heads
    write_random(config, tmp_path / "big", 0)
    halve_width(tmp_path / "big", tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert (half.config.num_attention_heads, half.config.num_key_value_heads) == (2, 2)
    assert half(torch.arange(8)[None]).logits.isfinite().all()


def test_half_of_the_papers_models():
    """Parameter counts of recipes/paper/table_model_configs.csv; XL's 25 heads become 12 of 64, as the
    docstring says."""
    for size, heads, width, count in (
        ("gpt2_medium", 8, 512, 101_802_496),
        ("gpt2_large", 10, 640, 209_843_840),
        ("gpt2_xl", 12, 768, 50_304 * 768 + 1024 * 768 + 48 * (12 * 768**2 + 2 * 768) + 768),
    ):
        half = halve_config(build_config(Model(size=size)))
        assert (half.num_attention_heads, half.hidden_size, half.n_inner) == (heads, width, 4 * width)
        assert count_parameters(half) == count


def test_half_width_of_another_family_and_of_one_head_is_refused(tmp_path):
    from tiny_families import family_config

    write_random(family_config("bloom"), tmp_path / "bloom")
    config = config_of("llama")
    config.num_key_value_heads = 1
    write_random(config, tmp_path / "one")
    for name, what in (("bloom", "family bloom with 4 key"), ("one", "family llama with 1 key")):
        with pytest.raises(UserError, match=f"half width can be cut from gpt2 and llama .* {what}"):
            halve_width(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what experiments refuse --------------------------------------------------------------------------------

REFERENCE = {"init": "random"}


def inherited(**more) -> dict:
    return {"init": {"inherit": {"source": "reference", "layers": "0:2", **more}}}


MISTAKES = {
    "two starts": (
        {"init": {"random": True, "stack": {"source": "reference", "layers": "0:2"}}},
        "give exactly one of: ",
    ),
    "layers of a stack": (
        {"init": {"stack": {"source": "reference", "layers": "0:2"}}, "layers": 4},
        "'layers' belongs to a random run",
    ),
    "key": ({"init": {"half_width": {"source": "reference", "layers": "0:2"}}}, "unknown key; .*revision"),
    "too deep": (
        {"init": {"stack": {"source": "reference", "layers": "0:5"}}},
        "asks for layer 4; the source has 4 layers",
    ),
    "no room": (inherited(depth=3, at=2), "do not fit into depth 3"),
    "module": (inherited(modules=["attn_nrom"]), "modules.0: Input should be"),
    "grow elsewhere": (inherited(at=1) | {"grow": {"max_layers": 3}}, "'grow' adds layers to the first ones"),
    "alpha": (
        {**REFERENCE, "distil": {"teacher": "reference", "alpha": 1.0}},
        "distil.alpha: Input should be less than 1",
    ),
    "temperature": (
        {**REFERENCE, "distil": {"teacher": "reference", "temperature": 0}},
        "should be greater than 0",
    ),
    "own teacher": ({**REFERENCE, "distil": {"teacher": "ours"}}, "runs.ours: .* contains a cycle"),
    "external": (
        {"init": {"external": {"source": "a/b"}}, "distil": {"teacher": "reference"}},
        "'distil' belongs to a run",
    ),
    "other's run": (
        {**REFERENCE, "distil": {"teacher": "public"}},
        "named by its own source, 'a/b', not by a run",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_contradictions_are_told_when_the_file_is_read(tmp_path, case):
    run, sentence = MISTAKES[case]
    runs = {"reference": REFERENCE, "public": {"init": {"external": {"source": "a/b"}}}, "ours": run}
    with pytest.raises(UserError, match=sentence):
        load_experiment(write_experiment(tmp_path, experiment_dict(runs=runs, paper=[])))


def test_rehearsal_maps_every_list_by_one_rule(tmp_path):
    runs = {
        "reference": REFERENCE,
        "half": {"init": "random", "layers": 8},
        "stacking": {"init": {"stack": {"source": "half", "layers": "0:8"}}},
        "lazy": {"init": {"inherit": {"source": "reference", "layers": "15:24", "depth": 24, "at": 15}}},
        "teacher": {
            "init": {"inherit": {"source": "reference", "layers": [*range(0, 24, 2), 18, 19, 20, 21]}}
        },
    }
    raw = experiment_dict(runs=runs, paper=[], model={"size": "gpt2_medium"})
    small = load_experiment(write_experiment(tmp_path, raw), rehearse=True)
    assert {name: small.layers_of(run) for name, run in small.runs.items()} == {
        "reference": 8,
        "half": 3,
        "stacking": 6,
        "lazy": 8,
        "teacher": 6,
    }
    assert small.runs["lazy"].init.copied.blocks(8) == [None] * 5 + [5, 6, 7]
    assert small.runs["teacher"].init.copied.blocks(8) == [0, 2, 4, 6, 6, 7]


# --- distillation -------------------------------------------------------------------------------------------

STEPS, ALPHA, TEMPERATURE = 12, 0.3, 2.0
TRAIN = {
    "steps": STEPS,
    "batch_tokens": 20 * 32,
    "lr": 3e-3,
    "min_lr": 3e-4,
    "warmup_steps": 3,
    "clip": 0.05,
    "weight_decay": 0.5,
    "eval_every": 6,
    "eval_windows": 8,
    "final_windows": 16,
    "log_every": 1,
    "checkpoint_every": 4,
    "precision": "fp32",
}


def distilled(root: Path) -> str:
    """An experiment of a teacher of four layers and students of two, whose shares of the batch need padding
    on two ranks."""
    runs = {"reference": {"init": "random", "train": {"steps": 60, "lr": 2e-2, "clip": 1.0}}}
    for stage in (0, 3):
        settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
        if stage == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (root / f"zero{stage}.json").write_text(json.dumps(settings))
        train = {"deepspeed": str(root / f"zero{stage}.json")}
        taught = {"teacher": "reference", "alpha": ALPHA, "temperature": TEMPERATURE}
        runs[f"taught_{stage}"] = {"init": "random", "layers": 2, "distil": taught, "train": train}
        runs[f"alone_{stage}"] = {"init": "random", "layers": 2, "train": train}
    runs["autocast"] = {
        **runs["taught_3"],
        "train": {**runs["taught_3"]["train"], "precision": "bf16_autocast"},
    }
    path = write_experiment(root, experiment_dict(runs=runs, train=TRAIN, paper=[]))
    write_tokens(get_data_dir(load_experiment(path)))
    return path


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """(root, path) of that experiment, all of it trained on two ranks."""
    root = tmp_path_factory.mktemp("distil")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(root))
        path = distilled(root)
        names = ["reference", "taught_0", "taught_3", "alone_0", "alone_3", "autocast"]
        train_runs([f"{path}:{name}" for name in names], 2, root)
    return root, path


@pytest.fixture
def runs_of(taught, monkeypatch):
    """name -> its folder, and the experiment."""
    root, path = taught
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    experiment = load_experiment(path)
    return lambda name: RunDir.of(experiment, name), experiment, path


def model_of(folder: Path):
    source = open_source(folder)
    model = build_model(source.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.tensor(name))
    return model


def plain_distillation(experiment, run: RunDir, teacher: RunDir) -> dict[str, np.ndarray]:
    """The same training in plain PyTorch: one batch, KL by its definition in float64, no DeepSpeed. -> rows
    by key"""
    train = experiment.train_of(experiment.runs["taught_0"])
    tokens = Tokens(get_data_dir(experiment), "train")
    order = Order(tokens, "random_windows", 32, 20, seed=0)
    student, teacher = model_of(run.seed_checkpoint(2)), model_of(teacher.final).eval()
    decayed = {id(p) for p in find_linear_weights(student).values()}
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if (id(p) in decayed) is wanted],
            "weight_decay": train.weight_decay if wanted else 0.0,
        }
        for wanted in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps)
    rows = {"loss": [], "ce_loss": [], "distil_loss": [], "grad_norm": []}
    for step in range(STEPS):
        windows = torch.from_numpy(np.stack([tokens.read(int(s), 33) for s in order.starts(step)]))
        logits = student(input_ids=windows[:, :-1], use_cache=False).logits
        with torch.no_grad():
            theirs = teacher(input_ids=windows[:, :-1], use_cache=False).logits
        p, q = (torch.softmax(x.double() / TEMPERATURE, dim=-1) for x in (theirs, logits))
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        kl = (p * (p / q).log()).sum(dim=-1).mean() * TEMPERATURE**2
        loss = ALPHA * ce + (1 - ALPHA) * kl
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, train.clip)
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(step + 1, train)
        optimizer.step()
        for key, value in (("loss", loss), ("ce_loss", ce), ("distil_loss", kl), ("grad_norm", norm)):
            rows[key].append(value.item())
    return {key: np.array(values) for key, values in rows.items()}


@pytest.mark.slow
def test_distillation_equals_plain_pytorch_at_zero_0_and_3(runs_of):
    folder, experiment, _ = runs_of
    plain = plain_distillation(experiment, folder("taught_0"), folder("reference"))
    assert plain["distil_loss"].min() > 0.05 and plain["grad_norm"].min() > TRAIN["clip"]
    for stage in (0, 3):
        run = folder(f"taught_{stage}")
        for key in ("loss", "ce_loss", "distil_loss"):
            assert np.abs(losses_of(run, key) - plain[key]).max() < 1e-5, (stage, key)
        assert np.abs(losses_of(run, "grad_norm") / plain["grad_norm"] - 1).max() < 1e-4, stage
        alone = folder(f"alone_{stage}")
        # the same start and batch
        assert losses_of(alone)[0] == pytest.approx(losses_of(run, "ce_loss")[0], abs=1e-6)
        norms = losses_of(alone, "grad_norm")[0], losses_of(run, "grad_norm")[0]
        assert (
            abs(norms[0] / norms[1] - 1) > 1e-2
            and np.abs(losses_of(alone) - losses_of(run, "ce_loss")).max() > 1e-3
        )
        assert not any("distil_loss" in row for row in read_jsonl(alone.metrics))
    assert np.abs(losses_of(folder("autocast")) - plain["loss"]).max() < 2e-2
    assert np.abs(losses_of(folder("autocast")) - plain["loss"]).max() > 1e-6


@pytest.mark.slow
def test_the_teachers_forward_is_counted_and_its_weights_are_on_record(runs_of):
    folder, experiment, _ = runs_of
    student, teacher = (count_flops_per_token(build_config(experiment.model, n), 32) for n in (2, 4))
    tokens = STEPS * 20 * 32
    assert read_json(folder("alone_3").results)["train_flops"] == student * tokens
    assert read_json(folder("taught_3").results)["train_flops"] == pytest.approx(
        (student + teacher / 3) * tokens
    )
    start = read_json(folder("taught_3").provenance)["starts"][0]
    weights = {
        name: facts
        for name, facts in read_json(folder("reference").done)["final"].items()
        if "safetensors" in name
    }
    assert start["teacher"]["files"] == {n: facts for n, facts in weights.items() if n.startswith("model-")}


@pytest.mark.slow
def test_resumed_distillation_is_the_unbroken_one_and_needs_the_same_teacher(runs_of, tmp_path):
    folder, _, path = runs_of
    run, teacher = folder("taught_3"), folder("reference")
    record = [
        {k: v for k, v in row.items() if not re.search("_s$|memory|mfu", k)}
        for row in read_jsonl(run.metrics)
    ]
    shards = {file.name: file.read_bytes() for file in run.final.glob("*.safetensors")}
    run.done.unlink()
    shutil.rmtree(run.final)
    shutil.rmtree(run.checkpoint(12)) if run.checkpoint(12).exists() else None
    victim = next(teacher.final.glob("model-*.safetensors"))
    saved = {file: file.read_bytes() for file in (victim, teacher.done, teacher.results)}
    victim.write_bytes(saved[victim][:-4] + b"\0\0\0\1")  # as if trained again
    write_json(teacher.done, {"final": hash_folder(teacher.final)})
    write_json(teacher.results, read_json(teacher.results) | {"weights": teacher.weights_hash()})
    refused = run_verb("train", path, "--run", "taught_3", procs=2, check=False)
    assert (
        refused.returncode == 2
        and "whose weights are not those of" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    for file, content in saved.items():
        file.write_bytes(content)
    again = run_verb("train", path, "--run", "taught_3", procs=2)
    assert "resumed at step 8" in again.stdout
    now = [
        {k: v for k, v in row.items() if not re.search("_s$|memory|mfu", k)}
        for row in read_jsonl(run.metrics)
    ]
    assert now == record
    assert {file.name: file.read_bytes() for file in run.final.glob("*.safetensors")} == shards


def test_a_teacher_that_does_not_fit_is_one_sentence(small, tmp_path):
    raw = experiment_dict(paper=[])
    random_model(config_of("paper")).save_pretrained(tmp_path / "other")
    raw["runs"]["unfinished"] = {"init": "random", "layers": 2, "distil": {"teacher": "reference"}}
    raw["runs"]["misfit"] = {"init": "random", "layers": 2, "distil": {"teacher": str(tmp_path / "other")}}
    path = write_experiment(tmp_path / "recipes", raw)
    for run, sentence in (
        (
            "unfinished",
            f"run 'reference' of small (seed 0) is not finished; first: python -m inheritune train {path} "
            f"--run",
        ),
        (
            "misfit",
            "has 61 tokens and 12 positions, the student 320 tokens and sequences of 32; use a teacher that "
            "fits",
        ),
    ):
        done = run_verb("train", path, "--run", run, check=False)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert not RunDir.of(load_experiment(path), run).experiment.exists()
    assert (
        "run 'reference', which it needs, is not trained"
        in run_verb("check", path, "--run", "unfinished", check=False).stderr
    )


# --- the whole way ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_start_trains_from_an_experiment(tmp_path, own_root):
    """Each kind of start as a run: its init/ is what the surgery says, it trains, and its results tell its
    size."""
    raw = experiment_dict(paper=[])
    raw["runs"] = {
        "reference": REFERENCE,
        "half": {"init": "random", "layers": 2},
        "stacking": {"init": {"stack": {"source": "half", "layers": "0:2"}}, "compare": "reference"},
        "hybrid": {
            "init": {
                "stack": {
                    "source": "reference",
                    "layers": "0:2",
                    "parts": ["token_embedding", "blocks", "head"],
                }
            }
        },
        "half_width": {"init": {"half_width": {"source": "reference"}}},
        "lazy": {"init": {"inherit": {"source": "reference", "layers": "3:4", "depth": 4, "at": 3}}},
    }
    path = write_experiment(tmp_path, raw)
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment))
    train_runs([f"{path}:{name}" for name in raw["runs"]], 2, own_root)
    manifests = {
        name: read_json(RunDir.of(experiment, name).init / "inherited.json") for name in list(raw["runs"])[2:]
    }
    assert {name: (m["kind"], m["layers"]) for name, m in manifests.items()} == {
        "stacking": ("stack", [0, 1, 0, 1]),
        "hybrid": ("stack", [0, 1, 0, 1]),
        "half_width": ("half_width", [0, 1, 2, 3]),
        "lazy": ("inherit", [None, None, None, 3]),
    }
    fresh = {name for name, row in manifests["hybrid"]["tensors"].items() if "fresh" in row}
    assert fresh == {"transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    results = {name: read_json(RunDir.of(experiment, name).results) for name in raw["runs"]}
    assert {name: r["layers"] for name, r in results.items()} == {
        name: experiment.layers_of(r) for name, r in experiment.runs.items()
    }
    assert results["half_width"]["parameters"] < results["reference"]["parameters"] / 2
    compared = {name: r["compared_with"] for name, r in results.items() if "compared_with" in r}
    assert compared == dict.fromkeys(("stacking", "hybrid", "half_width", "lazy"), "reference")
    assert all(math.isfinite(r["validation"]["mean"]) for r in results.values())
    table = find_architecture(GPT2Config())
    stacked, half = (
        open_source(RunDir.of(experiment, n).path / part)
        for n, part in (("stacking", "init"), ("half", "final"))
    )
    for name in stacked.names():
        inside = table.split_name(name)
        from_name = name if inside is None else table.block.format(i=inside[0] % 2) + inside[1]
        assert torch.equal(stacked.tensor(name), half.tensor(from_name)), name
