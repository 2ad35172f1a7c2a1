"""Goodput: the share of a run's time that goes into steps which count, where it is preempted every two hours.

    python tests/goodput.py [--preemptions 3] [--every STEPS] [--out tests/long_run]

A tiny run is asked to stop (SIGUSR1) each time it has done as many steps as the paper's XL does in two hours by `plan`, and is
started again at once. Its starts say themselves what they took, by part. With these parts, and the XL's checkpoint read and
written at DISK bytes a second, arithmetic gives the goodput of the XL."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import REPOSITORY, last_step, write_lone_run
from written import markdown

from inheritune.config import load_experiment
from inheritune.planning import plan_experiment
from inheritune.rundir import RunDir, read_json, read_jsonl

PERIOD = 2 * 3600
DISK = 1e9  # bytes a second of a shared disk that many nodes use
BY_BYTES = ("hashes of checkpoints", "checkpoint")  # parts that grow with the model; the rest is as long as here
PASSES = ("hashes of the checkpoint", "reading it", "writing it")
XL = "gpt2_xl_owt"


def train(path: str, run: RunDir, every: int) -> float:
    """Train to the end, asked to stop after every `every` steps; the seconds of all starts together."""
    begun, goal = time.time(), every
    while not run.is_done():
        words = [sys.executable, "-m", "inheritune", "train", path, "--run", "reference"]
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.1)
            if last_step(run) >= goal:
                process.send_signal(signal.SIGUSR1)
                goal += every
        if process.returncode:
            raise SystemExit(process.returncode)
    return time.time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preemptions", type=int, default=3)
    parser.add_argument("--every", type=int)
    parser.add_argument("--out", default=str(Path(__file__).with_name("long_run")))
    options, folder = parser.parse_args(), Path(tempfile.mkdtemp(prefix="goodput_"))
    os.environ["INHERITUNE_ROOT"] = str(folder)
    xl = plan_experiment(load_experiment(XL), "reference")[0]
    xl_step = 3600 * xl["hours"] / xl["steps"]
    every = options.every or int(PERIOD / xl_step)
    steps = every * (options.preemptions + 1)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    path = write_lone_run(folder, settings, {"layers": 1, "width": 16}, steps=steps, batch_tokens=32, eval_every=steps,
                          checkpoint_every=steps, log_every=100)  # fmt: skip
    run = RunDir.of(load_experiment(path), "reference")
    wall = train(path, run, every)

    rows, starts = [row for row in read_jsonl(run.metrics) if "loss" in row], read_json(run.provenance)["starts"]
    counted = sum(
        row["step_s"] * (row["step"] - before) for row, before in zip(rows, [0, *(r["step"] for r in rows)], strict=False)
    )
    again = [start["start_s"] for start in starts[1:]]
    parts = {part: median(start[part] for start in again) for part in again[0]}
    saves = [float(s) for s in re.findall(r"checkpoint of step \d+ written in ([0-9.]+) s", run.log.read_text())]
    fixed = sum(seconds for part, seconds in parts.items() if part not in BY_BYTES)
    by_bytes = dict.fromkeys(PASSES, xl["checkpoint"] / DISK)
    lost = fixed + sum(by_bytes.values())
    result = {
        "every": every, "starts": len(starts), "seconds": wall, "seconds_that_count": counted, "goodput": counted / wall,
        "parts": parts, "save_s": median(saves), "xl": {"step_s": xl_step, "gpus": xl["gpus"], "fixed_s": fixed, **by_bytes},
        "xl_goodput": PERIOD / (PERIOD + lost),
    }  # fmt: skip
    Path(options.out).mkdir(parents=True, exist_ok=True)
    (Path(options.out) / "goodput.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = [
        [f"restart: {part}", f"{seconds:.2f}", f"{seconds:.1f}" if part not in BY_BYTES else ""]
        for part, seconds in parts.items()
    ]
    table += [[what, "", f"{seconds:.1f}"] for what, seconds in by_bytes.items()]
    table += [
        ["saving", f"{median(saves):.2f}", ""],
        ["between two preemptions", f"{(counted / len(starts)):.0f}", f"{PERIOD}"],
    ]
    table += [["goodput", f"{counted / wall:.1%}", f"{result['xl_goodput']:.1%}"]]
    print(
        markdown(
            [f"seconds ({every} steps between preemptions)", "measured here, a toy", f"XL on {xl['gpus']} GPUs, by arithmetic"],
            table,
        )
    )


if __name__ == "__main__":
    main()
