"""fetch, through the real huggingface_hub, from a small Hub on this machine (hub_server.py)."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from conftest import REPOSITORY, experiment_dict, refused, run_verb, write_experiment
from hub_server import COMMIT, Hub
from tiny_models import config_of, random_model

from inheritune.cluster.fetch import BYTES_PER_TOKEN, count_files
from inheritune.data.gpt2_tokenizer import _find_last_merge, _format_ranks, _load_ranks, _spell_token
from inheritune.data.tokenizer import END_OF_TEXT

WORDS = [f"word{number}" for number in range(30)]


@pytest.fixture
def files(tmp_path) -> Path:
    """The Hub's files: a data set of four parquet files, and a model with its tokenizer and what nobody
    needs."""
    generator, texts = random.Random(0), []
    for number in range(4):
        texts.append([" ".join(generator.choices(WORDS, k=200)) for _ in range(60)])
        path = tmp_path / "hub" / "datasets" / "someone" / "texts" / "sample" / f"00{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts[-1]}), path, compression="none", use_dictionary=False)
    (path.parent.parent / "README.md").write_text("a card")
    model = tmp_path / "hub" / "models" / "someone" / "tiny"
    random_model(config_of("public")).save_pretrained(model)
    (tmp_path / "text").write_text("\n".join(sum(texts, [])))
    sentencepiece.SentencePieceTrainer.train(
        input=tmp_path / "text",
        model_prefix=model / "tokenizer",
        vocab_size=45,
        model_type="bpe",
        minloglevel=2,
    )
    (model / "tokenizer.vocab").unlink()
    (model / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja"):
        (model / name).write_text(f"{{# {name} #}}")
    for name in ("pytorch_model.bin", "flax_model.msgpack", "README.md"):
        (model / name).write_bytes(bytes(1000))
    return tmp_path / "hub"


def make_hub(request, files: Path, **options) -> Hub:
    hub = Hub(files, **options)
    request.addfinalizer(hub.close)
    return hub


def write_hub_experiment(tmp_path: Path, **data) -> str:
    """An experiment whose documents, tokenizer and start are all on the Hub."""
    raw = experiment_dict(paper=[])
    raw["data"] |= {
        "source": "hub",
        "repo": "someone/texts",
        "revision": COMMIT,
        "files": ["sample/*.parquet"],
        "sequence_length": 8,
        "tokenizer": "someone/tiny/tokenizer.model",
        "tokenizer_revision": COMMIT,
        "validation": {"first_shard": True},
        **data,
    }
    pinned = {"source": "someone/tiny", "revision": COMMIT}
    raw["runs"] = {
        "half": {"init": {"inherit": {**pinned, "layers": "0:2"}}},
        "again": {"init": {"inherit": {**pinned, "layers": "0:1"}}},
        "whole": {"init": {"external": pinned}},
        "grown": {"init": {"inherit": {"source": "half", "layers": "0:1"}}},
    }
    return write_experiment(tmp_path / "recipes", raw)


def environment(hub: Hub, tmp_path: Path, home: Path | None = None) -> dict:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": home or tmp_path / "home",
        "HF_HUB_DISABLE_XET": 1,
        "HF_HUB_DISABLE_PROGRESS_BARS": 1,
    }


def test_takes_what_is_needed_once_and_everything_works_offline_afterwards(request, tmp_path, files):
    hub = make_hub(request, files)
    size = (files / "datasets/someone/texts/sample/000.parquet").stat().st_size
    # tokens that one and a half files hold by the estimate: the second is needed, the third is not
    path = write_hub_experiment(
        tmp_path, max_tokens=int(1.5 * size / (BYTES_PER_TOKEN / 2)), shard_tokens=500
    )
    variables = environment(hub, tmp_path)
    said = run_verb("fetch", path, **variables).stdout
    model = ["config.json", "generation_config.json", "model.safetensors"]
    model += ["chat_template.jinja", "additional_chat_templates/tool.jinja"]
    assert sorted(hub.taken) == sorted(
        ["sample/000.parquet", "sample/001.parquet", "tokenizer.model", *model]
    )
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in said.splitlines()
        if line.startswith("| ")
    ]
    assert rows[1][:2] == [f"documents: someone/texts@{COMMIT[:8]}", "2"] and rows[1][3] == "0"
    assert rows[1][2] == rows[1][4] == f"{2 * size / 1000:.0f} kB"
    # the tokenizer is a file of the model's
    assert [row[0].split(":")[0] for row in rows[2:]] == ["model", "in all"]
    assert said.index("Free in") < said.index("file 1 of") and "is an estimate" in said
    assert said.splitlines()[-1] == "8 files of small are in the cache: 8 downloaded, 0 were there"

    hub.taken.clear()
    again = run_verb("fetch", path, **variables).stdout
    assert (
        not hub.taken
        and again.splitlines()[-1] == "8 files of small are in the cache: 0 downloaded, 8 were there"
    )

    hub.close()
    offline = {**variables, "HF_HUB_OFFLINE": 1, "HF_ENDPOINT": "http://127.0.0.1:9"}
    run_verb("prepare", path, "--workers", 1, **offline)
    inherited = run_verb(
        "inherit",
        "--source",
        "someone/tiny",
        "--revision",
        COMMIT,
        "--layers",
        "0:2",
        "--out",
        tmp_path / "cut",
        **offline,
    )
    assert (tmp_path / "cut" / "additional_chat_templates" / "tool.jinja").is_file()
    assert (
        "wrote" in inherited.stdout
        and json.loads((tmp_path / "cut" / "config.json").read_text())["n_layer"] == 2
    )


def test_a_killed_fetch_goes_on_with_the_file_it_was_at(request, tmp_path, files):
    hub = make_hub(request, files, stall_at="sample/002.parquet")
    path, variables = write_hub_experiment(tmp_path, tokenizer="bpe:300"), environment(hub, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "inheritune", "fetch", path],
        cwd=REPOSITORY,
        env={**os.environ, **{k: str(v) for k, v in variables.items()}},
        stdout=subprocess.DEVNULL,
    )
    assert hub.stalling.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hub.taken == ["sample/000.parquet", "sample/001.parquet"]
    hub.stall_at, hub.taken[:] = "", []
    said = run_verb("fetch", path, **variables).stdout
    assert (
        hub.taken[:2] == ["sample/002.parquet", "sample/003.parquet"]
        and "sample/000.parquet" not in hub.taken
    )
    assert said.splitlines()[-1].endswith("2 were there")


def test_gated_repositories_are_named_before_anything_is_downloaded(request, tmp_path, files):
    hub = make_hub(request, files, gated=["someone/tiny"])
    said = refused("fetch", write_hub_experiment(tmp_path, tokenizer="bpe:300"), **environment(hub, tmp_path))
    assert "https://huggingface.co/someone/tiny " in said and "HF_TOKEN" in said and not hub.taken
    hub.gated = ["someone/texts"]
    said = refused("fetch", write_hub_experiment(tmp_path), **environment(hub, tmp_path))
    assert "https://huggingface.co/datasets/someone/texts " in said and not hub.taken
    # the verbs that download on their own say it too
    hub.gated = ["someone/tiny"]
    words = (
        "inherit",
        "--source",
        "someone/tiny",
        "--revision",
        COMMIT,
        "--layers",
        "0:2",
        "--out",
        tmp_path / "cut",
    )
    assert "https://huggingface.co/someone/tiny " in refused(*words, **environment(hub, tmp_path))


def test_without_room_nothing_is_downloaded(request, tmp_path, files, disk):
    disk.resize(1 << 20)
    hub = make_hub(request, files)
    said = refused("fetch", write_hub_experiment(tmp_path), **environment(hub, tmp_path, home=disk.path))
    assert "the download of " in said and str(disk.path) in said and "HF_HOME" in said and not hub.taken


@pytest.mark.slow
def test_without_internet_or_with_a_wrong_name_it_is_one_sentence(request, tmp_path, files):
    hub = make_hub(request, files)
    variables = environment(hub, tmp_path)
    unknown = refused("fetch", write_hub_experiment(tmp_path, files=["sample/009.parquet"]), **variables)
    assert "has no file sample/009.parquet" in unknown
    hub.close()
    assert "available from the Hub" in refused("fetch", write_hub_experiment(tmp_path), **variables)
    assert not hub.taken


def test_a_rehearsal_takes_nothing(tmp_path):
    said = run_verb(
        "fetch", write_hub_experiment(tmp_path), "--rehearse", HF_ENDPOINT="http://127.0.0.1:9"
    ).stdout
    assert said.startswith("0 files of")


def test_gpt2s_bpe_is_kept_where_compute_nodes_find_it(tmp_path, own_root, gpt2_bpe):
    # tiktoken's cache as its download leaves it: OpenAI's two files (checked by tiktoken's own hashes) under
    # names of their URL
    ranks = _load_ranks(gpt2_bpe)
    merges = [
        " ".join(map(_spell_token, _find_last_merge(ranks, token))) for token in ranks if len(token) > 1
    ]
    encoder = {**{_spell_token(token): rank for token, rank in ranks.items()}, END_OF_TEXT: len(ranks)}
    contents = {"vocab.bpe": "\n".join(["#version: 0.2", *merges, ""]), "encoder.json": json.dumps(encoder)}
    (tmp_path / "downloaded").mkdir()
    for name, content in contents.items():
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (tmp_path / "downloaded" / hashlib.sha1(url.encode()).hexdigest()).write_text(content)

    raw = experiment_dict()
    raw["data"]["tokenizer"], raw["model"]["vocab_size"] = "gpt2", 50304
    path = write_experiment(tmp_path / "recipes", raw)
    no_internet = {"INHERITUNE_GPT2_BPE": "", "HTTPS_PROXY": "http://127.0.0.1:9"}
    assert "cannot be downloaded" in refused(
        "fetch", path, TIKTOKEN_CACHE_DIR=tmp_path / "empty", **no_internet
    )
    run_verb("fetch", path, TIKTOKEN_CACHE_DIR=tmp_path / "downloaded", **no_internet)
    kept = own_root / "data" / "gpt2-bpe" / "gpt2.tiktoken"
    assert kept.read_bytes() == _format_ranks(ranks)
    # as on a node that has only our folder
    run_verb("fetch", path, TIKTOKEN_CACHE_DIR=tmp_path / "empty", **no_internet)


@pytest.mark.parametrize(
    ("tokens", "names", "count"),
    [
        (99, "abc.jsonl", 1),
        (100, "abc.jsonl", 2),
        (100, "abc.jsonl.gz", 1),
        (399, "abc.parquet", 2),
        (10**9, "abc.parquet", 3),
    ],
)
def test_enough_files_for_the_tokens(tokens, names, count):
    letters, _, suffix = names.partition(".")
    sizes = {f"{letter}.{suffix}": 100 * BYTES_PER_TOKEN for letter in letters}
    assert count_files(sizes, list(sizes), tokens) == count
