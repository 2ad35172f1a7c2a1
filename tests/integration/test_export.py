"""export: the plain form computes what the run computes, here and in transformers 4, and says truly what it
is.

Weights of a few training steps are so small that attention is even and its scaling hardly matters; so the
runs here are real ones whose final/ was given larger random weights afterwards."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, experiment_dict, refused, run_verb, write_experiment, write_tokens
from tiny_families import family_config
from tiny_models import config_of, random_model, weights_of
from versions import assert_alike, assert_close, open_in_both

from inheritune.analysis.attention import load_model
from inheritune.config.experiment import load_experiment
from inheritune.config.sections import Data
from inheritune.data.bpe_training import train_bpe
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.evaluation import card
from inheritune.evaluation import export as module
from inheritune.files.json_files import read_json, write_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.dtypes import BF16, FP32, find_dtype
from inheritune.models.initialization import make_generator
from inheritune.models.networks import list_checkpoint_shapes
from inheritune.models.sources import open_source
from inheritune.models.writer import write_checkpoint

pytestmark = pytest.mark.slow


def store(folder: Path, model: torch.nn.Module) -> None:
    """Write a model's weights and config into `folder`, beside the tokenizer that is there."""
    weights = weights_of(model)
    write_checkpoint(
        folder,
        model.config,
        {n: (tuple(t.shape), find_dtype(t.dtype)) for n, t in weights.items()},
        weights.get,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the runs of a small experiment: `reference` (4 layers, random start) and `half` (2 of them,
    inherited)."""
    folder = tmp_path_factory.mktemp("trained")
    raw = experiment_dict()
    raw["runs"]["half"] = {"init": {"inherit": {"source": "reference", "layers": "0:2"}}}
    path = write_experiment(folder, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(folder / "root"))
        experiment = load_experiment(path)
        data = write_tokens(get_data_dir(experiment))
        texts = [p.read_text(errors="ignore") for p in sorted(Path(os.__file__).parent.glob("a*.py"))]
        train_bpe("bpe:300", texts, data / "tokenizer")
        for run in ("reference", "half"):
            run_verb("train", path, "--run", run)
            done = RunDir.of(experiment, run)
            store(done.final, random_model(open_source(done.final).config, seed=len(run)))
            write_json(done.done, {"final": hash_folder(done.final)})
            write_json(done.results, read_json(done.results) | {"weights": done.weights_hash()})
        return RunDir.of(experiment, "").path


def difference(ours: Path, theirs: Path) -> float:
    """Largest difference of a logit between two folders, over the 300 ids of the tokenizer."""
    ids = torch.randint(0, 300, (2, 32), generator=make_generator("test"))
    with torch.no_grad():
        first, second = (
            load_model(str(folder), attention="sdpa")(ids).logits[..., :300] for folder in (ours, theirs)
        )
    return float((first - second).abs().max())


def test_export_is_a_plain_gpt2_with_the_same_logits(trained, tmp_path):
    out = tmp_path / "small one"
    said = run_verb("export", trained / "reference", "--to", out).stdout
    assert f"hf upload OWNER/small one '{out}'" in said
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert difference(trained / "reference" / "final", out) < 1e-5
    config, source = read_json(out / "config.json"), open_source(out)
    assert not config.get("scale_attn_by_inverse_layer_idx") and config["vocab_size"] == 300
    assert source.shape("transformer.wte.weight") == (300, 32) and config["torch_dtype"] == "float32"
    assert read_json(out / "generation_config.json") == {
        "bos_token_id": 299,
        "eos_token_id": 299,
        "pad_token_id": 299,
    }

    # what is proven could fail: the flag alone turned off gives another model
    shutil.copytree(trained / "reference" / "final", tmp_path / "unfolded")
    raw = read_json(tmp_path / "unfolded" / "config.json")
    write_json(tmp_path / "unfolded" / "config.json", raw | {"scale_attn_by_inverse_layer_idx": False})
    assert difference(tmp_path / "unfolded", out) > 1e-2


def test_bf16_states_its_difference(trained, tmp_path):
    module.export(str(trained / "half"), str(tmp_path / "out"), "bf16")
    source = open_source(tmp_path / "out")
    assert {source.dtype(name) for name in source.names()} == {BF16}
    stated = float(
        re.search(r"by at most (\S+) \(the largest", (tmp_path / "out" / "README.md").read_text())[1]
    )
    compared = module.compare_logits(trained / "half" / "final", tmp_path / "out", 300)
    assert 1e-4 < compared["difference"] == pytest.approx(stated, rel=0.05)


def test_model_card_says_what_the_runs_json_says(trained, tmp_path):
    module.export(str(trained / "half"), str(tmp_path / "half"))
    card = (tmp_path / "half" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["inheritune"]}
    results = read_json(trained / "half" / "results.json")
    loss, gap = results["validation"], results["difference"]
    for sentence in (
        "run 'half' of experiment small (seed 0)",
        "Parent: run 'reference' of experiment small (seed 0), layers 0 to 1 (from 0)",
        "6 steps of 640 tokens, 3,840 in all, fp32",
        f"{loss['mean']:.4f} ({loss['low']:.4f} to {loss['high']:.4f}) nats per token, 16 windows of "
        f"embedded",
        f"Difference to run 'reference': {gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})",
        "data, embedded: psf-2.0",
        "W_Q / (layer + 1)",
    ):
        assert sentence in card
    assert "REHEARSAL" not in card and str(trained) not in card and "Parent: none" not in card

    # a parent of the Hub, a rehearsal, and data of the Hub, in a copy of the run
    shutil.copytree(trained / "half", tmp_path / "copy")
    run = RunDir(tmp_path / "copy")
    manifest = read_json(run.init / "inherited.json")
    write_json(
        run.init / "inherited.json", manifest | {"source": "openai-community/gpt2-xl", "revision": "15ea56d"}
    )
    described = yaml.safe_load(run.experiment.read_text()) | {"rehearsal": True}
    described["data"] |= {"repo": "HuggingFaceFW/fineweb-edu", "revision": "87f0914"}
    run.experiment.write_text(yaml.safe_dump(described))
    module.export(str(run.path), str(tmp_path / "second"))
    card = (tmp_path / "second" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == ["openai-community/gpt2-xl"] and head["license"] == "mit"
    assert head["datasets"] == ["HuggingFaceFW/fineweb-edu"] and "rehearsal" in head["tags"]
    assert (
        "REHEARSAL" in card and "at revision 15ea56d, layers 0 to 1" in card and "fineweb-edu: odc-by" in card
    )


def test_grown_run_means_the_stage_that_its_done_names(trained, tmp_path):
    grown = RunDir(tmp_path / "grown")
    shutil.copytree(trained / "half", grown.stage(2).path)
    write_json(grown.done, {"stage": 2, "layers": 2})
    module.export(str(grown.path), str(tmp_path / "out"))
    assert difference(grown.stage(2).final, tmp_path / "out") < 1e-5


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "public"])
def test_other_families_lose_their_padding_only(kind, tmp_path):
    (tmp_path / "ours").mkdir(), (tmp_path / "out").mkdir()
    store(tmp_path / "ours", random_model(config_of(kind)))
    source = open_source(tmp_path / "ours")
    config = module.make_portable_config(source.config, 57, 56)
    specs = {name: (shape, FP32) for name, shape in list_checkpoint_shapes(config).items()}
    write_checkpoint(
        tmp_path / "out", config, specs, lambda name: module.make_portable_tensor(source, config, name)
    )
    assert module.compare_logits(tmp_path / "ours", tmp_path / "out", 57)["difference"] < 1e-5
    assert config.vocab_size == 57 and source.config.vocab_size == 61


def test_an_export_that_computes_something_else_is_not_left(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module,
        "make_portable_tensor",
        lambda source, config, name: source.tensor(name)[: 300 if "wte" in name else None],
    )
    with pytest.raises(RuntimeError, match="computes other logits"):
        module.export(str(trained / "reference"), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence_and_leave_nothing(trained, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    assert "unknown dtype 'fp16'; did you mean" in refused(
        "export", trained / "half", "--to", out, "--dtype", "fp16"
    )
    with pytest.raises(UserError, match="is not a run folder"):
        module.export(str(tmp_path), str(out))
    with pytest.raises(UserError, match="give the run's folder, .*half"):
        module.export(str(trained / "half" / "final"), str(out))
    shutil.copytree(trained / "half", run)
    (run / "DONE").unlink()
    with pytest.raises(UserError, match="is not finished"):
        module.export(str(run), str(out))
    shutil.copy(trained / "half" / "DONE", run / "DONE")
    with pytest.raises(UserError, match="already holds something"):
        module.export(str(run), str(trained))
    (run / "final" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cut off or replaced"):
        module.export(str(run), str(out))
    shutil.copy(trained / "half" / "final" / "config.json", run / "final")
    (run / "final" / "tokenizer.json").unlink()
    write_json(run / "DONE", {"final": hash_folder(run / "final")})
    with pytest.raises(UserError, match="holds no tokenizer"):
        module.export(str(run), str(out))
    assert not out.exists()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_snippets_of_the_documents_and_of_the_card_generate_text(trained, tmp_path):
    page = (REPOSITORY / "docs" / "your_model.md").read_text(encoding="utf-8")
    (snippet,) = [block for block in python_blocks(page) if "quickstart-small" in block]
    assert "--to quickstart-small" in page
    module.export(str(trained / "half"), str(tmp_path / "quickstart-small"))
    (of_card,) = python_blocks((tmp_path / "quickstart-small" / "README.md").read_text())
    for code, prompt in ((snippet, "def "), (of_card, "The")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (
            done.returncode == 0 and done.stdout.startswith(prompt) and len(done.stdout) > len(prompt) + 5
        ), done.stderr


def test_both_versions_compute_the_logits_of_the_run(trained, older, tmp_path):
    """The plain form in transformers 4.57 and 5, by the tokenizer's own output, and the run's own form
    here."""
    out = tmp_path / "out"
    module.export(str(trained / "reference"), str(out))
    texts = ["import os", "def f(x):\n\treturn x"]
    (fourth,), (fifth,) = open_in_both([{"folder": str(out), "texts": texts}], older, tmp_path / "opened")
    assert_alike(fourth, fifth)
    assert fifth["outputs"] == ["attention_mask", "input_ids"]
    ours = load_tokenizer(Data.model_validate(experiment_dict()["data"]), trained / "reference" / "final")
    assert fifth["ids"] == [row.tolist() for row in ours.encode_batch(texts)]
    with torch.no_grad():
        logits = load_model(str(trained / "reference" / "final"))(torch.tensor([fifth["ids"][0]])).logits[
            ..., :300
        ]
    assert_close(fifth["logits"], logits)


# --- what the model that a run started from says ------------------------------------------------------------


def started_from(run: Path, to: Path, settings: dict | None = None, **config) -> RunDir:
    """A copy of a finished run, as it would be had its start stated `config` and generation settings."""
    shutil.copytree(run, to)
    copied = RunDir(to)
    for folder in (copied.init, copied.final):
        write_json(folder / "config.json", read_json(folder / "config.json") | config, seal=False)
    if settings:
        write_json(copied.init / "generation_config.json", settings, seal=False)
    done = {"final": hash_folder(copied.final)}
    write_json(copied.done, done)
    write_json(copied.results, read_json(copied.results) | {"weights": copied.weights_hash()})
    return copied


def test_generation_settings_of_the_start_are_kept(trained, tmp_path):
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": [299, 7, 50256],
        "bos_token_id": 5,
    }
    settings |= {"pad_token_id": 3, "transformers_version": "4.51.0"}
    run = started_from(trained / "half", tmp_path / "run", settings, eos_token_id=299, pad_token_id=50256)
    module.export(str(run.path), str(tmp_path / "out"))
    written = read_json(tmp_path / "out" / "generation_config.json")
    assert written == settings | {"eos_token_id": [299, 7]}  # the run's tokenizer has 300 ids
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (299, 299, None)
    run_verb("export", run.path, "--to", tmp_path / "again")
    assert read_json(tmp_path / "again" / "generation_config.json") == written


@pytest.mark.parametrize(
    ("stated", "ids"),
    [
        ({}, (299, 299, None)),
        ({"eos_token_id": 299, "bos_token_id": 1, "pad_token_id": 2}, (1, 299, 2)),
        ({"eos_token_id": [7, 299], "pad_token_id": 300}, (299, [7, 299], None)),
        ({"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}, (299, 299, None)),  # of another tokenizer
        ({"eos_token_id": [50256], "bos_token_id": 50256}, (299, 299, None)),
        ({"eos_token_id": 0, "bos_token_id": 0}, (299, 299, None)),
    ],
)
def test_special_ids_are_those_of_the_runs_tokenizer(stated, ids):
    known = module.choose_special_ids(stated, 300, 299)
    assert (known["bos_token_id"], known["eos_token_id"], known["pad_token_id"]) == ids


def test_dtype_is_that_of_the_start_unless_another_is_asked_for(trained, tmp_path):
    run = started_from(trained / "half", tmp_path / "run")
    # a random start
    assert module.get_source_dtype(run) == "fp32" == module.get_source_dtype(RunDir(trained / "reference"))
    for key, stated in (("dtype", "bfloat16"), ("torch_dtype", "bfloat16"), ("dtype", "float16")):
        described = {
            k: v for k, v in read_json(run.init / "config.json").items() if k not in ("dtype", "torch_dtype")
        }
        write_json(run.init / "config.json", described | {key: stated}, seal=False)
        assert module.get_source_dtype(run) == ("bf16" if stated == "bfloat16" else "fp32")
    write_json(run.init / "config.json", described | {"dtype": "bfloat16"}, seal=False)
    assert "in bf16" in run_verb("export", run.path, "--to", tmp_path / "out").stdout
    run_verb("export", run.path, "--to", tmp_path / "asked", "--dtype", "fp32")
    for name, dtype in (("out", BF16), ("asked", FP32)):
        source, config = open_source(tmp_path / name), read_json(tmp_path / name / "config.json")
        assert {source.dtype(tensor) for tensor in source.names()} == {dtype}
        assert config["dtype"] == config["torch_dtype"] == dtype.name


# --- tokenizers ---------------------------------------------------------------------------------------------


def test_tokenizer_that_an_older_run_left_is_opened_by_both(trained, tmp_path):
    run = started_from(trained / "half", tmp_path / "run")
    config = read_json(run.final / "tokenizer_config.json")
    config = {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "is_local": True,
        "local_files_only": False,
        "eos_token": config["eos_token"],
        "clean_up_tokenization_spaces": True,
    }
    write_json(run.final / "tokenizer_config.json", config, seal=False)
    (run.final / "chat_template.jinja").write_text("{{ messages }}")
    write_json(run.done, {"final": hash_folder(run.final)})
    write_json(run.results, read_json(run.results) | {"weights": run.weights_hash()})
    module.export(str(run.path), str(tmp_path / "out"))
    assert read_json(tmp_path / "out" / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_card_opens_a_tokenizer_by_a_class_that_gives_the_runs_ids(tmp_path, sentencepiece_models):
    """For Qwen 2 the installed AutoTokenizer takes a class with rules of its own, and some sentencepiece
    models have no counterpart in transformers."""
    names = {"own class": "bpe:300", "plain": "bpe:300", "sentencepiece": str(sentencepiece_models["llama"])}
    openers = {
        "own class": "PreTrainedTokenizerFast",
        "plain": "AutoTokenizer",
        "sentencepiece": "sentencepiece",
    }
    for name, tokenizer in names.items():
        folder = tmp_path / name
        config = family_config("qwen2" if name == "own class" else "llama")
        config.vocab_size, config.max_position_embeddings = 600, 64
        random_model(config).save_pretrained(folder)
        data = Data.model_validate(experiment_dict()["data"] | {"tokenizer": tokenizer})
        if name == "sentencepiece":
            shutil.copyfile(tokenizer, folder / "tokenizer.model")
        else:
            train_bpe(tokenizer, [Path(os.__file__).read_text(), "12345 " * 1000], folder)
        ours = load_tokenizer(data, folder)
        opener, pad_token_id = module.find_opener(folder, ours)
        assert (opener, pad_token_id) == (openers[name], None)
        snippet = (
            card.SNIPPETS[opener].format(name=json.dumps(name))
            + "\nprint('IDS', tokenizer.encode('The\\n\\n  cat 12345'))"
        )
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and done.stdout.startswith("The"), done.stderr
        assert f"IDS {ours.encode_batch(['The' + chr(10) * 2 + '  cat 12345'])[0].tolist()}" in done.stdout


def test_to_is_a_link_or_cannot_be_written(trained, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    module.export(str(trained / "half"), str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "README.md").is_file()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    for to, sentence in (
        ("file", "is a file; give"),
        ("dangling", "is a link to nowhere"),
        ("link", "already holds something"),
    ):
        with pytest.raises(UserError, match=sentence):
            module.export(str(trained / "half"), str(tmp_path / to))
