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
lanes = [[quickstart.Step(title, [words], 1)] for title, words in {lanes}]
quickstart.list_phases = lambda *_, parallel: [lanes]
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


@pytest.mark.parametrize("variable", ["SEED", "PROCS"])
@pytest.mark.parametrize("value", ["x", "1.5", "-1"])
def test_a_variable_that_is_no_number_is_told(variable, value):
    words = [value] if variable == "SEED" else ["0", value]
    command = [sys.executable, REPOSITORY / "recipes/quickstart.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"inheritune: {variable} ") and done.stderr.endswith(f"(got '{value}')\n")


def start(words: list[str], fork: bool = True, beside: list[str] | None = None) -> subprocess.Popen:
    """The script with a verb in place of its steps, and another one beside it; `fork` as on CPUs."""
    lanes = [("the only step", words), *([("another step", beside)] if beside else [])]
    command = [sys.executable, "-c", PROGRAM.format(lanes=lanes, fork=fork)]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=-1, stderr=-1)


@pytest.mark.parametrize("procs", [1, 2])
@pytest.mark.parametrize("parallel", [False, True])
def test_every_step_is_a_command(quickstart, own_root, procs, parallel):
    verbs, used, lanes = list_verbs(), [], []
    for phase in quickstart.list_phases(3, procs, parallel):
        lanes.append(len(phase))
        for lane in phase:
            for verb, *words in (words for step in lane for words in step.verbs):
                used.append((verb, bind_arguments(verb, verbs[verb], words)))
    trained = {its["run"]: (its["procs"], its["seed"]) for verb, its in used if verb == "train"}
    # several ranks for the reference alone; the others are one forked process each
    assert trained == {"reference": (procs, 3), "random": (1, 3), "random_longer": (1, 3)}
    others = [verb for verb, _ in used if verb != "train"]
    assert others == ["prepare", "analyze", "grow", "analyze", "figure", "table", "report"]
    # ranks of the reference have the machine to themselves
    assert lanes == ([1] * 7 if not parallel else [1, 2, 1] if procs == 1 else [1, 1, 2, 1])


@pytest.mark.parametrize("procs", [1, 2])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_step_comes_after_what_it_needs(quickstart, own_root, procs, parallel):
    ended: set[str] = set()
    for phase in quickstart.list_phases(0, procs, parallel):
        lanes = [[words for step in lane for words in step.verbs] for lane in phase]
        for lane in lanes:
            before = set(ended)
            for verb, *words in lane:
                if verb in ("analyze", "grow"):
                    assert "reference" in before
                if verb in ("figure", "table"):
                    assert before >= {"reference", "inheritune", "random", "random_longer"}
                before.add(words[words.index("--run") + 1] if "--run" in words else verb)
            ended |= before


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
    assert "inheritune: " in err and "nosuch" in err and "'the only step' has not finished" in err
    log = own_root / "runs/quickstart/seed0/quickstart.log"
    assert "== python -m inheritune train quickstart --run nosuch" in log.read_text()


def test_a_step_that_fails_stops_the_one_beside_it(own_root):
    program = start(["train", "quickstart", "--run", "nosuch"], beside=["prepare", "quickstart"])
    out, err = program.communicate(timeout=100)
    assert program.returncode == 2 and "1/2" not in out, out + err
    assert "nosuch" in err and "another step" not in err
    assert not list((own_root / "data").glob("stdlib-*/manifest.json"))
    assert (
        "== python -m inheritune prepare" in (own_root / "runs/quickstart/seed0/quickstart_2.log").read_text()
    )


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
