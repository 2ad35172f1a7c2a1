"""Ctrl-C: what can be saved is saved, the rest leaves without a traceback or a temporary file; a second one
ends everything at once; a script does not continue with its next line. By real processes, signals and a
terminal."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import REPOSITORY, experiment_dict, run_verb, write_experiment
from test_fetch import environment, files, make_hub, write_hub_experiment  # noqa: F401 - files is a fixture
from test_stop import make

from inheritune.config.experiment import load_experiment
from inheritune.config.sections import Model
from inheritune.files.json_files import read_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.networks import build_config
from inheritune.models.surgery import write_random
from inheritune.runtime.signals import ONE_PRESS_S

DIED = -signal.SIGINT  # which a shell shows as 130
SAVING = (
    "inheritune: Ctrl-C: saving, then stopping; a second Ctrl-C stops at once and loses what is not saved\n"
)
STOPPING = "inheritune: Ctrl-C: stopping\n"


class Program:
    """`python -m inheritune WORDS` in a process group of its own, as a shell starts it for a terminal."""

    def __init__(self, *words, before=(), ignore=None, **environment):
        def set_signals():  # whatever started the tests: nohup and scripts ignore some
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number == ignore else signal.SIG_DFL)

        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "inheritune", *map(str, words)],
            cwd=REPOSITORY,
            text=True,
            process_group=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}},
            stdout=-1,
            stderr=-1,
            preexec_fn=set_signals,
        )

    def until(self, is_time) -> "Program":
        """Wait for a moment of its work."""
        end = time.time() + 120
        while not is_time():
            assert self.process.poll() is None and time.time() < end, self.ended()
            time.sleep(0.005)
        return self

    def press(self, number=signal.SIGINT) -> "Program":
        """What a terminal does on Ctrl-C: the signal reaches the whole group."""
        os.killpg(self.process.pid, number)
        return self

    def ended(self) -> tuple[int, str, str]:
        """(exit code, standard output, standard error), with nothing of it left running."""
        out, err = self.process.communicate(timeout=120)
        end = time.time() + 30
        while left := [p for p in psutil.process_iter() if p.pid != self.process.pid and self._is_ours(p)]:
            assert time.time() < end, left
            time.sleep(0.05)
        return self.process.returncode, out, err

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, psutil.NoSuchProcess):
            return False

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(experiment, run folder) of a run that would take minutes."""
    path, root, folder = make(tmp_path, stage=1, steps=2000, checkpoint_every=2000, eval_every=2000)
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    return path, folder


def begun(run: RunDir):
    return lambda: run.metrics.is_file() and run.metrics.read_text().count("\n") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("procs", [1, 2])
def test_training_saves_and_the_next_start_resumes(run, procs):
    path, folder = run
    code, out, err = (
        Program("train", path, "--run", "reference", "--procs", procs).until(begun(folder)).press().ended()
    )
    assert code == DIED and err == SAVING and "(SIGINT), all saved" in out, out + err
    stopped = read_json(folder.stopped)["step"]
    assert folder.complete_checkpoints() == [stopped] and not folder.is_done()
    again = Program("train", path, "--run", "reference", "--procs", procs)
    again.until(lambda: not folder.stopped.exists()).press(signal.SIGTERM)
    code, out, _ = again.ended()
    assert code == 0 and f"resumed at step {stopped} of 2000" in out


@pytest.mark.slow
def test_one_press_that_arrives_twice_is_one(run):
    """`timeout --foreground` passes on what the terminal has sent to all already."""
    path, folder = run
    program = Program("train", path, "--run", "reference", before=["timeout", "--foreground", "600"])
    code, out, err = program.until(begun(folder)).press().ended()
    assert code == DIED and err == SAVING and "(SIGINT), all saved" in out, out + err
    assert folder.complete_checkpoints()


