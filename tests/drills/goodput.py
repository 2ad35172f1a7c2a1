"""Goodput: the share of a run's time that goes into steps which count, where it is preempted every two hours.

    python tests/drills/goodput.py [--every STEPS] [--compile] [--out tests/long_run]

A tiny run is asked to stop (SIGUSR1) each time it has done as many steps as the paper's XL does in two hours
by `plan`, and is started again at once: on one rank, then on two (a resize). Its starts say themselves what
they took, by part. With these parts, and the XL's checkpoint read and written at DISK_RATE bytes a second,
arithmetic gives the goodput of the XL."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.extend(str(Path(__file__).resolve().parents[2] / place) for place in ("", "tests", "tests/support"))
from conftest import REPOSITORY, last_step, write_lone_run
from written import markdown

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.rundir import RunDir
from inheritune.planning.plan import plan_experiment
from inheritune.planning.saving import DISK_RATE

PERIOD = 2 * 3600
# parts that grow with the model; the rest is as long as here
BY_BYTES = ("hashes of checkpoints", "checkpoint")
PASSES = ("hashes of the checkpoint", "reading it", "writing it")
XL = "gpt2_xl_owt"
RANKS = (1, 1, 2)  # of each start


def train(path: str, run: RunDir, every: int) -> float:
    """Train to the end, asked to stop after every `every` steps; the seconds of all starts together."""
    begun, goal = time.time(), every
    for ranks in RANKS:
        words = [
            sys.executable,
            "-m",
            "inheritune",
            "train",
            path,
            "--run",
            "reference",
            "--procs",
            str(ranks),
        ]
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.1)
            if goal < every * len(RANKS) and last_step(run) >= goal:
                process.send_signal(signal.SIGUSR1)
                goal += every
        if process.returncode:
            raise SystemExit(process.returncode)
    assert run.is_done()
    return time.time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile of the blocks, again at every start"
    )
    parser.add_argument("--out", default=str(Path(__file__).with_name("long_run")))
    options, place = parser.parse_args(), tempfile.TemporaryDirectory(prefix="goodput_")
    folder = Path(place.name)
    os.environ["INHERITUNE_ROOT"] = place.name
    xl = plan_experiment(load_experiment(XL), "reference")[0]
    xl_step = 3600 * xl["hours"] / xl["steps"]
    every = options.every or int(PERIOD / xl_step)
    steps = every * len(RANKS)
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    settings["inheritune"] = {"compile": options.compile}
    path = write_lone_run(
        folder,
        settings,
        {"layers": 1, "width": 16},
        steps=steps,
        batch_tokens=64,
        eval_every=steps,
        checkpoint_every=steps,
        log_every=100,
    )
    run = RunDir.of(load_experiment(path), "reference")
    wall = train(path, run, every)

    rows, starts = (
        [row for row in read_jsonl(run.metrics) if "loss" in row],
        read_json(run.provenance)["starts"],
    )
    counted = sum(
        row["step_s"] * (row["step"] - before)
        for row, before in zip(rows, [0, *(r["step"] for r in rows)], strict=False)
    )
    counted -= sum(start["start_s"]["first step"] for start in starts)  # these compile
    restarts = [start["start_s"] for start in starts[1:]]
    saves = [
        float(s) for s in re.findall(r"checkpoint of step \d+ written in ([0-9.]+) s", run.log.read_text())
    ]
    fixed = max(sum(seconds for part, seconds in parts.items() if part not in BY_BYTES) for parts in restarts)
    by_bytes = dict.fromkeys(PASSES, xl["checkpoint"] / DISK_RATE)
    result = {
        "every": every,
        "compiled": options.compile,
        "ranks": RANKS,
        "seconds": wall,
        "seconds_that_count": counted,
        "goodput": counted / wall,
        "restarts": restarts,
        "save_s": median(saves),
        "xl": {"step_s": xl_step, "gpus": xl["gpus"], "fixed_s": fixed, **by_bytes},
        "xl_goodput": PERIOD / (PERIOD + fixed + sum(by_bytes.values())),
    }
    Path(options.out).mkdir(parents=True, exist_ok=True)
    (Path(options.out) / "goodput.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report(result))


def report(result: dict) -> str:
    """The restarts part by part, and the XL that pays the dearest of them every two hours, as Markdown."""
    restarts, xl = result["restarts"], result["xl"]
    kinds = [
        f"{now} rank(s)" + (f" after {old}" if now != old else "") for old, now in pairwise(result["ranks"])
    ]
    empty = [""] * len(kinds)
    table = [[f"restart: {part}", *(f"{parts[part]:.2f}" for parts in restarts), ""] for part in restarts[0]]
    table.append(["a restart", *(f"{sum(parts.values()):.1f}" for parts in restarts), ""])
    table.append(["the same but for the checkpoint, the dearest", *empty, f"{xl['fixed_s']:.1f}"])
    table += [[what, *empty, f"{xl[what]:.1f}"] for what in PASSES]
    between = result["seconds_that_count"] / len(result["ranks"])
    table.append(["saving", *[f"{result['save_s']:.2f}"] * len(kinds), ""])
    table.append(["steps between two preemptions", *[f"{between:.0f}"] * len(kinds), f"{PERIOD}"])
    table.append(["goodput", f"{result['goodput']:.1%}", *empty[1:], f"{result['xl_goodput']:.1%}"])
    how = (
        f"{result['every']} steps between preemptions, blocks {'' if result['compiled'] else 'not '}compiled"
    )
    return f"Seconds; {how}\n\n" + markdown(["", *kinds, f"XL on {xl['gpus']} GPUs, by arithmetic"], table)


if __name__ == "__main__":
    main()
