"""recipes/quickstart.py: its steps, its screen, and its end when a step fails or is stopped. The whole takes
minutes; what it prints is in the README."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

from inheritune.cli.arguments import bind_arguments
from inheritune.cli.help import list_verbs

PROGRAM = """
import sys; sys.path.insert(0, "recipes")
import quickstart
quickstart.list_steps = lambda *_: [quickstart.Step("the only step", [{words}], 1)]
quickstart.is_on_cpu, quickstart.import_once = lambda: {fork}, lambda: None
sys.exit(quickstart.main(0, 1))
"""


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", REPOSITORY / "recipes/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    return module


def start(words: list[str], fork: bool = True) -> subprocess.Popen:
    """The script with a verb in place of its steps; `fork` as on CPUs."""
    command = [sys.executable, "-c", PROGRAM.format(words=words, fork=fork)]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=-1, stderr=-1)


def test_every_step_is_a_command(quickstart, own_root):
    verbs, used = list_verbs(), []
    for step in quickstart.list_steps(3, 2):
        for verb, *words in step.verbs:
            used.append((verb, bind_arguments(verb, verbs[verb], words)))
    trained = [(its["run"], its["procs"], its["seed"]) for verb, its in used if verb == "train"]
    # two ranks for the reference; the others are one forked process each
    assert trained == [("reference", 2, 3), ("random", 1, 3), ("random_longer", 1, 3)]
    assert [verb for verb, _ in used if verb != "train"] == [
        "prepare",
        "analyze",
        "grow",
        "analyze",
        "figure",
        "table",
    ]


def test_the_table_on_the_screen_fits_100_columns(quickstart, tmp_path, capsys):
    row = ["a random start with as many steps as both of the others together", "12", "1000000"]
    row += ["5.2910 (5.2483 to 5.3336)", "-0.3864 (-0.3985 to -0.3743)"]
    lines = [",".join(f'"{cell}"' for cell in cells) for cells in (quickstart.COLUMNS, row, row)]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "table.md").write_text("| table |\n\n" + "it reaches the loss of the reference, " * 9 + "\n")
    quickstart.print_result(tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 100
    assert sum("-0.3864 (-0.3985 to -0.3743)" in line for line in printed) == 2


@pytest.mark.parametrize("fork", [True, False])
def test_a_step_that_fails_shows_its_sentence_and_has_its_code(own_root, fork):
    program = start(["train", "quickstart", "--run", "nosuch"], fork)
    out, err = program.communicate(timeout=100)
    assert program.returncode == 2 and "1/1" not in out, out + err
    assert "inheritune: " in err and "nosuch" in err and "step 1 has not finished" in err
    log = own_root / "runs/quickstart/seed0/quickstart.log"
    assert "== python -m inheritune train quickstart --run nosuch" in log.read_text()


@pytest.mark.slow
def test_a_step_that_is_stopped_saves_and_is_continued(own_root):
    program = start(["prepare", "quickstart"])
    end = time.time() + 100
    while not list((own_root / "data").glob("*/*")):
        assert program.poll() is None and time.time() < end
        time.sleep(0.05)
    os.kill(program.pid, signal.SIGTERM)
    out, err = program.communicate(timeout=100)
    assert program.returncode == 128 + signal.SIGTERM and "the same command continues" in err, out + err
    again = start(["prepare", "quickstart"])
    out, err = again.communicate(timeout=200)
    assert "1/1 the only step" in out, out + err
    assert len(list((own_root / "data").glob("stdlib-*/manifest.json"))) == 1