@pytest.mark.slow
def test_a_second_one_ends_ranks_that_hang(run):
    path, folder = run
    program = Program("train", path, "--run", "reference", "--procs", 2).until(begun(folder))
    for rank in program.ranks():
        rank.suspend()
    program.press()
    time.sleep(2 * ONE_PRESS_S)
    code, out, err = program.press().ended()
    assert code == DIED and err == SAVING and "Traceback" not in out, out + err
    assert not folder.complete_checkpoints()
    # nothing holds it
    done = run_verb("train", path, "--run", "reference", check=False, STOP=folder.stop.touch())
    assert f"{folder.stop} exists; delete it to continue" in done.stdout


IN_A_LIBRARY = """
import hashlib
from inheritune.runtime import signals
signals.listen_for_signals()
print("begun", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_a_second_one_ends_a_process_that_is_inside_a_library():
    """Python's own handlers run only after the call."""
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_LIBRARY], cwd=REPOSITORY, text=True, stdout=-1, stderr=-1
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == SAVING
    time.sleep(2 * ONE_PRESS_S)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == DIED and process.stderr.read() == ""


def make_growth(tmp_path, monkeypatch, steps: int) -> tuple[str, RunDir]:
    """A growth whose runs take `steps` steps and save nothing before their end; its reference."""
    _, root, reference = make(tmp_path, stage=1, steps=steps)
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    raw = experiment_dict()
    raw["train"] |= {"steps": steps, "checkpoint_every": steps, "eval_every": steps}
    return write_experiment(tmp_path, raw), reference


@pytest.mark.slow
def test_a_growth_that_waits_for_its_reference_can_be_stopped(tmp_path, monkeypatch):
    """Another job trains the reference; the signal reaches the waiting child alone, as when a node fails."""
    path, reference = make_growth(tmp_path, monkeypatch, steps=20_000)
    other = Program("train", path, "--run", "reference").until(begun(reference))
    growth = Program("grow", path, "--run", "grown")
    assert any("is being written by" in line for line in growth.process.stdout)
    (child,) = psutil.Process(growth.process.pid).children()
    child.terminate()
    code, out, err = growth.ended()
    assert code == 0 and "Traceback" not in err, out + err
    assert "inheritune: grown: stopped within train reference; the same command continues from there" in out
    other.press(signal.SIGTERM).ended()


@pytest.mark.slow
def test_a_growth_stops_within_a_stage_and_says_so_once(tmp_path, monkeypatch):
    path, reference = make_growth(tmp_path, monkeypatch, steps=2000)
    code, out, err = (
        Program("grow", path, "--run", "grown", "--procs", 2).until(begun(reference)).press().ended()
    )
    assert code == DIED and err == SAVING, out + err
    assert "inheritune: grown: stopped within train reference; the same command continues from there" in out
    assert reference.complete_checkpoints()


@pytest.mark.slow
def test_the_end_of_the_terminal_saves(run):
    path, folder = run
    code, out, err = (
        Program("train", path, "--run", "reference").until(begun(folder)).press(signal.SIGHUP).ended()
    )
    assert code == 0 and "(SIGHUP), all saved" in out and not err and folder.complete_checkpoints()


@pytest.mark.slow
def test_signals_that_are_ignored_from_the_start_stay_so(tmp_path, monkeypatch):
    """nohup, and the background jobs of a script."""
    path, root, folder = make(tmp_path, stage=1, steps=60)
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    for number in (signal.SIGINT, signal.SIGHUP):
        program = Program("train", path, "--run", "reference", ignore=number)
        code, _, err = program.until(begun(folder)).press(number).ended()
        assert code == 0 and not err and folder.is_done()
        folder.done.unlink()


