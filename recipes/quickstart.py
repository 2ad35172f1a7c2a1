"""The steps of recipes/quickstart.sh: python recipes/quickstart.py SEED PROCS.

Each step is a verb of `python -m inheritune`. What the verbs print goes to quickstart.log beside the runs.
The screen has a line for each step and, on a terminal, the remaining time of the whole. On CPUs the verbs are
forks of this process, which imports once what each of them would import for 8 to 12 seconds.
"""

import csv
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from inheritune.config.experiment import load_experiment
from inheritune.config.paths import REPOSITORY
from inheritune.files.json_files import read_jsonl
from inheritune.files.rundir import RunDir

EXPERIMENT = "quickstart"
COLUMNS = {
    "model": 22,
    "layers": 6,
    "steps": 5,
    "validation loss (95% interval)": 25,
    "difference to the reference (95% interval)": 28,
}
"""The columns of the table that are printed, with their widths, 98 characters in all. The file has more."""
SHOWN_LINES = 15
"""Lines of the log that are printed when a step fails."""


@dataclass(frozen=True)
class Step:
    """One line of the screen."""

    title: str
    verbs: list[list[str]]
    share_s: int
    """Seconds that it took on two quiet cores: its share of the progress."""
    record: RunDir | None = None
    """The run whose record shows how far the step is."""
    steps: int = 1


def list_steps(seed: int, procs: int) -> list[Step]:
    """Return the steps of the method. On CPUs only the reference shows ZeRO 3 on `procs` ranks: one process,
    which is forked, starts many seconds sooner than two new ones."""
    experiment = load_experiment(EXPERIMENT)
    folder = {name: RunDir.of(experiment, name, seed) for name in ("", *experiment.runs)}
    ranks, alone = ["--procs", str(procs)], ["--procs", str(1 if is_on_cpu() else procs)]

    def train(run: str, processes: list[str]) -> list[str]:
        return ["train", EXPERIMENT, "--run", run, "--seed", str(seed), *processes]

    def analyze(model: Path, *more: str) -> list[str]:
        return ["analyze", "--model", str(model), "--data", EXPERIMENT, *more]

    n_steps = experiment.train.steps
    grown = folder["inheritune"]
    grow = ["grow", EXPERIMENT, "--run", "inheritune", "--seed", str(seed), *alone]
    figures = [[verb, EXPERIMENT, "--seed", str(seed)] for verb in ("figure", "table")]
    return [
        Step("prepare: the Python standard library's text becomes tokens", [["prepare", EXPERIMENT]], 15),
        Step(
            f"train the reference: an 8-layer GPT-2 from random, ZeRO 3 on {procs} rank(s)",
            [train("reference", ranks)],
            90,
            folder["reference"],
            n_steps,
        ),
        Step(
            "analyze the reference's attention: which layers are lazy?",
            [analyze(folder["reference"].final, "--ranks-only")],
            8,
        ),
        Step(
            "inherit its first layers, train, and grow until parity or the last stage",
            [grow],
            45,
            grown.stage(1),
            n_steps,
        ),
        Step(
            "the same size from random, for as many steps",
            [train("random", alone)],
            30,
            folder["random"],
            n_steps,
        ),
        Step(
            "the same, with the reference's steps added",
            [train("random_longer", alone)],
            55,
            folder["random_longer"],
            2 * n_steps,
        ),
        Step("what came out: attention, figures, table", [analyze(grown.path, "--ranks-only"), *figures], 12),
    ]


def is_on_cpu() -> bool:
    """Return whether training runs on CPUs here."""
    from inheritune.runtime.dist import get_device

    return get_device().type == "cpu"


