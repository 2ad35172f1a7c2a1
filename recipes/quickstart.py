"""The steps of recipes/quickstart.sh: python recipes/quickstart.py SEED [PROCS].

Each step is a verb of `python -m inheritune`. What the verbs print goes to quickstart.log beside the runs.
The screen has a line for each step and, on a terminal, the remaining time of the whole. On CPUs the verbs are
forks of this process, which imports once what each of them would import for 8 to 12 seconds. There the random
starts train beside the reference and the grown run: a model this small trains faster on a core of its own.
"""

import csv
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from inheritune.cli.scripts import read_variable, run_script
from inheritune.config.experiment import load_experiment
from inheritune.config.paths import REPOSITORY
from inheritune.files.json_files import read_jsonl
from inheritune.files.rundir import RunDir
from inheritune.submit.site import adopt_folders

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


def list_phases(seed: int, procs: int, parallel: bool) -> list[list[list[Step]]]:
    """Return the phases of the method: in a phase lanes run at the same time, in a lane the steps follow one
    another. If not `parallel`, each phase has one lane.

    Only the reference has `procs` ranks; on CPUs the others are one process, which is forked, and so starts
    many seconds sooner than two new ones."""
    experiment = load_experiment(EXPERIMENT)
    folder = {name: RunDir.of(experiment, name, seed) for name in ("", *experiment.runs)}
    ranks, alone = ["--procs", str(procs)], ["--procs", str(1 if is_on_cpu() else procs)]

    def train(title: str, run: str, share_s: int, processes: list[str] = alone) -> Step:
        words = ["train", EXPERIMENT, "--run", run, "--seed", str(seed), *processes]
        return Step(title, [words], share_s, folder[run], experiment.train_of(experiment.run(run)).steps)

    def analyze(model: Path) -> list[str]:
        # whoever has measured the costs too keeps them
        quick = [] if RunDir(model.parent).attention.is_file() else ["--ranks-only"]
        return ["analyze", "--model", str(model), "--data", EXPERIMENT, *quick]

    grown = folder["inheritune"]
    grow = ["grow", EXPERIMENT, "--run", "inheritune", "--seed", str(seed), *alone]
    figures = [[verb, EXPERIMENT, "--seed", str(seed)] for verb in ("figure", "table", "report")]
    prepare = Step(
        "prepare: the Python standard library's text becomes tokens", [["prepare", EXPERIMENT]], 15
    )
    title = f"train the reference: an 8-layer GPT-2 from random, ZeRO 3 on {procs} rank(s)"
    reference = train(title, "reference", 90, ranks)
    inherited = [
        Step(
            "analyze the reference's attention: which layers are lazy?",
            [analyze(folder["reference"].final)],
            8,
        ),
        Step(
            "inherit its first layers, train, and grow until parity or the last stage",
            [grow],
            45,
            grown.stage(1),
            experiment.train.steps,
        ),
    ]
    random = train("half the layers from random, for as many steps", "random", 30)
    random_longer = train(
        "half the layers from random, with the reference's steps added", "random_longer", 55
    )
    end = Step("what came out: attention, figures, table, report", [analyze(grown.path), *figures], 12)
    if not parallel:
        steps = [prepare, reference, *inherited, random, random_longer, end]
        return [[[step]] for step in steps]
    if procs == 1:
        return [[[prepare]], [[reference, *inherited], [random_longer, random]], [[end]]]
    return [[[prepare]], [[reference]], [[*inherited, random], [random_longer]], [[end]]]


def is_on_cpu() -> bool:
    """Return whether training runs on CPUs here."""
    from inheritune.runtime.dist import get_device

    return get_device().type == "cpu"


