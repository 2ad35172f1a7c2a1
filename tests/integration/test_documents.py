"""Documents that strangers bring: packed, cut off, linked, marked, huge, or changed since they were
prepared."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import zstandard
from conftest import REPOSITORY, experiment_dict, one_sentence, refused, run_verb, write_experiment
from fork_server import FORKS
from test_prepare import decode, experiment, some_texts, write_jsonl

from inheritune import errors
from inheritune.config.experiment import load_experiment
from inheritune.data import bpe_training, corpus_changes, preparation, worker_pool
from inheritune.data import prepare as module
from inheritune.data.batches import Order, Share, Tokens, read_share
from inheritune.data.bpe_training import cut_long_words, train_bpe
from inheritune.data.documents import Corpus, UnusableDocument, batch_documents, extract_text
from inheritune.data.prepare import prepare
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.rundir import get_data_dir
from inheritune.runtime.dist import NodeError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def texts_of(folder: Path, chosen) -> list[str]:
    """All documents of both parts, in any order."""
    tokenizer = load_tokenizer(chosen.data, folder / "tokenizer")
    return sorted(decode(folder, "train", tokenizer) + decode(folder, "val", tokenizer))


def raws(*files, **data) -> list[bytes]:
    """Raw documents of the files, in order."""
    chosen = experiment(files=[str(file) for file in files], **data).data
    source = Corpus(chosen, Path("listing"))
    return [raw for batch in batch_documents(source, "", (0, 0), 1 << 20) for raw in batch.raws]


# --- packed files -------------------------------------------------------------------------------------------


def test_a_zst_of_several_frames_is_read_whole(tmp_path):
    parts = [json.dumps({"text": f"document {n} " * 500}).encode() + b"\n" for n in range(5)]
    packed = b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert [raw.rstrip() for raw in raws("a.jsonl.zst")] == [part.rstrip() for part in parts]
    for end in (len(packed) - 1, len(packed) // 2):
        (tmp_path / "a.jsonl.zst").write_bytes(packed[:end])
        with pytest.raises(UserError, match=r"a\.jsonl\.zst is cut off or damaged .*middle of a frame"):
            raws("a.jsonl.zst")


def test_a_zst_with_a_long_window_is_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=28, compression_level=3)
    compressor = zstandard.ZstdCompressor(
        compression_params=settings
    ).compressobj()  # states the window, not the size
    line = json.dumps({"text": "a document"}).encode() + b"\n"
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(line * 3) + compressor.flush())
    assert len(raws("a.jsonl.zst")) == 3


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_an_empty_packed_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="is cut off or damaged .it is empty"):
        raws(name)


# --- names --------------------------------------------------------------------------------------------------


def test_each_real_file_is_read_once(tmp_path):
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    for n in range(4):
        (tmp_path / "docs" / f"{n}.txt").write_text(f"document {n}")
        (tmp_path / "docs" / "sub" / f"{n}.txt").write_text(f"another {n}")
    (tmp_path / "docs" / "sub" / "loop").symlink_to(tmp_path / "docs")
    (tmp_path / "docs" / "again.txt").symlink_to(tmp_path / "docs" / "0.txt")
    (tmp_path / "elsewhere.txt").write_text("by its link")
    (tmp_path / "docs" / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    (names,) = Corpus(experiment(files=["docs/**/*.txt", "docs/*.txt"]).data, tmp_path).groups.values()
    found = [os.path.relpath(name, tmp_path) for name in names]
    assert sorted(found) == sorted(
        [f"docs/{n}.txt" for n in range(4)] + [f"docs/sub/{n}.txt" for n in range(4)] + ["docs/link.txt"]
    )


def test_a_file_of_two_groups_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"b\.txt belongs to the groups 'x' and 'y'"):
        Corpus(experiment(files={"x": ["a.txt"], "y": ["b.txt"]}).data, tmp_path)


def test_a_link_to_a_file_that_is_gone_is_named(tmp_path, monkeypatch):
    """It was once left out without a word."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"b\.txt, which '\*\.txt' matches, is a link to gone\.txt"):
        raws("*.txt")


