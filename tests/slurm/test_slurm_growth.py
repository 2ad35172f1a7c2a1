"""Staged growth as an array job on a real Slurm of two nodes, with the real program: undisturbed, and
disturbed in every way that a cluster knows. The two must end with the same bits, and no stage may run twice
from its beginning."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from conftest import REPOSITORY, experiment_dict, last_step, run_verb, write_experiment, write_tokens
from fork_server import FORKS
from slurm_cluster import Slurm, cluster, session_cluster, slurm  # noqa: F401

from inheritune.config.experiment import load_experiment
from inheritune.config.jobs import load_jobs
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir

SLURM = REPOSITORY / "slurm"
TWO_NODES = {"GPUS": 2, "SITE_GPUS_PER_NODE": 1, "SITE_CPUS_PER_GPU": 1, "SITE_MEM_PER_GPU": "1G"}
STEPS = 40


def make(folder: Path, root: Path, monkeypatch, steps: int = STEPS) -> tuple[str, RunDir, RunDir]:
    """An experiment that grows over two stages, its data, its root.  -> path, grown run, reference"""
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    raw = experiment_dict()
    raw["train"] |= {
        "steps": steps,
        "checkpoint_every": 10,
        "eval_every": 20,
        "keep_last": 2,
        "deepspeed": str(folder / "ds.json"),
    }
    raw["runs"]["grown"]["grow"]["margin"] = -9.0  # never parity: both stages are trained
    (folder / "ds.json").write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            }
        )
    )
    path = write_experiment(folder, raw)
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment))
    return path, RunDir.of(experiment, "grown"), RunDir.of(experiment, "reference")


def record(run: RunDir) -> list[tuple]:
    return [
        tuple(row.get(key) for key in ("step", "loss", "grad_norm", "val_loss"))
        for row in read_jsonl(run.metrics)
    ]


def tasks_of(rank: int) -> list[int]:
    """Process ids of the running training tasks of a rank, under this test's root."""
    found, root = [], f"INHERITUNE_ROOT={os.environ['INHERITUNE_ROOT']}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = root in environment and f"SLURM_PROCID={rank}".encode() in environment
        if ours and b"train" in command and b"srun" not in command[0]:
            found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_two_arrays_do_not_meet_and_a_disturbed_one_ends_with_the_same_bits(slurm, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "calm").mkdir(), (tmp_path / "wild").mkdir()
    # two arrays at once on one run: one of them works, the other says so and leaves
    path, calm, calm_reference = make(tmp_path / "calm", tmp_path / "calm-root", monkeypatch)
    # forks run this checkout
    forks, words = FORKS.on_path(anyway=True), (SLURM / "grow.sh", path, "grown", "--no-snapshot")
    shape = {**TWO_NODES, **forks, "ARRAY": "1-4%1", "INHERITUNE_LOCK_WAIT": 5}
    first = slurm.submit(*words, **shape)
    second = slurm.submit(*words, **shape, FORCE=1)
    slurm.wait(first, second, timeout=400)
    logs = slurm.logs()
    assert calm.is_done() and "did not reach reference's validation loss" in logs, logs
    assert "2 task(s)" in logs and "preflight: 2 rank(s) on 2 node(s)" in logs
    assert re.search(r"is being written by job \d+ on 127.0.0.\d", logs), logs
    for run in (calm_reference, calm.stage(1), calm.stage(2)):
        assert [row["step"] for row in read_jsonl(run.metrics) if "loss" in row] == list(range(1, STEPS + 1))
        assert [start["resumed_at"] for start in read_json(run.provenance)["starts"]] == [None]

    path, wild, reference = make(tmp_path / "wild", tmp_path / "wild-root", monkeypatch)
    words = (SLURM / "grow.sh", path, "grown", "--no-snapshot")
    array = slurm.submit(*words, **TWO_NODES, **forks, ARRAY="1-12%1")
    struck = []

    def running() -> str:
        """JobId of the array's running task."""
        return next(r["JobId"] for r in slurm.records(array) if r["JobState"] == "RUNNING")

    def strike(run: RunDir, step: int, name: str, blow) -> None:
        """Deliver `blow` as soon as `run` has recorded `step` and is still in mid-training."""
        slurm.until(lambda: last_step(run) >= step, timeout=200)
        job, starts = running(), len(read_json(run.provenance)["starts"])
        struck.append((name, run, last_step(run)))
        # scancel takes 5 s to answer: the next task may have ended the run by then. That the blow fell in
        # mid-training is shown by the start that followed it.
        blow(job)
        slurm.until(lambda: run.is_done() or len(read_json(run.provenance)["starts"]) > starts, timeout=200)
        assert len(read_json(run.provenance)["starts"]) == starts + 1, (
            f"{name} struck too late\n{slurm.logs()}"
        )

    strike(reference, 14, "SIGKILL", lambda job: os.kill(tasks_of(1)[0], signal.SIGKILL))
    strike(reference, 24, "requeue", lambda job: slurm.run("scontrol", "requeue", job))
    strike(wild.stage(1), 14, "USR1", slurm.ask_to_stop)

    def node_failure(job):
        node = next(r for r in slurm.records(job) if r["JobId"] == job)["BatchHost"]
        slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        time.sleep(2)
        # it may be back by itself
        slurm.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    strike(wild.stage(2), 14, "node down", node_failure)
    slurm.until(wild.is_done, timeout=300)
    slurm.wait(array, timeout=120)

    for ours, theirs in [
        (reference, calm_reference),
        (wild.stage(1), calm.stage(1)),
        (wild.stage(2), calm.stage(2)),
    ]:
        assert record(ours) == record(theirs), slurm.logs()
        assert hash_folder(ours.final) == hash_folder(theirs.final)
        starts = read_json(ours.provenance)["starts"]
        # begun once
        assert [start["resumed_at"] is None for start in starts] == [True] + [False] * (len(starts) - 1)
        assert not list(ours.path.rglob(".*"))
    by_run = {str(run.path): [at for _, other, at in struck if other is run] for _, run, _ in struck}
    assert all(0 < at < STEPS for steps in by_run.values() for at in steps)
    # the kill struck between two checkpoints: what came after the newest was done again
    assert [row["step"] for row in read_jsonl(reference.discarded_metrics)][0] == 11
    # USR1 saved at the very step, and reached the tasks as such
    assert "(SIGUSR1), all saved" in slurm.logs() and "before the tasks had started" not in slurm.logs()
    assert read_json(wild.stage(1).provenance)["starts"][1]["resumed_at"] >= 14
    verdicts = [read_json(run.done) for run in (wild, calm)]
    assert verdicts[0] == verdicts[1]
    table = run_verb("table", path).stdout
    assert "Inheritune, stage 2" in table and "does not reach" in table


