"""Prints the summary of tests/gpu.sh in Markdown: python tools/gpu_summary.py EXPERIMENT

The folder of the slices is $GPU_OUT."""

import json
import os
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from harness import describe, machine
from written import markdown

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.rundir import RunDir

HEADS = ["run", "ZeRO", "ranks", "ms/step", "tokens/s", "MFU", "peak GB", "last loss", "validation loss"]


def list_facts(run: RunDir) -> list:
    """Return a run's row: medians over all steps but the first three, the largest peak of a rank."""
    rows = [row for row in read_jsonl(run.metrics) if "loss" in row]
    steady, start = rows[3:], read_json(run.provenance)["starts"][-1]
    mfu = median(row["mfu"] for row in steady) if steady[0]["mfu"] else None
    return [
        run.path.name,
        start["deepspeed"]["zero_optimization"]["stage"],
        start["ranks"],
        f"{1000 * median(row['step_s'] for row in steady):.1f}",
        f"{median(row['tokens_per_s'] for row in steady):,.0f}",
        "" if mfu is None else f"{mfu:.1%}",
        max(row["peak_memory_gb"] for row in steady),
        f"{rows[-1]['loss']:.5f}",
        f"{read_json(run.results)['validation']['mean']:.4f}",
    ]


def compare_losses(one: RunDir, other: RunDir) -> str:
    """Return a line with the largest difference between the losses of two runs at the same step."""
    losses = [[row["loss"] for row in read_jsonl(run.metrics) if "loss" in row] for run in (one, other)]
    largest = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return (
        f"- {one.path.name} and {other.path.name}: the losses of {len(losses[0])} steps differ by at most "
        f"{largest:.1e}"
    )


def main(path: str) -> None:
    experiment, out, here = load_experiment(path), Path(os.environ["GPU_OUT"]), machine()
    runs = {name: RunDir.of(experiment, name) for name in experiment.runs}
    done = {name: run for name, run in runs.items() if run.is_done()}
    dry = os.environ.get("GPU_SH_ON_CPU") == "1"
    print("# tests/gpu.sh" + (": a trial on the CPU, not a result" if dry else ""))
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items() if number)
    print(
        f"\n{here['gpu'] or 'no GPU'}; {os.environ['GPUS']} rank(s); {here['cpu']}, {here['cores']} cores; "
        f"commit {here['commit']}"
    )
    print(f"\nPython {here['python']}, {versions}")
    slices = sorted(out.glob("*.done"), key=lambda file: file.stat().st_mtime)
    print(
        "\nSlices done: "
        + (", ".join(f"{file.stem} ({file.read_text().strip()})" for file in slices) or "none")
    )
    print("\n" + markdown(HEADS, [list_facts(run) for run in done.values()]) + "\n")
    for one, other in (("zero3", "zero1"), ("resumed", "zero3"), ("resized", "zero1")):
        if one in done and other in done:
            print(compare_losses(done[one], done[other]))
    if (out / "memory.done").is_file():
        print("\n```\n" + (out / "memory.log").read_text(encoding="utf-8").strip() + "\n```")
    for result in json.loads((out / "bench.json").read_text()) if (out / "bench.json").is_file() else ():
        print("\n" + describe(result))


if __name__ == "__main__":
    main(sys.argv[1])
