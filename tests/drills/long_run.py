"""A long run of a tiny model: do memory, open files, the time of a step or the record creep?

    python tests/drills/long_run.py [--steps 5000] [--ranks 2] [--out tests/long_run]

Trains through the verb and looks at its processes from outside, once a second. What is reported leaves out
the first fifth of the steps, in which caches fill. Memory counts as flat where the 95% interval of its slope,
over the means of twenty stretches, holds zero or ends below 1 MB in a thousand steps."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.extend(str(Path(__file__).resolve().parents[2] / place) for place in ("", "tests", "tests/support"))
from conftest import REPOSITORY, write_lone_run
from written import markdown

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_jsonl
from inheritune.files.rundir import RunDir

STRETCHES = 20


def watch(path: str, ranks: int, run: RunDir) -> list[dict]:
    """Train, looking at the ranks once a second.  -> [{step, rss_mb, files, threads}], each the sum over the
    ranks"""
    words = [sys.executable, "-m", "inheritune", "train", path, "--run", "reference", "--procs", str(ranks)]
    process, looks = subprocess.Popen(words, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}), []
    while process.poll() is None:
        time.sleep(1)
        row = next((row for row in reversed(read_jsonl(run.metrics)) if "loss" in row), None)
        try:
            at_work = psutil.Process(process.pid)
            at_work = at_work.children() or [at_work]
            facts = [(p.memory_info().rss / 1e6, p.num_fds(), p.num_threads()) for p in at_work]
        except psutil.Error:  # it has just ended
            continue
        if row and len(facts) == ranks:
            looks.append(
                dict(zip(("rss_mb", "files", "threads"), map(sum, zip(*facts, strict=True)), strict=True))
            )
            looks[-1]["step"] = row["step"]
    if process.returncode:
        raise SystemExit(process.returncode)
    return looks


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """(slope in a thousand steps, ends of its 95% interval) over the means of STRETCHES of equal length:
    neighbours in time are alike, and single looks would make the interval too narrow."""
    from scipy import stats

    cuts = [part for part in np.array_split(np.arange(len(steps)), STRETCHES) if len(part)]
    x, y = (np.array([a[part].mean() for part in cuts]) for a in (steps / 1000, values))
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr
    return fit.slope, fit.slope - half, fit.slope + half


def report(looks: list[dict], run: RunDir, ranks: int, out: Path) -> str:
    """Write the numbers and the plot; the table."""
    rows = read_jsonl(run.metrics)
    losses, last = [row for row in rows if "loss" in row], rows[-1]["step"]
    first, facts = last // 5, []
    series = {
        "memory of all ranks (MB)": ([one["step"] for one in looks], [one["rss_mb"] for one in looks]),
        "open files of all ranks": ([one["step"] for one in looks], [one["files"] for one in looks]),
        "time of a step (ms)": ([row["step"] for row in losses], [1000 * row["step_s"] for row in losses]),
    }
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axis, (name, (steps, values)) in zip(figure.subplots(1, 3), series.items(), strict=True):
        steps, values = np.array(steps), np.array(values, float)
        axis.plot(steps, values, ".", markersize=2)
        axis.axvspan(0, first, alpha=0.15, color="gray", label="left out", linewidth=0)
        axis.set(xlabel="step", title=name, ylim=(0, 1.15 * np.percentile(values, 99)))
        late = steps >= first
        per_thousand, low, high = slope(steps[late], values[late])
        facts.append(
            {
                "what": name,
                "median": float(np.median(values[late])),
                "slope": per_thousand,
                "low": low,
                "high": high,
            }
        )
    figure.savefig(out / "long_run.png", dpi=100)
    sizes = {"metrics.jsonl": run.metrics.stat().st_size, "train.log": run.log.stat().st_size}
    result = {
        "steps": last,
        "ranks": ranks,
        "python": platform.python_version(),
        "looks": len(looks),
        "series": facts,
        "rows": len(rows),
        "bytes": sizes,
        "checkpoints": run.complete_checkpoints(),
    }
    (out / "long_run.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = [
        [f["what"], f"{f['median']:.1f}", f"{f['slope']:+.2f} ({f['low']:+.2f} to {f['high']:+.2f})"]
        for f in facts
    ]
    table += [[f"bytes of {name}, per step", f"{size / last:.1f}", ""] for name, size in sizes.items()]
    return markdown(
        [f"{last} steps, {ranks} rank(s)", "median", "change in 1,000 steps (95% interval)"], table
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).with_name("long_run")))
    options, place = parser.parse_args(), tempfile.TemporaryDirectory(prefix="long_run_")
    folder = Path(place.name)
    os.environ["INHERITUNE_ROOT"] = place.name
    Path(options.out).mkdir(parents=True, exist_ok=True)
    settings = {"train_micro_batch_size_per_gpu": 10, "zero_optimization": {"stage": 1}}
    # a validation, a checkpoint and their rows again and again, as in a run of weeks
    path = write_lone_run(
        folder,
        settings,
        steps=options.steps,
        eval_every=options.steps // 50,
        checkpoint_every=options.steps // 25,
        keep_last=2,
        log_every=10,
    )
    run = RunDir.of(load_experiment(path), "reference")
    print(report(watch(path, options.ranks, run), run, options.ranks, Path(options.out)))


if __name__ == "__main__":
    main()