@pytest.mark.drill
def test_an_array_whose_tasks_meet_their_time_limit_ends_with_the_same_bits(slurm, tmp_path, monkeypatch):  # noqa: F811
    """Limits of two minutes, which Slurm itself keeps: it looks at them every 30 s. Each model takes about
    100 s of steps."""
    for name in ("try", "calm", "wild"):
        (tmp_path / name).mkdir()
    path, _, tried = make(tmp_path / "try", tmp_path / "try-root", monkeypatch, steps=20)
    run_verb("train", path, "--run", "reference", procs=2)
    steps = int(100 / median(row["step_s"] for row in read_jsonl(tried.metrics) if "loss" in row))
    path, calm, calm_reference = make(tmp_path / "calm", tmp_path / "calm-root", monkeypatch, steps)
    run_verb("grow", path, "--run", "grown", procs=2)
    path, wild, reference = make(tmp_path / "wild", tmp_path / "wild-root", monkeypatch, steps)
    array = slurm.submit(
        SLURM / "grow.sh", path, "grown", **TWO_NODES, ARRAY="1-30%1", SITE_TIME=2, SITE_LEAD=40
    )
    records = slurm.wait(array, timeout=1500)
    # the slots that were left when all was done are cancelled
    assert {record["JobState"] for record in records} == {"COMPLETED", "CANCELLED"} and wild.is_done(), (
        slurm.logs()
    )
    assert {record["TimeLimit"] for record in records} == {"00:02:00"}
    assert "(SIGUSR1), all saved" in slurm.logs() and "(SIGTERM), all saved" not in slurm.logs()
    stops = []
    for ours, theirs in [
        (reference, calm_reference),
        (wild.stage(1), calm.stage(1)),
        (wild.stage(2), calm.stage(2)),
    ]:
        assert record(ours) == record(theirs), slurm.logs()
        assert hash_folder(ours.final) == hash_folder(theirs.final)
        starts = [start["resumed_at"] or 0 for start in read_json(ours.provenance)["starts"]]
        assert starts == sorted(starts) and not ours.discarded_metrics.exists()  # no step was done twice
        stops += starts[1:]
    assert any(step % 10 for step in stops), f"no limit struck between two checkpoints: {stops}"
    print(f"limits met at steps {stops}")


