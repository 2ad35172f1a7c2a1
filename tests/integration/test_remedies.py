"""What a refusal says to do is done, and then the same command works: where a disk is full, a folder
read-only, a cache somewhere else. Those that harm a file are in REMEDIES of test_damage.py."""

import errno
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import (
    REPOSITORY,
    experiment_dict,
    one_sentence,
    refused,
    run_verb,
    write_experiment,
    write_tokens,
)
from hub_server import Hub
from test_evaluate import ALONE, OWN, TEXT, write_model, write_own
from test_fetch import environment, files, make_hub, write_hub_experiment  # noqa: F401
from test_foreign import unfinish
from test_prepare import children, some_texts, write_jsonl

from inheritune.config.experiment import load_experiment
from inheritune.data.bpe_training import train_bpe
from inheritune.errors import UserError
from inheritune.evaluation.downstream import TASK_FILES
from inheritune.files.json_files import read_json
from inheritune.files.rundir import RunDir, get_data_dir, require_weights
from inheritune.files.storage import explain_disk_error, find_moving_variable
from inheritune.files.writing import replace_atomically

pytestmark = pytest.mark.slow


@contextmanager
def read_only(folder: Path):
    """Whatever lies in `folder` cannot be written, not even by root: it is mounted so."""
    if (
        os.geteuid()
        or subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode
    ):
        pytest.skip("a folder that is read-only for root too needs the right to mount")
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


# --- the variable that moves a place ------------------------------------------------------------------------


def test_each_place_is_moved_by_its_own_variable(tmp_path, monkeypatch):
    for name in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_DATASETS_CACHE",
        "XDG_CACHE_HOME",
        "HF_HOME",
        "TMPDIR",
    ):
        monkeypatch.delenv(name, raising=False)
    root, home = Path(os.environ["INHERITUNE_ROOT"]), Path.home() / ".cache" / "huggingface"
    assert find_moving_variable(root / "runs" / "a" / "b") == ("INHERITUNE_ROOT", root)
    assert find_moving_variable(root / "data" / "a") == ("INHERITUNE_ROOT", root)
    assert find_moving_variable(home / "hub" / "models--a") == ("HF_HOME", home)
    assert find_moving_variable(home / "datasets" / "a.lock") == ("HF_DATASETS_CACHE", home / "datasets")
    assert find_moving_variable(Path("/tmp/tmp0a1b2c3d/tokenizer.json")) == ("TMPDIR", Path("/tmp"))
    for own in (tmp_path / "cut", root / "cut", Path("/tmp/cut"), Path("cut"), home.parent / "cut"):
        assert find_moving_variable(own) == (None, own)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_moving_variable(tmp_path / "cache" / "huggingface" / "hub" / "a")[0] == "HF_HOME"
    monkeypatch.setenv("HF_HOME", str(root / "data" / "hf"))  # the nearest decides
    assert find_moving_variable(root / "data" / "hf" / "xet" / "a") == ("HF_HOME", root / "data" / "hf")
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "hub"))
    assert find_moving_variable(tmp_path / "hub" / "a") == ("HUGGINGFACE_HUB_CACHE", tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub2"))
    assert (
        find_moving_variable(tmp_path / "hub2" / "a")[0] == "HF_HUB_CACHE"
        and find_moving_variable(tmp_path / "hub" / "a")[0] is None
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "sets"))
    assert find_moving_variable(tmp_path / "sets" / "a") == ("HF_DATASETS_CACHE", tmp_path / "sets")
    (tmp_path / "link").symlink_to(tmp_path / "sets")
    assert find_moving_variable(tmp_path / "link" / "a")[0] == "HF_DATASETS_CACHE"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    assert find_moving_variable(tmp_path / "scratch" / "tmpabc" / "x")[0] == "TMPDIR"


def test_a_sentence_names_what_there_is_to_copy(tmp_path, monkeypatch):
    full, closed = OSError(errno.ENOSPC, "x"), OSError(errno.EROFS, "x")
    root = Path(os.environ["INHERITUNE_ROOT"])
    assert "free some, or set INHERITUNE_ROOT to a folder on a larger disk" in str(
        explain_disk_error(full, root / "runs" / "a")
    )
    (root / "data").mkdir(parents=True)
    assert f"free some, or set INHERITUNE_ROOT to a copy of {root} on a larger disk" in str(
        explain_disk_error(full, root / "runs" / "a")
    )
    assert f"set INHERITUNE_ROOT to a copy of {root} that you can write" in str(
        explain_disk_error(closed, root / "runs" / "a")
    )
    assert "; choose a folder that you can write" in str(explain_disk_error(closed, tmp_path / "cut"))
    assert "free some, or choose a folder on a larger disk" in str(explain_disk_error(full, tmp_path / "cut"))


