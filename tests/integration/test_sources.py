"""sources.py: every kind of checkpoint gives back the tensors that were saved, and a damaged one is refused
in a sentence."""

import errno
import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import REPOSITORY
from launching import launch_locally
from tiny_models import config_of, logits, random_model, weights_of
from transformers import AutoModelForCausalLM

from inheritune.errors import UserError
from inheritune.files.json_files import write_json
from inheritune.files.markers import hash_folder
from inheritune.models import deepspeed_files, extents
from inheritune.models.dtypes import FP32
from inheritune.models.networks import list_checkpoint_shapes
from inheritune.models.sources import open_source
from inheritune.models.writer import CheckpointWriter, write_checkpoint

KINDS = ("paper", "public", "llama", "llama_tied")


def save(model, folder: Path, layout: str) -> Path:
    """Save `model` as transformers does (one file or shards), or as .bin files with a hand-written index."""
    if layout == "shards":
        model.save_pretrained(folder, max_shard_size="6KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
    elif layout == "single":
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        state = model.state_dict()
        names = list(state)
        if layout == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            halves = {"pytorch_model-00001-of-00002.bin": names[: len(names) // 2]}
            halves["pytorch_model-00002-of-00002.bin"] = names[len(names) // 2 :]
            for file, part in halves.items():
                torch.save({name: state[name].clone() for name in part}, folder / file)
            index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("layout", ["single", "shards", "bin", "bin_shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_saved_tensors(tmp_path, kind, layout):
    model = random_model(config_of(kind))
    source = open_source(save(model, tmp_path, layout))
    expected = weights_of(model)
    assert source.names() == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.tensor(name), tensor)
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == FP32
        assert (tmp_path / source.file_of(name)).is_file()
    assert torch.equal(source.tensor("lm_head.weight"), model.lm_head.weight)


def test_half_precision_stays(tmp_path):
    model = random_model(config_of("llama")).to(torch.bfloat16)
    for layout in ("single", "bin"):
        source = open_source(save(model, tmp_path / layout, layout))
        assert all(
            source.tensor(n).dtype == torch.bfloat16 and torch.equal(source.tensor(n), t)
            for n, t in weights_of(model).items()
        )


def test_names_without_prefix_and_with_old_buffers(tmp_path):
    """openai-community/gpt2: no 'transformer.', no head, causal masks among the tensors."""
    model = random_model(config_of("public"))
    published = {name.removeprefix("transformer."): t.contiguous() for name, t in weights_of(model).items()}
    for i in range(4):
        published[f"h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.bool)
        published[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(published, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.names() == list(weights_of(model))
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in weights_of(model).items())


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled, then DistributedDataParallel": lambda name: f"module._orig_mod.{name}",
    "DistributedDataParallel, compiled": lambda name: f"_orig_mod.module.{name}",
    "blocks compiled": lambda name: name.replace(".h.0.", ".h.0._orig_mod.").replace(
        ".layers.0.", ".layers.0._orig_mod."
    ),
    "FSDP and checkpointing": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        ".attn.", "._checkpoint_wrapped_module.attn."
    ),
    "compiled base model": lambda name: (
        "_orig_mod." + name.removeprefix("transformer.").removeprefix("model.")
    ),
}


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["public", "llama"])
@pytest.mark.parametrize("case", WRAPPED)
def test_names_of_a_wrapped_model_are_those_of_the_model(tmp_path, case, kind, layout):
    model = random_model(config_of(kind))
    named = {WRAPPED[case](name): tensor.clone() for name, tensor in model.state_dict().items()}
    assert not named.keys() & weights_of(model).keys() or case == "blocks compiled"
    model.config.save_pretrained(tmp_path)
    if layout == "bin":
        torch.save(named, tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(named, tmp_path / "model.safetensors")
    source, expected = open_source(tmp_path), weights_of(model)
    assert source.names() == list(expected)
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in expected.items())


def test_wrapped_and_plain_names_of_one_tensor_are_refused(tmp_path):
    model = random_model(config_of("llama"))
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["_orig_mod.model.norm.weight"] = state["model.norm.weight"] + 1
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match="holds model.norm.weight both of a compiled or wrapped model and of a plain one"
    ):
        open_source(tmp_path)


def test_byte_order_mark_of_an_editor_is_passed_over(tmp_path):
    model = random_model(config_of("llama"))
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    for name in ("config.json", INDEX):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    source = open_source(tmp_path)
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in weights_of(model).items())


def test_tied_head_alone_or_twice(tmp_path):
    model = random_model(config_of("public"))
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embedding = state["transformer.wte.weight"]

    def saved(changed):
        safetensors.torch.save_file(changed, tmp_path / "model.safetensors")
        return open_source(tmp_path)

    assert torch.equal(saved(state).tensor("transformer.wte.weight"), embedding)
    alone = {name: tensor for name, tensor in state.items() if name != "transformer.wte.weight"}
    assert torch.equal(saved(alone).tensor("transformer.wte.weight"), embedding)
    with pytest.raises(UserError, match="lm_head.weight and transformer.wte.weight differ"):
        saved({**state, "lm_head.weight": embedding + 1})


def test_only_the_tensor_asked_for_is_read(tmp_path, monkeypatch):
    model = random_model(config_of("llama"))
    for layout in ("single", "bin"):
        source = open_source(save(model, tmp_path / layout, layout))
        read = []

        class Counting:
            def __init__(self, *arguments):
                self.file = open(*arguments)  # noqa: SIM115

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def seek(self, offset):
                self.file.seek(offset)

            def readinto(self, buffer, read=read):
                read.append(len(buffer))
                return self.file.readinto(buffer)

        monkeypatch.setattr(extents, "open", Counting, raising=False)
        source.tensor("model.layers.1.mlp.up_proj.weight")
        monkeypatch.undo()
        assert read == [27 * 24 * 4]


# --- DeepSpeed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero_checkpoints(tmp_path_factory) -> Path:
    """Checkpoints of real one- and two-rank runs, all stages (zero_worker.py)."""
    out = tmp_path_factory.mktemp("zero")
    worker = str(REPOSITORY / "tests" / "support" / "zero_worker.py")
    for ranks in (1, 2):
        (out / str(ranks)).mkdir()
        launch_locally([worker, str(out / str(ranks))], ranks)
    return out


@pytest.mark.parametrize("kind", ["paper", "llama"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_checkpoints_give_the_engines_weights(zero_checkpoints, ranks, stage, kind):
    folder = zero_checkpoints / str(ranks) / f"{kind}_zero{stage}_ranks{ranks}"
    truth = torch.load(f"{folder}.truth")
    source = open_source(folder)
    assert source.kind == "deepspeed" and source.names() == list(truth)
    for name, tensor in truth.items():
        assert source.dtype(name) == FP32 and torch.equal(source.tensor(name), tensor), name
    if kind == "paper":
        assert torch.equal(source.tensor("lm_head.weight"), truth["transformer.wte.weight"])


@pytest.mark.parametrize("kind", ["paper", "llama"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_checkpoints_give_adamws_moments_and_step(zero_checkpoints, ranks, stage, kind):
    folder = zero_checkpoints / str(ranks) / f"{kind}_zero{stage}_ranks{ranks}"
    for moment, truth in torch.load(f"{folder}.moments").items():
        stored = deepspeed_files.read_deepspeed(folder, moment)
        assert set(stored) == set(truth)
        for name, tensor in truth.items():
            assert torch.equal(extents.read_tensor(stored[name]), tensor), (moment, name)
    assert float(extents.read_tensor(deepspeed_files.read_deepspeed(folder, "step")["step"])) == 2
    with pytest.raises(UserError, match="holds no momentum_buffer of AdamW"):
        deepspeed_files.read_deepspeed(folder, "momentum_buffer")


def copy_of(folder: Path, to: Path) -> Path:
    """A copy made of hard links: files may be removed and replaced, not written into."""
    to.mkdir(parents=True)
    for file in folder.iterdir():
        os.link(file, to / file.name)
    return to


def test_zero_tag_folder_one_level_down(zero_checkpoints, tmp_path):
    base = zero_checkpoints / "2"
    step = tmp_path / "run" / "checkpoints" / "step_00000002"
    copy_of(base / "paper_zero3_ranks2", step / "global_step2")
    (step / "global_step2" / "config.json").rename(step / "config.json")
    (step / "latest").write_text("global_step2\n")
    with pytest.raises(UserError, match="no COMPLETE marker"):
        open_source(step)
    write_json(step / "COMPLETE", {"files": hash_folder(step)})
    assert open_source(step).file_of("transformer.wte.weight") == "zero_pp_rank_*_mp_rank_00_optim_states.pt"
    copy_of(base / "paper_zero3_ranks2", step / "global_step3")
    assert open_source(step).folder.name == "global_step2", "what was put beside our own files is not ours"
    step = step.rename(tmp_path / "of_another_program")
    (step / "COMPLETE").unlink()
    (step / "latest").write_text("elsewhere")
    with pytest.raises(UserError, match="names 'elsewhere'"):
        open_source(step)
    (step / "latest").unlink()
    with pytest.raises(UserError, match="holds 2 DeepSpeed checkpoints, global_step2 to global_step3"):
        open_source(step)


def test_zero_incomplete_checkpoints_are_refused(zero_checkpoints, tmp_path):
    base = zero_checkpoints / "2"
    for number, (stage, lost, sentence) in enumerate(
        [
            (1, "zero_pp_rank_1_mp_rank_00_optim_states.pt", "optimizer states of 1 ranks, but 2 saved"),
            (2, "zero_pp_rank_0_mp_rank_00_optim_states.pt", "lacks the optim states of rank 0"),
            (3, "zero_pp_rank_1_mp_rank_00_model_states.pt", "model states of 1 ranks, but 2 saved"),
            (3, "config.json", "config.json is missing"),
        ]
    ):
        folder = copy_of(base / f"paper_zero{stage}_ranks2", tmp_path / str(number))
        (folder / lost).unlink()
        with pytest.raises(UserError, match=sentence):
            open_source(folder)
    folder = copy_of(base / "paper_zero1_ranks2", tmp_path / "cut")
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off or damaged"):
        open_source(folder)
    folder = copy_of(base / "paper_zero1_ranks2", tmp_path / "parallel")
    (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"")
    with pytest.raises(UserError, match="tensor parallelism"):
        open_source(folder)
    folder = copy_of(base / "paper_zero0_ranks2", tmp_path / "half")
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    (folder / "mp_rank_00_model_states.pt").unlink()
    state["module"] = {name: tensor.bfloat16() for name, tensor in state["module"].items()}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="half precision without its fp32 master"):
        open_source(folder)


# --- refusals -----------------------------------------------------------------------------------------------


class Trap:
    """Pickles to a call of os.system."""

    def __reduce__(self):
        return os.system, ("echo trapped > trapped.txt",)


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(folder: Path, **changes) -> None:
    """Save model.safetensors again with tensors replaced, or left out where the change is None."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    safetensors.torch.save_file(
        {n: t for n, t in state.items() if t is not None}, folder / "model.safetensors"
    )


def header(folder: Path, text: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


INDEX = "model.safetensors.index.json"
NORM = "model__norm__weight"
REFUSALS = {
    "missing shard": ("shards", lambda f: first_shard(f).unlink(), "lacks model-00001-of-"),
    "cut shard": (
        "shards",
        lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-5]),
        "cut off; download",
    ),
    "extra shard": (
        "shards",
        lambda f: (f / "model-00009-of-00009.safetensors").write_bytes(b""),
        "is not listed in",
    ),
    "single beside index": (
        "shards",
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "is not listed in",
    ),
    "no index": ("shards", lambda f: (f / INDEX).unlink(), "but no model.safetensors.index.json"),
    "no map": ("shards", lambda f: (f / INDEX).write_text("[]"), "has no 'weight_map'"),
    "relative path in index": (
        "shards",
        lambda f: edit_json(f / INDEX, lambda v: v["weight_map"].update(a="../x.safetensors")),
        "not a file of its own folder",
    ),
    "absolute path in index": (
        "shards",
        lambda f: edit_json(f / INDEX, lambda v: v["weight_map"].update(a="/etc/passwd")),
        "not a file of its own folder",
    ),
    "tensor not in its shard": (
        "shards",
        lambda f: edit_json(f / INDEX, lambda v: v["weight_map"].update({"model.x": first_shard(f).name})),
        "tensor model.x is not in model-00001-of-",
    ),
    "tensor missing": (
        "single",
        lambda f: rewrite(f, **{NORM: None}),
        "lacks tensor model.norm.weight .and 0 more",
    ),
    "wrong shape": (
        "single",
        lambda f: rewrite(f, **{NORM: torch.zeros(23)}),
        r"shape \(23,\), but .* implies \(24,\)",
    ),
    "foreign tensor": ("single", lambda f: rewrite(f, score=torch.zeros(2)), "holds model.score"),
    "integer tensor": (
        "single",
        lambda f: rewrite(f, **{NORM: torch.zeros(24, dtype=torch.int8)}),
        "is not of floats",
    ),
    "empty file": (
        "single",
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "cut off or no safetensors",
    ),
    "huge header": (
        "single",
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 100_000_000_000) + b"{}"),
        "header of 100000000000",
    ),
    "header no JSON": ("single", lambda f: header(f, b"not json"), "damaged safetensors header"),
    "header no mapping": ("single", lambda f: header(f, b"[1, 2]  "), "damaged safetensors header"),
    "header negative": (
        "single",
        lambda f: header(f, b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'),
        "damaged safetensors header",
    ),
    "header beyond the file": (
        "single",
        lambda f: header(
            f, b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
        ),
        "cut off",
    ),
    "no weights": ("single", lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "no config": ("single", lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config no JSON": ("single", lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no model type": ("single", lambda f: (f / "config.json").write_text("{}"), "names no 'model_type'"),
    "unknown family": (
        "single",
        lambda f: edit_json(f / "config.json", lambda v: v.update(model_type="nosuch")),
        "family 'nosuch' has no causal language model in the installed transformers",
    ),
    "remote code": (
        "single",
        lambda f: edit_json(
            f / "config.json", lambda v: v.update(model_type="mine", auto_map={"AutoConfig": "x.Y"})
        ),
        "needs code that comes with the model .auto_map: mine.",
    ),
    "remote class": (
        "single",
        lambda f: edit_json(
            f / "config.json", lambda v: v.update(architectures=["MineForLM"], auto_map={"AutoConfig": "x.Y"})
        ),
        "needs code that comes with the model .auto_map: MineForLM.",
    ),
    "quantized": (
        "single",
        lambda f: edit_json(f / "config.json", lambda v: v.update(quantization_config={"bits": 4})),
        "quantized model",
    ),
    "encoder-decoder": (
        "single",
        lambda f: edit_json(f / "config.json", lambda v: v.update(is_encoder_decoder=True)),
        "encoder-decoder",
    ),
    "impossible config": (
        "single",
        lambda f: edit_json(f / "config.json", lambda v: v.update(num_attention_heads=0)),
        "config.json",
    ),
    "badly typed config": (
        "single",
        lambda f: edit_json(f / "config.json", lambda v: v.update(hidden_size="wide")),
        "is not a valid llama config",
    ),
    "cut .bin": (
        "bin",
        lambda f: (f / "pytorch_model.bin").write_bytes((f / "pytorch_model.bin").read_bytes()[:-99]),
        "cut off or damaged",
    ),
    "old .bin": (
        "bin",
        lambda f: torch.save(
            {"a": torch.zeros(2)}, f / "pytorch_model.bin", _use_new_zipfile_serialization=False
        ),
        "torch before 1.6",
    ),
    "trap in .bin": (
        "bin",
        lambda f: torch.save({"a": Trap()}, f / "pytorch_model.bin"),
        "asks to run .*system",
    ),
    "missing .bin shard": (
        "bin_shards",
        lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink(),
        "lacks pytorch_model-00002",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_sentence(tmp_path, monkeypatch, case):
    layout, damage, sentence = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    folder = save(random_model(config_of("llama")), tmp_path / "source", layout)
    damage(folder)
    with pytest.raises(UserError, match=sentence) as refusal:
        open_source(folder)
    assert str(folder) in str(refusal.value) or case in ("unknown family", "remote code")
    assert "\n" not in str(refusal.value) and not Path("trapped.txt").exists()


def test_family_with_code_of_its_own_is_read_without_it(tmp_path):
    """A Llama whose config names remote code opens by the class of transformers; the code is not run."""
    folder = save(random_model(config_of("llama")), tmp_path / "source", "single")
    edit_json(folder / "config.json", lambda v: v.update(auto_map={"AutoConfig": "evil.Config"}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert not hasattr(open_source(folder).config, "auto_map")


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="is neither a folder nor a Hub id"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_source(tmp_path / "file")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        open_source(tmp_path)
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(UserError, match="did you mean .*final"):
        open_source(tmp_path / "run")
    with pytest.raises(UserError, match="only a Hub id has revisions"):
        open_source(tmp_path, revision="main")


def test_hub_id_from_the_cache_without_network(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="is not available from the Hub"):
        open_source("someone/tiny")
    repo, commit = tmp_path / "models--someone--tiny", "0" * 40
    model = random_model(config_of("public"))
    save(model, repo / "snapshots" / commit, "shards")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    source = open_source("someone/tiny")
    assert (source.origin, source.revision) == ("someone/tiny", commit)
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in weights_of(model).items())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_of_the_hubs_cache_to_a_file_that_is_gone_is_named(tmp_path, name):
    """As after a part of blobs/ was deleted. It was once taken for shards without an index."""
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    save(random_model(config_of("public")), snapshot, "single")
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).symlink_to("../../blobs/gone")
    with pytest.raises(UserError, match=f"{name} is a link to ../../blobs/gone, which does not exist"):
        open_source(snapshot)


# --- the writer ---------------------------------------------------------------------------------------------


def specs_of(config, dtype=FP32):
    return {name: (shape, dtype) for name, shape in list_checkpoint_shapes(config).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_written_checkpoint_opens_without_a_word(tmp_path, kind, caplog, recwarn, monkeypatch):
    model = random_model(config_of(kind))
    weights = weights_of(model)
    record = write_checkpoint(
        tmp_path, model.config, specs_of(model.config), weights.__getitem__, max_shard_bytes=9000
    )
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert set(record["tensors"]) == set(weights) and set(record["files"]) == {
        p.name for p in tmp_path.iterdir()
    }
    monkeypatch.setattr(transformers.utils.logging._get_library_root_logger(), "propagate", True)
    opened, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()) and not caplog.records and not recwarn.list
    assert opened.dtype == torch.float32 and torch.equal(logits(opened.eval()), logits(model))
    for file in tmp_path.glob("model-*.safetensors"):
        for name, tensor in safetensors.torch.load_file(file).items():
            assert torch.equal(tensor, weights[name]) and record["tensors"][name]["file"] == file.name


def test_shards_written_side_by_side_are_those_written_in_order(tmp_path):
    model = random_model(config_of("llama"))
    weights, specs = weights_of(model), specs_of(model.config)
    side_by_side, in_order = tmp_path / "threads", tmp_path / "order"
    side_by_side.mkdir(), in_order.mkdir()
    third_begins = threading.Event()

    def tensor_of(name: str):
        if name == list(specs)[0]:
            third_begins.wait(5)  # the first shard is not the first to end, given a second thread
        elif name == third[0]:
            third_begins.set()
        return weights[name]

    writer = CheckpointWriter(in_order, model.config, specs, max_shard_bytes=9000)
    assert len(writer.shards) > 3
    third = list(writer.shards.values())[2]
    record = write_checkpoint(side_by_side, model.config, specs, tensor_of, max_shard_bytes=9000)
    for name in specs:
        writer.add(name, weights[name])
    assert json.dumps(writer.close()) == json.dumps(record)  # in the same order too: markers are made of it
    for file in record["files"]:
        assert (side_by_side / file).read_bytes() == (in_order / file).read_bytes(), file


def test_a_shard_that_fails_ends_the_others(tmp_path):
    model = random_model(config_of("llama"))
    specs, asked, failed = specs_of(model.config), [], threading.Event()

    def tensor_of(name: str):
        asked.append(name)
        if name == list(specs)[0]:
            failed.set()
            raise OSError(errno.ENOSPC, "no space")
        assert failed.wait(60)
        time.sleep(0.2)  # by now the writer has heard of it
        return torch.zeros(specs[name][0])

    with pytest.raises(OSError, match="no space"):
        write_checkpoint(tmp_path, model.config, specs, tensor_of, max_shard_bytes=9000)
    assert len(asked) <= 8 < len(specs), asked  # four at work, each at its first or second
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_writer_without_a_folder_takes_part_and_writes_nothing(tmp_path):
    config = config_of("llama")
    writer = CheckpointWriter(None, config, specs_of(config))
    for name, shape in list_checkpoint_shapes(config).items():
        writer.add(name, torch.zeros(shape))
    assert writer.close() == {} and not list(tmp_path.iterdir())


def test_writer_insists_on_what_was_announced(tmp_path):
    config = config_of("llama")
    writer = CheckpointWriter(tmp_path, config, specs_of(config))
    with pytest.raises(AssertionError, match="expected"):
        writer.add("model.norm.weight", torch.zeros(24))
    with pytest.raises(AssertionError, match="not"):
        writer.add("model.embed_tokens.weight", torch.zeros(61, 24, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match="never added"):
        writer.close()


def test_a_tensor_under_two_names_must_be_one(tmp_path):
    """With and without the prefix: which of the two counts would depend on their order in the file."""
    model = random_model(config_of("public"))
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.contiguous() for name, tensor in weights_of(model).items()}
    state["wte.weight"] = state["transformer.wte.weight"].clone()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(open_source(tmp_path).tensor("transformer.wte.weight"), state["wte.weight"])
    for other in (state["wte.weight"] + 1, state["wte.weight"].bfloat16(), state["wte.weight"][1:].clone()):
        safetensors.torch.save_file({**state, "wte.weight": other}, tmp_path / "model.safetensors")
        with pytest.raises(
            UserError,
            match="transformer.wte.weight is stored under two names, with and without 'transformer.'",
        ):
            open_source(tmp_path)
