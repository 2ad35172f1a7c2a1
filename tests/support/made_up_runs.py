"""Made-up run folders of an experiment in their real form, for tests of what is shown of them."""

import json

import yaml

from inheritune.config.experiment import Experiment
from inheritune.files.json_files import write_json
from inheritune.files.rundir import RunDir
from inheritune.files.writing import write_text
from inheritune.runs.job import Job

RUNS = {
    "reference": {"init": "random"},
    "grown": {
        "init": {"inherit": {"source": "reference", "layers": "0:2"}},
        "grow": {"by": 1, "max_layers": 4},
    },
    "random": {"init": "random", "layers": 2, "compare": "reference"},
    "longer": {"init": "random", "layers": 2, "compare": "reference"},
}
"""Runs of `experiment_dict`."""
START = {
    "time": "2026-11-02T09:30:00+0000",
    "host": "gpu07",
    "machine": "x86_64, 64 cores",
    "ranks": 8,
    "slurm_job": "4711",
    "git_commit": "0123456789abcdef0123+changes",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    "device": "cuda:0",
    "gpu": "NVIDIA H100 80GB HBM3",
    "resumed_at": None,
}


def make_layers(n_layers: int, n_heads: int = 3, costs: bool = True, tokens: int = 12) -> list[dict]:
    """Rows of attention.jsonl: ranks that fall with depth, costs down to less than nothing, two maps."""
    rows = [{"kind": "header", "model": "final", "data": "d", "length": tokens, "sequences": 3, "loss": 4.0}]
    for layer in range(n_layers):
        ranks = [max(1.0, 9.0 / (layer + 1) + head) for head in range(n_heads)]
        rows.append(
            {
                "kind": "layer",
                "layer": layer,
                "rank": {"0.9": ranks},
                "max_rank": {"0.9": max(ranks)},
                "max_rank_std": {"0.9": 0.4},
                "avg_mass": {"0.9": 12.0 - layer},
                "avg_mass_std": {"0.9": 1.0},
                "lazy": layer == n_layers - 1,
            }
        )
        if costs:
            cost = {"block": 3.0 / (layer + 1) ** 3 - 0.06, "attn": None if layer else 0.1, "mlp": 0.05}
            rows[-1]["cost"] = cost
    causal = [[1 / (i + 1) if j <= i else 0.0 for j in range(tokens)] for i in range(tokens)]
    rows += [
        {"kind": "map", "layer": layer, "head": 1, "sequences": 3, "mean": causal}
        for layer in (0, n_layers - 1)
    ]
    return [*rows, {"kind": "summary", "reason": "inherit the first half"}]


def finish_run(
    experiment: Experiment, run: str, loss: float, stage: int | None = None, gap: float | None = None, **more
) -> RunDir:
    """A finished run, or a stage of a grown one; `gap`: its difference to the reference. `more` replaces
    results."""
    folder, spec = RunDir.of(experiment, run), experiment.run(run)
    folder = folder.stage(stage) if stage else folder
    train = experiment.train_of(spec)
    results = {
        "experiment": experiment.name,
        "rehearsal": experiment.rehearsal,
        "run": run,
        "stage": stage,
        "seed": 0,
        "layers": 4 if run == "reference" else 1 + (stage or 1),
        "parameters": 12345678,
        "steps": train.steps,
        "tokens": train.steps * train.batch_tokens,
        "train_flops": 1.5e15,
        "precision": "fp32",
        "data_fingerprint": "tiny",
        "validation": {"mean": loss, "low": loss - 0.01, "high": loss + 0.01, "n": 400},
    }
    if gap is not None:
        results["difference"] = {"mean": gap, "low": gap - 0.004, "high": gap + 0.004, "n": 400}
        results |= {"compared_with": "reference", "paper_rule": gap <= 0}
    write_json(folder.results, results | more)
    write_settings(experiment, run, folder, stage)
    write_record(folder, train.steps, loss, train.batch_tokens)
    write_json(folder.provenance, {"starts": [START]})
    write_json(folder.done, {"final": {}})
    return folder


def write_settings(
    experiment: Experiment, run: str, folder: RunDir, stage: int | None = None, seed: int = 0
) -> None:
    """experiment.yaml of a run: what was trained there."""
    job = Job(experiment, run, seed, stage)
    write_text(folder.experiment, yaml.safe_dump(job.resolved(job.settings), sort_keys=False))


def write_record(folder: RunDir, steps: int, loss: float, batch: int = 640) -> None:
    """metrics.jsonl: a curve down to `loss`, and a training row per step of 900 seconds."""
    rows: list[dict] = []
    for step in range(steps + 1):
        row = {"step": step, "tokens": step * batch}
        rows.append(row | {"val_loss": loss + 1 - step / steps})
        if step:
            rows.append(row | {"loss": loss + 1.1 - step / steps, "step_s": 900.0, "tokens_per_s": 100.0})
    write_text(folder.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def end_growth(experiment: Experiment, run: str, stage: int, layers: int, parity: bool, gap: float) -> None:
    """DONE of a grown run, which names `stage`."""
    difference = {"mean": gap, "low": gap - 0.004, "high": gap + 0.004, "n": 400}
    verdict = {"stage": stage, "layers": layers, "parity": parity, "margin": 0.01, "difference": difference}
    write_json(RunDir.of(experiment, run).done, verdict)


def write_attention(folder: RunDir, rows: list[dict]) -> None:
    """attention.jsonl of a finished run."""
    write_text(folder.attention, "".join(json.dumps(row) + "\n" for row in rows))
