"""status: every state that a run can be in, from folders that the program's own writers left; on a real Slurm at the end."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, experiment_dict, run_verb, write_experiment, write_tokens
from slurm_cluster import session_cluster, slurm  # noqa: F401

from inheritune import dist
from inheritune.config import load_experiment
from inheritune.lock import Lock, lock_holder
from inheritune.log import record_provenance
from inheritune.paper import curve_of, published_curves, published_loss
from inheritune.rundir import RunDir, data_dir, read_json, read_jsonl, write_json
from inheritune.status import Job, last_rows, read_jobs
from inheritune.status import status as show


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
    assert "not started" in said["reference"] and f"next: python -m inheritune train {small}" in said["reference:"]
    assert f"next: python -m inheritune grow {small} --run grown" in said["grown:"]

    # at work: the lock is held, the last line of the record is half written
    write_rows(run, training_row(3), {"step": 3, "val_loss": 3.25}, training_row(4, loss=2.875))
    with open(run.metrics, "a") as file:
        file.write('{"step": 5, "loss": 1.')
    record_provenance(run)
    with Lock(run.path):
        said = lines(capsys, small)
        assert "running" in said["reference"] and "4 of 6" in said["reference"] and "2.8750" in said["reference"]
        assert "3.2500 at 3" in said["reference"] and "1,234" in said["reference"] and "2.0 min" in said["reference"]
        assert f"process {lock_holder(run.path)['pid']} on " in said["reference"] and "reference:" not in said

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
    dist.tell_run(run.path)
    dist.tell_failure("CUDA out of memory\nTried to allocate")
    said = lines(capsys, small)
    assert "failed" in said["reference"] and "job 12_3 failed: " in said["reference:"]
    assert "rank 0: CUDA out of memory; next: " in said["reference:"]

    write_json(run.done, {"final": {}})
    said = lines(capsys, small)
    assert "finished" in said["reference"] and "reference:" not in said


def test_stages_stand_below_their_run(small, capsys):
    experiment = load_experiment(small)
    grown = RunDir.of(experiment, "grown")
    said = lines(capsys, small)
    assert "stage 1 of 2" in said["grown"] and "not started" in said["grown/stage1"] and "grown/stage2" not in said
    write_json(grown.stage(1).done, {"final": {}})
    write_rows(grown.stage(1), training_row(6))
    said = lines(capsys, small)  # between two stages
    assert "stage 2 of 2" in said["grown"] and "stopped" in said["grown"]
    assert "finished" in said["grown/stage1"] and "3 layers" in said["grown/stage2"] and "not started" in said["grown/stage2"]
    with Lock(grown.stage(2).path):
        assert "running" in lines(capsys, small)["grown"]
    write_json(grown.done, {"stage": 1})
    said = lines(capsys, small)
    assert "finished" in said["grown"] and "(chosen)" in said["grown/stage1"] and "grown/stage2" not in said


def test_last_rows_come_from_the_end_of_a_long_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps(training_row(step)) for step in range(200_000)]
    path.write_text("\n".join([rows[0], *rows, '{"step": 1, "val_loss": 2.0}', *rows[:2000]]) + '\n{"step": 9')
    found = last_rows(path, ("loss", "val_loss"))
    assert found["loss"]["step"] == 1999 and found["val_loss"]["val_loss"] == 2.0
    path.write_text("")
    assert last_rows(path, ("loss",)) == {} == last_rows(tmp_path / "none", ("loss",))


# --- the paper's curves ---------------------------------------------------------------------------------------------------


def test_published_losses_are_the_papers():
    """Milestones of the authors' logs; of a step that a log repeats, the last."""
    medium = published_curves("gpt2_medium_owt")
    assert published_loss(curve_of(medium, "reference", 24), 100_000) == 2.8187
    assert published_loss(curve_of(medium, "inheritune", 14), 50_000) == 2.9419
    assert curve_of(medium, "inheritune", 13) == {} and published_loss({}, 1) is None
    large = curve_of(published_curves("gpt2_large_owt"), "reference", 36)
    assert published_loss(large, 100_000) == 2.8531
    assert published_loss(large, 1500) == pytest.approx((large[1000] + large[2000]) / 2)
    assert published_loss(large, 100_001) is None
    assert published_curves("quickstart") == {}


