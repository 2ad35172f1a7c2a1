"""inherit.py: slices equal models cut by hand, bit for bit; every tensor is accounted for; refusals write
nothing."""

import copy
import errno
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny_families import LLAMA, NO_TOKENS
from tiny_models import config_of, logits, random_model, weights_of
from tiny_tokenizers import TEMPLATE, save_by_newest, write_chat_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from inheritune.config.run import MODULES
from inheritune.errors import UserError
from inheritune.files import json_files, markers
from inheritune.models.architectures import find_architecture
from inheritune.models.config_files import OLDER_KEYS
from inheritune.models.initialization import make_fresh_tensor
from inheritune.models.networks import list_checkpoint_shapes
from inheritune.models.sources import open_source
from inheritune.models.surgery import extend_model, inherit, write_random

KINDS = ("paper", "public", "llama", "llama_tied")


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    """(model of six layers, its folder of sharded safetensors with a tokenizer file)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(config_of(request.param, layers=6))
    model.save_pretrained(folder, max_shard_size="9KB")
    (folder / "tokenizer.json").write_text("{}")
    return model, folder


def truncated(model, layers: list[int]):
    """The model with only the blocks `layers`, cut by hand: ModuleList and configuration."""
    cut = copy.deepcopy(model)
    table = find_architecture(model.config)
    inner = cut.get_submodule(table.block.split(".{i}")[0])
    kept = [inner[i] for i in layers]
    del inner[:]
    inner.extend(kept)
    for i, block in enumerate(kept):  # the index under which a block scales its attention and keeps its cache
        attention = block.attn if model.config.model_type == "gpt2" else block.self_attn
        attention.layer_idx = i
        if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
            attention.scaling = attention.head_dim**-0.5 / (i + 1)
    setattr(cut.config, table.layers, len(layers))
    return cut


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


LAYERS = {"0:6": range(6), ":3": [0, 1, 2], "-2:": [4, 5], "2:5": [2, 3, 4], (0, 5, 3): [0, 5, 3], "1:2": [1]}


@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_slice_equals_the_model_cut_by_hand(source, tmp_path, layers):
    model, folder = source
    before, kept = snapshot(folder), list(LAYERS[layers])
    manifest = inherit(folder, layers, tmp_path / "out")
    ours, expected = opened(tmp_path / "out"), truncated(model, kept)
    assert torch.equal(logits(ours), logits(expected))
    if len(kept) == 6:
        assert torch.equal(logits(ours), logits(model))
    weights = weights_of(expected)
    assert list(manifest["tensors"]) == list(weights) and manifest["layers"] == kept
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in weights.items())
    for name, row in manifest["tensors"].items():
        assert (
            row["copied"]["tensor"] in weights_of(model) and Path(row["copied"]["file"]).parent == folder
        ), name
    moves = kept != list(range(len(kept))) and bool(
        getattr(model.config, "scale_attn_by_inverse_layer_idx", False)
    )
    assert manifest["moved_blocks"]["changed"] == moves
    markers.check_files(tmp_path / "out", manifest["files"])
    assert set(manifest["files"]) | {"inherited.json"} == {p.name for p in (tmp_path / "out").iterdir()}
    assert json_files.read_json(tmp_path / "out" / "inherited.json") == manifest
    assert (tmp_path / "out" / "tokenizer.json").is_file() and snapshot(folder) == before


SUBSETS = [
    (["blocks"], list(MODULES)),
    (["blocks"], ["attn"]),
    (["blocks", "final_norm"], ["mlp", "norms"]),
    (["token_embedding"], ["attn"]),
    (["head", "position_embedding"], ["norms"]),
]


@pytest.mark.parametrize("parts, modules", SUBSETS, ids=str)
def test_what_is_not_named_is_that_of_the_random_model(source, tmp_path, parts, modules):
    model, folder = source
    manifest = inherit(folder, "3:5", tmp_path / "out", parts=parts, modules=modules, seed=7)
    expected, target = weights_of(truncated(model, [3, 4])), open_source(tmp_path / "out")
    table, tied = target.table, target.config.tie_word_embeddings
    write_random(target.config, tmp_path / "random", seed=7)
    random = open_source(tmp_path / "random")
    named = 0
    for name, tensor in expected.items():
        part, module = table.part_of(name)
        module = "norms" if module in ("attn_norm", "mlp_norm") else module
        copied = part in parts and (part != "blocks" or module in modules)
        copied = copied or (tied and part == "token_embedding" and "head" in parts)
        fresh = make_fresh_tensor(name, tuple(tensor.shape), target.config, 7)
        assert torch.equal(random.tensor(name), fresh)
        assert torch.equal(target.tensor(name), tensor if copied else fresh), name
        assert list(manifest["tensors"][name])[0] == ("copied" if copied else "fresh"), name
        named += copied
    assert 0 < named < len(expected) and manifest["tied_head"] == tied


def test_parts_and_modules_may_be_words(tmp_path):
    random_model(config_of("llama")).save_pretrained(tmp_path / "source")
    manifest = inherit(tmp_path / "source", "0:1", tmp_path / "out", parts="head,blocks", modules="mlp")
    assert manifest["parts"] == ["blocks", "head"] and manifest["modules"] == ["mlp"]


def test_half_precision_source_gives_a_half_precision_target(tmp_path):
    model = random_model(config_of("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    inherit(tmp_path / "source", "1:3", tmp_path / "out", parts=["blocks"])
    target = opened(tmp_path / "out")
    assert target.dtype == torch.bfloat16
    fresh = make_fresh_tensor("lm_head.weight", (61, 24), target.config, 0)
    assert torch.equal(target.lm_head.weight, fresh.bfloat16())
    assert torch.equal(target.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_lists_with_one_entry_per_block_are_cut_by_index(tmp_path):
    config = config_of("llama", layers=4)
    config.layer_types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    random_model(config).save_pretrained(tmp_path / "source")
    inherit(tmp_path / "source", [3, 1], tmp_path / "out")
    assert open_source(tmp_path / "out").config.layer_types == ["full_attention", "sliding_attention"]


def test_chain_of_inheritance_and_random_start(tmp_path):
    """A slice is a source, and so is a random start; frozen biases stay marked and zero."""
    config = config_of("paper", layers=6)
    manifest = write_random(config, tmp_path / "random", seed=3)
    assert all(list(row) == ["fresh", "xxh3"] for row in manifest["tensors"].values())
    assert list(manifest["tensors"]) == list(list_checkpoint_shapes(config))
    inherit(tmp_path / "random", "0:4", tmp_path / "a")
    inherit(tmp_path / "a", "0:2", tmp_path / "b")
    inherit(tmp_path / "random", "0:2", tmp_path / "c")
    b, c = open_source(tmp_path / "b"), open_source(tmp_path / "c")
    assert all(torch.equal(b.tensor(name), c.tensor(name)) for name in b.names())
    assert b.config.frozen_zero_biases and not b.tensor("transformer.h.1.mlp.c_fc.bias").any()


def test_tokenizer_templates_and_settings_come_along(tmp_path):
    """All that is beside the weights of a chat model, in words of both versions; the manifest has it."""
    source, out = tmp_path / "source", tmp_path / "out"
    config = config_of("llama")
    config.vocab_size = 310  # the tokenizer has 305
    random_model(config).save_pretrained(source)
    (source / "generation_config.json").unlink(missing_ok=True)
    write_chat_tokenizer(tmp_path / "older")
    save_by_newest(tmp_path / "older", source)
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "notes.md"):
        (source / name).write_text("{}")
    described = json_files.read_json(source / "config.json") | {
        "temperature": 0.6,
        "do_sample": True,
        "eos_token_id": [2, 3],
    }
    json_files.write_json(source / "config.json", described | {"_name_or_path": "/home/me/model"}, seal=False)
    manifest = inherit(source, "0:2", out)
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "vocab.json",
        "merges.txt",
    } < written
    assert {
        "tokenizer.model",
        "added_tokens.json",
        "generation_config.json",
    } < written and "notes.md" not in written
    assert set(manifest["files"]) | {"inherited.json"} == written
    markers.check_files(out, manifest["files"])
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert json_files.read_json(out / "generation_config.json") == {
        "do_sample": True,
        "temperature": 0.6,
        "eos_token_id": [2, 3],
    }
    assert "/home/me" not in "".join(path.read_text() for path in out.glob("*config.json"))
    assert json_files.read_json(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    inherit(out, "0:1", tmp_path / "again")  # a slice of a slice
    for name in written - {"inherited.json", "config.json"}:
        if not name.startswith("model"):
            assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


# --- growth from the previous stage -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_extend_keeps_what_was_trained_and_adds_blocks_of_the_reference(tmp_path, kind):
    previous, reference = random_model(config_of(kind, 2), seed=1), random_model(config_of(kind, 6), seed=2)
    previous.save_pretrained(tmp_path / "previous")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "reference")
    manifest = extend_model(tmp_path / "previous", tmp_path / "reference", 2, 5, tmp_path / "out")
    ours, table = opened(tmp_path / "out"), find_architecture(previous.config)
    assert getattr(ours.config, table.layers) == 5 and ours.dtype == torch.float32
    for name, tensor in weights_of(ours).items():
        inside = table.split_name(name)
        origin = reference if inside and inside[0] >= 2 else previous
        assert torch.equal(tensor, origin.state_dict()[name].float()), name
        row = manifest["tensors"][name]["copied"]
        assert Path(row["file"]).parent.name == ("reference" if origin is reference else "previous")
        assert row.get("cast") == ("torch.bfloat16 to torch.float32" if origin is reference else None)
    assert not manifest["moved_blocks"]["changed"]
    assert extend_model(tmp_path / "previous", tmp_path / "reference", 2, 5, tmp_path / "out") == manifest


def test_extend_joins_what_names_the_same_positions_in_other_words(tmp_path):
    """A reference as transformers 4 wrote it, and a slice of it in words of both versions or as an older
    version left it."""
    for family in ("llama", "phi3"):
        positions = {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
        if family == "phi3":
            positions = {"rope_theta": 77.0, "partial_rotary_factor": 0.5}
        raw = {"model_type": family, "vocab_size": 61, **NO_TOKENS, **LLAMA, **positions}
        folder = tmp_path / family
        random_model(CONFIG_MAPPING[family].from_dict(copy.deepcopy(raw))).save_pretrained(
            folder / "reference"
        )
        json_files.write_json(
            folder / "reference" / "config.json", raw | {"architectures": ["X"]}, seal=False
        )
        inherit(folder / "reference", "0:2", folder / "slice")
        extend_model(folder / "slice", folder / "reference", 2, 3, folder / "out")
        shutil.copytree(folder / "slice", folder / "older")
        (folder / "older" / "inherited.json").unlink()
        described = json_files.read_json(folder / "older" / "config.json")
        described = {key: value for key, value in described.items() if key not in OLDER_KEYS}
        if family == "llama":
            described["rope_parameters"]["type"] = "linear"
        json_files.write_json(folder / "older" / "config.json", described, seal=False)
        extend_model(folder / "older", folder / "reference", 2, 3, folder / "again")
        assert (
            opened(folder / "out").config.rope_parameters == opened(folder / "again").config.rope_parameters
        )
        with pytest.raises(UserError, match="differ in rope_parameters"):
            described["rope_parameters"]["rope_theta"] = 78.0
            json_files.write_json(folder / "older" / "config.json", described, seal=False)
            extend_model(folder / "older", folder / "reference", 2, 3, folder / "other")


def test_extend_refuses_models_that_do_not_fit(tmp_path):
    for name, kind, layers in (
        ("two", "paper", 2),
        ("six", "paper", 6),
        ("public", "public", 6),
        ("llama", "llama", 6),
    ):
        random_model(config_of(kind, layers)).save_pretrained(tmp_path / name)
    cases = [
        ("two", "llama", 2, 4, "is a gpt2 and .* a llama"),
        ("two", "public", 2, 4, "differ in"),
        ("two", "six", 3, 4, "has 2 layers, not 3"),
        ("two", "six", 2, 7, "cannot extend 2 layers to 7"),
        ("two", "six", 2, 2, "cannot extend 2 layers to 2"),
    ]
    for previous, reference, low, high, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            extend_model(tmp_path / previous, tmp_path / reference, low, high, tmp_path / "out")
    assert_nothing_written(tmp_path / "out")


# --- refusals, repetition, room -----------------------------------------------------------------------------


def assert_nothing_written(out: Path):
    assert not out.exists() and not list(out.parent.glob(".*tmp*"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    random_model(config_of("llama")).save_pretrained(folder)
    return folder


REFUSALS = {
    "beyond the end": ({"layers": "0:5"}, "asks for layer 4; the source has 4 layers"),
    "no layer": ({"layers": "2:2"}, "selects no layer"),
    "malformed": ({"layers": "first"}, "neither a half-open range"),
    "unknown part": ({"parts": ["block"]}, "parts: unknown name 'block'; did you mean 'blocks'"),
    "unknown module": ({"modules": ["attention"]}, "modules: unknown name 'attention'"),
    "no part": ({"parts": []}, "parts is empty"),
    "no source": ({"source": "/no/such/folder"}, "is neither a folder"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_and_nothing_written(llama, tmp_path, case):
    arguments, sentence = REFUSALS[case]
    with pytest.raises(UserError, match=sentence):
        inherit(**{"source": llama, "layers": "0:2", "out": tmp_path / "out", **arguments})
    assert_nothing_written(tmp_path / "out")


def test_same_surgery_again_changes_nothing(llama, tmp_path, capsys):
    out = tmp_path / "out"
    manifest = inherit(llama, "0:2", out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert inherit(llama, [0, 1], out) == manifest and "already complete" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    for changed in ({"layers": "0:3"}, {"seed": 1}, {"parts": ["blocks"]}):
        with pytest.raises(UserError, match=f"another surgery .its {next(iter(changed))} differs"):
            inherit(**{"source": llama, "layers": "0:2", "out": out, **changed})
    shard = next(out.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut off or replaced"):
        inherit(llama, "0:2", out)


def test_source_written_anew_is_another_surgery(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "source")
    inherit(tmp_path / "source", "0:2", tmp_path / "out")
    random_model(config_of("llama"), seed=9).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="its source_files differs"):
        inherit(tmp_path / "source", "0:2", tmp_path / "out")


def test_folder_with_something_else_is_left_alone(llama, tmp_path):
    (tmp_path / "out").mkdir()
    inherit(llama, "0:2", tmp_path / "out")  # an empty folder is free
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(UserError, match="already holds something else"):
        inherit(llama, "0:2", tmp_path / "thesis")
    assert snapshot(tmp_path / "thesis") == {"chapter1.tex": b"precious"}


def test_disk_without_room(llama, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 6 * 10**6))
    with pytest.raises(UserError, match=r"needs (\d+) MB, its disk has 6 MB free; free some") as caught:
        inherit(llama, "0:2", tmp_path / "out")
    assert int(re.search(r"needs (\d+) MB", str(caught.value))[1]) > 6  # with what it needs besides weights
    assert_nothing_written(tmp_path / "out")


def test_disk_that_fills_up_meanwhile(llama, tmp_path, monkeypatch):
    from inheritune.models.writer import CheckpointWriter

    whole, calls = CheckpointWriter.add, []

    def full(self, name, tensor):
        calls.append(name)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", full)
    with pytest.raises(UserError, match="no space left while writing"):
        inherit(llama, "0:2", tmp_path / "out")
    assert_nothing_written(tmp_path / "out")


# --- memory -------------------------------------------------------------------------------------------------


def test_peak_memory_does_not_grow_with_the_layers(tmp_path):
    """2 against 8 of 12 layers of 25 MB each (150 MB apart): the same peak, within two of the largest tensors
    (8 MB)."""
    config = config_of("paper", layers=12)
    for key, value in {"n_embd": 720, "n_inner": 2880, "n_head": 12}.items():
        setattr(config, key, value)
    write_random(config, tmp_path / "source")
    program = (
        "import resource, sys; from inheritune.models.surgery import inherit; inherit(*sys.argv[1:4]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "source")]
    runs = [
        subprocess.Popen([*command, f"0:{n}", str(tmp_path / f"out{n}")], stdout=subprocess.PIPE, text=True)
        for n in (2, 8)
    ]
    peaks = [int(run.communicate()[0].split()[-1]) for run in runs]
    assert abs(peaks[1] - peaks[0]) < 17, f"MB with 2 and 8 layers: {peaks}"