APPTAINER = """#!/bin/bash
# Stands for Apptainer: runs the command behind the image with nothing on its PATH but a Python, a shell and git.
while [ "$1" != IMAGE ]; do
  [ "$1" = --env ] && export ${2//,/ }
  shift
done
shift
PATH=HERE exec "$@"
"""  # noqa: E501 - the text is written as it stands


@pytest.mark.slow
def test_an_array_grows_from_nothing_in_an_image(slurm, own_root, tmp_path):  # noqa: F811
    """No task finds Slurm's commands, and the host's Python makes nothing but decisions."""
    inside, bin_, image = tmp_path / "inside", tmp_path / "bin", tmp_path / "image.sif"
    inside.mkdir(), bin_.mkdir(), image.touch()
    for name in ("bash", "git", "uname"):
        (inside / name).symlink_to(shutil.which(name))
    programs = {
        inside / "python": f'#!/bin/bash\necho "$3" >> {tmp_path}/verbs\nexec {sys.executable} "$@"\n',
        bin_ / "apptainer": APPTAINER.replace("IMAGE", str(image)).replace("HERE", str(inside)),
    }
    for path, text in programs.items():
        path.write_text(text)
        path.chmod(0o755)
    raw = experiment_dict()
    raw["data"] |= {"source": "files", "files": [f"{REPOSITORY}/tests/*/*.py"]}
    experiment = write_experiment(tmp_path, raw)
    site = {**TWO_NODES, "ARRAY": "1", "SITE_APPTAINER": image, "PATH": f"{bin_}:{os.environ['PATH']}"}
    array = slurm.submit(SLURM / "grow.sh", experiment, "grown", **site)
    slurm.wait(array, timeout=300)
    assert RunDir.of(load_experiment(experiment), "grown").is_done(), slurm.logs()
    assert "preflight: 2 rank(s) on 2 node(s)" in slurm.logs()
    verbs = (tmp_path / "verbs").read_text().split()
    assert verbs[0] == "prepare" and set(verbs) == {"prepare", "train"}


@pytest.mark.slow
def test_baselines_wait_for_the_analysis_that_chooses_their_layers(slurm, own_root, tmp_path):  # noqa: F811
    """A script queues it behind the array; a part of its array, or one task again, is refused without it."""
    raw = experiment_dict()
    raw["model"]["positions"] = 128  # analyze takes sequences of 100 tokens
    chosen = {"init": {"inherit": {"source": "reference", "layers": "auto:2:influence"}}}
    raw["runs"] |= {"random": {"init": "random", "layers": 2}, "influence": chosen}
    path = write_experiment(tmp_path, raw)
    loaded = load_experiment(path)
    write_tokens(get_data_dir(loaded), val_tokens=10_000)  # and 100 of them
    script, site = SLURM / "baselines.sh", {**TWO_NODES, **FORKS.on_path(anyway=True)}
    slurm.wait(slurm.submit(SLURM / "train.sh", path, "reference", "--no-snapshot", **site), timeout=200)
    refused = slurm.run("bash", script, path, check=False, ARRAY="2", **site)
    remedy = f"bash {SLURM}/analyze.sh reference {path}"
    assert refused.startswith("inheritune: run 'influence' cannot start: an analysis of 'reference' chooses")
    assert f"first: {remedy}" in refused and not slurm.run("squeue", "-h")
    printed = slurm.run("bash", script, path, "--no-snapshot", **site)
    array, analysis, behind = re.findall(r"^submitted job (\d+)$", printed, re.MULTILINE)
    slurm.wait(array, analysis, behind, timeout=200)
    assert RunDir.of(loaded, "influence").is_done() and RunDir.of(loaded, "random").is_done(), slurm.logs()
    layers = read_json(RunDir.of(loaded, "influence").init / "inherited.json")["layers"]
    rows = read_jsonl(RunDir.of(loaded, "reference").attention)
    influence = [row["influence"] for row in rows if row["kind"] == "layer"]
    assert layers == sorted(sorted(range(4), key=lambda i: -influence[i])[:2])


