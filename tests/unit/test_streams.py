"""What is printed may go nowhere: into a pipe that nobody reads, a full disk, a closed stream, a terminal
without the letters. Work goes on, nothing is a traceback, and the exit code says whether what was asked for
is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, experiment_dict, one_sentence, run_verb, write_experiment, write_tokens

from inheritune.config.experiment import load_experiment
from inheritune.files.rundir import RunDir, get_data_dir


def started(*words, **options) -> subprocess.CompletedProcess:
    """`python -m inheritune WORDS` with the streams of `options`, those not named read."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-m", "inheritune", *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, text=True, check=False, **streams)


@pytest.fixture
def unread():
    """The end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def full():
    with open("/dev/full", "w") as disk:
        yield disk


PRINTING = [["--help"], ["train", "--help"], ["status", "{}"], ["check", "{}"], ["plan", "{}", "--json"]]


def filled(words: list[str], experiment: str) -> list[str]:
    return [word.format(experiment) for word in words]


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_a_reader_that_has_enough_is_no_error(small, unread, words):
    done = started(*filled(words, small), stdout=unread)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_what_a_full_disk_did_not_take_is_an_error_where_it_is_all_that_was_asked_for(small, full, words):
    done = started(*filled(words, small), stdout=full)
    assert done.returncode == 2
    assert done.stderr == "inheritune: standard output cannot be written (No space left on device)\n"


def test_work_whose_words_a_full_disk_did_not_take_is_done(small, tmp_path, full):
    raw = experiment_dict()
    raw["data"] |= {"max_tokens": 50_000, "shard_tokens": 20_000, "validation": {"first_shard": True}}
    path = write_experiment(tmp_path / "other", raw)
    done = started("prepare", path, "--workers", 1, stdout=full, stderr=full)
    assert done.returncode == 0 and (get_data_dir(load_experiment(path)) / "manifest.json").is_file()


def test_a_refusal_that_nobody_can_read_keeps_its_exit_code(full, unread):
    for stream in (full, unread):
        assert started("train", "quickstrat", "--run", "reference", stderr=stream).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("procs", [1, 2])
def test_training_goes_on_when_its_reader_leaves(small, procs):
    """As when an ssh ends, or the `tee` behind a pipe is killed."""
    command = [
        sys.executable,
        "-m",
        "inheritune",
        "train",
        small,
        "--run",
        "reference",
        "--procs",
        str(procs),
    ]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(300) == 0
    run = RunDir.of(load_experiment(small), "reference")
    assert run.is_done() and "finished, validation loss" in run.log.read_text()


@pytest.mark.slow
def test_training_with_closed_streams_writes_into_its_own_files_only(small):
    """The first file opened would get the number of the closed stream, and with it what libraries in C
    print."""
    command = f'exec "{sys.executable}" -m inheritune train "$1" --run reference >&- 2>&- <&-'
    done = subprocess.run(["bash", "-c", command, "-", small], cwd=REPOSITORY, check=False)
    run = RunDir.of(load_experiment(small), "reference")
    assert done.returncode == 0 and run.is_done()
    run_verb("verify", run.path)


C_LIBRARY = """
import os, subprocess
from inheritune.runtime import streams
streams.guard_streams()
with open("first", "w"):
    os.write(1, b"of a library")
    subprocess.run(["sh", "-c", "echo of a child"], check=True)
print("of ours")
"""


def test_the_first_file_opened_is_no_stream(tmp_path):
    command = f"exec \"{sys.executable}\" -c '{C_LIBRARY}' >&-"
    subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True
    )
    assert Path(tmp_path / "first").read_text() == ""


@pytest.mark.parametrize("words", [["status", "{}"], ["status"]], ids=["print", "refusal"])
def test_closed_streams_are_no_error(small, words):
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        command = f'exec "{sys.executable}" -m inheritune "$@" {closed}'
        arguments = filled(words, small)
        done = subprocess.run(
            ["bash", "-c", command, "-", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (
            done.returncode == (0 if len(words) > 1 else 2) and "Traceback" not in done.stdout + done.stderr
        )


def test_a_terminal_that_does_not_wait_gets_every_line():
    """Some programs leave the terminal that they share in the mode in which a write may fail for now."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "from inheritune.runtime import streams; streams.guard_streams(); print('x' * 1_000_000)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=writer)
    os.close(writer)
    with open(reader) as said:
        assert len(said.read()) == 1_000_001
    assert process.wait() == 0


# --- letters ------------------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "", "LANG": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


@pytest.fixture
def accented(tmp_path):
    """Path of an experiment whose data is prepared; the file's name, and so the experiment's, has letters
    beyond ASCII."""
    path = write_experiment(
        tmp_path, experiment_dict(paper=[], runs={"reference": {"init": "random"}}), name="größe"
    )
    write_tokens(get_data_dir(load_experiment(path)))
    return path


def test_letters_that_cannot_be_shown_are_replaced(accented):
    assert "größe, seed 0" in run_verb("status", accented).stdout
    assert "gr??e, seed 0" in run_verb("status", accented, **ASCII).stdout
    assert "?" in run_verb("table", "table5", **ASCII).stdout  # the paper's own log: mean ± deviation
    assert "has no run 'grosse'" in one_sentence(
        run_verb("train", accented, "--run", "grosse", check=False, **ASCII)
    )


def test_a_name_that_is_no_text_can_be_printed(small, tmp_path):
    """File names are bytes."""
    root = os.fsdecode(bytes(tmp_path / "m") + b"\xff")
    assert "not started" in run_verb("status", small, INHERITUNE_ROOT=root).stdout


@pytest.mark.slow
def test_training_an_experiment_of_a_name_that_cannot_be_shown(accented, own_root):
    done = run_verb("train", accented, "--run", "reference", INHERITUNE_JOB=own_root / "job", **ASCII)
    assert "gr??e/reference seed 0: finished" in done.stdout and not done.stderr
    run = RunDir.of(load_experiment(accented), "reference")
    assert run.is_done() and "/reference seed 0: finished" in run.log.read_text(encoding="utf-8")
    run_verb("verify", run.path)
