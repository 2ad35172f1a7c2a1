"""The drill: a grown run, from its documents to its export, killed again and again, must end as the unbroken
one did.

    python tests/drills/drill.py                       200 kills, more than an hour on two cores
    python tests/drills/drill.py --kills 12 --seed 7   a short form
    python tests/drills/drill.py --in-background       the struck trainings save in the background

Rounds: each does the whole chain (prepare, reference, stage 1, stage 2, a resized run, analyze, inherit,
export, table) in a folder of its own. Every step of the chain is struck at several points before it may
finish. A kill counts when the trace shows that the process was alive at the named point. Then the round's
files are compared with those of the unbroken chain."""

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.extend(str(Path(__file__).resolve().parents[2] / place) for place in ("", "tests", "tests/support"))
from conftest import REPOSITORY, experiment_dict, free_port, last_step, write_experiment
from drill_worker import POINTS
from tabulate import tabulate

from inheritune.cluster.verify import verify
from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir

EVERY = 3  # steps between checkpoints
RECORD = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1")
LAST_PASSAGE = {  # how often a point is passed before its step ends, at least
    "prepare: writing tokens": 4,
    "prepare: noting the progress": 3,
    "inherit: writing tensors": 12,
    "export: writing tensors": 12,
    "train: in a step": 3,
    "train: in validation": 2,
    "train: writing the start": 12,
    "train: writing final/": 12,
    "resize: reading the old states": 40,
}


def make(folder: Path, documents: Path, in_background: bool = False) -> str:
    """The experiment of one chain, its folder its root. Returns its path."""
    ds = folder / "zero3.json"
    folder.mkdir(parents=True)
    settings = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 3}}
    ds.write_text(json.dumps(settings | {"inheritune": {"background_saves": in_background}}))
    raw = experiment_dict()
    raw["data"] |= {
        "source": "files",
        "files": [str(documents)],
        "shard_tokens": 400_000,
        "tokenizer": "bpe:512",
    }
    raw["model"] |= {"vocab_size": 512}
    raw["train"] |= {
        "steps": 12,
        "clip": 0.5,
        "eval_every": 4,
        "checkpoint_every": EVERY,
        "keep_last": 2,
        "deepspeed": str(ds),
    }
    raw["runs"]["grown"]["grow"] |= {"margin": -9.0}  # never reached: both stages are trained
    raw["runs"]["resized"] = {"init": "random"}
    return write_experiment(folder, raw)


