"""Every reader under a file that was cut off: refused in a sentence that names it, counted by name, or the
honest "not seen".

What comes out stands in the second table of damage.md; each cell is compared with it.

READERS=write pytest tests/unit/test_readers.py     writes that table anew"""

import gc
import gzip
import io
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
import zstandard
from conftest import REPOSITORY, experiment_dict, write_experiment, write_tokens
from open_files import open_files_limited
from test_prepare import experiment, some_texts
from tiny_models import config_of, random_model
from written import filled, markdown

from inheritune.config.experiment import load_experiment
from inheritune.config.sections import Data
from inheritune.data.batches import Tokens
from inheritune.data.bpe_training import train_bpe
from inheritune.data.documents import Corpus, UnusableDocument, extract_text
from inheritune.data.gpt2_tokenizer import Gpt2Tokenizer
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.errors import UserError
from inheritune.files.json_files import compute_seal, read_json, write_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir
from inheritune.models.sources import open_source
from inheritune.models.torch_files import load_skeleton, read_bin
from inheritune.models.weight_files import read_safetensors
from inheritune.runtime.limits import explain_limit

TABLE = REPOSITORY / "tests" / "damage.md"
MAKER = "tests/unit/test_readers.py"
WRITE = os.environ.get("READERS") == "write"
CUTS = (10, 50, 90, 99.9)
OUTCOMES: dict[str, dict[float, str]] = defaultdict(dict)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in some_texts(400)).encode()


# --- the files, whole ---------------------------------------------------------------------------------------


def quoted_texts() -> list[str]:
    """The texts of LINES, as they stand within the quotes of a CSV file."""
    return [json.loads(line)["text"].replace('"', '""') for line in LINES.splitlines()]


def write_packed(folder: Path, name: str) -> Path:
    """Documents in a file of this kind; gzip and zstd in two frames."""
    path, half = folder / name, LINES.index(b"\n", len(LINES) // 2) + 1
    if name.endswith(".gz"):
        path.write_bytes(b"".join(gzip.compress(part, mtime=0) for part in (LINES[:half], LINES[half:])))
    elif name.endswith(".zst"):
        path.write_bytes(
            b"".join(zstandard.ZstdCompressor().compress(part) for part in (LINES[:half], LINES[half:]))
        )
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [json.loads(line)["text"] for line in LINES.splitlines()]}), path)
    elif name.endswith(".csv"):
        path.write_text("n,text\n" + "".join(f'{n},"{t}"\n' for n, t in enumerate(quoted_texts())))
    elif name.endswith(".arrow"):
        table = pa.table({"text": quoted_texts()})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    elif name.endswith(".tar"):
        with tarfile.open(path, "w") as archive:
            for number, text in enumerate(quoted_texts()):
                entry = tarfile.TarInfo(f"{number:04d}.text")
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
    elif name == "array.json":
        path.write_text(json.dumps([json.loads(line) for line in LINES.splitlines()]))
    elif name.endswith((".txt", ".py")):
        path.write_text("# a comment\n" + "x = 1\n" * 2000)
    else:
        path.write_bytes(LINES)
    return path


def write_sentencepiece(folder: Path, _) -> Path:
    (folder / "text").write_bytes(LINES)
    sentencepiece.SentencePieceTrainer.train(
        input=folder / "text",
        model_prefix=folder / "sp",
        vocab_size=500,
        byte_fallback=True,
        minloglevel=2,
        model_type="bpe",
    )
    return folder / "sp.model"


def write_bpe(folder: Path, name: str) -> Path:
    train_bpe("bpe:400", [LINES.decode()], folder / "tokenizer")
    return folder / "tokenizer" / name


def write_gpt2(folder: Path, name: str) -> Path:
    Gpt2Tokenizer().save(folder / "gpt2")
    return folder / "gpt2" / name


def write_model(folder: Path, name: str) -> Path:
    model = random_model(config_of("public"))
    model.save_pretrained(folder / "model")
    torch.save(model.state_dict(), folder / "model" / "pytorch_model.bin")
    return folder / "model" / name


