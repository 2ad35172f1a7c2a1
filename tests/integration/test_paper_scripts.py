"""The scripts of the paper's tables and figures, run in rehearsal from nothing, all into one folder, so that
what they share is made once. Each ends green with everything drawn; what the baselines did is read back from
their weights and records."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_verb
from fork_server import FORKS
from test_tables import SCRIPTS

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.rundir import RunDir
from inheritune.models.sources import open_source
from inheritune.paper.items import load_experiments, load_item
from inheritune.paper.measured import find_folder, resolve_row
from inheritune.paper.table_files import locate_results

# distilled, nothing to train; the drill runs them all
SHORT = ("fig17_distillation", "table6_model_configs")
LONG = [script.stem for script in SCRIPTS]


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(autouse=True)
def own_root(shared_root, monkeypatch):
    """Here all tests share one $INHERITUNE_ROOT."""
    monkeypatch.setenv("INHERITUNE_ROOT", str(shared_root))
    monkeypatch.setenv("REHEARSE", "1")


def rehearse(script: str) -> str:
    """What `bash recipes/SCRIPT.sh` prints in rehearsal; `pytest -s` shows how long it took."""
    started, command = time.monotonic(), ["bash", REPOSITORY / "recipes" / f"{script}.sh"]
    environment = {**os.environ, **FORKS.on_path(anyway=True)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(f"{script}: {time.monotonic() - started:.0f} s")
    return done.stdout


def check_drawn(script: str) -> None:
    """Every cell that a run belongs to has its number, every panel its plot."""
    for name in (
        (REPOSITORY / "recipes" / f"{script}.sh")
        .read_text()
        .splitlines()[-1]
        .partition('paper_item.sh" ')[2]
        .removesuffix(' "$@"')
        .split()
    ):
        item = load_item(name)
        experiments = load_experiments(item)
        folder, there = locate_results(True, 0), {}
        measured = bool(item.panels) or any(
            c.metric not in (None, "parameters") or c.mean for c in item.columns.values()
        )
        for row in (row for row in item.models() if row.run and measured):
            experiment = experiments[row.run.rpartition("/")[0]]
            shown = resolve_row(experiment, row, 0)[0]
            there[row.label, row.run] = find_folder(experiment, shown, 0) is not None
            assert there[row.label, row.run], (name, row.label)
        if item.columns:
            lines = [
                line for line in (folder / f"{name}.md").read_text().splitlines() if line.startswith("| ")
            ][1:]
            for row, line in zip(item.rows, lines, strict=False):  # claim rows follow
                assert ("not run" in line) == (not there.get((row.label, row.run), True)), line
            assert all((folder / f"{name}{ending}").stat().st_size for ending in (".csv", ".tex"))
        drawn = sorted(folder.glob(f"{name}.png")) + sorted(folder.glob(f"{name}_?.png"))
        wanted = [p for p in item.panels if any(there[r.label, r.run] for r in p.rows)]
        assert len(drawn) == len(wanted) + item.drawn


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT)
def test_a_script_of_each_kind_from_nothing(script):
    said = rehearse(script)
    assert "REHEARSAL" in said or script == "table6_model_configs"
    check_drawn(script)


@pytest.mark.slow
def test_a_second_call_only_draws():
    said = rehearse("fig17_distillation")
    assert "==" not in said and said.startswith("REHEARSAL, not a result.")


@pytest.fixture
def login_node(tmp_path, monkeypatch):
    """A login node whose sbatch only writes down what it is given (Slurm itself: test_slurm_growth.py)."""
    sbatch = (
        f'[ -z "$REFUSE" ] || case "$*" in *grow*) echo "sbatch: error: no" >&2; exit 1; esac\n'
        f'n=$(($(cat {tmp_path}/calls 2> /dev/null | wc -l) + 101)); echo "$@" >> {tmp_path}/calls; echo $n'
    )
    for name, body in (("sbatch", sbatch), ("sinfo", "echo idle"), ("squeue", "")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("SUBMIT", "1")
    return tmp_path


def read_calls(login_node: Path) -> list[tuple[list[str], str]]:
    """(what a job waits for, its script and arguments) of each call of sbatch."""
    lines = (login_node / "calls").read_text().splitlines()
    calls = [(re.findall(r"--dependency=(\S+)", line), line.rpartition("/slurm/")[2]) for line in lines]
    return [(waits, job.removesuffix(" --parsable")) for waits, job in calls]


@pytest.mark.slow
def test_submitted_jobs_wait_for_what_they_need(login_node, monkeypatch):
    """`SUBMIT=1` of a paper's table."""
    assert "When these jobs are done, run this again" in rehearse("table7_xl_downstream")
    assert read_calls(login_node) == [
        ([], "prepare.sh gpt2_xl_owt"),
        (["afterok:101"], "train.sh gpt2_xl_owt reference --seed 0"),
        (["afterok:101,afterok:102"], "grow.sh gpt2_xl_owt inheritune --seed 0"),
        (["afterok:101,afterok:102"], "grow.sh gpt2_xl_owt inheritune_everything --seed 0"),
        (["afterok:102"], "evaluate.sh gpt2_xl_owt --run reference --seed 0"),
        (["afterany:103"], "evaluate.sh gpt2_xl_owt --run inheritune/stage1 --seed 0"),
        (["afterany:104"], "evaluate.sh gpt2_xl_owt --run inheritune_everything/stage1 --seed 0"),
    ]
    # the first refused submission ends it: what would wait for the job must not start at once
    (login_node / "calls").unlink()
    monkeypatch.setenv("REFUSE", "1")
    command = ["bash", REPOSITORY / "recipes" / "table7_xl_downstream.sh"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len((login_node / "calls").read_text().splitlines()) == 2
    assert "sbatch refused the job: no\nqueued so far: 101 102 (scancel 101 102 " in done.stderr


def test_on_a_login_node_nothing_is_trained_and_the_sites_folder_is_looked_at(tmp_path, monkeypatch):
    for name in ("sbatch", "srun", "sinfo"):
        (tmp_path / name).write_text("#!/bin/bash\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)  # else one is made
    for name in ("REHEARSE", "INHERITUNE_ROOT", "HF_HOME", "SCRATCH", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    command = ["bash", REPOSITORY / "recipes" / "table5_val_loss.sh"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False
    )  # the default: no folder is set
    assert done.returncode == 2 and "SUBMIT=1 submits them as jobs" in done.stderr, done.stderr
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "DRAW": "1", "SUBMIT": "0"}
    )
    assert done.returncode == 0 and list((tmp_path / "scratch" / "inheritune").rglob("table5.md")), (
        done.stdout + done.stderr
    )


@pytest.mark.slow
def test_the_claim_from_nothing_to_its_verdict():
    """Two seeds of its four runs, the references' attention, and the rule over them."""
    said = rehearse("claim")
    assert "REHEARSAL, not a result." in said and said.count("\n== train") == 2 == said.count("\n== analyze")
    experiment = load_experiment("claim/gpt2_small")
    verdict = read_json(RunDir.of(experiment, "reference").path.parent.parent / "claim.json")
    assert verdict["rehearsal"] and verdict["seeds"] == [0, 1] and verdict["meaning"] in said
    losses = [
        {
            run: RunDir.of(experiment, run, seed).read_results()["validation"]["mean"]
            for run in experiment.runs
        }
        for seed in (0, 1)
    ]
    for one in verdict["comparisons"]:
        assert one["gaps"] == pytest.approx([of["inheritune"] - of[one["other"]] for of in losses])
    runs = {run: RunDir.of(experiment, run) for run in experiment.runs}
    reference, longer = weights(runs["reference"].final), weights(runs["reference_longer"].init)
    assert same(longer, reference) == set(reference)  # trained on: nothing cut, nothing fresh
    assert copied_from(weights(runs["inheritune"].init), reference) == [0, 1]
    assert "==" not in rehearse("claim")  # the second call only judges


@pytest.mark.slow
def test_the_claims_jobs_wait_for_their_reference(login_node, monkeypatch):
    """Four runs of each seed; all but the reference wait for it."""
    monkeypatch.setenv("SEEDS", "3 4")
    assert rehearse("claim").count("When these jobs are done, run this again") == 2
    calls = read_calls(login_node)
    jobs = [job.replace("claim/gpt2_small", "NAME") for _, job in calls]
    prepare, first = (jobs.index(job) for job in ("prepare.sh NAME", "train.sh NAME reference --seed 3"))
    assert calls[prepare][0] == [] and calls[first][0] == [f"afterok:{101 + prepare}"]
    for job in ("train.sh NAME reference_longer", "train.sh NAME inheritune", "analyze.sh reference NAME"):
        waits = calls[jobs.index(f"{job} --seed 3")][0]
        assert waits == [f"afterok:{101 + prepare},afterok:{101 + first}"], job
    assert sum("train.sh" in job for job in jobs) == 8


@pytest.mark.parametrize(
    "wrong, why", [({"SEEDS": "one"}, "whole numbers"), ({"PLAN": "1", "PRICE": "H100=x"}, "is a number")]
)
def test_wrong_settings_of_the_claim_are_refused(wrong, why):
    words = [wrong["PRICE"]] if "PRICE" in wrong else []
    command = ["bash", REPOSITORY / "recipes" / "claim.sh", *words]
    environment = {**os.environ, **FORKS.on_path(anyway=True), **wrong}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and why in done.stderr and not done.stdout


@pytest.mark.drill
@pytest.mark.parametrize("script", LONG)
def test_every_script_from_nothing(script):
    rehearse(script)
    check_drawn(script)


# --- what the runs of these scripts did ---------------------------------------------------------------------


def made(experiment: str, *runs: str) -> dict[str, RunDir]:
    """{run: its folder}, of runs that are trained or grown now if no script did."""
    loaded = load_experiment(experiment)
    folders = {run: RunDir.of(loaded, run) for run in runs}
    for run in (run for run, folder in folders.items() if not folder.is_done()):
        words = ["grow" if loaded.runs[run].grow else "train", experiment, "--run", run]
        for command in (["prepare", experiment], words):
            run_verb(*command, procs=2 if command == words else 1)
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    return {name: source.tensor(name) for name in source.names()}


def block_of(tensors: dict, block: int) -> dict[str, torch.Tensor]:
    """{name inside the block: tensor} of GPT-2's block `block`."""
    prefix = f"transformer.h.{block}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def same(ours: dict, theirs: dict) -> set[str]:
    """Names of the tensors that are equal in both."""
    assert ours and ours.keys() == theirs.keys()
    return {name for name in ours if torch.equal(ours[name], theirs[name])}


def copied_from(start: dict, source: dict) -> list[int | None]:
    """For each block the block of `source` that it is a copy of, None if of none."""
    ours, theirs = (
        [block_of(tensors, i) for i in range(9) if block_of(tensors, i)] for tensors in (start, source)
    )
    return [
        next((i for i, b in enumerate(theirs) if len(same(block, b)) == len(block)), None) for block in ours
    ]


@pytest.mark.drill  # what a start copies: test_baselines.py
def test_submodules_start_with_these_tensors_of_the_reference():
    kept = {"attn": ("attn.", "ln_1."), "mlp": ("mlp.", "ln_2."), "no_norms": ("attn.", "mlp.")}
    runs = made("gpt2_medium_owt", "reference", *(f"submodules_{name}" for name in kept))
    reference = weights(runs["reference"].final)
    for name, prefixes in kept.items():
        start = weights(runs[f"submodules_{name}"].init)
        for block in range(6):
            # which are zero everywhere
            ours = {n: t for n, t in block_of(start, block).items() if not n.endswith(".bias")}
            theirs = {n: t for n, t in block_of(reference, block).items() if n in ours}
            assert same(ours, theirs) == {n for n in ours if n.startswith(prefixes)}, (name, block)
        assert torch.equal(start["transformer.wte.weight"], reference["transformer.wte.weight"])


@pytest.mark.drill
def test_distilled_runs_learn_from_the_teacher_and_others_do_not():
    runs = made("gpt2_medium_owt", "reference", "kd_random", "kd_teacher", "kd_teacher_12", "random_16")
    steps = {name: [row for row in read_jsonl(run.metrics) if "loss" in row] for name, run in runs.items()}
    for name in ("kd_random", "kd_teacher", "kd_teacher_12"):
        for row in steps[name]:
            assert row["loss"] == pytest.approx(0.6 * row["ce_loss"] + 0.4 * row["distil_loss"], abs=1e-5)
            assert row["distil_loss"] > 1e-5
    # a student of the teacher's own layers is near it from the first step on
    assert 1e-2 < steps["kd_random"][0]["distil_loss"] > 10 * steps["kd_teacher"][0]["distil_loss"]
    assert not any("distil_loss" in row for row in steps["random_16"])
    # the same start and data: the first cross-entropy is the same, those after it are not
    (first, *taught), (alone, *untaught) = steps["kd_random"], steps["random_16"]
    assert first["ce_loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert max(abs(a["ce_loss"] - b["loss"]) for a, b in zip(taught, untaught, strict=False)) > 1e-3
    teacher = weights(runs["reference"].final)
    assert copied_from(weights(runs["kd_teacher"].init), teacher) == [0, 2, 4, 6, 6, 7]
    assert copied_from(weights(runs["kd_teacher_12"].init), teacher) == [0, 2, 4, 6]


@pytest.mark.drill
def test_lazy_layers_are_those_of_their_depth():
    runs = made("gpt2_small_owt", "reference", "layers_5_to_8", "layers_9_to_12", "inheritune")
    starts = [runs["inheritune"].stage(1).init, runs["layers_5_to_8"].init, runs["layers_9_to_12"].init]
    reference = weights(runs["reference"].final)
    assert [copied_from(weights(start), reference) for start in starts] == [[0, 1], [2], [3]]
    assert [read_json(start / "inherited.json")["layers"] for start in starts] == [[0, 1], [2], [3]]


@pytest.mark.drill
def test_stacked_hybrid_half_wide_and_placed_starts():
    runs = made(
        "gpt2_medium_owt", "reference", "stacking_half", "stacking", "hybrid", "half_width", "lazy_deep_24"
    )
    reference, half = weights(runs["reference"].final), weights(runs["stacking_half"].final)
    for run, source in (("stacking", half), ("hybrid", reference)):
        start = weights(runs[run].init)
        assert copied_from(start, source) == [0, 1, 2, 0, 1, 2]
        assert len(same(block_of(start, 0), block_of(start, 3))) == len(block_of(start, 0))
        assert torch.equal(start["transformer.wpe.weight"], source["transformer.wpe.weight"]) == (
            run == "stacking"
        )
    config, narrow = read_json(runs["half_width"].init / "config.json"), weights(runs["half_width"].init)
    assert (config["n_head"], config["n_embd"], config["n_layer"]) == (2, 32, 8)
    assert torch.equal(narrow["transformer.wte.weight"], reference["transformer.wte.weight"][:, :32])
    assert copied_from(weights(runs["lazy_deep_24"].init), reference) == [None] * 5 + [5, 6, 7]
    results = {name: read_json(run.results) for name, run in runs.items()}
    assert {name: result["layers"] for name, result in results.items()} == {
        "reference": 8,
        "stacking_half": 3,
        "stacking": 6,
        "hybrid": 6,
        "half_width": 8,
        "lazy_deep_24": 8,
    }