def test_an_error_of_another_file_is_not_told_of_the_one_that_is_written(tmp_path):
    """Reading a source that may not be read is no fault of the place that is written to."""
    with pytest.raises(PermissionError), replace_atomically(tmp_path / "out") as temporary:
        temporary.mkdir()
        raise PermissionError(
            errno.EACCES, "Permission denied", str(tmp_path / "source" / "model.safetensors")
        )
    with (
        pytest.raises(UserError, match=f"cannot write {tmp_path}/out: "),
        replace_atomically(tmp_path / "out") as temporary,
    ):
        temporary.mkdir()
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary / "model.safetensors"))
    assert list(tmp_path.iterdir()) == []


# --- runs and data ------------------------------------------------------------------------------------------


def test_a_read_only_root_is_left_for_a_copy(tmp_path, small, own_root):
    (own_root / "runs").mkdir()
    with read_only(own_root):
        said = refused("train", small, "--run", "reference")
        assert f"set INHERITUNE_ROOT to a copy of {own_root} that you can write" in said
        shutil.copytree(own_root, tmp_path / "copy")
        run_verb("train", small, "--run", "reference", INHERITUNE_ROOT=tmp_path / "copy")


def test_a_full_disk_is_left_for_a_copy_on_a_larger_one(tmp_path, monkeypatch, disk):
    """A run that needs room for one more checkpoint goes on where its files were copied to, or with fewer
    checkpoints kept."""
    raw = experiment_dict(runs={"reference": {"init": "random"}}, paper=[])
    raw["train"] |= {"steps": 6, "checkpoint_every": 2, "keep_last": 2}
    path = write_experiment(tmp_path, raw)
    root = disk.path / "root"
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    write_tokens(get_data_dir(load_experiment(path)))
    run = RunDir.of(load_experiment(path), "reference")
    run_verb("train", path, "--run", "reference")
    unfinish(run)
    one = sum(file.stat().st_size for file in run.checkpoint(2).rglob("*") if file.is_file())
    disk.resize(disk.used() + one // 2)
    said = refused("train", path, "--run", "reference")
    assert (
        f"set train.keep_last lower, free some, or set INHERITUNE_ROOT to a copy of {root} on a larger disk"
        in said
    )

    shutil.copytree(root, tmp_path / "larger")
    again = run_verb("train", path, "--run", "reference", INHERITUNE_ROOT=tmp_path / "larger").stdout
    assert "resumed at step 4 of 6" in again and "finished" in again

    raw["train"]["keep_last"] = 1
    assert (
        "resumed at step 4 of 6"
        in run_verb("train", write_experiment(tmp_path, raw), "--run", "reference").stdout
    )


def test_a_place_of_ones_own_choice_is_chosen_anew(tmp_path, disk):
    source = write_model(tmp_path / "source")
    words = ["inherit", "--source", source, "--layers", "0:2", "--out"]
    disk.resize(1 << 20)
    assert "choose a folder on a larger disk" in refused(*words, disk.path / "cut")
    (tmp_path / "closed").mkdir()
    with read_only(tmp_path / "closed"):
        assert "give a path below a folder that you own" in refused(*words, tmp_path / "closed" / "cut")
    run_verb(*words, tmp_path / "cut")
    assert not list(disk.path.iterdir())


def test_the_command_that_trains_a_source_is_that_of_the_same_file(tmp_path, small):
    """Not of one of this name in recipes/, and of the rehearsal if that was asked for."""
    for rehearse in (False, True):
        with pytest.raises(UserError) as caught:
            require_weights(load_experiment(small, rehearse), "reference", 3)
        command = re.search("first: python -m inheritune (.*)", str(caught.value))[1]
        words = ["train", small, *(["--rehearse"] if rehearse else []), "--run", "reference", "--seed", "3"]
        assert shlex.split(command) == words
    spaced = write_experiment(tmp_path / "two words", experiment_dict())
    with pytest.raises(UserError) as caught:
        require_weights(load_experiment(spaced), "grown")
    assert shlex.split(str(caught.value))[-4:] == ["grow", spaced, "--run", "grown"]


# --- prepare ------------------------------------------------------------------------------------------------


def test_a_preparation_whose_worker_was_killed_goes_on_with_fewer(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", some_texts(6000) * 6)
    raw = experiment_dict()
    raw["data"] |= {"source": "files", "files": [str(tmp_path / "docs.jsonl")], "tokenizer": "bpe:300"}
    path = write_experiment(tmp_path, raw)
    command = [sys.executable, "-m", "inheritune", "prepare", path, "--workers", "2"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers, deadline = [], time.monotonic() + 60
    while not workers:
        assert process.poll() is None and time.monotonic() < deadline
        workers = [
            pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
    os.kill(workers[0], signal.SIGKILL)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    said = one_sentence(subprocess.CompletedProcess(command, process.returncode, out, err))
    assert "start again with fewer workers than 2: what is written is kept" in said
    run_verb("prepare", path, "--workers", 1)
    assert (get_data_dir(load_experiment(path)) / "manifest.json").is_file()


def test_a_full_temporary_folder_is_moved(tmp_path, disk):
    """A tokenizer of the Hub is saved there once, by a library that names no file when the disk is full."""
    words = " ".join(f"word{number}" for number in range(20_000))
    train_bpe("bpe:9000", [words] * 3, tmp_path / "tokenizer")
    (tmp_path / "docs.jsonl").write_text(
        "".join(f'{{"text": "{words[n : n + 500]}"}}\n' for n in range(0, 50_000, 500))
    )
    raw = experiment_dict()
    raw["data"] |= {
        "source": "files",
        "files": [str(tmp_path / "docs.jsonl")],
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    raw["model"]["vocab_size"] = 9000
    path = write_experiment(tmp_path, raw)
    disk.resize(40_000)
    said = refused("prepare", path, "--workers", 1, TMPDIR=disk.path)
    assert "no space left while writing" in said and "set TMPDIR to a folder on a larger disk" in said
    (tmp_path / "scratch").mkdir()
    run_verb("prepare", path, "--workers", 1, TMPDIR=tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


# --- the Hub's caches ---------------------------------------------------------------------------------------


def test_a_hub_cache_that_is_full_or_closed_is_moved(request, tmp_path, files, disk):  # noqa: F811
    hub = make_hub(request, files)
    (tmp_path / "closed").mkdir()
    path = write_hub_experiment(tmp_path, shard_tokens=20_000)
    here = environment(hub, tmp_path)
    disk.resize(64 << 20)
    said = refused("fetch", path, **here | {"HF_HOME": disk.path / "home"})
    assert "set HF_HOME to a folder on a larger disk" in said
    said = refused("fetch", path, **here, HF_HUB_CACHE=disk.path / "hub")
    assert "set HF_HUB_CACHE to a folder on a larger disk" in said
    with read_only(tmp_path / "closed"):
        for name in ("HF_HOME", "HF_HUB_CACHE"):
            said = refused("fetch", path, **here | {name: tmp_path / "closed" / "cache"})
            assert f"set {name} to a folder that you can write" in said
    run_verb("fetch", path, **here)
    # what is in none is looked for in the cache that has it
    said = refused("prepare", path, "--workers", 1, **here | ALONE | {"HF_HOME": tmp_path / "empty"})
    assert "set HF_HOME to a cache that has it" in said
    said = refused("prepare", path, "--workers", 1, **here | ALONE | {"HF_HUB_CACHE": tmp_path / "empty"})
    assert "set HF_HUB_CACHE to a cache that has it" in said
    run_verb("prepare", path, "--workers", 1, **here | ALONE)


def test_a_read_only_cache_of_data_sets_is_copied(request, tmp_path):
    """Compute nodes often see the cache of the login node read-only: the data sets' library wants to lock
    what it reads."""
    folder = tmp_path / "hub" / "datasets" / "someone" / "questions"
    folder.mkdir(parents=True)
    shutil.copy(TASK_FILES / "rehearsal" / "test.jsonl", folder)
    hub = Hub(tmp_path / "hub")
    request.addfinalizer(hub.close)
    content = {
        "include": "choice.yaml",
        "task": "fetched",
        "dataset_path": "someone/questions",
        "custom_dataset": None,
    }
    tasks = {"fetched": {"task": "fetched", "metrics": ["acc"]}}
    path = write_own(
        tmp_path, write_model(tmp_path / "checkpoint"), tasks, fetched=content | {"fewshot_split": None}
    )
    home = {"HF_HOME": tmp_path / "home", "HF_HUB_DISABLE_XET": 1, "HF_ENDPOINT": hub.url}
    run_verb("fetch", path, **home)
    away = {**home, **ALONE, "HF_ENDPOINT": "http://127.0.0.1:9"}
    with read_only(tmp_path / "home"):
        said = refused("evaluate", path, "--run", "theirs", **away)
        assert (
            f"set HF_DATASETS_CACHE to a copy of {tmp_path / 'home' / 'datasets'} that you can write" in said
        )
        shutil.copytree(tmp_path / "home" / "datasets", tmp_path / "copy")
        run_verb("evaluate", path, "--run", "theirs", **away, HF_DATASETS_CACHE=tmp_path / "copy")


# --- evaluate -----------------------------------------------------------------------------------------------


def test_scores_of_another_version_are_scored_anew(tmp_path):
    path = write_own(tmp_path, write_model(tmp_path / "checkpoint"))
    words = ["evaluate", path, "--run", "theirs", "--tasks", "choice"]
    run_verb(*words, **ALONE)
    results = RunDir.of(load_experiment(path), "theirs").results
    results.write_text(
        re.sub(
            '("version": )"1.0"', '\\1"0.9"', re.sub('"seal": "[0-9a-f]*"', '"note": ""', results.read_text())
        )
    )
    assert "delete that row, and 'seal', to score it anew" in refused(*words, **ALONE)
    edited = json.loads(results.read_text())
    del edited["tasks"]["choice"]
    results.write_text(json.dumps(edited))
    run_verb(*words, **ALONE)
    assert read_json(results)["tasks"]["choice"]["version"] == "1.0"


def test_drawn_examples_are_scored_on_one_rank_or_taken_in_order(tmp_path):
    checkpoint = write_model(tmp_path / "checkpoint")
    task = {"include": "choice.yaml", "task": "drawn", "fewshot_config": {"sampler": "default"}}
    chosen = {"drawn": {**OWN["choice"], "task": "drawn"}}
    words = ["evaluate", write_own(tmp_path, checkpoint, chosen, drawn=task), "--run", "theirs"]
    said = refused(*words, "--procs", 2, **ALONE)
    assert "evaluate it on one rank, or give it 'fewshot_config: {sampler: first_n}'" in said
    run_verb(*words, **ALONE)
    write_own(tmp_path, checkpoint, chosen, drawn=task | {"fewshot_config": {"sampler": "first_n"}})
    RunDir.of(load_experiment(words[1]), "theirs").results.unlink()
    run_verb(*words, **ALONE, procs=2)


def test_a_checkpoint_without_a_tokenizer_is_measured_or_given_one(tmp_path):
    checkpoint = write_model(tmp_path / "checkpoint")
    words = ["evaluate", write_own(tmp_path, checkpoint), "--run", "theirs"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    said = refused(*words, "--tasks", "word", **ALONE)
    assert "put its files there, or give --tasks none" in said
    run_verb(*words, "--tasks", "none", **ALONE)
    train_bpe("bpe:300", [TEXT] * 3, checkpoint)
    run_verb(*words, "--tasks", "word", **ALONE)


# --- the machine --------------------------------------------------------------------------------------------


def test_more_open_files_are_enough(tmp_path):
    words = [
        sys.executable,
        "-m",
        "inheritune",
        "inherit",
        "--source",
        str(write_model(tmp_path / "source")),
        "--layers",
        "0:2",
    ]
    shell = f"{shlex.join([*words, '--out', str(tmp_path / 'out')])}"

    def limited(most: int) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", f"ulimit -n {most}; {shell}"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )

    # How many are enough depends on what the machine opens at the start of a Python.
    said = list(itertools.takewhile(lambda done: done.returncode, map(limited, range(4, 100))))
    told = [one_sentence(done) for done in said if done.returncode == 2]
    assert told and all("allow more, as in: ulimit -n 4096" in sentence for sentence in told)
    for done in said[: len(said) - len(told)]:  # Python itself could not start
        assert done.returncode != 2 and "Too many open files" in done.stderr
    assert limited(4096).returncode == 0