def write_states(folder: Path, name: str) -> Path:
    """A file of DeepSpeed's: tensors and plain values."""
    content = {"module": {"a": torch.randn(400)}, "param_shapes": None, "dp_world_size": 1, "step": 3}
    torch.save(content, folder / name)
    return folder / name


def write_data(folder: Path, name: str) -> Path:
    return write_tokens(folder / "data") / name


def write_run(folder: Path, name: str) -> Path:
    """What a finished run leaves, with its record."""
    run = RunDir(folder / "run")
    run.validation.mkdir(parents=True)
    run.final.mkdir()
    (run.final / "model.safetensors").write_bytes(b"weights")
    run.metrics.write_text("".join(json.dumps({"step": n, "loss": 5.0 / n}) + "\n" for n in range(1, 200)))
    np.save(run.losses(6), np.random.default_rng(0).random(300))
    record = hash_folder(run.path, only=("metrics.jsonl", "validation/step_6.npy"))
    done = {"final": hash_folder(run.final)}
    facts = {
        **{"run": "run", "seed": 0, "layers": 4, "parameters": 1000, "steps": 6, "tokens": 3840},
        "train_flops": 1e9,
        "record": record,
        "weights": compute_seal(done["final"]),
        "validation": {"mean": 3.0, "low": 2.9, "high": 3.1, "n": 300},
    }
    write_json(run.results, facts)
    write_json(run.done, done)
    return run.path / name


def write_file_of_experiment(folder: Path, _) -> Path:
    return Path(write_experiment(folder, experiment_dict()))


def write_deepspeed_json(folder: Path, name: str) -> Path:
    settings = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50000},
    }
    (folder / name).write_text(json.dumps(settings, indent=2))
    return folder / name


# --- how each is read ---------------------------------------------------------------------------------------


def read_documents(path: Path):
    """The texts of a file; those that cannot be used are counted."""
    source, texts, counted = Corpus(experiment(files=[str(path)]).data, path.parent), [], 0
    for _, raw in source.documents(str(path)):
        try:
            texts.append(extract_text(source.kind(str(path)), raw, "text"))
        except UnusableDocument:
            counted += 1
    return texts, counted


def data_of(tokenizer: str) -> Data:
    return experiment(tokenizer=tokenizer, files=["a.txt"]).data


def read_ids(tokenizer) -> list:
    return [row.tolist() for row in tokenizer.encode_batch(["def hello(world): return 1", "café 漢字"])]


def read_finished(path: Path):
    run = RunDir(next(p for p in path.parents if p.name == "run"))
    return run.read_results(), read_json(run.done)


def read_shard(path: Path):
    split = "train" if path.name.startswith("train") else "val"
    tokens = Tokens(path.parent, split)
    return tokens.read(0, tokens.n_tokens).tolist()


def read_whole_model(path: Path):
    source = open_source(path.parent)
    return [source.tensor(name).tolist() for name in source.names()]


def read_weights(read: Callable) -> Callable:
    return lambda path: sorted((name, place.shape) for name, place in read(path).items())


