"""The lock and temporary files where nobody sees everything: hidden processes, other users, damaged or copied
lock files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_damage import modes_count

from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files.lock import Lock, find_lock_holder, find_lock_holders
from inheritune.files.processes import find_process_state, identify_machine, read_start_time
from inheritune.files.rundir import get_data_dir
from inheritune.files.writing import ABANDONED_S, get_temporary_path, remove_leftovers, replace_atomically

# --- alive, dead, unknown -----------------------------------------------------------------------------------


def test_a_process_is_alive_dead_or_unknown():
    here, own = identify_machine(), os.getpid()
    ended = subprocess.Popen(["true"])
    deadline = time.monotonic() + 30
    while read_start_time(ended.pid) != "":  # it has ended and is not waited for: a zombie
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert find_process_state(here, ended.pid, "1") == "dead"
    ended.wait()
    assert find_process_state(here, ended.pid, "1") == "dead"
    assert find_process_state(here, own, read_start_time(own)) == "alive"
    assert find_process_state(here, own, "1") == "dead"  # the number is used again
    assert find_process_state(here, own) == "unknown"
    for where, pid in (
        ("another machine", own),
        (None, own),
        (here, "x"),
        (here, None),
        (here, True),
        (here, -1),
        (here, 10**30),
    ):
        assert find_process_state(where, pid, "1") == "unknown"


@pytest.fixture
def open_folder():
    """A folder that every user may enter and fill (pytest's own are only for the user who runs it)."""
    folder = Path(tempfile.mkdtemp(prefix="inheritune-lock-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("proc", ["hidden", "outer", "none"])
def test_users_who_cannot_see_each_others_processes(open_folder, proc):
    """Two users on a machine that hides processes (hidepid=2), in a container with the /proc of its host, and
    without /proc."""
    unshare = ["unshare", "--mount", "--pid", "--fork"]
    if os.geteuid() or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("other users and a /proc of one's own need root and the right to make namespaces")
    command = [
        *unshare,
        sys.executable,
        str(REPOSITORY / "tests" / "support" / "lock_worker.py"),
        str(open_folder),
        proc,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=open_folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "is being written by process " in found["lock"]["beating"] and found["lock"]["holder"], found
    assert found["lock"]["silent"] == "taken", found
    assert (
        found["file"]["while it writes"] == ["part"] and found["file"]["written"] == "of the second user"
    ), found
    if proc != "none":  # without /proc a number may be another namespace's
        assert found["lock"]["killed"] == "taken" and found["file"]["after its end"] == [], found


# --- lock files that are none -------------------------------------------------------------------------------

CONTENTS = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "an empty object": b"{}",
    "a word for a number": b'{"pid": "x", "machine": "%s", "host": "node1"}',
    "too large a number": b'{"pid": 1e999, "machine": "%s", "host": ["node1"], "slurm": "12"}',
    "a job that is none": b'{"pid": 1, "host": "node1\\u001b[2J", "slurm": [12, null, "x"]}',
    "deep": b"[" * 100_000,
    "binary": bytes(range(256)),
}


def lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock.0123456789ab")


def age(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def check_unknown(path: Path) -> None:
    """A lock file that names nobody is respected while it is young, and named; then it is in nobody's way."""
    file = lock_file(path)
    with pytest.raises(UserError) as caught:
        Lock(path, wait=0).acquire()
    assert f"is being written by a process that its lock file {file} does not name" in str(caught.value)
    assert find_lock_holder(path)["silent"] < Lock.SILENCE
    age(file, Lock.SILENCE + 30)
    assert find_lock_holder(path) is None
    with Lock(path, wait=0):
        pass


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_damaged_lock_file_counts_until_it_is_old(tmp_path, content):
    lock_file(tmp_path / "run").write_bytes(content.replace(b"%s", identify_machine().encode()))
    check_unknown(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["unreadable", "a folder", "a pipe"])
def test_a_lock_file_that_cannot_be_read_counts_until_it_is_old(tmp_path, kind):
    file = lock_file(tmp_path / "run")
    if kind == "a folder":
        (file / "kept").mkdir(parents=True)
    elif kind == "a pipe":
        os.mkfifo(file)
    else:
        file.write_text("{}")
        file.chmod(0)
    with modes_count():
        check_unknown(tmp_path / "run")
    assert list(tmp_path.iterdir()) == ([file] if kind == "a folder" else [])


def test_what_is_named_like_a_lock_but_not_as_ours_is_no_lock(tmp_path):
    names = [".run.lock.notes", ".run.lock.0123456789ab.bak", ".run.lock.0123456789ab~"]
    names += [".run.lock.0123456789AB", ".other.lock.0123456789ab"]
    for name in names:
        (tmp_path / name).write_text("{}")
    with Lock(tmp_path / "run", wait=0):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert list(find_lock_holders(tmp_path)) == ["other"]


def test_a_lock_from_the_future_is_not_for_ever(tmp_path):
    lock_file(tmp_path / "run").write_text("{}")
    age(lock_file(tmp_path / "run"), -10 * 365 * 24 * 3600)
    with Lock(tmp_path / "run", wait=0):
        pass


def test_a_copy_of_a_run_at_work_is_not_locked_by_the_original(tmp_path):
    """Who copies the runs of a seed copies the lock of the one at work too."""
    (tmp_path / "seed0").mkdir()
    with Lock(tmp_path / "seed0" / "run"):
        shutil.copytree(tmp_path / "seed0", tmp_path / "copied")
        (copy,) = (tmp_path / "copied").iterdir()
        age(copy, Lock.SILENCE + 30)
        assert find_lock_holder(tmp_path / "copied" / "run") is None and find_lock_holder(
            tmp_path / "seed0" / "run"
        )
        with Lock(tmp_path / "copied" / "run", wait=0):
            pass
        with pytest.raises(UserError, match=f"by process {os.getpid()} on"):
            Lock(tmp_path / "seed0" / "run", wait=0).acquire()


def test_a_lock_that_cannot_be_taken_away_is_named(open_folder):
    """In a folder where only a file's owner may remove it (like /tmp)."""
    if os.geteuid():
        pytest.skip("a second user needs root")
    open_folder.chmod(0o1777)
    file = lock_file(open_folder / "run")
    file.write_text("{}")
    age(file, Lock.SILENCE + 30)
    code = "import os, sys; from pathlib import Path\n"
    code += "from inheritune.errors import UserError; from inheritune.files.lock import Lock\n"
    code += "os.setgid(12346); os.setuid(12346)\n"
    code += "try: Lock(Path(sys.argv[1]), wait=0).acquire()\nexcept UserError as error: print(error)"
    command = [sys.executable, "-c", code, str(open_folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=open_folder, check=False)
    said = (
        f"{file} is a lock left behind that cannot be removed (Operation not permitted); have its owner "
        f"delete it"
    )
    assert done.stdout.strip() == said, done.stdout + done.stderr
    assert list(open_folder.iterdir()) == [file]


@pytest.mark.parametrize("word", ["soon", "-1", "nan", "1e"])
def test_a_wait_that_is_no_number_is_refused(tmp_path, monkeypatch, word):
    monkeypatch.setenv("INHERITUNE_LOCK_WAIT", word)
    with pytest.raises(UserError, match=f"INHERITUNE_LOCK_WAIT={word} .*; set 120, or unset it"):
        Lock(tmp_path / "run")


# --- temporary files ----------------------------------------------------------------------------------------


def other_temporary(path: Path, place: str) -> Path:
    """The temporary folder of `path` that process 7 of another machine would make."""
    folder = path.with_name(f".{path.name}.tmpnode9-{place}-7")
    folder.mkdir()
    (folder / "part").write_text("x")
    return folder


def test_a_temporary_of_a_process_elsewhere_is_removed_when_it_is_old_only(tmp_path):
    """The same number on another machine, or in another container of this one: nothing here tells whether it
    lives."""
    left = other_temporary(tmp_path / "out", "00000000")
    for _ in range(2):
        with replace_atomically(tmp_path / "out") as temporary:
            temporary.write_text("x")
        assert left.is_dir()
        age(left, ABANDONED_S + 60)  # the file in it is still written to
    age(left / "part", ABANDONED_S + 60)
    age(left, ABANDONED_S + 60)
    with replace_atomically(tmp_path / "out") as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FOREIGN = [
    ".notes.tmp",
    ".tmp",
    ".x.tmp1",
    ".progress.json.tmp",
    ".run.tmp.swp",
    ".step_00000004.Xa1b2c",
    ".nfs0000",
    "._a.tmp-1",
]


def test_only_leftovers_of_ours_are_removed(tmp_path):
    for name in FOREIGN:
        (tmp_path / name).write_text("a person's")
    # and an older form
    ours = [other_temporary(tmp_path / "step_00000004", "00000000"), tmp_path / ".DONE.tmpnode-1-2-33"]
    ours[1].write_text("x")
    ours.append(get_temporary_path(tmp_path / "final"))
    ours[2].write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FOREIGN)


# --- waiting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_who_waits_for_a_lock_leaves_when_asked(small, number):
    """`prepare` waits without a limit, and once heard nothing meanwhile."""
    folder = get_data_dir(load_experiment(small))
    shutil.rmtree(folder)
    with Lock(folder):
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "inheritune", "prepare", small],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert f"{folder} is being written by process {os.getpid()}" in process.stdout.readline()
        process.send_signal(number)
        said = process.communicate(timeout=20)[0]
    assert process.returncode == 0 and "Traceback" not in said, said
    assert (
        f"inheritune: stopped while waiting for {folder}" in said
        and f"({number.name}); nothing was changed" in said
    )
    assert not folder.exists() and list(folder.parent.iterdir()) == []


def test_a_lock_that_came_with_a_copy_is_named(tmp_path, capsys):
    (tmp_path / "seed0").mkdir()
    with Lock(tmp_path / "seed0" / "run"):
        shutil.copytree(tmp_path / "seed0", tmp_path / "copied")
        (copy,) = (tmp_path / "copied").iterdir()
        with pytest.raises(UserError, match="delete that file if it came with a copy of the folder"):
            Lock(tmp_path / "copied" / "run", wait=0.1).acquire()
        assert (
            f"(according to {copy}; delete that file if it came with a copy of the folder): waiting"
            in capsys.readouterr().out
        )
        copy.unlink()
        with Lock(tmp_path / "copied" / "run", wait=0):
            pass
        with pytest.raises(UserError) as caught:
            Lock(tmp_path / "seed0" / "run", wait=0).acquire()
        assert "came with a copy" not in str(caught.value)
