"""The record of a run after kills, damage and a million rows; what a run adds to in a copy that shares its
files."""

import json
import os
import shutil
import time

import pytest
from conftest import experiment_dict, run_verb, write_experiment, write_tokens
from test_foreign import unfinish

from inheritune.config.experiment import load_experiment
from inheritune.data.token_shards import Shards
from inheritune.files.json_files import read_jsonl
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.files.writing import break_links
from inheritune.runtime.log import logger
from inheritune.training.record import SPIKE_ROWS, Metrics


def row(step: int, loss: float = 3.0) -> dict:
    return {
        "step": step,
        "tokens": 491_520 * step,
        "loss": loss + step % 977 / 1000,
        "step_s": 1.2345,
        "tokens_per_s": 398_123.4,
    }


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run with a checkpoint at step 4, killed after step 6."""
    run = RunDir(tmp_path / "run")
    run.checkpoint(4).mkdir(parents=True)
    (run.checkpoint(4) / "metrics.jsonl").write_text(lines(KEPT))
    run.metrics.write_text(lines([*KEPT, *AFTER]))
    return run


KEPT = [row(1), row(2), {"step": 2, "val_loss": 3.5}, row(3), row(4)]
AFTER = [row(5), {"step": 5, "val_loss": 3.25}, row(6)]


def start(run: RunDir) -> list[dict]:
    """A start that resumes at step 4.  -> the record afterwards"""
    Metrics(run, 4).close()
    return read_jsonl(run.metrics)


def test_rows_after_the_checkpoint_are_moved(run):
    assert start(run) == KEPT and read_jsonl(run.discarded_metrics) == AFTER
    run.metrics.write_text(lines([*KEPT, row(5, loss=4.0)]))
    assert start(run) == KEPT and read_jsonl(run.discarded_metrics) == [*AFTER, row(5, loss=4.0)]


def test_a_start_killed_before_it_wrote_the_record_moves_no_row_twice(run):
    before = run.metrics.read_text()
    for _ in range(3):
        start(run)
        run.metrics.write_text(before)
    assert read_jsonl(run.discarded_metrics) == AFTER
    with open(run.discarded_metrics, "a") as file:
        file.write('{"step": 7, "lo')  # by a start that was killed while it wrote
    run.metrics.write_text(lines([*KEPT, row(8)]))
    assert start(run) == KEPT and read_jsonl(run.discarded_metrics) == [*AFTER, row(8)]


def test_a_damaged_line_costs_that_line_only(run, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    content = run.metrics.read_bytes().splitlines(keepends=True)
    content[1] = content[1].replace(b"3.", b"8.")  # edited
    content[6] = b'{"step": 5, "val_loss": \xff\x00\n'
    content.insert(3, b"[1, 2]\n")
    run.metrics.write_bytes(b"".join(content) + b'{"step": 7')
    assert start(run) == KEPT
    assert [one["step"] for one in read_jsonl(run.discarded_metrics)] == [2, 5, 6]
    assert [r.message for r in caplog.records] == [f"2 damaged lines of {run.metrics} are left out"]


def test_the_record_of_a_run_without_a_checkpoint_is_moved_whole(run):
    Metrics(run, -1).close()
    assert read_jsonl(run.metrics) == [] and read_jsonl(run.discarded_metrics) == [*KEPT, *AFTER]


def test_a_long_record_costs_a_start_seconds(run):
    """300,000 rows. Compared row by row with those of the checkpoint they would take an hour."""
    n = 300_000
    (run.checkpoint(4) / "metrics.jsonl").write_text(lines([row(step) for step in range(n)]))
    shutil.copyfile(run.checkpoint(4) / "metrics.jsonl", run.metrics)
    with open(run.metrics, "a") as file:
        file.write(lines([row(n + 1), row(n + 2)]))
    start_time = time.monotonic()
    metrics = Metrics(run, 4)
    assert time.monotonic() - start_time < 30
    assert list(metrics._losses) == [row(step)["loss"] for step in range(n - SPIKE_ROWS, n)]
    metrics.add(row(n))
    metrics.close()
    with open(run.metrics) as file:
        assert sum(1 for _ in file) == n + 1
    assert read_jsonl(run.discarded_metrics) == [row(n + 1), row(n + 2)]


# --- copies that share their files --------------------------------------------------------------------------


def test_a_run_copied_by_links_does_not_touch_the_original(tmp_path, monkeypatch):
    raw = experiment_dict(runs={"reference": {"init": "random"}}, paper=[])
    path = write_experiment(tmp_path, raw)
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "root"))
    write_tokens(get_data_dir(load_experiment(path)))
    original = RunDir.of(load_experiment(path), "reference")
    run_verb("train", path, "--run", "reference")
    unfinish(original)
    original.discarded_metrics.write_text(lines([row(6)]))
    original.losses(6).write_bytes(b"as the original left it")
    before = hash_folder(tmp_path / "root")
    shutil.copytree(tmp_path / "root", tmp_path / "copy", copy_function=os.link)  # cp -rl
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "copy"))
    copy = RunDir.of(load_experiment(path), "reference")
    assert "resumed at step 4 of 6" in run_verb("train", path, "--run", "reference").stdout and copy.is_done()
    assert hash_folder(tmp_path / "root") == before
    assert (
        len(copy.log.read_text()) > len(original.log.read_text())
        and len(read_jsonl(copy.discarded_metrics)) > 1
    )


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_is_broken_off_from_its_other_names(tmp_path, link):
    (tmp_path / "a").write_text("shared\n")
    link(tmp_path / "a", tmp_path / "b")
    break_links(tmp_path / "b")
    with open(tmp_path / "b", "a") as file:
        file.write("own\n")
    assert (tmp_path / "a").read_text() == "shared\n" and (tmp_path / "b").read_text() == "shared\nown\n"
    inode = (tmp_path / "b").stat().st_ino
    break_links(tmp_path / "b")  # it is its own now
    assert (tmp_path / "b").stat().st_ino == inode
    break_links(tmp_path / "none")


def test_tokens_copied_by_links_do_not_touch_the_original(tmp_path):
    """A preparation that was killed, copied and started again cuts and adds to the shard that it was at."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train_00000.bin").write_bytes(bytes(range(100)))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=os.link)
    state = {"tokens": 20, "documents": 1, "shards": [], "open_bytes": 40}
    shards = Shards(tmp_path / "b", "train", "<u2", 1000, state)
    shards.write(shards.dtype.type([7, 8]), 1)
    shards.save()
    assert (tmp_path / "a" / "train_00000.bin").read_bytes() == bytes(range(100))
    assert (tmp_path / "b" / "train_00000.bin").read_bytes() == bytes(range(40)) + bytes([7, 0, 8, 0])
