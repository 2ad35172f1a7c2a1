"""Machines that lack what others have: git, a working nvidia-smi, /dev/shm, /proc, a folder for temporary
files, a name that can be looked up. Each is done without, or is one sentence."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, experiment_dict, one_sentence, run_verb, write_experiment
from test_stop import make

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import get_data_dir
from inheritune.runtime import devices, rendezvous
from inheritune.runtime.limits import explain_limit
from inheritune.training import provenance
from inheritune.training.provenance import git_commit


def changed_machine(change: str, *words, own: str = "--mount") -> subprocess.CompletedProcess:
    """`python -m inheritune WORDS` where the shell commands `change` have changed what this process and its
    children see."""
    command = [
        "unshare",
        own,
        "sh",
        "-c",
        f'{change} && exec "$@"',
        "-",
        sys.executable,
        "-m",
        "inheritune",
        *map(str, words),
    ]
    if os.geteuid() or subprocess.run(["unshare", own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("another view of the machine (unshare) needs root")
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def write_tool(folder, name: str, text: str, monkeypatch) -> None:
    """Make it the only program on the PATH."""
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


HANGS = "#!/bin/sh\nexec /bin/sleep 600\n"


# --- git ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_without_git(tmp_path):
    path, root, run = make(tmp_path, stage=1, steps=3)
    done = run_verb(
        "train", path, "--run", "reference", fresh=True, INHERITUNE_ROOT=root, PATH="/nonexistent"
    )
    assert run.is_done() and not done.stderr
    (start,) = read_json(run.provenance)["starts"]
    assert start["git_commit"] is None


def test_git_that_hangs_or_cannot_run_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "GIT_PATIENCE_S", 1)
    write_tool(tmp_path, "git", HANGS, monkeypatch)
    began = time.monotonic()
    assert git_commit() is None and time.monotonic() - began < 60
    (tmp_path / "git").write_text("not a program")
    assert git_commit() is None


def test_a_checkout_of_another_owner_has_no_commit(tmp_path, monkeypatch):
    """git refuses it ("dubious ownership")."""
    if os.geteuid():
        pytest.skip("giving a folder to another user needs root")
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path / "checkout")
    monkeypatch.setenv("HOME", str(tmp_path))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", tmp_path / "checkout"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], cwd=tmp_path / "checkout", check=True)
    assert re.fullmatch("[0-9a-f]{40}", git_commit())
    for made in (tmp_path / "checkout", *(tmp_path / "checkout").rglob("*")):
        shutil.chown(made, 12345)
    assert git_commit() is None


# --- nvidia-smi and scontrol --------------------------------------------------------------------------------


def test_a_driver_that_hangs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "SMI_TIMEOUT_S", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write_tool(tmp_path, "nvidia-smi", HANGS, monkeypatch)
    assert "nvidia-smi does not answer within 1 s" in devices.find_unused_gpu("2.13.0", "13.0")
    (tmp_path / "nvidia-smi").write_text("not a program")
    assert devices.find_unused_gpu("2.13.0", "13.0") is None


def test_nodes_are_not_named_where_scontrol_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[3-4]")
    for text in ("#!/bin/sh\nexit 1\n", "not a program"):
        write_tool(tmp_path, "scontrol", text, monkeypatch)
        assert rendezvous.list_slurm_hosts() == []


# --- file systems -------------------------------------------------------------------------------------------

NO_SHM = {
    "read-only": "mount -t tmpfs -o ro tmpfs /dev/shm",
    "missing": "mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3",
}


@pytest.mark.slow
@pytest.mark.parametrize("change", NO_SHM.values(), ids=NO_SHM)
def test_without_shared_memory_one_worker_prepares_the_same(tmp_path, own_root, change):
    raw = experiment_dict()
    raw["data"] |= {"max_tokens": 300_000, "shard_tokens": 100_000, "validation": {"first_shard": True}}
    path = write_experiment(tmp_path, raw)
    change += " && mknod /dev/urandom c 1 9" if "mknod" in change else ""
    done = changed_machine(change, "prepare", path, "--workers", 2)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "several workers need a writable /dev/shm" in done.stdout
    folder = get_data_dir(load_experiment(path))
    alone = hash_folder(folder)
    shutil.rmtree(folder)
    run_verb("prepare", path, "--workers", 2)
    assert alone == hash_folder(folder)


@pytest.mark.slow
def test_training_shows_that_there_is_no_shared_memory(tmp_path, monkeypatch):
    path, root, run = make(tmp_path, stage=1, steps=3)
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    done = changed_machine(NO_SHM["read-only"], "train", path, "--run", "reference", "--procs", 2)
    assert "a sum over all ranks works, no writable /dev/shm" in done.stdout and run.is_done()


def test_without_proc_training_is_one_sentence(tmp_path, monkeypatch):
    path, root, _ = make(tmp_path, stage=1)
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    done = changed_machine("mount -t tmpfs tmpfs /proc", "train", path, "--run", "reference")
    assert "/proc is not mounted" in one_sentence(done) and not (root / "runs").exists()


def test_without_a_folder_for_temporary_files_training_is_one_sentence(tmp_path, monkeypatch):
    path, root, _ = make(tmp_path, stage=1)
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    read_only = [
        f"mount --bind {place} {place} && mount -o remount,bind,ro {place}"
        for place in ("/tmp", "/var/tmp", "$PWD")
    ]
    done = changed_machine(" && ".join(read_only), "train", path, "--run", "reference")
    assert "set TMPDIR to one that can" in one_sentence(done)


def test_a_lost_folder_for_temporary_files_is_a_limit_of_the_machine():
    """What tempfile raises, wherever a library first asks it."""
    error = FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
    assert (
        "set TMPDIR" in str(explain_limit(error))
        and explain_limit(FileNotFoundError(2, "No such file", "x")) is None
    )


@pytest.mark.slow
def test_ranks_meet_on_a_machine_whose_name_cannot_be_looked_up(tmp_path, monkeypatch):
    path, root, run = make(tmp_path, stage=1, steps=3)
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    done = changed_machine(
        "hostname no-such-machine", "train", path, "--run", "reference", "--procs", 2, own="--uts"
    )
    assert run.is_done() and "hostname" not in done.stderr, done.stderr
