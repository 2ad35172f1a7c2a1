"""status: every state that a run can be in, from folders that the program's own writers left; on a real Slurm
at the end."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import REPOSITORY, experiment_dict, run_verb, write_experiment, write_tokens
from fork_server import FORKS
from slurm_cluster import session_cluster, slurm  # noqa: F401
from test_damage import modes_count

from inheritune.cluster import status as status_module
from inheritune.cluster.record_tail import read_last_rows
from inheritune.cluster.slurm_queue import QueuedJob, read_jobs
from inheritune.cluster.standing import View
from inheritune.cluster.status import find_next_command
from inheritune.cluster.status import status as show
from inheritune.config import run as run_config
from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, read_jsonl, write_json
from inheritune.files.lock import Lock, find_lock_holder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.paper.published import interpolate_loss, load_curves, select_curve
from inheritune.runtime import job_reports
from inheritune.training.provenance import record_provenance


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch, tmp_path):
    """No squeue and no sbatch on the path, whatever is installed; git is, for provenance.json."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def lines(capsys, experiment: str, **options) -> dict[str, str]:
    """{first word: line} of what status prints; what is said below the table goes by 'name:'."""
    show(experiment, **options)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    return {line.split()[0].rstrip(","): line for line in printed}


def write_rows(run: RunDir, *rows: dict) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_row(step: int, loss=3.0) -> dict:
    return {"step": step, "tokens": step, "loss": loss, "step_s": 60.0, "tokens_per_s": 1234.5}


def test_states_of_a_run(small, capsys, monkeypatch):
    experiment = load_experiment(small)
    run = RunDir.of(experiment, "reference")

    said = lines(capsys, small)
    assert (
        "not started" in said["reference"]
        and f"next: python -m inheritune train {small}" in said["reference:"]
    )
    assert f"next: python -m inheritune grow {small} --run grown" in said["grown:"]

    # at work: the lock is held, the last line of the record is half written
    write_rows(run, training_row(3), {"step": 3, "val_loss": 3.25}, training_row(4, loss=2.875))
    with open(run.metrics, "a") as file:
        file.write('{"step": 5, "loss": 1.')
    record_provenance(run)
    with Lock(run.path):
        said = lines(capsys, small)
        assert (
            "running" in said["reference"] and "4 of 6" in said["reference"] and "2.8750" in said["reference"]
        )
        assert (
            "3.2500 at 3" in said["reference"]
            and "1,234" in said["reference"]
            and "2.0 min" in said["reference"]
        )
        assert (
            f"process {find_lock_holder(run.path)['pid']} on " in said["reference"]
            and "reference:" not in said
        )

    said = lines(capsys, small)  # the lock is free, nothing says why
    assert "failed" in said["reference"] and "ended without a word" in said["reference:"]
    assert f"next: python -m inheritune train {small} --run reference" in said["reference:"]

    write_json(run.stopped, {"step": 4, "why": "SIGUSR1"})
    run.stop.touch()
    said = lines(capsys, small)
    assert "stopped" in said["reference"] and "stopped: SIGUSR1" in said["reference:"]
    assert f"next: rm {run.stop} && python -m" in said["reference:"]
    run.stop.unlink()

    # a job failed, as the program tells it
    monkeypatch.setenv("INHERITUNE_JOB", str(run.path.parents[2] / "jobs" / "12_3"))
    job_reports.report_run(run.path)
    job_reports.report_failure("CUDA out of memory\nTried to allocate")
    said = lines(capsys, small)
    assert "failed" in said["reference"] and "job 12_3 failed: " in said["reference:"]
    assert "rank 0: CUDA out of memory; next: " in said["reference:"]

    write_json(run.done, {"final": {}})
    said = lines(capsys, small)
    assert "finished" in said["reference"] and "reference:" not in said


