"""`model: {from: FOLDER_OR_ID}`: the shape of an existing model, and experiments that contradict it."""

import json
import shutil

import pytest
from conftest import experiment_dict, write_experiment, write_tokens
from tiny_families import FAMILIES, FURTHER, family_config
from tiny_models import config_of, random_model

from inheritune.cli import main
from inheritune.config.catalog import FAMILIES as NAMES
from inheritune.config.experiment import load_experiment
from inheritune.config.sections import Model
from inheritune.files.rundir import get_data_dir
from inheritune.models.config_files import load_config, write_config
from inheritune.models.dtypes import FP32
from inheritune.models.networks import build_config, build_meta_model, count_flops_per_token, count_parameters
from inheritune.models.sizes import count_trained_elements, predict_flops_per_token


def write_family(folder, config):
    """The config.json of `config` in a new folder, as our own writer leaves it."""
    folder.mkdir()
    write_config(folder / "config.json", config, FP32)
    return folder


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_a_family_is_planned_and_built_from_its_config_alone(name, tmp_path):
    config = family_config(name)
    model = Model.model_validate({"from": str(write_family(tmp_path / "source", config))})
    heads = config.num_attention_heads
    assert (model.family, model.layers, model.width) == (config.model_type, 5, config.hidden_size)
    assert (model.heads, model.vocab_size, model.tied_head) == (heads, 61, config.tie_word_embeddings)
    values = [t for n, t in build_meta_model(config).named_parameters() if "k_proj.weight" in n]
    if values and not hasattr(config, "kv_lora_rank"):
        wide = getattr(config, "head_dim", None) or model.width // heads
        assert values[0].shape[0] == model.kv_heads * wide
    assert count_trained_elements(model, 5) == count_parameters(config)
    assert predict_flops_per_token(model, 5, 8) == pytest.approx(count_flops_per_token(config, 8))
    assert build_config(model, 3).num_hidden_layers == 3
    assert Model.model_validate(model.model_dump(mode="json", by_alias=True)) == model


def test_it_is_that_of_the_sizes_which_describe_the_same_model(tmp_path):
    """The formulas of sizes.py and a model that transformers builds agree, and so do the configs."""
    sizes = {"size": "llama_tiny", "layers": 3, "heads": 4, "kv_heads": 2}
    stated = Model.model_validate(sizes)
    read = Model.model_validate({"from": str(write_family(tmp_path / "source", build_config(stated)))})
    for key in set(Model.model_fields) - {"size", "from_"}:
        assert getattr(read, key) == getattr(stated, key), key
    for layers in (2, 3):
        assert count_trained_elements(read, layers) == count_trained_elements(stated, layers)
        ours, theirs = (build_config(model, layers).to_diff_dict() for model in (read, stated))
        assert {key: value for key, value in ours.items() if key != "dtype"} == theirs
    with pytest.raises(Exception, match="4 layers were asked for"):
        build_config(read, 4)
    again = {"from": read.from_, **sizes}
    assert Model.model_validate(again).kv_heads == 2  # what is stated may be stated twice


def test_a_config_of_transformers_4_is_read_with_its_defaults(tmp_path):
    raw = {"model_type": "gpt2", "n_layer": 3, "n_embd": 48, "n_head": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(raw))
    model = Model.model_validate({"from": str(tmp_path)})
    assert (model.layers, model.mlp_width, model.positions, model.tied_head) == (3, 192, 1024, True)
    assert load_config(tmp_path / "config.json").n_positions == 1024


def test_the_table_of_families_is_the_surgery_s():
    assert {"gpt2", "llama", "qwen3_moe"} <= set(NAMES) and len(NAMES) >= 40


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.err.count("\n") == 1
    return said.err


