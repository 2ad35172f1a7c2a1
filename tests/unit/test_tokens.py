"""Tokenizers: the ids of each kind against another library's, saved folders, fingerprints, refusals."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import experiment_dict, write_experiment, write_tokens
from tiny_models import config_of, random_model
from tiny_tokenizers import TEMPLATE, save_by_newest, write_chat_tokenizer
from transformers import GPT2Config

from inheritune.config.experiment import load_experiment
from inheritune.config.paths import REPOSITORY
from inheritune.config.sections import Data
from inheritune.data.batches import Tokens
from inheritune.data.bpe_training import parse_bpe_size, train_bpe
from inheritune.data.gpt2_tokenizer import LETTERS
from inheritune.data.tokenizer import PROBE, check_vocabulary
from inheritune.data.tokenizer_comparison import has_same_ids, open_encoder
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import get_data_dir
from inheritune.runs.job import Job
from inheritune.runs.starts import find_foreign_tokenizer

TEXTS = [PROBE, "", " ", "hello  world", "<|endoftext|> in a text </s><s>", "x" * 3000 + "\n" * 50]
TEXTS.append((REPOSITORY / "inheritune" / "config" / "experiment.py").read_text())


def data(tokenizer: str) -> Data:
    return Data(
        name="t",
        source="embedded",
        tokenizer=tokenizer,
        validation={"fraction": 0.1},
        sequence_length=8,
        sampling="one_pass",
    )


def lists(rows) -> list[list[int]]:
    return [row.tolist() for row in rows]


def test_gpt2_ids_are_those_of_the_tokenizers_library(gpt2_bpe, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer

    ours = load_tokenizer(data("gpt2"))
    assert (ours.vocab_size, ours.end_of_text, ours.dtype) == (50257, 50256, "<u2")
    ours.save(tmp_path)
    ids = lists(ours.encode_batch(TEXTS))
    assert ids[3] == [31373, 220, 995]  # "hello", " ", " world"
    assert 50256 not in ids[4]
    reopened = load_tokenizer(data("gpt2"), tmp_path)
    assert lists(reopened.encode_batch(TEXTS)) == ids and reopened.fingerprint == ours.fingerprint
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved(TEXTS[:4])["input_ids"] == ids[:4] and saved.eos_token_id == 50256 and len(saved) == 50257
    assert saved.decode(ids[0]) == PROBE
    if (gpt2_bpe / "vocab.bpe").is_file():  # OpenAI's own merges, not those worked out from the ranks
        encoder = json.loads((gpt2_bpe / "encoder.json").read_text())
        merges = [tuple(line.split()) for line in (gpt2_bpe / "vocab.bpe").read_text().split("\n")[1:-1]]
        theirs = Tokenizer(models.BPE(encoder, merges))
        theirs.pre_tokenizer, theirs.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        assert [row.ids for row in theirs.encode_batch(TEXTS)] == ids
        assert [
            tuple(m) for m in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
        ] == merges


def test_gpt2_from_either_form_of_its_files_is_one_tokenizer(gpt2_bpe, tmp_path, monkeypatch):
    ours = load_tokenizer(data("gpt2"))
    spelled = {"".join(LETTERS[b] for b in token): rank for token, rank in ours._ranks.items()} | {
        "<|endoftext|>": 50256
    }
    (tmp_path / "encoder.json").write_text(json.dumps(spelled))
    monkeypatch.setenv("INHERITUNE_GPT2_BPE", str(tmp_path))
    assert load_tokenizer(data("gpt2")).fingerprint == ours.fingerprint
    (tmp_path / "encoder.json").write_text(
        json.dumps({token: rank for token, rank in spelled.items() if rank != 40000})
    )
    with pytest.raises(UserError, match="is not GPT-2's vocabulary"):
        load_tokenizer(data("gpt2"))
    monkeypatch.setenv("INHERITUNE_GPT2_BPE", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds neither gpt2.tiktoken nor encoder.json"):
        load_tokenizer(data("gpt2"))


def test_trained_bpe_is_the_same_each_time_and_reopens_anywhere(tmp_path):
    from transformers import AutoTokenizer

    texts = [path.read_text() for path in sorted((REPOSITORY / "inheritune").rglob("*.py"))]
    train_bpe("bpe:512", iter(texts), tmp_path / "one")
    code = (
        "import sys; from pathlib import Path; from inheritune.data.bpe_training import train_bpe; "
        "train_bpe('bpe:512', [p.read_text() for p in sorted(Path(sys.argv[1]).rglob('*.py'))], "
        "Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, REPOSITORY / "inheritune", tmp_path / "two"]
    subprocess.run(
        command,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
    )
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    ours = load_tokenizer(data("bpe:512"), tmp_path / "one")
    assert (ours.vocab_size, ours.end_of_text) == (512, 511)
    ids = lists(ours.encode_batch(TEXTS))
    assert all(511 not in row for row in ids)
    saved = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert saved(TEXTS[:4])["input_ids"] == ids[:4] and saved.decode(ids[0]) == PROBE
    ours.save(tmp_path / "again")
    assert load_tokenizer(data("bpe:512"), tmp_path / "again").fingerprint == ours.fingerprint
    train_bpe("bpe:512", iter(texts[::2]), tmp_path / "other")
    assert load_tokenizer(data("bpe:512"), tmp_path / "other").fingerprint != ours.fingerprint


@pytest.mark.parametrize("kind", ["llama", "open_llama", "unigram"])
def test_sentencepiece_ids_are_its_own_and_a_saved_folder_has_the_same(
    sentencepiece_models, kind, tmp_path, caplog
):
    import sentencepiece
    from transformers import AutoTokenizer

    path = sentencepiece_models[kind]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(data(str(path)))
    ids = lists(ours.encode_batch(TEXTS))
    assert ids == reference.encode(TEXTS)
    assert (ours.vocab_size, ours.end_of_text) == (600, reference.eos_id())
    ours.save(tmp_path)
    reopened = load_tokenizer(data(str(path)), tmp_path)
    assert reopened.fingerprint == ours.fingerprint and lists(reopened.encode_batch(TEXTS)) == ids
    if kind == "unigram" and not (tmp_path / "tokenizer.json").is_file():
        # two segmentations of one score: the conversion may take the other one
        assert "gives other ids" in caplog.text
        return
    assert (tmp_path / "tokenizer.json").is_file(), caplog.text
    saved = AutoTokenizer.from_pretrained(tmp_path)
    plain = [0, 1, 2, 3, 5, 6]  # transformers takes the "</s>" of text 4 for the end of text
    assert saved([TEXTS[i] for i in plain])["input_ids"] == [ids[i] for i in plain]
    assert saved.eos_token_id == ours.end_of_text


def test_sentencepiece_conversion_with_other_ids_is_not_kept(
    sentencepiece_models, tmp_path, monkeypatch, caplog
):
    from inheritune.data.sentencepiece_tokenizer import SentencePieceTokenizer

    path = sentencepiece_models["llama"]
    # a kind of model without counterpart
    monkeypatch.setattr(SentencePieceTokenizer, "_converted", lambda self: None)
    load_tokenizer(data(str(path))).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.txt", "tokenizer.model"]
    assert "gives other ids" in caplog.text


def test_any_hugging_face_folder(tmp_path):
    train_bpe("bpe:300", [Path(__file__).read_text()], tmp_path / "hf")
    ours = load_tokenizer(data(str(tmp_path / "hf")))
    assert (ours.kind, ours.vocab_size, ours.end_of_text) == ("FastTokenizer", 300, 299)
    ids = lists(ours.encode_batch(TEXTS))
    assert ids == lists(load_tokenizer(data("bpe:300"), tmp_path / "hf").encode_batch(TEXTS))
    ours.save(tmp_path / "saved")
    reopened = load_tokenizer(data("moved/away"), tmp_path / "saved")
    assert lists(reopened.encode_batch(TEXTS)) == ids and reopened.fingerprint == ours.fingerprint
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    (tmp_path / "hf/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": config["tokenizer_class"]})
    )
    with pytest.raises(UserError, match=r"no end-of-text \(EOS\) token"):
        load_tokenizer(data(str(tmp_path / "hf")))


def test_saved_configuration_has_no_word_of_one_version_or_machine(tmp_path):
    """A tokenizer of the Hub, as the installed transformers saves it: with named and extra tokens, templates
    and a prefix."""
    from transformers import AutoTokenizer

    write_chat_tokenizer(tmp_path / "hf")
    save_by_newest(tmp_path / "hf", tmp_path / "newest")
    assert read_json(tmp_path / "newest" / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    backend = read_json(tmp_path / "newest" / "tokenizer.json")
    backend["pre_tokenizer"]["add_prefix_space"] = True
    write_json(tmp_path / "newest" / "tokenizer.json", backend, seal=False)
    load_tokenizer(data(str(tmp_path / "newest"))).save(tmp_path / "saved")
    reopened = load_tokenizer(data("moved/away"), tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "tokenizer_config.json") == {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|user|>"],
        "extra_special_tokens": {"image_token": "<|image|>"},
        "image_token": "<|image|>",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    names = {
        p.relative_to(tmp_path / "saved").as_posix() for p in (tmp_path / "saved").rglob("*") if p.is_file()
    }
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    }
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved(TEXTS[:4], add_special_tokens=False)["input_ids"] == lists(reopened.encode_batch(TEXTS[:4]))
    assert (
        saved.chat_template == {"default": TEMPLATE, "tool": "{{ messages }}"}
        and saved.pad_token == "<|pad|>"
    )
    for names in ("hf", "newest"):  # a config that is damaged is not taken for a name of the Hub
        (tmp_path / names / "tokenizer_config.json").write_text("{")
        with pytest.raises(UserError, match=f"tokenizer '.*{names}' cannot be opened .*restore its folder"):
            load_tokenizer(data(str(tmp_path / names)))


@pytest.mark.parametrize("kind", ["gpt2", "bpe:300", "sentencepiece"])
def test_every_saved_tokenizer_states_its_outputs(sentencepiece_models, request, tmp_path, kind):
    if kind == "bpe:300":
        train_bpe(kind, [Path(__file__).read_text()], tmp_path)
    else:
        request.getfixturevalue("gpt2_bpe") if kind == "gpt2" else None
        load_tokenizer(data(str(sentencepiece_models["llama"]) if kind == "sentencepiece" else kind)).save(
            tmp_path
        )
    config = read_json(tmp_path / "tokenizer_config.json")
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_byte_order_marks_in_a_tokenizer_are_passed_over(tmp_path):
    train_bpe("bpe:300", [Path(__file__).read_text()], tmp_path)
    expected = load_tokenizer(data(str(tmp_path)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert load_tokenizer(data(str(tmp_path))).fingerprint == expected.fingerprint


def test_two_tokenizers_never_share_a_fingerprint(sentencepiece_models, tmp_path):
    train_bpe("bpe:300", [Path(__file__).read_text()], tmp_path / "a")
    train_bpe("bpe:301", [Path(__file__).read_text()], tmp_path / "b")
    loaded = [
        load_tokenizer(data("bpe:300"), tmp_path / "a"),
        load_tokenizer(data("bpe:301"), tmp_path / "b"),
    ]
    # one tokenizer by two names
    assert load_tokenizer(data(str(tmp_path / "a"))).fingerprint == loaded[0].fingerprint
    loaded += [load_tokenizer(data(str(path))) for path in sentencepiece_models.values()]
    assert len({tokenizer.fingerprint for tokenizer in loaded}) == len(loaded)


def test_sentencepiece_model_of_the_hub_comes_from_its_cache(sentencepiece_models, tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--llama" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.model").write_bytes(sentencepiece_models["llama"].read_bytes())
    code = (
        "import sys; from inheritune.config.sections import Data\n"
        "from inheritune.errors import UserError; from inheritune.data.tokenizer_loading import "
        "load_tokenizer\n"
        "try: print(load_tokenizer(Data.model_validate_json(sys.argv[1])).fingerprint)\n"
        "except UserError as error: print(error)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    outputs = []
    for name in ("someone/llama/tokenizer.model", "someone/llama/other.model"):
        wanted = data(name).model_copy(update={"tokenizer_revision": "0" * 40})
        command = [sys.executable, "-c", code, wanted.model_dump_json()]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout.strip())
    assert outputs[0] == load_tokenizer(data(str(sentencepiece_models["llama"]))).fingerprint
    assert "other.model' is neither in the cache" in outputs[1] and "HF_HOME" in outputs[1]


def test_refusals(tmp_path):
    for name in ("bpe:", "bpe:2k", "bpe:256"):
        with pytest.raises(UserError, match="write bpe:N with N from 258"):
            parse_bpe_size(name)
    with pytest.raises(UserError, match="is trained by 'prepare'"):
        load_tokenizer(data("bpe:512"))
    with pytest.raises(UserError, match="yields only"):
        train_bpe("bpe:5000", ["a short text"], tmp_path / "short")
    with pytest.raises(UserError, match="nothing.model is missing"):
        load_tokenizer(data(str(tmp_path / "nothing.model")))
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        load_tokenizer(data(str(tmp_path / "broken.model")))
    model = random_model(config_of("public"))
    model.save_pretrained(tmp_path / "without files")  # transformers would make a tokenizer that gives no ids
    with pytest.raises(UserError, match="without files' has no vocabulary .* add tokenizer.json"):
        load_tokenizer(data(str(tmp_path / "without files")))
    check_vocabulary(50257, 50304, "recipe")
    with pytest.raises(
        UserError, match="recipe: the tokenizer has 50257 ids, the model's vocabulary only 50256"
    ):
        check_vocabulary(50257, 50256, "recipe")


def test_what_workers_are_given_can_be_pickled():
    assert pickle.loads(pickle.dumps(data("gpt2"))) == data("gpt2")


def test_tokenizers_that_differ_on_the_data_alone_are_told_apart(tmp_path):
    """A loss was once measured on ids of another tokenizer, since both gave a fixed text the same ids."""
    rng, folders = (
        np.random.default_rng(0),
        [write_tokens(tmp_path / "data") / "tokenizer", tmp_path / "other"],
    )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        train_bpe("bpe:300", ["".join(rng.choice(list("ACGT"), 20_000))], folder)
    tokens = Tokens(tmp_path / "data", "val")
    own, other = (open_encoder(folder) for folder in folders)
    assert own(PROBE) == other(PROBE)
    assert has_same_ids(own, tokens) and not has_same_ids(other, tokens)
    assert open_encoder(tmp_path) is None


def test_a_start_whose_tokenizer_is_not_that_of_the_data_is_named(tmp_path, own_root):
    """Such a run was once trained without a word."""
    source = tmp_path / "source"
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=32, vocab_size=300)
    random_model(config).save_pretrained(source)
    inherited = {"init": {"inherit": {"source": str(source), "layers": "0:1"}}}
    runs = {"cut": inherited, "taught": {"init": "random", "distil": {"teacher": str(source)}}}
    experiment = load_experiment(write_experiment(tmp_path / "e", experiment_dict(runs=runs, paper=[])))
    tokens = Tokens(write_tokens(get_data_dir(experiment)), "val")
    jobs = [Job(experiment, run) for run in experiment.runs]
    assert [find_foreign_tokenizer(job, tokens) for job in jobs] == [None, None]  # it has no tokenizer
    train_bpe("bpe:300", [Path(np.__file__).read_text()], source)
    for job in jobs:
        said = find_foreign_tokenizer(job, tokens)
        assert f"the tokenizer of {source} gives other ids than bpe:300" in said
    shutil.copytree(tokens.folder / "tokenizer", source, dirs_exist_ok=True)
    assert [find_foreign_tokenizer(job, tokens) for job in jobs] == [None, None]
    shutil.rmtree(source)  # a start that was made before it went needs it no more
    assert [find_foreign_tokenizer(job, tokens) for job in jobs] == [None, None]