def test_brackets_in_the_working_folder_and_in_a_name(tmp_path, monkeypatch):
    for folder in (tmp_path / "x[1]", tmp_path / "x1"):
        folder.mkdir()
        (folder / "a.txt").write_text(folder.name)
    (tmp_path / "x[1]" / "[corpus] v1").mkdir()
    (tmp_path / "x[1]" / "[corpus] v1" / "b.txt").write_text("literal")
    monkeypatch.chdir(tmp_path / "x[1]")
    assert raws("*.txt") == [b"x[1]"]
    assert raws("[corpus] v1/b.txt") == [b"literal"]
    assert raws("[[]corpus] v1/*.txt") == [b"literal"]
    with pytest.raises(UserError, match=r"matches no file.*write \[\[\] for a bracket"):
        raws("[corpus] v1/*.txt")


# --- what a document may hold -------------------------------------------------------------------------------

CODING = {
    "rot13": b"# coding: rot13\nx = 1\n",
    "undefined": b"# coding: undefined\nx = 1\n",
    "no such": b"# coding: no-such-encoding\nx = 1\n",
    "surrogate": b"# coding: raw_unicode_escape\nx = '\\ud800'\n",
    "hex": b"# coding: hex\nx = 1\n",
    "idna": b"# coding: idna\n" + b"x" * 300 + b" = 1\n",
    "utf-7": b"# coding: utf-7\nx = '+2AA-'\n",
    "UTF-16": "x = 1\n".encode("utf-16"),
}


def test_a_coding_line_never_ends_a_prepare(tmp_path):
    (tmp_path / "py").mkdir()
    for name, content in CODING.items():
        (tmp_path / "py" / f"{name}.py").write_bytes(content)
    for n in range(20):
        (tmp_path / "py" / f"good{n}.py").write_text(f"value_{n} = {n}\n" * 30)
    chosen = experiment(files=["py/*.py"], tokenizer="bpe:260")
    bad = read_json(prepare(chosen, workers=1) / "manifest.json")["bad_documents"]
    named = {example for entry in bad.values() for example in entry["examples"]}
    assert {Path(example.rpartition(":")[0]).stem for example in named} >= set(CODING) - {"idna"}
    assert all("good" not in example for example in named)


def test_a_byte_order_mark_costs_no_document_and_stays_in_none(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "first"}\n' + mark + b'{"text": "second"}\n')
    (tmp_path / "b.txt").write_bytes(mark + b"third")
    (tmp_path / "c.json").write_bytes(mark + b'[{"text": "fourth"}]')
    assert [raw.strip() for raw in raws("a.jsonl", "b.txt", "c.json")] == [
        b'{"text": "first"}',
        b'{"text": "second"}',
        b"third",
        b'{"text": "fourth"}',
    ]


def test_a_document_that_cannot_be_encoded_is_counted(tmp_path, gpt2_bpe):
    texts = some_texts(60)
    texts[10] = " " * 1_000_000 + "x"
    write_jsonl(tmp_path / "a.jsonl", texts)
    chosen = experiment(files=["a.jsonl"], tokenizer="gpt2")
    chosen = chosen.model_copy(update={"model": chosen.model.model_copy(update={"vocab_size": 50304})})
    manifest = read_json(prepare(chosen, workers=1) / "manifest.json")
    ((defect, entry),) = manifest["bad_documents"].items()
    assert defect.startswith("not encoded by the tokenizer (") and entry["count"] == 1
    assert entry["examples"] == [f"{tmp_path / 'a.jsonl'}:11"]
    assert sum(split["documents"] for split in manifest["splits"].values()) == 59


def test_a_huge_word_ends(tmp_path):
    """Eight million letters without a blank: hours, where a BPE is trained on the whole word."""
    texts = [*some_texts(40), ("aGVsbG8x" * 1000 + "d2") * 1000]
    write_jsonl(tmp_path / "a.jsonl", texts)
    started = time.monotonic()
    chosen = experiment(files=["a.jsonl"], tokenizer="bpe:300")
    folder = prepare(chosen, workers=1)
    assert time.monotonic() - started < 400
    assert not read_json(folder / "manifest.json")["bad_documents"]
    assert sorted(map(len, texts_of(folder, chosen))) == sorted(map(len, texts))


def test_words_are_cut_only_where_they_are_too_long():
    n = bpe_training.LONGEST_WORD
    for text in ("", "a b\n c", "x" * (n - 1), " " * (n - 1)):
        assert list(cut_long_words(text)) == ([text] if text else [])
    text = "begin " + "x" * (2 * n + 5) + "  " + "\n" * n + "end"
    pieces = list(cut_long_words(text))
    assert "".join(pieces) == text and len(pieces) == 4
    assert max(len(run) for piece in pieces for run in re.findall(r"\S+|\s+", piece)) == n


