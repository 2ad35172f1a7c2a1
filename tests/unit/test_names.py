"""Names of experiments, runs, data and tasks (names.py): none meets a folder or file of ours, none is two
names at once."""

import ast
import re

import pytest
from conftest import REPOSITORY, experiment_dict, write_experiment
from test_tables import finish

from inheritune.config import names
from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files import processes, writing
from inheritune.files.lock import Lock, find_lock_holder
from inheritune.files.rundir import RunDir
from inheritune.files.writing import replace_atomically
from inheritune.paper import figures, tables


def refused_run(tmp_path, *runs: str) -> str:
    """The sentence about an experiment with these runs."""
    raw = experiment_dict(paper=[])
    raw["runs"] |= {run: {"init": "random"} for run in runs}
    with pytest.raises(UserError) as caught:
        load_experiment(write_experiment(tmp_path, raw))
    return str(caught.value)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("random_init_2_layers", "begins like the random starts"),
        ("Random_Init_x", "begins like the random starts"),
        ("stage1", "is the name of a stage"),
        ("at_00000010", "weights kept at a step"),
        ("final", "within every run"),
        ("DONE", "within every run"),
        ("done", "within every run"),
        ("results.json", "within every run"),
        ("a.lock", "holds '.lock' or '.tmp'"),
        ("a.lock.b", "holds '.lock' or '.tmp'"),
        ("a.TMP", "holds '.lock' or '.tmp'"),
        ("table.md", "ends like the tables and plots"),
        ("loss.png", "ends like the tables and plots"),
        ("report.html", "ends like the tables and plots"),
        ("--x", "begins with '-'"),
        ("-", "begins with '-'"),
        ("a" * 151, "has 151 bytes"),
        ("a,b", "match pattern"),
        ("a@10", "match pattern"),
        ("a/stage1", "match pattern"),
        ("", "match pattern"),
    ],
)
def test_a_run_whose_name_is_ours_is_refused_by_name(tmp_path, run, says):
    said = refused_run(tmp_path, run)
    assert says in said and "small.yaml: runs" in said and run[:40] in said


def test_runs_that_differ_in_capitals_only_are_one_folder_somewhere(tmp_path):
    assert "'Twin' and 'twin' are one folder where case is ignored" in refused_run(tmp_path, "Twin", "twin")


@pytest.mark.parametrize("name", [*names.FOLDERS, "JOBS", "Rehearsal"])
def test_an_experiment_whose_name_is_ours_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"name: '{name}' is a reserved folder name in runs/"):
        load_experiment(write_experiment(tmp_path, experiment_dict(), name))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("--x", "begins with '-'"),
        ("a\nb", "cannot be printed"),
        ("a\x1b[31m", "cannot be printed"),
        ("é" * 76, "152 bytes"),
    ],
)
def test_no_name_is_a_flag_or_breaks_a_line(tmp_path, name, says):
    for change in ({"name": name}, {"data": {**experiment_dict()["data"], "name": name}}):
        if "data" in change and not name.isascii():
            continue
        with pytest.raises(UserError) as caught:
            load_experiment(write_experiment(tmp_path, experiment_dict(**change)))
        assert "\n" not in str(caught.value) and (
            says in str(caught.value) or "match pattern" in str(caught.value)
        )


@pytest.mark.parametrize("task", ["none", "a,b", "a.b", "a b", ""])
def test_a_task_has_a_name_that_tasks_can_list(tmp_path, task):
    raw = experiment_dict(evaluate={"tasks": {task: {"task": "piqa", "metrics": ["acc"]}}})
    with pytest.raises(UserError, match="is not a valid task name"):
        load_experiment(write_experiment(tmp_path, raw))


def test_names_that_only_look_like_ours_are_free(tmp_path):
    raw = experiment_dict(paper=[])
    free = [
        "random_16_200k",
        "stages",
        "stage1b",
        "finally",
        "locked",
        "tmp",
        "a.b",
        "jobs",
        "table",
        "1",
        "none",
        "a" * 150,
    ]
    raw["runs"] |= {run: {"init": "random"} for run in free}
    assert set(free) <= set(load_experiment(write_experiment(tmp_path, raw, "jobs2")).runs)


# --- the lists are those of the code ------------------------------------------------------------------------


def test_every_folder_that_the_code_makes_in_runs_is_in_the_list():
    """Python joins names.X to "runs", never a word of its own, and no script makes a folder there."""
    for path in sorted((REPOSITORY / "inheritune").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            if joined and ast.unparse(node.left).endswith("'runs'"):
                assert "names." in ast.unparse(node.right), (path.name, ast.unparse(node))
    scripts = [*(REPOSITORY / "slurm").glob("*.sh"), *(REPOSITORY / "recipes").glob("*.sh")]
    words = {
        word
        for path in scripts
        for word in re.findall(r"ROOT/runs/([a-z]+)", path.read_text(encoding="utf-8"))
    }
    assert words <= set(names.FOLDERS)


def test_every_file_of_a_run_is_in_the_list(tmp_path):
    run = RunDir(tmp_path)
    found = {name: getattr(run, name) for name, kind in vars(RunDir).items() if isinstance(kind, property)}
    assert len(found) > 15
    assert {path.name for path in found.values()} == set(names.WITHIN_RUN)
    assert all(
        names.find_run_problem(path.name)
        for path in (run.stage(3).path, run.kept(10), run.seed_checkpoint(2))
    )


def test_tables_and_plots_beside_the_runs_take_no_name_that_a_run_may_have(tmp_path, own_root):
    finish("gpt2_medium_owt", "reference", 2.81)
    tables.table("gpt2_medium_owt")
    figures.figure("gpt2_medium_owt")
    folder = RunDir.of(load_experiment("gpt2_medium_owt"), "reference").path.parent
    beside = [path.name for path in folder.iterdir() if path.name != "reference"]
    assert len(beside) >= 4 and all(names.find_run_problem(name) for name in beside)


def test_locks_and_temporary_names_have_room(tmp_path, monkeypatch):
    """The longest names here, on a machine with the longest name."""
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "h" * 64)
    monkeypatch.setattr(writing.os, "getpid", lambda: 4_194_304)
    longest = tmp_path / ("a" * names.MAX_NAME_BYTES)
    assert not names.find_run_problem(longest.name)
    with Lock(longest, wait=0):
        assert len(Lock(longest).file.name) <= 255 and names.LOCK in Lock(longest).file.name
    with replace_atomically(longest.with_name(f"{longest.name}-{'0' * 12}")) as temporary:
        assert len(temporary.name) <= 255 and names.TEMPORARY in temporary.name
        temporary.write_text("x")


def test_the_lock_of_one_run_is_not_taken_for_anothers(tmp_path):
    """Which it would be, were 'a.lock.b' a name."""
    with Lock(tmp_path / "a", wait=0), Lock(tmp_path / "a.b", wait=0), Lock(tmp_path / "a.locker", wait=0):
        assert [find_lock_holder(tmp_path / name) is not None for name in ("a", "a.b", "a.locker")] == [
            True
        ] * 3