READERS: dict[str, tuple[Callable, str, Callable]] = {
    ".jsonl.gz": (write_packed, "a.jsonl.gz", read_documents),
    ".json.gz": (write_packed, "a.json.gz", read_documents),
    ".jsonl.zst": (write_packed, "a.jsonl.zst", read_documents),
    ".jsonl": (write_packed, "a.jsonl", read_documents),
    ".json, an array": (write_packed, "array.json", read_documents),
    ".json, a line each": (write_packed, "lines.json", read_documents),
    ".parquet": (write_packed, "a.parquet", read_documents),
    ".csv": (write_packed, "a.csv", read_documents),
    ".arrow": (write_packed, "a.arrow", read_documents),
    ".tar, WebDataset": (write_packed, "a.tar", read_documents),
    ".txt": (write_packed, "a.txt", read_documents),
    ".py": (write_packed, "a.py", read_documents),
    "sentencepiece .model": (
        write_sentencepiece,
        "",
        lambda path: read_ids(load_tokenizer(data_of(str(path)))),
    ),
    "tokenizer.json": (
        write_bpe,
        "tokenizer.json",
        lambda path: read_ids(load_tokenizer(data_of("bpe:400"), path.parent)),
    ),
    "tokenizer_config.json": (
        write_bpe,
        "tokenizer_config.json",
        lambda path: read_ids(load_tokenizer(data_of("bpe:400"), path.parent)),
    ),
    "gpt2.tiktoken": (write_gpt2, "gpt2.tiktoken", lambda path: read_ids(Gpt2Tokenizer(path.parent))),
    "safetensors": (write_model, "model.safetensors", read_weights(read_safetensors)),
    "config.json of a model": (write_model, "config.json", read_whole_model),
    "pytorch_model.bin": (write_model, "pytorch_model.bin", read_weights(read_bin)),
    "DeepSpeed states .pt": (write_states, "states.pt", lambda path: str(load_skeleton(path, check=True))),
    "validation losses .npy": (write_run, "validation/step_6.npy", read_finished),
    "metrics.jsonl": (write_run, "metrics.jsonl", read_finished),
    "results.json": (write_run, "results.json", read_finished),
    "DONE": (write_run, "DONE", read_finished),
    "token shard, train": (write_data, "train_00001.bin", read_shard),
    "token shard, validation": (write_data, "val_00000.bin", read_shard),
    "manifest.json": (write_data, "manifest.json", lambda path: read_shard(path.parent / "train_00000.bin")),
    "experiment .yaml": (write_file_of_experiment, "", lambda path: load_experiment(str(path))),
    "DeepSpeed JSON": (write_deepspeed_json, "ds.json", lambda path: load_deepspeed_json(path)),
}


def outcome(reader: str, folder: Path, percent: float) -> str:
    """The cell of the table."""
    write, name, read = READERS[reader]
    path = write(folder, name)
    whole, content = read(path), path.read_bytes()
    path.write_bytes(content[: min(len(content) - 1, int(len(content) * percent / 100))])
    try:
        found = read(path)
    except UserError as error:
        assert str(path) in str(error) or str(path.parent) in str(error), error
        return "refused"
    if read is read_documents and found[1]:
        return "counted"
    return "the same" if found == whole else "not seen"


@pytest.mark.parametrize("percent", CUTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_was_cut_off(tmp_path, monkeypatch, request, reader, percent):
    if reader == "gpt2.tiktoken":
        request.getfixturevalue("gpt2_bpe")
    found = OUTCOMES[reader][percent] = outcome(reader, tmp_path, percent)
    assert WRITE or found == committed()[reader][f"{percent}%"]


@pytest.mark.parametrize("reader", READERS)
def test_a_limit_of_open_files_is_no_damage(tmp_path, request, reader):
    """A file that cannot be opened for want of open files is neither refused as damaged nor left out."""
    if reader == "gpt2.tiktoken":
        request.getfixturevalue("gpt2_bpe")
    write, name, read = READERS[reader]
    path = write(tmp_path, name)
    whole, failed = read(path), 0
    gc.collect()  # files that were not closed would be closed in between
    for more in range(8):
        with open_files_limited(more):
            try:
                found = read(path)
            except Exception as error:
                found = error
        if isinstance(found, Exception):
            failed += 1
            assert "ulimit -n" in str(explain_limit(found)), repr(found)
        else:
            assert found == whole
    assert failed


def committed() -> dict[str, dict[str, str]]:
    """The cells of the table in damage.md."""
    made = TABLE.read_text().partition(f"<!-- made by {MAKER} -->")[2]
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in made.splitlines()
        if line.startswith("| ")
    ]
    heads, _, *cells = rows
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in cells}


def test_only_plain_text_is_not_seen():
    """A cut that nothing tells: text has no end of its own, and neither have lines that end where they were
    cut."""
    silent = {reader for reader, cells in committed().items() if "not seen" in cells.values()}
    assert silent <= {".txt", ".py"}


@pytest.fixture(scope="module", autouse=True)
def write_table():
    """Write the table at the end, where that was asked for."""
    yield
    if WRITE:
        heads = ["file cut to", *(f"{percent}%" for percent in CUTS)]
        rows = [[reader, *(OUTCOMES[reader].get(percent, "?") for percent in CUTS)] for reader in READERS]
        TABLE.write_text(filled(TABLE.read_text(), MAKER, markdown(heads, rows)))