@pytest.mark.parametrize("code", [0, 1])
def test_the_next_command_is_one_of_slurm_only_where_slurm_answers(small, capsys, tmp_path, code):
    """Its commands are often installed on a machine that belongs to no cluster."""
    for name in ("sbatch", "squeue"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    said = lines(capsys, small)["reference:"]
    assert ("slurm/train.sh" in said, "python -m inheritune train" in said) == (not code, bool(code))


def test_data_that_may_not_be_read_is_a_remark_and_the_runs_are_shown(small, capsys, own_root):
    (own_root / "data").chmod(0)
    with modes_count():
        said = lines(capsys, small)
    (own_root / "data").chmod(0o755)
    data = str(get_data_dir(load_experiment(small)))
    assert "cannot be read (Permission denied): see its owner and mode" in said[data]
    assert "not started" in said["reference"] and "next: " in said["reference:"]


def test_stages_stand_below_their_run(small, capsys):
    experiment = load_experiment(small)
    grown = RunDir.of(experiment, "grown")
    said = lines(capsys, small)
    assert (
        "stage 1 of 2" in said["grown"]
        and "not started" in said["grown/stage1"]
        and "grown/stage2" not in said
    )
    write_json(grown.stage(1).done, {"final": {}})
    write_rows(grown.stage(1), training_row(6))
    said = lines(capsys, small)  # between two stages
    assert "stage 2 of 2" in said["grown"] and "stopped" in said["grown"]
    assert (
        "finished" in said["grown/stage1"]
        and "3 layers" in said["grown/stage2"]
        and "not started" in said["grown/stage2"]
    )
    with Lock(grown.stage(2).path):
        assert "running" in lines(capsys, small)["grown"]
    difference = {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    verdict = {"stage": 1, "layers": 2, "parity": True, "margin": 0.01, "difference": difference}
    write_json(grown.done, verdict)
    said = lines(capsys, small)
    assert "finished" in said["grown"] and "(chosen)" in said["grown/stage1"] and "grown/stage2" not in said


def test_last_rows_come_from_the_end_of_a_long_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps(training_row(step)) for step in range(200_000)]
    path.write_text(
        "\n".join([rows[0], *rows, '{"step": 1, "val_loss": 2.0}', *rows[:2000]]) + '\n{"step": 9'
    )
    found = read_last_rows(path, ("loss", "val_loss"))
    assert found["loss"]["step"] == 1999 and found["val_loss"]["val_loss"] == 2.0
    path.write_text("")
    assert read_last_rows(path, ("loss",)) == {} == read_last_rows(tmp_path / "none", ("loss",))


# --- the paper's curves -------------------------------------------------------------------------------------


def test_published_losses_are_the_papers():
    """Milestones of the authors' logs; of a step that a log repeats, the last."""
    medium = load_curves("gpt2_medium_owt")
    assert interpolate_loss(select_curve(medium, "reference", 24), 100_000) == 2.8187
    assert interpolate_loss(select_curve(medium, "inheritune", 14), 50_000) == 2.9419
    assert select_curve(medium, "inheritune", 13) == {} and interpolate_loss({}, 1) is None
    large = select_curve(load_curves("gpt2_large_owt"), "reference", 36)
    assert interpolate_loss(large, 100_000) == 2.8531
    assert interpolate_loss(large, 1500) == pytest.approx((large[1000] + large[2000]) / 2)
    assert interpolate_loss(large, 100_001) is None
    assert load_curves("quickstart") == {}


def test_distance_to_the_curve_is_shown(capsys):
    run = RunDir.of(load_experiment("gpt2_medium_owt"), "inheritune").stage(1)
    write_rows(run, training_row(50_000), {"step": 50_000, "val_loss": 3.0})
    record_provenance(run)
    assert "+0.0314" in lines(capsys, "gpt2_medium_owt")["inheritune/stage1"]  # the paper: 2.9686
    small = RunDir.of(load_experiment("gpt2_medium_owt", rehearse=True), "reference")
    write_rows(small, training_row(10), {"step": 10, "val_loss": 3.0})
    # a rehearsal is compared with nothing
    assert "paper" not in " ".join(lines(capsys, "gpt2_medium_owt", rehearse=True))


# --- files that are damaged, unreadable or gone -------------------------------------------------------------

STARTED = {"starts": [{"time": "2026-01-02", "host": "node1", "slurm_job": None}]}
BROKEN = {  # file: {content: what is said of it}
    "provenance.json": {
        b"{}": "does not list the starts of its run",
        b"[]": "does not list the starts of its run",
        b'{"starts": []}': "does not list the starts of its run",
        b'{"starts": [3]}': "does not list the starts of its run",
        b'{"starts": [{"time"': "cannot be read as JSON",
        b"": "cannot be read as JSON",
        bytes(range(256)): "cannot be read as JSON",
        b'{"starts": [{}], "seal": "0"}': "is not as it was written",
        b'{"starts": [{}]}': "ended without a word",
    },
    "STOPPED": {
        b"{}": "does not say why the run stopped",
        b"[1]": "does not say why the run stopped",
        b'{"why": 3}': "does not say why the run stopped",
        b'{"why": "SIG': "cannot be read as JSON",
    },
    "metrics.jsonl": dict.fromkeys(
        [
            b"",
            b"5\n[]\nnull\n{}\n",
            bytes(range(256)),
            b'{"step": "x", "loss": 3.0}\n',
            b'{"step": 3, "loss": null}\n',
            b'{"step": 3, "loss": NaN}\n',
            b'{"step": 3, "val_loss": "3"}\n',
            b'{"step": 3, "loss": 3.0, "step_s": "x"}\n',
            b'{"loss": 3.0}\n',
            b'{"loss": ' + b"[" * 100_000 + b"\n",
        ],
        "ended without a word",
    ),
}
DAMAGES = [(file, content) for file, contents in BROKEN.items() for content in contents]


@pytest.fixture
def three(tmp_path, own_root) -> str:
    """An experiment of three runs, all of which began; `middle` will be damaged."""
    runs = {name: {"init": "random"} for name in ("first", "middle", "last")}
    path = write_experiment(tmp_path / "recipes", experiment_dict(runs=runs, paper=[]))
    for name in runs:
        run = RunDir.of(load_experiment(path), name)
        write_rows(run, training_row(3), {"step": 3, "val_loss": 3.25})
        write_json(run.provenance, STARTED)
    return path


def check_others(said: dict[str, str]) -> None:
    """The runs beside `middle` are shown as without its damage."""
    for name in ("first", "last"):
        assert (
            "failed" in said[name]
            and "3 of 6" in said[name]
            and "(node1, started 2026-01-02)" in said[f"{name}:"]
        )


@pytest.mark.parametrize(
    ("file", "content"), DAMAGES, ids=[f"{file}-{content[:20]}" for file, content in DAMAGES]
)
def test_a_damaged_file_is_a_remark_and_the_other_runs_are_shown(three, capsys, file, content):
    (RunDir.of(load_experiment(three), "middle").path / file).write_bytes(content)
    said = lines(capsys, three)
    check_others(said)
    assert (
        BROKEN[file][content] in said["middle:"]
        and ("stopped" if file == "STOPPED" else "failed") in said["middle"]
    )


@pytest.mark.parametrize("file", ["provenance.json", "metrics.jsonl", "STOPPED", "DONE", "."])
@pytest.mark.parametrize("damage", ["unreadable", "a folder", "a link to nowhere"])
def test_a_file_that_cannot_be_read_is_a_remark_and_the_other_runs_are_shown(three, capsys, file, damage):
    """Another user's run folder, for one."""
    path = RunDir.of(load_experiment(three), "middle").path / file
    if damage == "unreadable":
        path.exists() or path.write_text("{}")
        mode = path.stat().st_mode
        path.chmod(0)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.mkdir() if damage == "a folder" else path.symlink_to("/nowhere/at/all")
    with modes_count():
        said = lines(capsys, three)
    check_others(said)
    if damage == "unreadable":
        path.chmod(mode)
    if damage == "unreadable" and file == ".":
        assert "unknown" in said["middle"] and "cannot be read (Permission denied)" in said["middle:"]
    elif damage == "unreadable" and file != "DONE":
        assert f"{path} cannot be read" in said["middle:"] and "Permission denied" in said["middle:"]
    elif file == "metrics.jsonl" and damage == "a folder":
        assert f"{path} cannot be read (Is a directory)" in said["middle:"]


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b'{"stage": 9}', b'{"stage": true}', b'{"stage": "1"}', b'{"sta']
)
def test_a_damaged_done_of_a_grown_run_is_a_remark(small, capsys, content):
    run = RunDir.of(load_experiment(small), "grown")
    run.path.mkdir(parents=True)
    run.done.write_bytes(content)
    said = lines(capsys, small)
    assert "unknown" in said["grown"] and f"{run.done} " in said["grown:"] and "next:" not in said["grown:"]
    assert "not started" in said["reference"] and "next:" in said["reference:"]


