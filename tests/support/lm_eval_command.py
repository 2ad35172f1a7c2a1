"""lm-eval's own command, which our scores are compared with, in the tests and the benchmarks."""

import json
import sys
from pathlib import Path


def lm_eval_command(model: Path, names: list[str], tasks: Path, out: Path, *more) -> list[str]:
    """The command that scores the checkpoint `model` on the tasks `names`, defined in the folder `tasks`,
    into `out`."""
    program = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
    ]
    where = ["--tasks", ",".join(names), "--include_path", str(tasks), "--output_path", str(out)]
    return [*program, *where, *map(str, more)]


def lm_eval_results(out: Path) -> dict:
    """What the command has left in `out`."""
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text(encoding="utf-8"))