@dataclass
class Chain:
    """One run of the whole chain in `folder`; `kills` counts what has struck, by (point, signal, who)."""

    folder: Path
    path: str
    choose: random.Random
    kills: Counter = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)

    def start(self, words: list[str], ranks: int, strike: tuple | None = None) -> tuple[list[int], str, bool]:
        """Run a verb, as `ranks` ranks.  -> (exit codes, what was printed, whether it was struck)"""
        trace = self.folder / "trace"
        trace.unlink(missing_ok=True)
        program = [sys.executable, "-m", "inheritune"]
        if strike:
            program = [sys.executable, "tests/support/drill_worker.py", str(trace), *map(str, strike)]
        common = {**os.environ, "INHERITUNE_ROOT": str(self.folder), "OMP_NUM_THREADS": "1"}
        common |= {"INHERITUNE_LOCK_WAIT": "30"}
        if ranks > 1:
            common |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        log, processes, group = open(self.folder / "log", "wb"), [], 0  # noqa: SIM115
        for rank in range(ranks):
            env = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            processes.append(
                subprocess.Popen(
                    [*program, *words],
                    cwd=REPOSITORY,
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=group,
                )
            )
            group = group or processes[0].pid
        try:
            while any(process.poll() is None for process in processes):
                time.sleep(0.05)
                # as srun --kill-on-bad-exit does
                if any(process.poll() not in (None, 0) for process in processes):
                    deadline = time.monotonic() + 5
                    while time.monotonic() < deadline and any(
                        process.poll() is None for process in processes
                    ):
                        time.sleep(0.05)
                    for process in processes:
                        process.kill()
        finally:
            log.close()
            with suppress(ProcessLookupError):
                # workers of prepare that are left, and all of them if the drill is stopped
                os.killpg(group, signal.SIGKILL)
        return (
            [process.wait() for process in processes],
            (self.folder / "log").read_text(errors="replace"),
            trace.exists(),
        )

    def kill(self, words: list[str], ranks: int, point: str) -> None:
        """Start the verb and strike it at `point`, by a signal and on a rank drawn by lot."""
        sign = self.choose.choice(SIGNALS)
        who = self.choose.choice(["all", *map(str, range(ranks))]) if "reading the old" not in point else "0"
        if (
            POINTS[point][1] in ("write_json", "remove_path", "CheckpointWriter.add", "format_card")
            and who != "all"
        ):
            who = "0"  # only rank 0 writes
        n = self.choose.randint(1, LAST_PASSAGE.get(point, 1))
        codes, said, struck = self.start(words, ranks, (point, n, sign, who))
        if not struck:  # it was not at the point again, and went on to its end
            assert set(codes) == {0}, f"{point} was not reached: exit codes {codes}\n{said[-3000:]}"
            return
        # a signal that asks to stop may also come so late that the verb just ends
        expected = {0, -9, 1, 2} if sign == "SIGKILL" else {0, -signal.SIGTERM, -signal.SIGUSR1}
        assert set(codes) <= expected, f"{point} {sign} {who}: exit codes {codes}\n{said[-3000:]}"
        self.kills[point, sign, "all ranks" if who == "all" else "one rank"] += 1

    def finish(self, words: list[str], ranks: int) -> str:
        codes, said, _ = self.start(words, ranks)
        while set(codes) == {0} and " stopped at step " in said:
            codes, said, _ = self.start(words, ranks)
        assert set(codes) == {0}, f"{words}: exit codes {codes}\n{said[-3000:]}"
        return said

    def train(
        self, run: RunDir, words: list[str], points: list[str], ranks: int = 2, begin=lambda: None
    ) -> None:
        """Train to the end, struck at each of `points`; no start may lose more than one interval of
        checkpoints. A run that got to its end with points left to strike is begun anew, by `begin`."""
        words = ["train", self.path, *words]
        begin()
        # each is passed in every start but these: the weights at the start only in the first one, the last
        # ones only at the end
        place = {"train: writing the start": -1, "train: writing final/": 1, "train: before DONE": 2}
        for point in [*sorted(points, key=lambda point: place.get(point, 0)), None]:
            if point and run.is_done():
                shutil.rmtree(run.path)
                begin()
            reached = last_step(run)
            before = starts_of(run)
            self.kill(words, ranks, point) if point else self.finish(words, ranks)
            if len(now := starts_of(run)) > len(before):
                self.lost.append(max(0, reached - (now[len(before)]["resumed_at"] or 0)))

    def run(self, kills: bool, few: int | None = None) -> None:
        """The whole chain; with `kills`, every step of it struck at every point, or at `few` drawn by lot."""

        def points(verb: str, times: int = 1) -> list[str]:
            chosen = [point for point in POINTS if point.startswith(f"{verb}: ")] * times if kills else []
            self.choose.shuffle(chosen)
            return chosen[:few]

        def disturbed(words, at, marker) -> None:
            for point in at:
                if marker.exists():  # it got to its end, with points left to strike
                    shutil.rmtree(marker.parent)
                self.kill(words, 1, point)
            self.finish(words, 1)

        os.environ["INHERITUNE_ROOT"] = str(self.folder)
        experiment = load_experiment(self.path)
        disturbed(
            ["prepare", self.path, "--workers", "2"],
            points("prepare", 2),
            get_data_dir(experiment) / "manifest.json",
        )
        self.train(RunDir.of(experiment, "reference"), ["--run", "reference"], points("train"))
        for stage in (1, 2):
            self.train(
                RunDir.of(experiment, "grown").stage(stage),
                ["--run", "grown", "--stage", str(stage)],
                points("train"),
            )
        self.resize(RunDir.of(experiment, "resized"), points("resize", 2))
        final, cut, out = (
            str(RunDir.of(experiment, "reference").final),
            self.folder / "cut",
            self.folder / "out",
        )
        words = ["inherit", "--source", final, "--layers", "1:3", "--out", str(cut)]
        disturbed(words, points("inherit", 2), cut / "inherited.json")
        self.finish(["grow", self.path, "--run", "grown"], 1)
        words = ["export", str(RunDir.of(experiment, "grown").path), "--to", str(out)]
        disturbed(words, points("export", 2), out / "config.json")
        self.finish(
            ["analyze", "--model", final, "--data", self.path, "--length", "32", "--sequences", "8"], 1
        )
        self.finish(["table", self.path], 1)

    def resize(self, run: RunDir, points: list[str]) -> None:
        """Six steps on two ranks, then the rest on one."""
        words = ["--run", "resized"]

        def begin() -> None:
            codes, said, struck = self.start(
                ["train", self.path, *words], 2, ("train: in a step", 6, "SIGUSR1", "1")
            )
            assert codes == [0, 0] and struck and run.complete_checkpoints()[-1] == 6, said

        self.train(run, words, points, ranks=1, begin=begin)

    def outcome(self) -> dict:
        """All that must not depend on kills: weights, data, the record, the measures of attention."""
        os.environ["INHERITUNE_ROOT"] = str(self.folder)
        experiment = load_experiment(self.path)
        data, grown = get_data_dir(experiment), RunDir.of(experiment, "grown")
        found = {"data": {n: facts["xxh3"] for n, facts in hash_folder(data).items() if n.endswith(".bin")}}
        found["tokenizer"] = hash_folder(data / "tokenizer")
        runs = [
            RunDir.of(experiment, "reference"),
            RunDir.of(experiment, "resized"),
            grown.stage(1),
            grown.stage(2),
        ]
        for run in runs:
            name = run.path.relative_to(grown.path.parent).as_posix()
            found[f"{name} final"] = hash_folder(run.final)
            found[f"{name} record"] = [
                tuple(row.get(key) for key in RECORD) for row in read_jsonl(run.metrics)
            ]
            # a start that was asked to stop leaves a checkpoint of its own (after the last step too, if it
            # was asked there), so which ones are kept may differ, not how many
            found[f"{name} checkpoints"] = len(list(run.checkpoints.iterdir()))
            assert run.complete_checkpoints()[-1] >= 12 - EVERY, run.path
        found["decision"] = read_json(grown.done)
        found["attention"] = [r for r in read_jsonl(runs[0].attention) if r["kind"] != "header"]
        for folder in ("cut", "out"):
            found[folder] = {
                n: f for n, f in hash_folder(self.folder / folder).items() if n.endswith(".safetensors")
            }
        found["leftovers"] = sorted(path.name for path in self.folder.rglob(".*"))
        with redirect_stdout(io.StringIO()):
            verify(self.folder)
        return found