def test_a_lock_that_names_nobody_is_a_run_at_work(three, capsys):
    run = RunDir.of(load_experiment(three), "middle")
    run.path.with_name(".middle.lock.0123456789ab").write_text("[]")
    said = lines(capsys, three)
    check_others(said)
    assert "running" in said["middle"] and "a process that its lock does not name" in said["middle"]


def test_only_jobs_are_read_from_the_folder_of_jobs(own_root):
    jobs = own_root / "runs" / "jobs"
    names = ["12", "12_3", "12.bak", "12 (copy)", ".12", "12_", "1２", "notes", "99_1"]
    for name in names:
        (jobs / name).mkdir(parents=True)
        (jobs / name / "run").write_text(f"runs/small/seed0/{name}\n")
    (jobs / "12" / "failure").mkdir()
    (jobs / "99_1" / "run").write_bytes(bytes(range(128, 256)))
    (jobs / "100").write_text("a file")
    (jobs / "101" / "run").mkdir(parents=True)
    (jobs / "12_3" / "failure").write_bytes(b"node1 rank 0: \xff\n1\n")
    found = read_jobs({})
    assert {job.name for job in found.values()} == {"12", "12_3", "99_1"}
    assert "cannot be read (Is a directory)" in found[own_root / "runs/small/seed0/12"].failure
    assert found[own_root / "runs/small/seed0/12_3"].failure == "node1 rank 0: \ufffd"


