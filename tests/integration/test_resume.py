"""A run killed at a random step and started again ends with the bits of the unbroken run; damage is passed
over."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, experiment_dict, run_verb, write_experiment, write_tokens
from fork_server import FORKS

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_jsonl
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir

STEPS = 14
RECORD = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


def make(tmp_path, name: str, stage: int):
    """An experiment of one run under its own root, with two decay groups, accumulation, a binding clip and
    three shards."""
    root = tmp_path / name
    root.mkdir()
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    (tmp_path / f"zero{stage}.json").write_text(json.dumps(settings))
    raw = experiment_dict(runs={"reference": {"init": "random", "keep_at": [9]}}, paper=[])
    raw["train"].update(
        steps=STEPS,
        clip=0.5,
        weight_decay=0.5,
        checkpoint_every=3,
        eval_every=4,
        keep_last=2,
        deepspeed=str(tmp_path / f"zero{stage}.json"),
    )
    path = write_experiment(tmp_path, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(root))
        write_tokens(get_data_dir(load_experiment(path)))
        return path, root, RunDir.of(load_experiment(path), "reference")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A function from the ZeRO stage to (experiment's path, root, RunDir) of an unbroken run, trained when
    first asked for."""
    made = {}

    def of(stage: int):
        if stage not in made:
            made[stage] = make(tmp_path_factory.mktemp(f"stage{stage}"), "root", stage)
            assert start(*made[stage][:2]).wait() == 0
        return made[stage]

    return of


def copy_finished(finished, folder):
    """The same of a copy of the unbroken run of ZeRO 3, in `folder`."""
    path, root, run = finished(3)
    shutil.copytree(root.parent, folder, dirs_exist_ok=True)
    return (
        str(folder / Path(path).name),
        folder / root.name,
        RunDir(folder / run.path.relative_to(root.parent)),
    )


def start(path, root, *words) -> subprocess.Popen:
    """Training of the run that `words` name (the reference), on two ranks."""
    words = words or ("--run", "reference")
    command = [FORKS.python(), "-m", "inheritune", "train", path, *words, "--procs", "2"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "INHERITUNE_ROOT": str(root)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_at(path, root, run: RunDir, step: int, *words) -> None:
    """Start the run that `words` name and SIGKILL all its processes as soon as it has recorded `step`."""
    process = start(path, root, *words)
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_jsonl(run.metrics)):
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it could be killed"
        )
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not run.is_done()


def record(run: RunDir) -> list[tuple]:
    return [tuple(row.get(key) for key in RECORD) for row in read_jsonl(run.metrics)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.drill), 3])
def test_killed_and_resumed_equals_unbroken_bit_for_bit(tmp_path, finished, stage):
    unbroken = finished(stage)[2]
    path, root, killed = make(tmp_path, "killed", stage)
    seed = random.SystemRandom().randrange(10**6)
    moments = sorted(random.Random(seed).sample(range(4, STEPS - 1), 2))
    for step in moments:
        kill_at(path, root, killed, step)
    assert start(path, root).wait() == 0, f"seed {seed}"
    assert record(killed) == record(unbroken), f"seed {seed}: killed at {moments}"
    assert hash_folder(killed.final) == hash_folder(unbroken.final)
    assert hash_folder(killed.kept(9)) == hash_folder(unbroken.kept(9))
    starts = json.loads(killed.provenance.read_text())["starts"]
    assert len(starts) == 3 and starts[-1]["resumed_at"], "the last start must really have resumed"
    steps = [row[0] for row in record(killed) if row[2] is not None]
    assert steps == list(range(1, STEPS + 1))
    assert killed.complete_checkpoints() == [9, 12]  # keep_last, and nothing half-written beside them
    assert sorted(p.name for p in killed.checkpoints.iterdir()) == ["step_00000009", "step_00000012"]


@pytest.mark.slow
def test_finished_run_is_a_no_op_and_damage_is_passed_over(tmp_path, finished):
    path, root, run = copy_finished(finished, tmp_path)
    whole, files = record(run), hash_folder(run.path)
    done = run_verb("train", path, "--run", "reference", procs=2, INHERITUNE_ROOT=root)
    assert "is finished" in done.stdout and hash_folder(run.path) == files

    # as if it had died at the end, with its newest checkpoint damaged: it goes on from the one before
    before = hash_folder(run.final)
    run.done.unlink()
    victim = next(run.checkpoint(12).rglob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    again = run_verb("train", path, "--run", "reference", procs=2, INHERITUNE_ROOT=root)
    assert "checkpoint of step 12 is skipped" in again.stdout and "resumed at step 9" in again.stdout
    assert record(run) == whole and hash_folder(run.final) == before
    assert [row["step"] for row in read_jsonl(run.discarded_metrics)][:1] == [10]


@pytest.mark.slow
def test_resume_refuses_what_would_change_the_run(tmp_path, finished):
    path, root, run = copy_finished(finished, tmp_path)
    run.done.unlink()
    files = hash_folder(run.path)

    def refused(*changes, words):
        for key, value in changes:
            text = (tmp_path / "small.yaml").read_text()
            (tmp_path / "small.yaml").write_text(text.replace(f"{key}:", f"{key}: {value} #", 1))
        done = run_verb("train", path, "--run", "reference", procs=2, check=False, INHERITUNE_ROOT=root)
        (tmp_path / "small.yaml").write_text(original)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (
            done.stdout + done.stderr
        )
        assert hash_folder(run.path) == files  # nothing written, nothing lost

    original = (tmp_path / "small.yaml").read_text()
    refused(("lr", "0.5"), words="was started with train.lr = 0.001, now it is 0.5")
    manifest = next((root / "data").glob("*/manifest.json"))
    saved = manifest.read_text()
    manifest.write_text(saved.replace('"tiny"', '"other"'))
    refused(words="was trained on data tiny")
    manifest.write_text(saved)
    # what does not change a step may change
    (tmp_path / "small.yaml").write_text(original.replace("keep_last: 2", "keep_last: 1"))
    run_verb("train", path, "--run", "reference", procs=2, INHERITUNE_ROOT=root)
    assert run.is_done() and run.complete_checkpoints() == [12], (
        "a start that saves nothing keeps to keep_last too"
    )