def choose_procs() -> int:
    """Return the ranks of the reference where none are asked for: one on CPUs, two on two GPUs or more."""
    import torch

    return 1 if is_on_cpu() or torch.cuda.device_count() == 1 else 2


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_once() -> None:
    """Import what the verbs need before they are forked."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import inheritune.analysis.attention
    import inheritune.cluster.grow
    import inheritune.data.prepare
    import inheritune.paper.figures
    import inheritune.paper.report
    import inheritune.paper.tables
    import inheritune.training.loop  # noqa: F401


class Verb:
    """A verb that runs, as a fork of this process on CPUs, else as a Python of its own."""

    def __init__(self, words: list[str], log: Path, fork: bool, threads: int | None = None):
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
                be_verb(words, out.fileno(), threads)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self._python is not None:
            return self._python.poll()
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None


def be_verb(words: list[str], out: int, threads: int | None) -> None:
    """Be `python -m inheritune WORDS` that prints to the file `out` and computes on so many threads, unless
    the environment names another number. Never returns."""
    code = 1
    try:
        if threads and "OMP_NUM_THREADS" not in os.environ:
            import torch

            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # for the ranks that the verb starts
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


class StepStopped(Exception):
    """A step has failed, or has been asked to stop."""


def run_lane(lane: list[Step], log: Path, fork: bool, threads: int | None) -> Iterator[tuple[float, str]]:
    """Run the steps of a lane one after another. Yields, again and again, the share that is done and the line
    of a step that has just ended, else an empty one.

    Raises:
        StepStopped: a verb has another exit code than 0, or a signal came.
    """
    before = 0
    for step in lane:
        begun = time.monotonic()
        for words in step.verbs:
            verb = Verb(words, log, fork, threads)
            running.append(verb)
            while (code := verb.poll()) is None:
                yield before + step.share_s * measure_progress(step), ""
            running.remove(verb)
            if code or exit_codes:
                end_step(step, code, log)
                raise StepStopped
        before += step.share_s
        yield before, f"{step.title} ({time.monotonic() - begun:.0f} s)"


def end_step(step: Step, code: int, log: Path) -> None:
    """Say how a step ended that did not finish, and after the first failure ask the other lanes' verbs to
    save and stop; these say nothing."""
    if failed:
        return
    tqdm.write("\n".join(log.read_text().splitlines()[-SHOWN_LINES:]), file=sys.stderr)
    tqdm.write(f"'{step.title}' has not finished; the same command continues", file=sys.stderr)
    if not exit_codes:
        failed.append(step)
        exit_codes.append(code if code > 0 else 128 - code)
        for verb in running:
            os.kill(verb.pid, signal.SIGTERM)


def run_phase(phase: list[list[Step]], log: Path, fork: bool, bar: tqdm) -> Iterator[str]:
    """Run the lanes of a phase at the same time, and move the bar. Yields the lines of the steps that end.

    Raises:
        StepStopped: as a lane does, once no verb runs.
    """
    begun, whole = bar.n, measure_phase(phase)
    threads = max(1, count_cores() // len(phase)) if len(phase) > 1 else None
    logs = [log, *(log.with_stem(f"{log.stem}_{number}") for number in range(2, len(phase) + 1))]
    working = {number: run_lane(lane, logs[number], fork, threads) for number, lane in enumerate(phase)}
    done, shares = [0.0] * len(phase), sum(step.share_s for lane in phase for step in lane)
    stopped: StepStopped | None = None
    while working:
        for number, lane in list(working.items()):
            try:
                done[number], line = next(lane)
            except StopIteration:
                del working[number]
            except StepStopped as error:
                stopped = error
                del working[number]
            else:
                if line:
                    yield line
        bar.update(begun + whole * sum(done) / shares - bar.n)
        time.sleep(0.2)
    if stopped:
        raise stopped


def measure_phase(phase: list[list[Step]]) -> int:
    """Return the seconds that a phase takes: those of its longest lane."""
    return max(sum(step.share_s for step in lane) for lane in phase)


def measure_progress(step: Step) -> float:
    """Return how much of a step is done, 0 to 1, by the record of its run."""
    if step.record is None or not step.record.metrics.is_file():
        return 0.0
    last = max((row["step"] for row in read_jsonl(step.record.metrics)), default=0)
    return min(1.0, last / step.steps)


running: list[Verb] = []
failed: list[Step] = []
exit_codes: list[int] = []
"""What the script shall return: of the first step that failed, or of the signals that asked to stop."""


def pass_on(number: int, _) -> None:
    """Pass a signal on to the verb, which saves. A terminal's Ctrl-C has reached it already."""
    exit_codes.append(128 + number)
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


def run(seed: str, procs: str = "") -> int:
    """Run all steps for the variables SEED and PROCS. Raises UserError if one is no number."""
    return main(read_variable("SEED", seed), read_variable("PROCS", procs) if procs else choose_procs())


def main(seed: int, procs: int) -> int:
    """Run all steps. Returns the exit code."""
    started = time.monotonic()
    adopt_folders()  # as the verbs do
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    fork = is_on_cpu()
    phases = list_phases(seed, procs, parallel=fork and count_cores() > 1)
    folder = RunDir.of(load_experiment(EXPERIMENT), "", seed).path
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "quickstart.log"
    print(f"What the steps print is in {show_path(log)}", flush=True)
    if fork:
        import_once()
    tqdm.monitor_interval = 0  # no thread may run while the verbs are forked
    form = "{percentage:3.0f}% |{bar:40}| {elapsed}, {remaining} left"
    total, n_steps = sum(map(measure_phase, phases)), sum(len(lane) for phase in phases for lane in phase)
    with tqdm(total=total, bar_format=form, disable=None, leave=False) as bar:
        lines = (line for phase in phases for line in run_phase(phase, log, fork, bar))
        try:
            for number, line in enumerate(lines, 1):
                tqdm.write(f"{number}/{n_steps} {line}")
                sys.stdout.flush()
        except StepStopped:
            return exit_codes[0]
    print()
    print_result(folder)
    print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {show_path(folder)}")
    print(f"To look at it, open {show_path(folder / 'report.html')} in a browser")
    return 0


if __name__ == "__main__":
    run_script(run, *sys.argv[1:])
