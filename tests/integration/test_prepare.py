"""Documents to shards: bytes, split, order, resuming, bad documents, refusals, the Hub's cache."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import sentencepiece
import zstandard
from conftest import experiment_dict, write_experiment

import inheritune.data.preparation
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.paths import REPOSITORY
from inheritune.data import worker_pool
from inheritune.data.batches import Tokens
from inheritune.data.bpe_training import train_bpe
from inheritune.data.held_out import hold_out
from inheritune.data.prepare import prepare
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.markers import hash_file
from inheritune.files.rundir import get_data_dir

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(autouse=True)
def _root(tmp_path, monkeypatch):
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "root"))


def experiment(**data) -> Experiment:
    """An experiment whose data section is `data` over small defaults."""
    defaults = {
        "name": "t",
        "source": "files",
        "tokenizer": "bpe:300",
        "validation": {"fraction": 0.1},
        "shard_tokens": 20_000,
    }
    return Experiment.model_validate(
        {
            "name": "test",
            "data": {**defaults, "sequence_length": 8, "sampling": "one_pass", **data},
            "model": {"size": "gpt2_tiny", "positions": 8},
            "train": {"steps": 1, "batch_tokens": 8, "lr": 0.1, "warmup_steps": 0},
            "runs": {"reference": {"init": "random"}},
        }
    )


def some_texts(count: int, source: Path = STDLIB) -> list[str]:
    """Documents of different lengths: paragraphs of the standard library."""
    paragraphs = "\n".join(path.read_text() for path in sorted(source.glob("*.py"))[:40]).split("\n\n")
    return [text for text in paragraphs if text.strip()][:count]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text, "meta": {"n": n}}) + "\n" for n, text in enumerate(texts))
    )
    return path


def decode(folder: Path, split: str, tokenizer) -> list[str]:
    """The documents of a split, read back through the reader that training uses."""
    tokens = Tokens(folder, split)
    ids = tokens.read(0, tokens.n_tokens)
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    assert ends[-1] == len(ids) - 1
    return [tokenizer._backend.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def start(chosen: Experiment, workers: int = 2, **environment) -> subprocess.Popen:
    """`prepare` as a process of its own."""
    code = (
        "import logging, sys; from inheritune.config.experiment import Experiment\n"
        "from inheritune.errors import UserError; from inheritune.data.prepare import prepare\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "try: prepare(Experiment.model_validate_json(sys.argv[1]), int(sys.argv[2]))\n"
        "except UserError as error: sys.exit(f'UserError: {error}')"
    )
    command = [sys.executable, "-c", code, chosen.model_dump_json(by_alias=True), str(workers)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )


def test_embedded_corpus_comes_back_as_it_was(caplog):
    caplog.set_level("INFO")
    chosen = experiment(source="embedded", max_tokens=150_000)
    folder = prepare(chosen, 1)
    manifest = read_json(folder / "manifest.json")
    assert manifest["preparation"] == chosen.data.preparation()
    assert manifest["python"] == sys.version.split()[0] and "PSF" in manifest["licence"]
    assert manifest["tokenizer"] | {"fingerprint": ""} == {
        "name": "bpe:300",
        "class": "FastTokenizer",
        "vocab_size": 300,
        "end_of_text": 299,
        "fingerprint": "",
    }
    assert sum(split["tokens"] for split in manifest["splits"].values()) == 150_000
    for shard in (shard for split in manifest["splits"].values() for shard in split["shards"]):
        assert shard["bytes"] == 2 * shard["tokens"] and hash_file(folder / shard["file"]) == shard["xxh3"]
    assert [shard["tokens"] for shard in manifest["splits"]["train"]["shards"]][:-1] == [20_000] * 7
    names = [file["name"] for file in manifest["source_files"]]
    assert names == sorted(names) and not any("/test" in name or "site-packages" in name for name in names)
    backend = load_tokenizer(chosen.data, folder / "tokenizer")._backend
    n_val = manifest["splits"]["val"]["tokens"]
    first, held_out = (
        backend.decode(Tokens(folder, split).read(0, n).tolist())
        for split, n in (("train", 2000), ("val", n_val))
    )
    # which documents are held out depends on their number, and so on the Python version
    text = next(text for name in names if (text := (STDLIB / name).read_text()) not in held_out)
    assert text.startswith(first) or first.startswith(text)
    before = contents(folder)
    assert prepare(chosen, 1) == folder and contents(folder) == before
    assert "already prepared" in caplog.text


def test_the_same_documents_from_any_kind_of_file_give_the_same_bytes(tmp_path):
    texts = some_texts(300)
    write_jsonl(tmp_path / "a.jsonl", texts)
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    half = raw.index(b"\n", len(raw) // 2)
    # as written by tools that append
    frames = [zstandard.compress(part) for part in (raw[:half], raw[half:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    pq.write_table(
        pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "a.parquet", row_group_size=70
    )
    (tmp_path / "txt").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "txt" / f"{number:04d}.txt").write_text(text)
    results = []
    for pattern in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "txt/*.txt"):
        folder = prepare(experiment(files=[str(tmp_path / pattern)]), 1)
        manifest = read_json(folder / "manifest.json")
        assert manifest["splits"]["train"]["documents"] + manifest["splits"]["val"]["documents"] == len(texts)
        results.append((manifest["splits"], manifest["fingerprint"], contents(folder / "tokenizer")))
    assert results == [results[0]] * 5


def test_validation_documents_are_those_of_the_datasets_library(tmp_path):
    from datasets import Dataset

    texts = [f"document number {n}" for n in range(700)]
    chosen = experiment(
        files=[str(write_jsonl(tmp_path / "a.jsonl", texts))], validation={"fraction": 0.03, "seed": 2357}
    )
    folder = prepare(chosen, 1)
    tokenizer = load_tokenizer(chosen.data, folder / "tokenizer")
    theirs = Dataset.from_dict({"text": texts}).train_test_split(test_size=0.03, seed=2357, shuffle=True)
    val, train = decode(folder, "val", tokenizer), decode(folder, "train", tokenizer)
    assert sorted(val) == sorted(theirs["test"]["text"]) and sorted(train) == sorted(theirs["train"]["text"])
    in_order = {text: number for number, text in enumerate(texts)}
    assert val == sorted(val, key=in_order.get) and train == sorted(train, key=in_order.get)
    # OpenWebText as nanoGPT splits it: 4,007 of 8,013,769 documents
    data = experiment(files=["-"], validation={"fraction": 0.0005}).data
    assert hold_out(data, {"": 8_013_769}).mask.sum() == 4_007


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(inheritune.data.preparation, "BATCH_BYTES", 10_000)
    write_jsonl(tmp_path / "a.jsonl", some_texts(2000))
    chosen = experiment(files=[str(tmp_path / "a.jsonl")], max_tokens=200_000)
    results = []
    for workers in (1, 3):
        monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / f"root{workers}"))
        results.append(contents(prepare(chosen, workers)))
    assert results[0] == results[1] and len(results[0]) > 10


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])  # our reader, and one of the datasets library
def test_a_killed_prepare_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, name):
    texts = some_texts(6000) * 3
    if name == "a.csv":
        pa.csv.write_csv(pa.table({"text": texts}), tmp_path / name)
    else:
        write_jsonl(tmp_path / name, texts)
    chosen = experiment(files=[str(tmp_path / name)], shard_tokens=150_000)
    unbroken = contents(prepare(chosen, 2))
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "killed"))
    folder = get_data_dir(chosen)
    for shards in (1, 4):  # killed twice
        process = start(chosen)
        while not (folder / "progress.json").is_file() or len(shards_done(folder)) < shards:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = {name: (folder / name).stat().st_mtime_ns for name in shards_done(folder)}
        assert not (folder / "manifest.json").exists()
        deadline = time.monotonic() + 20
        while any(is_alive(worker) for worker in workers):  # they leave by themselves
            assert time.monotonic() < deadline
            time.sleep(0.05)
    (folder / ".progress.json.tmpnode1-0123abcd-1").write_text("left by a killed process")
    prepare(chosen, 1)
    assert contents(folder) == unbroken
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


def shards_done(folder: Path) -> list[str]:
    return [shard["file"] for shard in read_json(folder / "progress.json")["splits"]["train"]["shards"]]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_tokenizer_that_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    """Else a part of the shards would have the ids of another tokenizer."""
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(400))
    chosen = experiment(files=[str(path)], shard_tokens=5_000)
    monkeypatch.setattr(inheritune.data.preparation.Preparation, "_finish", lambda self: self.save())
    folder = prepare(chosen, 1)
    shutil.rmtree(folder / "tokenizer")
    train_bpe("bpe:300", [Path(__file__).read_text()], folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer has changed since this preparation began; delete "):
        prepare(chosen, 1)


def test_documents_that_changed_start_it_anew(tmp_path, monkeypatch, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(400))
    chosen = experiment(files=[str(path)], shard_tokens=5_000)
    # stop short of the manifest
    monkeypatch.setattr(inheritune.data.preparation.Preparation, "_finish", lambda self: self.save())
    folder = prepare(chosen, 1)
    monkeypatch.undo()
    monkeypatch.setenv("INHERITUNE_ROOT", str(folder.parent.parent))
    write_jsonl(path, some_texts(300)[::-1])
    prepare(chosen, 1)
    assert "starting anew" in caplog.text
    result = contents(folder)
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "other"))
    assert contents(prepare(chosen, 1)) == result


def test_a_shard_of_another_size_is_made_again(tmp_path, caplog):
    chosen = experiment(files=[str(write_jsonl(tmp_path / "a.jsonl", some_texts(300)))])
    folder = prepare(chosen, 1)
    before = contents(folder)
    os.truncate(folder / "train_00000.bin", 100)
    assert prepare(chosen, 1) == folder and contents(folder) == before
    assert "preparing again" in caplog.text


def test_two_at_once_make_it_once(tmp_path):
    chosen = experiment(files=[str(write_jsonl(tmp_path / "a.jsonl", some_texts(1500)))])
    outputs = [process.communicate()[1] for process in [start(chosen, 1), start(chosen, 1)]]
    assert sorted("already prepared" in output for output in outputs) == [False, True]
    assert sum("prepared" in output and "tokens/s" in output for output in outputs) == 1, outputs


def test_end_of_text_and_first_shard(tmp_path):
    texts = some_texts(200)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for end, first, last in (("prepend", True, False), ("append", False, True)):
        chosen = experiment(
            files=[str(path)],
            end_of_text=end,
            validation={"first_shard": True},
            shard_tokens=1000,
            max_tokens=5500,
        )
        folder = prepare(chosen, 1)
        manifest = read_json(folder / "manifest.json")
        tokenizer = load_tokenizer(chosen.data, folder / "tokenizer")
        assert [s["tokens"] for s in manifest["splits"]["val"]["shards"]] == [1000]
        assert [s["tokens"] for s in manifest["splits"]["train"]["shards"]] == [1000] * 4 + [500]
        ids = np.concatenate(
            [Tokens(folder, split).read(0, count) for split, count in (("val", 1000), ("train", 4500))]
        )
        expected = []
        for row in tokenizer.encode_batch(texts):
            expected += [299] * first + row.tolist() + [299] * last
        assert ids.tolist() == expected[:5500]


def test_token_shares_follow_the_weights(tmp_path, monkeypatch):
    texts = some_texts(3000)
    write_jsonl(tmp_path / "web.jsonl", texts)
    write_jsonl(tmp_path / "code.jsonl", ["<code>" + text for text in texts])
    write_jsonl(tmp_path / "books.jsonl", ["<book>" + text for text in texts])
    weights = {"web": 6, "code": 1, "books": 3}
    monkeypatch.setattr(inheritune.data.preparation, "MIXED_BATCH_BYTES", 2000)
    results = []
    for workers in (1, 2):
        monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / f"root{workers}"))
        chosen = experiment(
            files={name: [str(tmp_path / f"{name}.jsonl")] for name in weights},
            weights=weights,
            max_tokens=200_000,
        )
        results.append(contents(prepare(chosen, workers)))
    assert results[0] == results[1]
    tokenizer = load_tokenizer(chosen.data, get_data_dir(chosen) / "tokenizer")
    taken = dict.fromkeys(weights, 0)
    for text in decode_all(get_data_dir(chosen), tokenizer):
        taken[{"<code>": "code", "<book>": "books"}.get(text[:6], "web")] += (
            len(tokenizer.encode_batch([text])[0]) + 1
        )
    assert {name: round(10 * count / 200_000, 1) for name, count in taken.items()} == pytest.approx(
        weights, abs=0.15
    )


def decode_all(folder: Path, tokenizer) -> list[str]:
    parts = []
    for split in ("train", "val"):
        tokens = Tokens(folder, split)
        ids = tokens.read(0, tokens.n_tokens)
        parts += np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)
    return [tokenizer._backend.decode(part.tolist()) for part in parts if len(part)]


def test_reading_ends_with_the_first_group_that_has_no_more(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(inheritune.data.preparation, "MIXED_BATCH_BYTES", 2000)
    texts = some_texts(600)
    write_jsonl(tmp_path / "small.jsonl", texts[:60])
    write_jsonl(tmp_path / "large.jsonl", texts)
    files = {name: [str(tmp_path / f"{name}.jsonl")] for name in ("large", "small")}
    both = read_json(prepare(experiment(files=files), 1) / "manifest.json")
    mixed = read_json(prepare(experiment(files=files, weights={"large": 1, "small": 1}), 1) / "manifest.json")
    assert "group 'small' has no more documents" in caplog.text
    assert mixed["splits"]["train"]["tokens"] < 0.5 * both["splits"]["train"]["tokens"]


def test_bad_documents_are_counted_and_named(tmp_path, caplog):
    good = [json.dumps({"text": text}).encode() for text in some_texts(100)]
    bad = {
        b'{"text": "\xff\xfe"}': "not UTF-8",
        b'{"text": "half a pair: \\ud83d"}': "not UTF-8",
        b'{"text": ""}': "empty text",
        b'{"other": "key"}': "no key 'text'",
        b'{"text": 7}': "'text' is not text",
        b'["a list"]': "not a JSON object",
        b'{"text": "cut o': "invalid JSON",
        b"[" * 100_000: "invalid JSON",
    }
    lines = [*good[:10], b"   ", *bad, *good[10:]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    folder = prepare(experiment(files=[str(tmp_path / "a.jsonl")]), 1)
    manifest = read_json(folder / "manifest.json")
    path = tmp_path / "a.jsonl"
    assert manifest["bad_documents"] == {
        "not UTF-8": {"count": 2, "examples": [f"{path}:12", f"{path}:13"]},
        "empty text": {"count": 1, "examples": [f"{path}:14"]},
        "no key 'text'": {"count": 1, "examples": [f"{path}:15"]},
        "'text' is not text": {"count": 1, "examples": [f"{path}:16"]},
        "not a JSON object": {"count": 1, "examples": [f"{path}:17"]},
        "invalid JSON": {"count": 2, "examples": [f"{path}:18", f"{path}:19"]},
    }
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(good)
    assert "documents left out: 2 not UTF-8" in caplog.text
    table = pa.table({"text": pa.array([b"fine", b"\xff", None, *[b"more text"] * 20]).cast(pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "z.txt").write_bytes(b"\xff")
    chosen = experiment(files=[str(tmp_path / "a.parquet"), str(tmp_path / "z.txt")], tokenizer="bpe:258")
    manifest = read_json(prepare(chosen, 1) / "manifest.json")
    assert manifest["bad_documents"] == {
        "not UTF-8": {"count": 2, "examples": [f"{tmp_path}/a.parquet:2", f"{tmp_path}/z.txt:1"]},
        "empty text": {"count": 1, "examples": [f"{tmp_path}/a.parquet:3"]},
    }


def test_more_ids_than_two_bytes_hold(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{n}": n for n in range(70_000)} | {"</s>": 70_000, "<unk>": 70_001}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    path = write_jsonl(tmp_path / "a.jsonl", ["w1 w69999 w2"] * 20)
    folder = prepare(experiment(files=[str(path)], tokenizer=str(tmp_path)), 1)
    assert read_json(folder / "manifest.json")["dtype"] == "<u4"
    assert Tokens(folder, "train").read(0, 4).tolist() == [1, 69_999, 2, 70_000]


def test_refusals(tmp_path):
    def refused(match: str, **data):
        with pytest.raises(UserError, match=match):
            prepare(experiment(**data), 1)

    write_jsonl(tmp_path / "good.jsonl", some_texts(20))
    (tmp_path / "data.pdf").write_text("text\nhello\n")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n{}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(5000) + b"\n")[:3000])
    (tmp_path / "cut.jsonl.zst").write_bytes(b"no zstandard")
    pq.write_table(pa.table({"txt": ["a"], "number": [1]}), tmp_path / "good.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:50])
    refused(
        r"data.pdf: documents are read from \.txt, .*\.jsonl\.zst.* files only",
        files=[str(tmp_path / "*.pdf")],
    )
    refused("matches no file", files=[str(tmp_path / "nothing*.txt")])
    train_bpe("bpe:300", some_texts(20), tmp_path / "hf")
    for tokenizer in ("bpe:300", str(tmp_path / "hf")):
        empty = {
            "files": [str(tmp_path / "empty.jsonl")],
            "validation": {"first_shard": True},
            "tokenizer": tokenizer,
        }
        refused("empty corpus, no usable document .1 empty text, 1 no key", **empty)
    refused("cut.jsonl.gz is cut off or damaged", files=[str(tmp_path / "cut.jsonl.gz")])
    refused("cut.jsonl.zst is cut off or damaged", files=[str(tmp_path / "cut.jsonl.zst")])
    refused("cut.parquet is not a complete parquet file", files=[str(tmp_path / "cut.parquet")])
    refused(
        "no column 'text' .* did you mean 'txt'. It has: txt, number", files=[str(tmp_path / "good.parquet")]
    )
    refused("column 'number' .* holds int64", files=[str(tmp_path / "good.parquet")], text_key="number")
    refused(
        "none into 'train'",
        files=[str(tmp_path / "good.jsonl")],
        validation={"first_shard": True},
        shard_tokens=10**6,
    )
    refused("'main' is not a commit of", source="hub", repo="a/b", revision="main", files=["x.jsonl"])


def test_a_full_disk_is_one_sentence_and_can_be_gone_on_from(tmp_path, monkeypatch, disk):
    chosen = experiment(files=[str(write_jsonl(tmp_path / "a.jsonl", some_texts(3000)))], shard_tokens=50_000)
    unbroken = contents(prepare(chosen, 1))
    disk.resize(400 << 10)
    monkeypatch.setenv("INHERITUNE_ROOT", str(disk.path))
    with pytest.raises(UserError, match="no space left while writing .*free some, or set INHERITUNE_ROOT"):
        prepare(chosen, 1)
    disk.resize(50 << 20)
    assert contents(prepare(chosen, 1)) == unbroken


# --- the Hub: the real library, offline, on a cache filled here ---------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(home: Path, files: dict[str, list[str]]) -> None:
    snapshot = home / "hub" / "datasets--someone--texts" / "snapshots" / COMMIT
    for name, texts in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": texts}), snapshot / name)
        else:
            write_jsonl(snapshot / name, texts)


def test_hub_files_come_from_its_cache_and_only_as_many_as_needed(tmp_path):
    texts = some_texts(600)
    fill_cache(tmp_path / "home", {"sample/000.parquet": texts[:300], "sample/001.parquet": texts[300:]})
    hub = {"source": "hub", "repo": "someone/texts", "revision": COMMIT}
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    chosen = experiment(files=["sample/*.parquet"], **hub)
    process = start(chosen, 1, **environment)
    output = process.communicate()[1]
    assert process.returncode == 0, output
    assert f"offline: someone/texts@{COMMIT} is taken to be the 2 files" in output
    from_hub = read_json(get_data_dir(chosen) / "manifest.json")
    assert [(f["name"], f["revision"]) for f in from_hub["source_files"]] == [
        ("sample/000.parquet", COMMIT),
        ("sample/001.parquet", COMMIT),
    ]
    local = experiment(files=[str(write_jsonl(tmp_path / "a.jsonl", texts))])
    assert read_json(prepare(local, 1) / "manifest.json")["splits"] == from_hub["splits"]

    (tmp_path / "text").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=tmp_path / "text", model_prefix=tmp_path / "sp", vocab_size=300, model_type="bpe", minloglevel=2
    )
    names = {
        "files": ["sample/001.parquet", "sample/002.parquet"],
        **hub,
        "tokenizer": str(tmp_path / "sp.model"),
    }
    for limit, code in ((3000, 0), (None, 1)):
        lazy = experiment(validation={"first_shard": True}, shard_tokens=1000, max_tokens=limit, **names)
        process = start(lazy, 1, **environment)
        output = process.communicate()[1]
        assert process.returncode == code, output
    assert f"UserError: sample/002.parquet of someone/texts@{COMMIT} is neither in the cache" in output
    assert "python -m inheritune fetch" in output and "HF_HOME" in output


def test_a_worker_that_is_killed_while_it_starts_is_told_as_one_killed_later(tmp_path, monkeypatch):
    """The second worker cannot be told what to do: its end of the pipe is closed."""
    started = []

    def start(self):
        started.append(self)
        if len(started) > 1:
            raise BrokenPipeError(32, "Broken pipe")
        super(worker_pool._Process, self).start()

    monkeypatch.setattr(worker_pool._Process, "start", start)
    raw = experiment_dict()
    raw["data"] |= {"max_tokens": 300_000, "shard_tokens": 100_000, "validation": {"first_shard": True}}
    path = write_experiment(tmp_path, raw)
    with pytest.raises(UserError, match="a worker process was killed while preparing"):
        prepare(load_experiment(path), workers=2)
    monkeypatch.undo()
    prepare(load_experiment(path), workers=1)