@pytest.mark.slow
def test_two_nodes_evaluate_a_model_in_shards(slurm, own_root, tmp_path):  # noqa: F811
    """A model that one GPU cannot hold: the options of sbatch give the job more, and its scores stay."""
    raw = experiment_dict()
    raw["model"]["positions"] = 96
    choice = {"task": "rehearsal_choice", "metrics": ["acc"], "shots": 0}
    raw["evaluate"] = {"tasks": {"choice": choice}, "task_files": "recipes/lm_eval/rehearsal", "batch": 4}
    path = write_experiment(tmp_path, raw)
    loaded = load_experiment(path)
    write_tokens(get_data_dir(loaded))
    run_verb("train", path, "--run", "reference")
    words = [path, "--run", "reference", "--ds", REPOSITORY / "ds_configs" / "zero3.json", "--no-snapshot"]
    more = ["--", "--nodes=2", "--gpus-per-node=1"]
    site = {**TWO_NODES, **FORKS.on_path(anyway=True)}
    slurm.wait(slurm.submit(SLURM / "evaluate.sh", *words, *more, **site), timeout=200)
    results = RunDir.of(loaded, "reference").read_results()
    logs = slurm.logs()
    assert "2 node(s)" in logs and "2 task(s)" in logs and "choice" in results.get("tasks", {}), logs
    alone = tmp_path / "alone.json"
    run_verb("evaluate", path, "--model", RunDir.of(loaded, "reference").final, "--out", alone)
    ours, theirs = results["tasks"]["choice"], read_json(alone)["tasks"]["choice"]
    assert ours["acc"] == theirs["acc"] and ours["n"] == theirs["n"] == 16


@pytest.mark.slow
def test_the_first_job_on_an_empty_site_tells_both_ways_on(slurm, own_root):  # noqa: F811
    printed = slurm.run(
        "sbatch", "--parsable", f"--output={own_root.parent}/log", SLURM / "gpt2_medium_stage1.sh"
    )
    job = printed.splitlines()[-1]
    assert slurm.wait(job)[0]["ExitCode"] == "2:0"
    log = (own_root.parent / "log").read_text()
    assert f"bash {SLURM}/fetch.sh gpt2_medium_owt && bash {SLURM}/prepare.sh gpt2_medium_owt" in log
    assert f"bash {SLURM}/train.sh gpt2_medium_owt reference" in log and "GPU-hours at 40%" in log
    assert f"bash {SLURM}/train.sh gpt2_medium_owt inheritune --stage 1 -- --dependency=afterok:JOB" in log
    assert log.splitlines()[-1].count("FAILED (code 2)") == 1


OF_AN_EXPERIMENT = [
    "gpt2_small",
    "gpt2_medium",
    "gpt2_large",
    "gpt2_xl",
    "gpt2_medium_fineweb",
    "gpt2_large_fineweb",
]


@pytest.mark.drill
@pytest.mark.parametrize("name", OF_AN_EXPERIMENT)
def test_every_script_of_an_experiment_rehearses_to_its_done(name, tmp_path, own_root):
    """In the order in which a person submits them, on a cluster without GPUs."""
    experiment = name if name.endswith("fineweb") else f"{name}_owt"
    loaded = load_experiment(experiment, rehearse=True)
    with cluster(LAB_GPUS=0) as lab:

        def submit(script, *words) -> str:
            job = lab.submit(SLURM / script, *words, REHEARSE=1)
            records = lab.wait(job, timeout=1500)
            ended = {record["JobState"] for record in records} - {"CANCELLED"}  # surplus slots of a growth
            assert ended == {"COMPLETED"}, lab.logs()
            return job

        submit("prepare.sh", experiment)
        submit(f"{name}_reference.sh")
        reference = RunDir.of(loaded, "reference")
        submit(f"{name}_stage1.sh")
        assert reference.is_done() and RunDir.of(loaded, "inheritune").stage(1).is_done()
        submit(f"{name}_growth.sh")
        assert RunDir.of(loaded, "inheritune").is_done(), lab.logs()
        submit(f"{name}_baselines.sh")
        lab.until(lambda: not lab.run("squeue", "-h"), timeout=1500)  # those that start from other baselines
        others = [n for n, run in loaded.runs.items() if run.init.random and n != "reference"]
        assert others and all(RunDir.of(loaded, n).is_done() for n in others), lab.logs()
        submit("evaluate.sh", experiment)
        submit("analyze.sh", reference.final, experiment)
        assert reference.attention.is_file(), lab.logs()


@pytest.mark.drill
@pytest.mark.parametrize("name", ["openllama_3b", "openllama_7b", "llama2_7b"])
def test_every_script_of_a_public_source_rehearses_to_its_done(name, own_root):
    with cluster(LAB_GPUS=0) as lab:
        script = SLURM / f"{name}_stage1.sh"
        job = load_jobs()[script.stem]
        experiment, run = job.experiment, job.run
        lab.wait(lab.submit(SLURM / "prepare.sh", experiment, REHEARSE=1), timeout=600)
        lab.wait(lab.submit(script, REHEARSE=1), timeout=600)
        loaded = load_experiment(experiment, rehearse=True)
        root = RunDir.of(loaded, run)
        assert (root.stage(1) if loaded.run(run).grow else root).is_done(), lab.logs()
