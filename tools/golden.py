"""Writes what this repository computes, as hashes: python tools/golden.py [FILE]

The JSON file (tests/golden.json) has the hashes of the tokens, starts, final weights and records of a small
experiment at four pairs of ranks and ZeRO stage, and of what `plan --json`, the paper's tables and the job
scripts print. A change that must not alter numerics leaves the file as it is, on the same machine with the
same versions. Run it before and after.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import xxhash
import yaml

sys.path.append(str(Path(__file__).resolve().parents[1]))

from inheritune.config.jobs import load_jobs
from inheritune.config.paths import REPOSITORY
from inheritune.submit.request import KINDS, read_request
from inheritune.submit.sbatch import make_submission
from inheritune.submit.site import Site

GOLDEN = REPOSITORY / "tests" / "golden.json"
SHAPES = [(ranks, stage) for ranks in (1, 2) for stage in (0, 3)]
TIMES = ("step_s", "tokens_per_s", "mfu", "peak_memory_gb")

EXPERIMENT = {
    "data": {
        "name": "golden",
        "source": "embedded",
        "tokenizer": "bpe:400",
        "validation": {"fraction": 0.2},
        "max_tokens": 120_000,
        "shard_tokens": 40_000,
        "sequence_length": 32,
        "sampling": "random_windows",
    },
    "model": {"size": "gpt2_tiny", "layers": 4, "width": 32, "heads": 2, "positions": 32, "vocab_size": 448},
    "train": {
        "steps": 12,
        "batch_tokens": 640,
        "lr": 1.0e-3,
        "min_lr": 1.0e-4,
        "warmup_steps": 2,
        "precision": "fp32",
        "deepspeed": "ds.json",
        "eval_every": 4,
        "eval_windows": 8,
        "final_windows": 16,
        "log_every": 1,
        "checkpoint_every": 4,
    },
    "runs": {
        "reference": {"init": "random"},
        "random_2": {"init": "random", "layers": 2},
        "half": {"init": {"half_width": {"source": "reference"}}},
        "stacking": {"init": {"stack": {"source": "random_2", "layers": "0:2"}}},
        "distilled": {
            "init": "random",
            "layers": 2,
            "distil": {"teacher": "reference"},
            "compare": "reference",
        },
        "grown": {
            "init": {"inherit": {"source": "reference", "layers": "0:1"}},
            "grow": {"by": 1, "max_layers": 2, "margin": -9.0},  # never reached: both stages are trained
        },
    },
}


def hash_bytes(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def run_program(*words, **environment) -> str:
    """Run `python -m inheritune WORDS` and return what it printed."""
    words = [sys.executable, "-m", "inheritune", *map(str, words)]
    kept = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**os.environ, **kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} exited with code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def hash_weights(folder: Path) -> str:
    """Hash the tensors of a checkpoint's shards, its config and its tokenizer."""
    names = sorted(
        p
        for p in folder.iterdir()
        if p.suffix == ".safetensors" or p.name in ("config.json", "tokenizer.json")
    )
    return hash_bytes(b"".join(path.name.encode() + path.read_bytes() for path in names))


def hash_record(path: Path) -> str:
    """Hash a record without its times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return hash_bytes(json.dumps([{k: v for k, v in row.items() if k not in TIMES} for row in rows]).encode())


def hash_runs(ranks: int, stage: int, folder: Path) -> dict[str, str]:
    """Train every run of EXPERIMENT on `ranks` ranks at this ZeRO stage; return {file: hash}."""
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50000},
    }
    (folder / "ds.json").write_text(json.dumps(settings))
    raw = {**EXPERIMENT, "train": {**EXPERIMENT["train"], "deepspeed": str(folder / "ds.json")}}
    experiment = folder / "golden.yaml"
    experiment.write_text(yaml.safe_dump(raw, sort_keys=False))
    root = {"INHERITUNE_ROOT": str(folder)}
    run_program("prepare", experiment, "--workers", 1, **root)
    single = [name for name, run in raw["runs"].items() if "grow" not in run]
    run_program("train", experiment, "--run", ",".join(single), "--procs", ranks, **root)
    run_program("grow", experiment, "--run", "grown", "--procs", ranks, **root)
    found = {
        path.name: hash_bytes(path.read_bytes()) for path in sorted(folder.glob("data/golden-*/*_0*.bin"))
    }
    runs = folder / "runs" / "golden" / "seed0"
    for weights in sorted([*runs.rglob("final"), *runs.rglob("init"), *runs.glob("random_init_*")]):
        found[str(weights.relative_to(runs))] = hash_weights(weights)
    for record in sorted(set(runs.rglob("metrics.jsonl")) - set(runs.rglob("checkpoints/*/metrics.jsonl"))):
        found[str(record.relative_to(runs))] = hash_record(record)
    return found


def hash_plans() -> dict[str, str]:
    """Return {experiment: hash of `plan --json`} of the recipes."""
    names = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))
    return {name: hash_bytes(run_program("plan", name, "--json").encode()) for name in names}


def hash_tables(folder: Path) -> dict[str, str]:
    """Return {item: hash of the CSV} of the paper's tables, before anything was run."""
    items = yaml.safe_load((REPOSITORY / "recipes" / "paper" / "items.yaml").read_text())
    tables = [name for name, item in items.items() if isinstance(item, dict) and item.get("columns")]
    for name in tables:
        run_program("table", name, INHERITUNE_ROOT=str(folder))
    return {
        path.stem: hash_bytes(path.read_bytes()) for path in sorted(folder.glob("runs/paper/seed0/*.csv"))
    }


def hash_submissions() -> dict[str, str]:
    """Return {job: hash of the command that would submit it} for a site whose nodes have 8 GPUs."""
    values = {"SITE_GPUS_PER_NODE": "8", "SITE_CPUS_PER_GPU": "8", "SITE_MEM_PER_GPU": "57600M"}
    values |= {"SITE_TIME": "1440", "SITE_LEAD": "300", "SITE_REQUEUE": "yes", "INHERITUNE_ROOT": "/scratch"}
    site, found = Site(values, nodes="gpu*|8|64|512000|1-00:00:00|gpu:8"), {}
    for name, job in load_jobs().items():
        words = [] if job.experiment else ["NAME"] * len(KINDS[job.verb].words)
        submission = make_submission(read_request(name, words), site, {}, n_runs=5)
        line = submission.line(site).replace(str(REPOSITORY), "REPOSITORY")
        found[name] = hash_bytes(line.encode())
    return found


def main(target: Path = GOLDEN) -> None:
    found = {"machine": f"{platform.machine()}, Python {platform.python_version()}"}
    found |= {
        "versions": {
            name: version(name) for name in ("torch", "deepspeed", "transformers", "numpy", "tokenizers")
        }
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks, stage in SHAPES:
            where = folder / f"{ranks}_{stage}"
            where.mkdir()
            found[f"{ranks} rank(s), ZeRO {stage}"] = hash_runs(ranks, stage, where)
            shutil.rmtree(where)
            print(f"{ranks} rank(s), ZeRO {stage}: done", flush=True)
        found["plan --json"] = hash_plans()
        found["paper tables"] = hash_tables(folder / "tables")
        found["submissions"] = hash_submissions()
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    if len(sys.argv) > 2 or any(word.startswith("-") for word in sys.argv[1:]):
        raise SystemExit(f"usage: python tools/golden.py [FILE]\n\n{__doc__}")
    main(*map(Path, sys.argv[1:]))