def starts_of(run: RunDir) -> list[dict]:
    """What each start of the run noted."""
    return read_json(run.provenance)["starts"] if run.provenance.is_file() else []


def write_documents(path: Path, seed: int = 0) -> None:
    """Some megabytes of the standard library as JSON lines, in an order of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = np.random.default_rng(seed).permutation(len(files))[:120]
    path.write_text("".join(json.dumps({"text": files[i].read_text(errors="ignore")}) + "\n" for i in chosen))


def drill(
    folder: Path, kills: int, seed: int, say=print, few: int | None = None, in_background: bool = False
) -> tuple[Counter, list[int]]:
    """Rounds until `kills` have struck, each point kills / 20 times.  -> (kills by (point, signal, who),
    steps lost per start)

    With `in_background` the trainings of the rounds save in the background, those of the unbroken chain do
    not. A start may then lose the steps since the save before the one that is being written.

    `say` hears of each round that ended well, with the kills up to there. Raises AssertionError where a
    round's outcome differs from the unbroken chain's."""
    documents = folder / "documents.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    write_documents(documents)
    unbroken = Chain(folder / "unbroken", make(folder / "unbroken", documents), random.Random(seed))
    unbroken.run(kills=False)
    expected, total, lost, number = unbroken.outcome(), Counter(), [], 0
    assert expected["leftovers"] == []
    while sum(total.values()) < kills or min(by_point(total).values()) < kills // 20:
        number += 1
        place = folder / f"round{number}"
        chain = Chain(place, make(place, documents, in_background), random.Random(f"{seed} {number}"))
        t0 = time.monotonic()
        chain.run(kills=True, few=few)
        found = chain.outcome()
        for what, value in expected.items():
            differs = f"seed {seed}, round {number}: {what} differs from the unbroken run's"
            assert found[what] == value, f"{differs}: {str(found[what])[:500]} instead of {str(value)[:500]}"
        total, lost = total + chain.kills, lost + chain.lost
        assert max(lost) <= EVERY * (1 + in_background), (
            f"seed {seed}, round {number}: {max(lost)} steps were lost"
        )
        shutil.rmtree(place)
        say(
            f"round {number}: {sum(chain.kills.values())} kills in {time.monotonic() - t0:.0f} s, the same "
            f"bits",
            total,
            lost,
        )
    return total, lost


def by_point(total: Counter) -> dict[str, int]:
    """Kills at each point, by any signal."""
    return {point: sum(n for (p, *_), n in total.items() if p == point) for point in POINTS}


def table(total: Counter) -> str:
    """Kills by point and signal, as Markdown."""
    columns = ("SIGKILL", "SIGTERM", "SIGUSR1")
    rows = []
    for point in POINTS:
        counts = [
            sum(n for (p, sign, _), n in total.items() if (p, sign) == (point, column)) for column in columns
        ]
        rows.append([point, *counts, sum(counts)])
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 5))])
    return tabulate(rows, headers=["moment", *columns, "all"], tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--in-background", action="store_true")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    ended = ""

    def say(round_ended: str, total: Counter, lost: list[int]) -> None:
        nonlocal ended
        print(round_ended, flush=True)
        ended = (
            f"\n{table(total)}\n\n{sum(total.values())} kills, all rounds ended with the bits of the "
            f"unbroken run; "
            f"steps lost at a restart: at most {max(lost)}; {EVERY} between checkpoints"
        )

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; of the rounds that had ended:"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            drill(Path(folder), chosen.kills, chosen.seed, say, in_background=chosen.in_background)
    finally:
        print(ended)  # of the rounds before a failure or an interruption too


if __name__ == "__main__":
    main()