def test_distance_to_the_curve_is_shown(capsys):
    run = RunDir.of(load_experiment("gpt2_medium_owt"), "inheritune").stage(1)
    write_rows(run, training_row(50_000), {"step": 50_000, "val_loss": 3.0})
    record_provenance(run)
    assert "+0.0314" in lines(capsys, "gpt2_medium_owt")["inheritune/stage1"]  # the paper: 2.9686
    small = RunDir.of(load_experiment("gpt2_medium_owt", rehearse=True), "reference")
    write_rows(small, training_row(10), {"step": 10, "val_loss": 3.0})
    assert "paper" not in " ".join(lines(capsys, "gpt2_medium_owt", rehearse=True))  # a rehearsal is compared with nothing


# --- quick, and on a cluster ----------------------------------------------------------------------------------------------


def test_status_is_quick_and_needs_no_torch(small):
    code = (
        "import sys; from inheritune.__main__ import main; main(sys.argv[1:]); print(*({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", small], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert "reference" in done.stdout and done.stdout.endswith("\n\n")


def test_array_that_waits_is_told(own_root):
    queue = {name: Job(name, "", "PENDING", "(Dependency)") for name in ("12_4", "12_5")}
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
    write_tokens(data_dir(experiment))
    run = RunDir.of(experiment, "reference")

    def asked() -> dict[str, str]:
        said = slurm.run(sys.executable, "-m", "inheritune", "status", path, cwd=REPOSITORY)
        return {line.split()[0]: line for line in said.splitlines() if line.strip()}

    assert f"next: bash slurm/train.sh {path} reference" in asked()["reference:"]
    shape = {"GPUS": 1, "SITE_GPUS_PER_NODE": 1, "SITE_CPUS_PER_GPU": 1, "SITE_MEM_PER_GPU": "1G"}
    job = slurm.submit(REPOSITORY / "slurm" / "train.sh", path, "reference", **shape)
    slurm.until(lambda: any("loss" in row for row in read_jsonl(run.metrics)), timeout=120)
    said = asked()["reference"]
    node = next(record["BatchHost"] for record in slurm.records(job))
    assert "running" in said and f"{job} on {node}" in said and " of 4,000" in said

    slurm.ask_to_stop(job)  # it saves and requeues itself
    slurm.until(run.stopped.is_file, timeout=60)
    slurm.run("scancel", job)
    slurm.wait(job)
    assert "stopped" in asked()["reference"] and read_json(run.stopped)["why"] in asked()["reference:"]

    shutil.rmtree(data_dir(experiment) / "tokenizer")
    (data_dir(experiment) / "train_00000.bin").unlink()
    job = slurm.submit(REPOSITORY / "slurm" / "train.sh", path, "reference", **shape)
    slurm.wait(job, timeout=120)
    said = asked()
    assert "failed" in said["reference"] and f"job {job} failed: {node[:1]}" in said["reference:"], slurm.logs()
    assert "train_00000.bin" in said["reference:"]


def test_an_unfinished_source_comes_first(small, capsys):
    raw = experiment_dict()
    raw["runs"]["half"] = {"init": {"inherit": {"source": "reference", "layers": "0:2"}}}
    path = write_experiment(RunDir(small).path.parent, raw, "other")
    assert f"next: python -m inheritune train {path} --run reference --seed 3" in lines(capsys, path, seed=3)["half:"]


def test_unknown_experiment_is_refused():
    done = run_verb("status", "quickstrat", check=False)
    assert done.returncode == 2 and "did you mean 'quickstart'?" in done.stderr
