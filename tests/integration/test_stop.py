"""Asked to stop: every rank saves and leaves, the next start goes on with the same bits; two jobs never write
one run; a full disk loses nothing."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, experiment_dict, free_port, run_verb, write_experiment, write_tokens
from fork_server import FORKS

from inheritune.cluster import launch
from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.lock import Lock
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir

RECORD = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


def make(folder, stage: int = 3, root=None, **train):
    """A run of 12 steps under a root of its own.  -> (experiment's path, root, RunDir)"""
    root = root or folder / "root"
    root.mkdir(parents=True, exist_ok=True)
    settings = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": stage}}
    (folder / "ds.json").write_text(json.dumps(settings))
    raw = experiment_dict(runs={"reference": {"init": "random"}}, paper=[])
    raw["train"] |= {
        "steps": 12,
        "checkpoint_every": 5,
        "eval_every": 4,
        "deepspeed": str(folder / "ds.json"),
        **train,
    }
    path = write_experiment(folder, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(root))
        write_tokens(get_data_dir(load_experiment(path)))
        return path, root, RunDir.of(load_experiment(path), "reference")


def start(
    path, root, when: str, ranks: int = 2, worker="stop_worker.py", **environment
) -> tuple[list[int], str]:
    """Run a worker on `ranks` ranks; those that rank 0 leaves behind are killed.  -> (exit codes, what they
    printed)"""
    common = {
        **os.environ,
        "INHERITUNE_ROOT": str(root),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
    }
    common |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **environment}
    workers = [
        subprocess.Popen(
            [FORKS.python(), f"tests/support/{worker}", path, "reference", when],
            cwd=REPOSITORY,
            text=True,
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(ranks)
    ]
    said = []
    for worker in workers:
        try:
            said.append(worker.communicate(timeout=60 if said else 600)[0])
        except subprocess.TimeoutExpired:
            worker.kill()
            said.append(worker.communicate()[0])
    return [worker.returncode for worker in workers], "".join(said)


def record(run: RunDir) -> list[tuple]:
    return [tuple(row.get(key) for key in RECORD) for row in read_jsonl(run.metrics)]


@pytest.mark.slow
def test_stopped_at_every_kind_of_moment_equals_unbroken_bit_for_bit(tmp_path):
    (tmp_path / "unbroken").mkdir(), (tmp_path / "stopped").mkdir()
    path, root, unbroken = make(tmp_path / "unbroken")
    run_verb("train", path, "--run", "reference", procs=2, INHERITUNE_ROOT=root)
    path, root, run = make(tmp_path / "stopped")
    job = tmp_path / "job"
    # resumed at 3; the first validation is that of step 4, which is then repeated
    # rank 1 has windows of its own only in the last validation, of the finished model
    for when, step in [
        ("SIGUSR1@step=3:1", 3),  # one rank is enough, and the step is finished first
        ("SIGTERM@validation=1:0", 4),
        ("SIGUSR1@saving=0:0", 5),
        ("SIGTERM@validation=1:1", 12),
    ]:
        codes, said = start(path, root, when, INHERITUNE_JOB=str(job), INHERITUNE_LEAD="0.001")
        assert codes == [0, 0] and f"struck: {when}" in said, said
        assert read_json(run.stopped)["step"] == step and run.complete_checkpoints()[-1] == step, said
        assert "raise SITE_LEAD in slurm/site.sh" in said  # a save takes longer than half a millisecond
        assert read_json(run.stopped)["why"] == when.partition("@")[0]
        assert (job / "more").read_text().startswith("small/reference seed 0 stopped at step"), said
        assert not run.is_done()
        (job / "more").unlink()
    done = run_verb("train", path, "--run", "reference", procs=2, INHERITUNE_ROOT=root, INHERITUNE_JOB=job)
    assert "resumed at step 12 of 12" in done.stdout and run.is_done() and not run.stopped.exists()
    assert not (job / "more").exists() and not (job / "failure").exists()
    assert record(run) == record(unbroken)
    assert hash_folder(run.final) == hash_folder(unbroken.final)
    assert not list(run.path.parent.rglob(".*"))  # no lock, no temporary file is left


def test_a_run_that_another_job_took_over_is_left_to_it(tmp_path):
    path, root, run = make(tmp_path)
    codes, said = start(path, root, "TAKEN@step=3:0", ranks=1)
    assert codes == [2] and "another job took this one for dead" in said and "Traceback" not in said, said
    assert run.complete_checkpoints() == [] and not run.is_done()


def test_stop_file_keeps_a_run_from_starting_and_asks_for_no_requeue(tmp_path):
    path, root, run = make(tmp_path)
    run.path.mkdir(parents=True)
    run.stop.touch()
    done = run_verb(
        "train", path, "--run", "reference", INHERITUNE_ROOT=root, INHERITUNE_JOB=tmp_path / "job"
    )
    assert f"{run.stop} exists; delete it to continue" in done.stdout
    assert not (tmp_path / "job" / "more").exists() and list(run.path.iterdir()) == [run.stop]
    assert "delete it to continue" in (tmp_path / "job" / "stopped").read_text()
    run.stop.rename(tmp_path / "STOP")  # that of a growth, whose reference this is
    done = run_verb(
        "train", path, "--run", "reference", INHERITUNE_ROOT=root, INHERITUNE_STOP=tmp_path / "STOP"
    )
    assert f"{tmp_path}/STOP exists; delete it to continue" in done.stdout and not run.is_done()


def test_a_growth_tells_the_trainings_on_its_way_of_its_stop_file(small, monkeypatch):
    from inheritune.cluster import grow as stages

    seen = []
    monkeypatch.setattr(
        launch,
        "launch_verb",
        lambda verb, procs, as_step: seen.append((verb, os.environ["INHERITUNE_STOP"])) or 0,
    )
    monkeypatch.setenv("INHERITUNE_STOP", "")
    with pytest.raises(RuntimeError, match="left no result"):
        stages.grow(small, "grown")
    ((verb, stop),) = seen
    assert verb[:4] == ["train", small, "--run", "reference"]
    assert stop == str(RunDir.of(load_experiment(small), "grown").stop)


@pytest.mark.drill
@pytest.mark.parametrize("stage", [1, 3])
def test_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path, stage, disk):
    def leave_free(n_bytes: int) -> None:
        disk.resize(disk.used() + n_bytes)

    def refused(when: str, sentence: str) -> None:
        before = run.complete_checkpoints()
        codes, said = start(path, root, when)
        assert codes == [2, 2] and sentence in said and "Traceback" not in said, said
        assert run.complete_checkpoints()[: len(before)] == before and not list(run.path.parent.rglob(".*"))

    path, root, run = make(tmp_path, stage, root=disk.path / "root", keep_last=50, checkpoint_every=1)
    assert start(path, root, "SIGUSR1@step=2:0")[0] == [0, 0]
    size = sum(file["bytes"] for file in read_json(run.checkpoint(2) / "COMPLETE")["files"].values())
    # found by the look at the free space before anything is written ...
    leave_free(size * 3 // 2)
    refused("NONE@never=0:0", "MB free; those before it are whole")
    assert run.complete_checkpoints() == [1, 2, 3]
    # ... by the write itself, if the space went in between ...
    leave_free(size // 4)
    refused("NONE@unchecked=0:0", f"no space left while writing {run.checkpoint(4)}")
    if stage == 1:  # what follows is the same code at every stage
        return
    # ... and in the last write of all
    leave_free(60 << 20)
    assert start(path, root, "SIGUSR1@validation=3:0")[0] == [0, 0]  # at 4, 8, and of the finished model
    assert run.complete_checkpoints()[-1] == 12
    leave_free(100_000)
    refused("NONE@never=0:0", f"no space left while writing {run.final}")
    assert not run.final.exists() and not run.is_done()
    leave_free(60 << 20)
    run_verb("train", path, "--run", "reference", procs=2, INHERITUNE_ROOT=root)
    assert run.is_done() and run.complete_checkpoints() == list(range(1, 13))


# --- the lock -----------------------------------------------------------------------------------------------


def other_holder(path, **facts):
    """A lock file as another process would have left it."""
    file = path.with_name(f".{path.name}.lock.0123456789ab")
    file.write_text(
        json.dumps({"machine": "another machine", "pid": 1, "born": "1", "host": "node9", **facts})
    )
    return file


def age(file, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def test_lock_of_a_living_process_is_respected_and_names_it(tmp_path):
    path = tmp_path / "run"
    with Lock(path):
        with pytest.raises(
            UserError, match=f"is being written by process {os.getpid()} on .*, still after 0 s"
        ):
            Lock(path, wait=0).acquire()
    with Lock(path, wait=0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path):
    code = f"from inheritune.files.lock import Lock; from pathlib import Path; import os, signal; \
Lock(Path({str(tmp_path / 'run')!r})).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with Lock(tmp_path / "run", wait=0):
        pass


def test_lock_of_another_machine_is_free_after_silence_only(tmp_path):
    path = tmp_path / "run"
    left = other_holder(path)
    age(left, Lock.SILENCE - 30)
    with pytest.raises(UserError, match="on node9"):
        Lock(path, wait=0).acquire()
    assert left.is_file()
    age(left, Lock.SILENCE + 30)
    with Lock(path, wait=0):
        assert not left.is_file()


def test_lock_of_an_earlier_start_of_our_own_job_is_free_after_two_silent_beats(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    left = other_holder(path, slurm=["7", "1"])
    with pytest.raises(UserError):  # its processes may still be saving
        Lock(path, wait=0).acquire()
    age(left, 3 * Lock.BEAT)
    with Lock(path, wait=0):
        pass


def test_holder_sees_that_its_lock_was_taken_away(tmp_path):
    with Lock(tmp_path / "run") as lock:
        assert not lock.lost()
        lock.file.unlink()
        assert lock.lost()


def test_many_contenders_are_let_in_one_by_one(tmp_path):
    code = """
import sys, time
from pathlib import Path
from inheritune.files.lock import Lock
counter = Path(sys.argv[1])
for _ in range(4):
    with Lock(counter, wait=60):
        seen = int(counter.read_text())
        time.sleep(0.01)
        counter.write_text(str(seen + 1))
"""
    (tmp_path / "counter").write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path / "counter")]
    workers = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) for _ in range(5)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 5
    assert (tmp_path / "counter").read_text() == "20"


# --- ranks that do not meet ---------------------------------------------------------------------------------


def test_a_missing_rank_is_named_with_its_node(tmp_path):
    control = tmp_path / "scontrol"
    control.write_text("#!/bin/sh\nprintf 'node3\\nnode4\\n'\n")
    control.chmod(0o755)
    code = "from inheritune.runtime import dist, rendezvous\n"
    code += "rendezvous.RENDEZVOUS_S = 1; dist.init_distributed()"
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_STEP_NODELIST": "node[3-4]"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    expected = (
        f"{socket.gethostname()} (rank 0): rank(s) [1, 2, 3] on node3, node4 did not arrive at the "
        f"rendezvous within 1 s"
    )
    assert expected in done.stderr, done.stderr