# --- .json and parquet --------------------------------------------------------------------------------------


def test_a_json_file_of_any_form_is_documents(tmp_path):
    rows = [{"text": f"text {n}", "n": n} for n in range(3)]
    forms = {
        "array": json.dumps(rows),
        "indented": json.dumps(rows, indent=2),
        "texts": json.dumps([row["text"] for row in rows]),
        "lines": "\n".join(map(json.dumps, rows)),
        "one": json.dumps(rows[0]),
        "one_indented": json.dumps(rows[0], indent=2),
        "empty": "",
        "none": "[]",
    }
    for name, content in forms.items():
        (tmp_path / f"{name}.json").write_text(content)
        with gzip.open(tmp_path / f"{name}.json.gz", "wt") as file:
            file.write(content)
        expected = {"one": 1, "one_indented": 1, "empty": 0, "none": 0}.get(name, 3)
        for found in (raws(f"{name}.json"), raws(f"{name}.json.gz")):
            assert [json.loads(raw)["text"] for raw in found] == [row["text"] for row in rows][:expected], (
                name
            )
    for name, content in {"number": "3", "cut": json.dumps(rows)[:-4], "words": "hello there"}.items():
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises(UserError, match=rf"{name}\.json (holds a JSON int|is cut off or not JSON)"):
            raws(f"{name}.json")
    (tmp_path / "numbers.json").write_text('[1, {"text": "good"}]')
    chosen = experiment(files=["array.json", "numbers.json"], tokenizer="bpe:258")
    assert Corpus(chosen.data, tmp_path).count(str(tmp_path / "numbers.json")) == 2


def test_columns_of_text_of_every_kind(tmp_path):
    texts = ["one", None, "three"]
    kinds = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
    for number, kind in enumerate(kinds):
        column = pa.array(
            [t.encode() if t and kind == pa.binary() else t for t in texts],
            pa.binary() if kind == pa.binary() else pa.string(),
        )
        pq.write_table(pa.table({"text": column.cast(kind)}), tmp_path / f"{number}.parquet")
        assert raws(f"{number}.parquet") == [b"one", None, b"three"], kind
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "null.parquet")
    with pytest.raises(UserError, match="column 'text' .* is empty, all its values are null"):
        raws("null.parquet")


# --- too few, changed, damaged ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bpe:300", "gpt2"])
def test_one_document_says_that_it_cannot_be_split(tmp_path, gpt2_bpe, tokenizer):
    (tmp_path / "input.txt").write_text("\n\n".join(some_texts(300)))
    raw = experiment_dict(paper=[], runs={"reference": {"init": "random"}})
    raw["data"] |= {"source": "files", "files": [str(tmp_path / "input.txt")], "tokenizer": tokenizer}
    raw["model"]["vocab_size"] = 50304
    path = write_experiment(tmp_path, raw)
    said = refused("prepare", path, "--workers", "1")
    assert "of 1 document(s), validation.fraction 0.05 holds out 1, so none is left" in said
    raw["data"] |= {"validation": {"first_shard": True}, "shard_tokens": 2000}  # as the sentence has it
    manifest = read_json(prepare(load_experiment(write_experiment(tmp_path, raw)), 1) / "manifest.json")
    assert manifest["splits"]["val"]["tokens"] == 2000 and manifest["splits"]["train"]["tokens"] > 2000


