"""A preparation in parts: the bytes of one process, whatever is killed, missing, damaged or run twice."""

import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.csv
import pytest
from conftest import REPOSITORY
from test_prepare import contents, experiment, some_texts, write_jsonl

from inheritune.data import encoded_units, preparation, prepare_parts
from inheritune.data.prepare import prepare
from inheritune.errors import Stopped, UserError
from inheritune.files.rundir import get_data_dir

TEXTS = some_texts(900)
FIRST_SHARD = {"validation": {"first_shard": True}, "shard_tokens": 3_000}


@pytest.fixture(autouse=True)
def _documents(tmp_path, monkeypatch):
    """Five files of many documents and six of one, and a root of its own."""
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoded_units, "UNIT_FILES", 4)
    monkeypatch.setattr(preparation, "MIXED_BATCH_BYTES", 2_000)
    monkeypatch.setattr(prepare_parts, "MIXED_BATCH_BYTES", 2_000)
    for number in range(4):
        write_jsonl(tmp_path / f"{number}.jsonl", [*TEXTS[number * 200 :][:200], "", TEXTS[number]])
    pa.csv.write_csv(pa.table({"text": TEXTS[800:]}), tmp_path / "table.csv")
    (tmp_path / "small").mkdir()
    for number in range(6):
        (tmp_path / "small" / f"{number}.txt").write_text(TEXTS[number + 10])


ALL = ["*.jsonl", "table.csv", "small/*.txt"]


@pytest.mark.parametrize(
    "data",
    [
        {"files": ALL},  # a random split, and a tokenizer that is trained on what it leaves
        {"files": ALL, **FIRST_SHARD, "max_tokens": 25_000},
        {"files": ALL, **FIRST_SHARD, "deduplicate": True},
        {"files": {"a": ALL[:2], "b": ALL[2:]}, "weights": {"a": 20, "b": 1}, **FIRST_SHARD},
    ],
    ids=["fraction", "max_tokens", "deduplicate", "weights"],
)
def test_parts_give_the_bytes_of_one_process(tmp_path, monkeypatch, caplog, data):
    caplog.set_level("INFO")
    chosen = experiment(**data)
    expected = contents(prepare(chosen, 1))
    for parts, order in ((1, [1]), (3, [2, 3, 1])):
        monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / f"root{parts}"))
        for number in order:
            assert not (get_data_dir(chosen) / "manifest.json").exists()
            folder = prepare(chosen, 1, f"{number}/{parts}")
        assert contents(folder) == expected
    assert "part 3 of 3 of" in caplog.text and "not complete yet: part 1; the part that ends" in caplog.text


def test_a_part_with_enough_tokens_waits_for_the_documents_of_their_last_batch(tmp_path, monkeypatch, caplog):
    """Small files share a batch beyond the end of their unit: the join failed while another part wrote the
    next unit."""
    caplog.set_level("INFO")
    chosen = experiment(files=["small/*.txt"], **{**FIRST_SHARD, "shard_tokens": 50}, max_tokens=120)
    expected = contents(prepare(chosen, 1))
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "root2"))
    folder = prepare(chosen, 1, "1/2")
    assert "part 1 of 2 of" in caplog.text and "not complete yet: part 2" in caplog.text
    assert not (folder / "manifest.json").exists()
    assert contents(prepare(chosen, 1, "2/2")) == expected


def start_part(chosen, part: str) -> subprocess.Popen:
    code = (
        "import logging, sys; from inheritune.config.experiment import Experiment\n"
        "from inheritune.data.prepare import prepare\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "prepare(Experiment.model_validate_json(sys.argv[1]), 1, sys.argv[2])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, chosen.model_dump_json(by_alias=True), part],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_part_and_two_last_ones_at_once(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "large.jsonl", TEXTS * 12)
    chosen = experiment(files=["large.jsonl", "0.jsonl", "1.jsonl"], shard_tokens=50_000)
    expected = contents(prepare(chosen, 1))
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "parts"))
    folder = get_data_dir(chosen)
    process = start_part(chosen, "1/2")
    while not list((folder / "parts").glob(".000000.tmp*/ids.bin")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "parts" / "000000").exists()
    prepare(chosen, 1, "2/2")
    assert not (folder / "manifest.json").exists()
    outputs = [process.communicate()[1] for process in [start_part(chosen, "1/2"), start_part(chosen, "1/2")]]
    assert contents(folder) == expected
    assert sum("tokens/s" in output for output in outputs) == 1, outputs  # one of them joined
    assert not any("Traceback" in output for output in outputs)


def test_a_stopped_part_a_stopped_join_and_damage(tmp_path, monkeypatch):
    chosen = experiment(files=ALL, **FIRST_SHARD)
    expected = contents(prepare(chosen, 1))
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "parts"))
    folder = get_data_dir(chosen)
    with monkeypatch.context() as patched:
        patched.setattr(
            prepare_parts.signals,
            "get_stop_signal",
            lambda: "SIGTERM" if (folder / "parts").is_dir() else None,
        )
        with pytest.raises(Stopped, match="part 1 of 2 .* stopped; the same command resumes with the file"):
            prepare(chosen, 1, "1/2")
    prepare(chosen, 1, "2/2")
    # a unit that was damaged after it was written
    damaged = folder / "parts" / "000001" / "ids.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(UserError, match="000001 is missing or damaged; remove it, and run the parts again"):
        prepare(chosen, 1, "1/2")
    for file in [*damaged.parent.iterdir()]:
        file.unlink()
    damaged.parent.rmdir()
    # plain prepare does what the parts have left, and joins
    assert contents(prepare(chosen, 1)) == expected


def test_documents_that_changed_are_encoded_again(tmp_path, monkeypatch):
    chosen = experiment(files=["*.jsonl"], **FIRST_SHARD)
    prepare(chosen, 1, "1/2")
    write_jsonl(tmp_path / "0.jsonl", TEXTS[500:700])
    for part in ("1/2", "2/2"):
        folder = prepare(chosen, 1, part)
    result = contents(folder)
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "other"))
    assert contents(prepare(chosen, 1)) == result


@pytest.mark.parametrize("part", ["3/2", "0/2", "2", "1/0", "a/b", "-1/2"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match=f"--part takes a part of all, such as 2/8 .got '{part}'"):
        prepare_parts.parse_part(part)