def test_runs_that_are_a_link_are_shown(three, capsys, own_root, tmp_path, monkeypatch):
    (own_root / "runs").rename(tmp_path / "elsewhere")
    (own_root / "runs").symlink_to(tmp_path / "elsewhere")
    run = RunDir.of(load_experiment(three), "middle")
    monkeypatch.setenv("INHERITUNE_JOB", str(own_root / "runs" / "jobs" / "12_3"))
    job_reports.report_run(run.path)
    job_reports.report_failure("CUDA out of memory")
    said = lines(capsys, three)
    check_others(said)
    assert "job 12_3 failed: " in said["middle:"]


def test_files_that_change_or_vanish_while_they_are_read(three, capsys):
    """A run whose files are written, and one whose folder is moved away and back, while status reads."""
    written, moved = (RunDir.of(load_experiment(three), name) for name in ("middle", "last"))
    over, rounds = threading.Event(), []

    def change() -> None:
        while not over.is_set():
            write_json(written.provenance, STARTED)
            write_rows(written, training_row(3), {"step": 3, "val_loss": 3.25})
            moved.path.rename(moved.path.with_name("away"))
            moved.path.with_name("away").rename(moved.path)
            rounds.append(1)

    worker = threading.Thread(target=change)
    worker.start()
    try:
        for _ in range(100):
            said = lines(capsys, three)
            assert (
                said["first"].split()[1] == "failed" and "ended without a word (node1" in said["middle:"]
            ), said
            assert "last" in said
    finally:
        over.set()
        worker.join()
    assert len(rounds) > 10