def test_documents_that_changed_are_reported_with_a_command_that_works(tmp_path):
    folder = tmp_path / "my docs"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n:02d}.txt").write_text(f"document number {n}, " * 40)
    raw = experiment_dict(paper=[], runs={"reference": {"init": "random"}})
    raw["data"] |= {"source": "files", "files": [str(folder / "*.txt")], "tokenizer": "bpe:270"}
    path = write_experiment(tmp_path / "my recipes", raw)
    run_verb("prepare", path, "--workers", "1")
    prepared = get_data_dir(load_experiment(path))
    before = (prepared / "train_00000.bin").read_bytes()
    os.utime(folder / "05.txt")  # touched, not changed
    assert "prepared from other documents" not in run_verb("prepare", path).stdout
    time.sleep(0.01)
    # of the same size
    (folder / "00.txt").write_text((folder / "00.txt").read_text().replace("number", "NUMBER"))
    (folder / "01.txt").write_text("shorter")
    (folder / "02.txt").unlink()
    (folder / "99.txt").write_text("a new one")
    done = run_verb("prepare", path)
    assert (
        f"1 new ({folder / '99.txt'}), 1 gone ({folder / '02.txt'}), 2 changed ({folder / '00.txt'}, ...)"
        in done.stdout
    )
    assert (prepared / "train_00000.bin").read_bytes() == before
    command = (
        done.stdout.partition("start again too): ")[2]
        .splitlines()[0]
        .replace("python", shlex.quote(sys.executable), 1)
    )
    subprocess.run(command, shell=True, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    assert (prepared / "train_00000.bin").read_bytes() != before
    assert "prepared from other documents" not in run_verb("prepare", path).stdout
    for file in folder.iterdir():  # to save space
        file.unlink()
    assert "prepared from other documents" not in run_verb("prepare", path).stdout


def test_foreign_files_in_a_data_folder_are_left_alone(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", some_texts(60))
    chosen = experiment(files=["a.jsonl"])
    folder = get_data_dir(chosen)
    folder.mkdir(parents=True)
    foreign = ["train_00000.bin.bak", "train_notes.bin", "val_00001 (copy).bin", ".DS_Store", "train_7.bin"]
    for name in foreign:
        (folder / name).write_text("mine")
    prepare(chosen, workers=1)
    assert all((folder / name).read_text() == "mine" for name in foreign)
    assert Tokens(folder, "train").n_tokens


def test_a_token_beyond_the_vocabulary_is_named(small):
    folder = get_data_dir(load_experiment(small))
    shard = folder / "train_00001.bin"
    content = bytearray(shard.read_bytes())
    content[2000:2002] = (60000).to_bytes(2, "little")
    shard.write_bytes(content)
    tokens = Tokens(folder, "train")
    with pytest.raises(
        NodeError, match=r"train_00001\.bin holds token 60000 at position 1000, the vocabulary has 300"
    ):
        tokens.read(3990, 20)
    order = Order(tokens, "epochs:9", 32, 200, 0)
    with pytest.raises(NodeError, match="run 'prepare' again"):
        for step in range(9):
            read_share(order, step, Share.of(200, 0, 1, 8))


def test_a_cut_vocabulary_of_gpt2_is_one_sentence(tmp_path, gpt2_bpe, monkeypatch):
    from inheritune.data.gpt2_tokenizer import Gpt2Tokenizer

    Gpt2Tokenizer().save(tmp_path / "whole")
    for name in ("gpt2.tiktoken", "encoder.json"):
        whole = gpt2_bpe / name if (gpt2_bpe / name).is_file() else tmp_path / "whole" / name
        if not whole.is_file():
            continue
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(whole.read_bytes()[:-200_001])
        with pytest.raises(UserError, match="cut off or not GPT-2's vocabulary|is not GPT-2's vocabulary"):
            Gpt2Tokenizer(tmp_path / name)


def test_a_sentencepiece_model_cut_between_two_pieces_is_refused(tmp_path):
    """It loads, and gives other ids."""
    from sentencepiece import sentencepiece_model_pb2

    (tmp_path / "text").write_text("\n".join(some_texts(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=tmp_path / "text", model_prefix=tmp_path / "sp", vocab_size=400, minloglevel=2
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "sp.model").read_bytes())
    cut = sentencepiece_model_pb2.ModelProto(pieces=proto.pieces[:300])
    (tmp_path / "sp.model").write_bytes(cut.SerializeToString())
    with pytest.raises(UserError, match=r"sp\.model is cut off: it ends before the settings"):
        load_tokenizer(experiment(files=["text"], tokenizer=str(tmp_path / "sp.model")).data)


def test_prepare_refuses_in_one_sentence_and_leaves_nothing(tmp_path):
    packed = zstandard.ZstdCompressor().compress(
        "".join(json.dumps({"text": t}) + "\n" for t in some_texts(500)).encode()
    )
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    raw = experiment_dict(paper=[], runs={"reference": {"init": "random"}})
    raw["data"] |= {"source": "files", "files": [str(tmp_path / "a.jsonl.zst")]}
    path = write_experiment(tmp_path, raw)
    said = one_sentence(run_verb("prepare", path, check=False))
    assert "a.jsonl.zst is cut off or damaged" in said
    assert not (get_data_dir(load_experiment(path)) / "manifest.json").exists()


def test_a_tokenizer_is_trained_on_the_same_text_as_before(tmp_path):
    """Cutting long words changes nothing for ordinary documents."""
    texts = some_texts(200)
    train_bpe("bpe:400", texts, tmp_path / "whole")
    train_bpe("bpe:400", (piece for text in texts for piece in cut_long_words(text)), tmp_path / "cut")
    assert (tmp_path / "whole" / "tokenizer.json").read_bytes() == (
        tmp_path / "cut" / "tokenizer.json"
    ).read_bytes()


# --- documents that change while they are read --------------------------------------------------------------


@pytest.mark.parametrize("change", ["appended", "rewritten", "cut"])
@pytest.mark.parametrize("by", ["fraction", "first_shard"])
def test_documents_that_change_while_they_are_read_are_not_mixed(tmp_path, monkeypatch, by, change):
    write_jsonl(tmp_path / "a.jsonl", some_texts(400))
    split = {"fraction": {"fraction": 0.1, "seed": 1}, "first_shard": {"first_shard": True}}[by]
    chosen = experiment(files=["a.jsonl"], shard_tokens=20_000, validation=split)
    whole, encode = (tmp_path / "a.jsonl").read_bytes(), worker_pool.encode_documents

    def meddle(*given):
        if change == "appended":
            (tmp_path / "a.jsonl").write_bytes(whole + whole)
        else:
            (tmp_path / "a.jsonl").write_bytes(
                whole[: len(whole) // 2] if change == "cut" else whole[::-1].lstrip()
            )
        return encode(*given)

    monkeypatch.setattr(preparation, "BATCH_BYTES", 4096)
    monkeypatch.setattr(worker_pool, "encode_documents", meddle)
    with pytest.raises(
        UserError,
        match="documents changed while they were read; once nothing writes to them, the same command",
    ):
        prepare(chosen, workers=1)
    assert not (get_data_dir(chosen) / "manifest.json").exists()
    monkeypatch.setattr(worker_pool, "encode_documents", encode)
    (tmp_path / "a.jsonl").write_bytes(whole)
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    splits = read_json(prepare(chosen, workers=1) / "manifest.json")["splits"]
    # the one that first_shard cuts is in no part
    assert sum(split["documents"] for split in splits.values()) in (399, 400)


def test_a_file_that_was_rewritten_between_two_starts_begins_anew(tmp_path, monkeypatch):
    """Of the same size: a part of each would be mixed without a word."""
    write_jsonl(tmp_path / "a.jsonl", some_texts(400))
    chosen = experiment(files=["a.jsonl"], shard_tokens=20_000)
    monkeypatch.setattr(preparation, "BATCH_BYTES", 4096)
    monkeypatch.setattr(module.signals, "get_stop_signal", lambda: True)
    with pytest.raises(errors.Stopped):
        prepare(chosen, workers=1)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [text.replace("e", "a") for text in some_texts(400)])
    folder = prepare(chosen, workers=1)
    assert not any("e" in text for text in texts_of(folder, chosen))


def test_a_replaced_file_with_the_time_of_the_old_one_is_reported(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module.log, "propagate", True)
    write_jsonl(tmp_path / "a.jsonl", some_texts(400))
    chosen = experiment(files=["a.jsonl"], shard_tokens=20_000)
    prepare(chosen, workers=1)
    facts = (tmp_path / "a.jsonl").stat()
    time.sleep(0.05)
    write_jsonl(tmp_path / "new.jsonl", [text.replace("e", "a") for text in some_texts(400)])
    os.utime(tmp_path / "new.jsonl", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(tmp_path / "new.jsonl", tmp_path / "a.jsonl")
    prepare(chosen, workers=1)
    assert "1 changed" in caplog.text


def test_a_column_with_a_dot_in_its_name(tmp_path):
    rows = {"a": [{"b": "of a struct"}] * 3, "a.b": [f"text {n}" for n in range(3)]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert raws("a.parquet", text_key="a.b") == [b"text 0", b"text 1", b"text 2"]


@pytest.mark.parametrize("encoding", ["punycode", "IDNA"])
def test_a_coding_line_of_a_slow_encoding_ends_soon(tmp_path, encoding):
    """punycode takes hours for a megabyte."""
    text = f"# coding: {encoding}\n".encode() + b"abcdefgh" * 200_000
    with pytest.raises(UnusableDocument, match="no text encoding"):
        extract_text("python", text, "text")


# --- the same words for other documents ---------------------------------------------------------------------


def two_projects(tmp_path: Path) -> list[Path]:
    """Folders of two projects whose experiments say the same, each with texts and an experiment of its
    own."""
    folders = []
    for name, word in (("first", "alpha beta "), ("second", "uno duos ")):
        folder = tmp_path / name
        (folder / "docs").mkdir(parents=True)
        write_jsonl(folder / "docs" / "a.jsonl", [word * 20 + str(n) for n in range(200)])
        raw = experiment_dict(runs={"reference": {"init": "random"}}, paper=[])
        raw["data"] |= {
            "name": "project",
            "source": "files",
            "files": ["docs/*.jsonl"],
            "tokenizer": "bpe:262",
        }
        raw["data"] |= {"validation": {"fraction": 0.2}, "shard_tokens": 2000}
        write_experiment(folder, raw)
        folders.append(folder)
    return folders


def test_another_projects_documents_are_not_taken_for_ones_own(tmp_path, monkeypatch):
    first, second = two_projects(tmp_path)
    monkeypatch.chdir(first)
    prepare(load_experiment(str(first / "small.yaml")), workers=1)
    monkeypatch.chdir(second)
    chosen = load_experiment(str(second / "small.yaml"))
    for check in (
        lambda: prepare(chosen, workers=1),
        lambda: corpus_changes.check_corpus(chosen, get_data_dir(chosen)),
    ):
        with pytest.raises(
            UserError,
            match=f"was prepared from {first}/docs/a.jsonl .*means other documents, such as {second}",
        ):
            check()
    shutil.copyfile(first / "docs" / "a.jsonl", second / "docs" / "a.jsonl")  # moved, not exchanged
    prepare(chosen, workers=1)
    (second / "docs" / "a.jsonl").unlink()  # deleted on purpose
    prepare(chosen, workers=1)


def test_train_does_not_take_another_projects_documents(tmp_path):
    first, second = two_projects(tmp_path)

    def run(folder: Path, *words) -> subprocess.CompletedProcess:
        command = [FORKS.python(), "-m", "inheritune", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    done = run(first, "prepare", "small.yaml")
    assert done.returncode == 0, done.stderr
    assert "data.files means other documents" in one_sentence(
        run(second, "train", "small.yaml", "--run", "reference")
    )


def test_a_tokenizer_whose_files_changed_is_reported(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module.log, "propagate", True)
    write_jsonl(tmp_path / "a.jsonl", some_texts(200))
    for folder, words in (("one", "alpha beta gamma " * 300), ("two", "uno duos tres quatro " * 300)):
        (tmp_path / folder).mkdir()
        train_bpe("bpe:270", [words], tmp_path / folder)
    shutil.copytree(tmp_path / "one", tmp_path / "mine")
    chosen = experiment(files=["a.jsonl"], tokenizer=str(tmp_path / "mine"), shard_tokens=20_000)
    prepare(chosen, workers=1)
    prepare(chosen, workers=1)
    assert "other files of tokenizer" not in caplog.text
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(tmp_path / "two", tmp_path / "mine")
    prepare(chosen, workers=1)
    assert (
        f"other files of tokenizer {tmp_path / 'mine'}, and stays as it is; to prepare it again"
        in caplog.text
    )


def test_two_columns_of_one_name_are_refused(tmp_path):
    """pyarrow gives neither, in words of its own."""
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match="a.parquet has 2 columns of the name 'text' .*; rename all but one of them"
    ):
        raws("a.parquet")


def test_utf_16_without_a_mark_is_no_text():
    text = "Plain words, and some more of them."
    for encoding in ("utf-16-le", "utf-16-be"):
        with pytest.raises(UnusableDocument, match="NUL characters: UTF-16 without a mark, or no text"):
            extract_text("text", text.encode(encoding), "text")
        with pytest.raises(UnusableDocument, match="NUL characters"):
            extract_text(
                "json", json.dumps({"text": text.encode(encoding).decode("latin-1")}).encode(), "text"
            )
    stray = "a field\0of a table\0here"
    assert extract_text("text", stray.encode(), "text") == stray