@pytest.fixture
def source(tmp_path):
    """A tiny Llama with its weights: 4 layers, width 24, 4 heads, 2 of keys and values."""
    random_model(config_of("llama")).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_shape_that_the_source_contradicts_is_refused(source, tmp_path, capsys, own_root):
    start = {"init": {"inherit": {"source": str(source), "layers": "0:2"}}}
    data = experiment_dict()["data"] | {"sequence_length": 8}
    raw = experiment_dict(paper=[], data=data, runs={"cut": start}, model={"from": str(source), "heads": 8})
    said = refused(capsys, "check", write_experiment(tmp_path, raw))
    assert f"model: heads is 8, but 4 in {source / 'config.json'}" in said

    # the same of a source that only the run names, in a file that states the sizes
    raw["model"] = {"size": "llama_tiny", "layers": 9, "width": 24, "heads": 4, "vocab_size": 61}
    raw["model"] |= {"kv_heads": 2, "mlp_width": 27, "positions": 12, "tied_head": False}
    raw["train"] |= {"batch_tokens": 64}
    raw["runs"]["base"] = {"init": "random"}
    raw["runs"]["grown"] = {**start, "grow": {"max_layers": 3}, "compare": "base"}
    path = write_experiment(tmp_path, raw)
    write_tokens(get_data_dir(load_experiment(path)), vocab=61)
    before = sorted(own_root.rglob("*"))
    runs = (["check", path], ["train", path, "--run", "cut"], ["grow", path, "--run", "grown"])
    for words in runs:
        said = refused(capsys, *words)
        assert f"copies {source}, which has another shape" in said and "layers is 9, but 4 in" in said
    assert sorted(own_root.rglob("*")) == before
    raw["model"]["layers"] = 4
    assert main(["check", write_experiment(tmp_path, raw)]) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "afmoe"}, "describes the family 'afmoe', of which blocks can be cut"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "describes an encoder-decoder (t5)"),
        ({"quantization_config": {"bits": 4}}, "describes a quantized model"),
        ({"model_type": 3}, "names no 'model_type'"),
        ({"num_hidden_layers": 0}, "layers: Input should be greater than or equal to 1"),
        (None, "holds no config.json"),
        ("adapter", "is an adapter without the model"),
    ],
)
def test_a_source_without_a_shape_is_refused(change, says, source, tmp_path, capsys):
    file = source / "config.json"
    if isinstance(change, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        file.unlink()
        if change:
            (source / "adapter_config.json").write_text("{}")
    raw = experiment_dict(paper=[], model={"from": str(source)}, runs={"base": {"init": "random"}})
    assert says in refused(capsys, "check", write_experiment(tmp_path, raw))


def test_a_hub_id_is_read_from_the_cache_and_refused_without(source, tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    raw = experiment_dict(paper=[], model={"from": "owner/tiny"}, runs={"base": {"init": "random"}})
    raw["data"] |= {"sequence_length": 8}
    path = write_experiment(tmp_path, raw)
    said = refused(capsys, "check", path)
    assert "'owner/tiny' is no local folder, and its config.json is not available from the Hub" in said
    snapshot = cache / "models--owner--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    shutil.copy(source / "config.json", snapshot)
    assert load_experiment(path).model.width == 24
    raw["model"]["from"] = "no/such/thing"
    assert "is neither a folder nor a Hub id" in refused(capsys, "check", write_experiment(tmp_path, raw))


def test_a_rehearsal_of_any_family_is_small(tmp_path):
    source = write_family(tmp_path / "source", family_config("qwen3"))
    raw = experiment_dict(paper=[], model={"from": str(source)}, runs={"base": {"init": "random"}})
    small = load_experiment(write_experiment(tmp_path, raw), rehearse=True)
    assert small.model.from_ is None and (small.model.family, small.model.layers) == ("llama", 2)


@pytest.mark.parametrize("wrong", [5, ["a"], "", " ", "a" * 300])
def test_a_source_that_is_no_name_is_refused(wrong, tmp_path, capsys):
    path = write_experiment(tmp_path, experiment_dict(model={"from": wrong}))
    assert main(["check", path]) == 2
    said = capsys.readouterr().err
    assert said.count("inheritune: ") == 1 and "Traceback" not in said
    assert f"from: {wrong!r} is neither a folder nor a Hub id" in said or "aaa...: it is too long" in said