# --- preparing ----------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """(experiment, data folder): text that takes some seconds to encode."""
    raw = experiment_dict()
    raw["data"] |= {"source": "files", "files": [str(tmp_path / "*.txt")], "shard_tokens": 100_000}
    raw["data"] |= {"validation": {"first_shard": True}}
    text = "\n".join(path.read_text() for path in sorted((REPOSITORY / "inheritune").rglob("*.py")))
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(text[number:])
    path = write_experiment(tmp_path, raw)
    return path, get_data_dir(load_experiment(path))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_preparing_saves_and_resumes_with_the_same_bytes(corpus, tmp_path, workers):
    path, folder = corpus
    program = Program("prepare", path, "--workers", workers).until(
        lambda: (folder / "train_00000.bin").is_file()
    )
    code, out, err = program.press().ended()
    assert code == DIED and err == SAVING and "the same command resumes from there" in out, out + err
    assert not (folder / "manifest.json").exists()
    assert "resuming after" in run_verb("prepare", path).stdout
    broken = hash_folder(folder)
    unbroken = tmp_path / "other"
    run_verb("prepare", path, INHERITUNE_ROOT=unbroken)
    assert broken == hash_folder(unbroken / "data" / folder.name)


@pytest.mark.slow
def test_workers_that_have_only_just_started_leave_it_to_their_parent(corpus):
    path, folder = corpus
    program = Program("prepare", path, "--workers", 2)
    program.until(lambda: len(program.ranks()) >= 2)  # one is multiprocessing's own
    code, out, err = program.press().ended()
    assert code == DIED and err == SAVING and "the same command resumes from there" in out, out + err


@pytest.mark.slow
def test_a_second_one_ends_the_workers_too(corpus):
    path, folder = corpus
    program = Program("prepare", path, "--workers", 2).until(lambda: (folder / "train_00000.bin").is_file())
    program.press()
    time.sleep(1.2 * ONE_PRESS_S)  # what is under way may be saved by then, or not
    code, out, err = program.press().ended()
    assert code == DIED and err == SAVING and "Traceback" not in out
    run_verb("prepare", path)


# --- verbs that have nothing to save ------------------------------------------------------------------------


def test_inherit_leaves_no_temporary_file(tmp_path):
    sizes = {"layers": 4, "width": 1024, "heads": 2, "positions": 32, "vocab_size": 40_000}
    write_random(build_config(Model(size="gpt2_tiny", **sizes), 4), tmp_path / "source")  # 300 MB
    out = tmp_path / "cut"
    program = Program("inherit", "--source", tmp_path / "source", "--layers", "0:4", "--out", out)
    code, _, err = program.until(lambda: list(tmp_path.glob(".cut.*"))).press().ended()
    assert (code, err) == (DIED, STOPPING) and sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_fetch_leaves_in_the_middle_of_a_file(request, tmp_path, files):  # noqa: F811
    hub = make_hub(request, files, stall_at="sample/002.parquet")
    path = write_hub_experiment(tmp_path, tokenizer="bpe:300")
    program = Program("fetch", path, **environment(hub, tmp_path)).until(hub.stalling.is_set)
    code, out, err = program.press().ended()
    assert (code, err.replace("\r", "\n").splitlines()[-1:]) == (
        DIED,
        [STOPPING.strip()],
    ) and "Traceback" not in err, err


def test_before_the_verb_has_begun_it_is_silent(tmp_path):
    """While Python imports: nothing to save, and no traceback."""
    (tmp_path / "difflib.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    program = Program(
        "train", "quickstart", "--run", "reference", PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}"
    )
    assert program.process.stdout.readline() == "importing\n"
    assert program.press().ended() == (DIED, "", "")


# --- in a terminal ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_script_does_not_continue_with_its_next_line(run, tmp_path):
    """A loop of a shell goes on after a program that answers Ctrl-C by an exit code of its own, even where
    that is not 0."""
    path, folder = run
    train = f"{shlex.quote(sys.executable)} -m inheritune train {shlex.quote(path)} --run reference"
    (tmp_path / "loop.sh").write_text(
        f"for seed in 0 1; do {train} --seed $seed; echo CONTINUED; done\necho CONTINUED\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execvp("bash", ["bash", str(tmp_path / "loop.sh")])
    end = time.time() + 120
    while not begun(folder)():
        assert time.time() < end
        time.sleep(0.05)
    os.write(terminal, b"\x03")
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # the terminal's last process has ended
            break
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == DIED, said
    assert b"all saved" in said and b"CONTINUED" not in said and b"Traceback" not in said, said
    assert folder.complete_checkpoints()