def test_a_file_replaced_on_nfs_is_opened_again(tmp_path, monkeypatch):
    """The kernel's boundary is replaced: no file system here answers ESTALE."""
    write_json(tmp_path / "a.json", {"a": 1})
    read, stale = Path.read_text, [2]

    def read_text(self, **options):
        if stale[0]:
            stale[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return read(self, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert read_json(tmp_path / "a.json") == {"a": 1} and stale == [0]
    stale[0] = 100
    with pytest.raises(UserError, match="Stale file handle"):
        read_json(tmp_path / "a.json")


# --- quick, and on a cluster --------------------------------------------------------------------------------


def test_status_is_quick_and_needs_no_torch(small):
    code = (
        "import sys; from inheritune.cli import main; main(sys.argv[1:]); print(*({'torch', 'numpy'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", small],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    assert "reference" in done.stdout and done.stdout.endswith("\n\n")


def test_five_hundred_runs_take_less_than_two_seconds(tmp_path, own_root, capsys, monkeypatch):
    """Each of which starts from the one before. No folder is listed, and no depth counted, once for every
    run."""
    names = [f"run{number}" for number in range(500)]
    runs = {
        name: {"init": {"inherit": {"source": before, "layers": "0:4"}}} for before, name in pairwise(names)
    }
    runs = {names[0]: {"init": "random"}, **runs}
    path = write_experiment(tmp_path / "recipes", experiment_dict(runs=runs, paper=[]))
    experiment, record = load_experiment(path), [training_row(step) for step in range(2000)]
    for name in names:
        write_rows(RunDir.of(experiment, name), *record)
        write_json(RunDir.of(experiment, name).provenance, STARTED)
    calls = Counter()
    for module, function in ((run_config, "place_layers"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(module, function, counting(calls, getattr(module, function)))
    start_time = time.process_time()
    said = lines(capsys, path)
    assert time.process_time() - start_time < 2
    assert len([name for name in names if "failed" in said[name]]) == 500
    assert calls["place_layers"] < 1000 and calls["listdir"] + calls["scandir"] < 10, calls


def counting(calls: Counter, function):
    def call(*args, **kwargs):
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def test_what_a_queued_growth_does_itself_is_not_advised(small, own_root):
    """A second job would wait for the first one's lock, or do its work."""
    view = View(load_experiment(small), 0)
    runs, view.data_ready = view.experiment.runs, False
    assert find_next_command(view, "reference", runs["reference"], "not started")
    view.work = [(view.key("train", "grown"), QueuedJob("7", "", "PENDING", "(Priority)"))]
    for view.data_ready in (False, True):
        assert not find_next_command(view, "reference", runs["reference"], "not started")


def test_array_that_waits_is_told(own_root):
    queue = {name: QueuedJob(name, "", "PENDING", "(Dependency)") for name in ("12_4", "12_5")}
    folder = own_root / "runs" / "jobs" / "12_3"
    folder.mkdir(parents=True)
    (folder / "run").write_text("runs/small/seed0/reference\n")
    (job,) = read_jobs(queue).values()
    assert (job.name, job.state) == ("12_4", "PENDING")
    (job,) = read_jobs(None).values()
    assert (job.name, job.state) == ("12_3", "")


@pytest.mark.slow
def test_status_on_a_cluster(slurm, tmp_path, own_root, monkeypatch):  # noqa: F811
    monkeypatch.undo()
    monkeypatch.setenv("INHERITUNE_ROOT", str(own_root))
    raw = experiment_dict()
    raw["train"] |= {"steps": 4000, "checkpoint_every": 20, "eval_every": 1000}
    path = write_experiment(tmp_path, raw)
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment))
    run = RunDir.of(experiment, "reference")

    def asked() -> dict[str, str]:
        said = slurm.run(FORKS.python(), "-m", "inheritune", "status", path, cwd=REPOSITORY)
        return {line.split()[0]: line for line in said.splitlines() if line.strip()}

    assert f"next: bash slurm/train.sh {path} reference" in asked()["reference:"]
    shape = {"GPUS": 1, "SITE_GPUS_PER_NODE": 1, "SITE_CPUS_PER_GPU": 1, "SITE_MEM_PER_GPU": "1G"}
    shape |= FORKS.on_path(anyway=True)  # which run this checkout
    words = (REPOSITORY / "slurm" / "train.sh", path, "reference", "--no-snapshot")
    job = slurm.submit(*words, **shape)
    slurm.until(lambda: any("loss" in row for row in read_jsonl(run.metrics)), timeout=120)
    said = asked()["reference"]
    node = next(record["BatchHost"] for record in slurm.records(job))
    assert "running" in said and f"{job} on {node}" in said and " of 4,000" in said

    # it saves and requeues itself: STOPPED may be gone again before it could be looked for
    slurm.ask_to_stop(job)
    slurm.until(lambda: "requeued as restart 1" in slurm.log(job), timeout=60)
    slurm.run("scancel", job)  # while it waits, or while it runs again: then it saves a second time
    slurm.wait(job)
    assert "stopped" in asked()["reference"] and read_json(run.stopped)["why"] in asked()["reference:"]

    shutil.rmtree(get_data_dir(experiment) / "tokenizer")
    (get_data_dir(experiment) / "train_00000.bin").unlink()
    job = slurm.submit(*words, **shape)
    slurm.wait(job, timeout=120)
    said = asked()
    assert "failed" in said["reference"] and f"job {job} failed: {node[:1]}" in said["reference:"], (
        slurm.logs()
    )
    assert "train_00000.bin" in said["reference:"]


def test_watching_prints_again_until_it_is_stopped(small, capsys, monkeypatch):
    waits = iter([None, KeyboardInterrupt])

    def sleep(seconds: float) -> None:
        if stop := next(waits):
            raise stop

    monkeypatch.setattr(status_module.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        status_module.watch_status(small)
    assert capsys.readouterr().out.count("every 30 s; Ctrl-C ends this") == 2


def test_an_unfinished_source_comes_first(small, capsys):
    raw = experiment_dict()
    raw["runs"]["half"] = {"init": {"inherit": {"source": "reference", "layers": "0:2"}}}
    path = write_experiment(RunDir(small).path.parent, raw, "other")
    assert (
        f"next: python -m inheritune train {path} --run reference --seed 3"
        in lines(capsys, path, seed=3)["half:"]
    )


def test_unknown_experiment_is_refused():
    done = run_verb("status", "quickstrat", check=False)
    assert done.returncode == 2 and "did you mean 'quickstart'?" in done.stderr