def import_once() -> None:
    """Import what the verbs need before they are forked."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import inheritune.analysis.attention
    import inheritune.cluster.grow
    import inheritune.data.prepare
    import inheritune.paper.figures
    import inheritune.paper.tables
    import inheritune.training.loop  # noqa: F401


class Verb:
    """A verb that runs, as a fork of this process on CPUs, else as a Python of its own."""

    def __init__(self, words: list[str], log: Path, fork: bool):
        self._python: subprocess.Popen | None = None
        with open(log, "a") as out:
            print(f"\n== python -m inheritune {' '.join(words)}", file=out, flush=True)
            if not fork:
                command = [sys.executable, "-m", "inheritune", *words]
                self._python = subprocess.Popen(command, stdout=out, stderr=out)
                self.pid = self._python.pid
                return
            self.pid = os.fork()
            if self.pid == 0:
                be_verb(words, out.fileno())

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self._python is not None:
            return self._python.poll()
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None


def be_verb(words: list[str], out: int) -> None:
    """Be `python -m inheritune WORDS` that prints to the file `out`. Never returns."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["inheritune", *words]
        runpy.run_module("inheritune", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_step(step: Step, log: Path, fork: bool, bar: tqdm) -> int:
    """Run the verbs of a step one after another, and move the bar. Returns the first exit code that is not
    0."""
    begun = bar.n
    for words in step.verbs:
        verb = Verb(words, log, fork)
        running.append(verb)
        while (code := verb.poll()) is None:
            time.sleep(0.2)
            bar.update(begun + step.share_s * measure_progress(step) - bar.n)
        running.remove(verb)
        if received:
            return 128 + received[0]
        if code:
            return code if code > 0 else 128 - code
    bar.update(begun + step.share_s - bar.n)
    return 0


def measure_progress(step: Step) -> float:
    """Return how much of a step is done, 0 to 1, by the record of its run."""
    if step.record is None or not step.record.metrics.is_file():
        return 0.0
    last = max((row["step"] for row in read_jsonl(step.record.metrics)), default=0)
    return min(1.0, last / step.steps)


running: list[Verb] = []
received: list[int] = []
"""Numbers of the signals that ask to stop."""


def pass_on(number: int, _) -> None:
    """Pass a signal on to the verb, which saves. A terminal's Ctrl-C has reached it already."""
    received.append(number)
    for verb in running:
        if number != signal.SIGINT:
            os.kill(verb.pid, number)


def show_path(path: Path) -> str:
    """Return the path as it is typed in the repository, if it lies there."""
    return os.path.relpath(path, REPOSITORY) if path.is_relative_to(REPOSITORY) else str(path)


def print_result(folder: Path) -> None:
    """Print the narrow form of the table, and the last line of its notes."""
    with open(folder / "table.csv", newline="") as file:
        rows = [[row[name] for name in COLUMNS] for row in csv.DictReader(file)]
    headers = [textwrap.fill(name, width) for name, width in COLUMNS.items()]
    print(tabulate(rows, headers, maxcolwidths=list(COLUMNS.values()), disable_numparse=True))
    outcome = (folder / "table.md").read_text().rstrip().splitlines()[-1]
    print("\n" + textwrap.fill(outcome, 98))


def main(seed: int, procs: int) -> int:
    """Run all steps. Returns the exit code."""
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    steps = list_steps(seed, procs)
    folder = RunDir.of(load_experiment(EXPERIMENT), "", seed).path
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "quickstart.log"
    print(f"What the steps print is in {show_path(log)}", flush=True)
    fork = is_on_cpu()
    if fork:
        import_once()
    tqdm.monitor_interval = 0  # no thread may run while the verbs are forked
    form = "{percentage:3.0f}% |{bar:40}| {elapsed}, {remaining} left"
    with tqdm(total=sum(step.share_s for step in steps), bar_format=form, disable=None, leave=False) as bar:
        for number, step in enumerate(steps, 1):
            begun = time.monotonic()
            code = run_step(step, log, fork, bar)
            if code:
                bar.close()
                print("\n".join(log.read_text().splitlines()[-SHOWN_LINES:]), file=sys.stderr)
                print(f"step {number} has not finished; the same command continues", file=sys.stderr)
                return code
            tqdm.write(f"{number}/{len(steps)} {step.title} ({time.monotonic() - begun:.0f} s)")
            sys.stdout.flush()
    print()
    print_result(folder)
    print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {show_path(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
