"""Train the probes of deep_probes.yaml and tabulate the attention of their layers.

    python recipes/evidence/probe.py [NAME ...]

Each probe is an experiment of its own, with a run `reference`, written to $INHERITUNE_ROOT/runs/deep_probes.
A finished probe is not trained again; one that was stopped resumes. The numbers of each stay in
deep_probes/NAME.json beside this file; deep_probes.md is the table of all that are there.
"""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from inheritune.analysis.thresholds import MAIN_THRESHOLD, NEAR_ONE
from inheritune.cli.scripts import run_script
from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError, suggest_name
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir, find_weights, get_results_dir
from inheritune.files.storage import find_root
from inheritune.files.writing import write_text

FILE = Path(__file__).parent / "deep_probes.yaml"
RESULTS = FILE.with_suffix("")
TABLE = FILE.with_suffix(".md")
SEED = 100
"""Seeds from 100 on choose a scale and are never reported as evidence."""
log = logging.getLogger(__name__)


def write_probe(name: str, raw: dict[str, Any]) -> Path:
    """Write the experiment of the probe `name` and return its path. Raises UserError for an unknown name."""
    if name not in raw["probes"]:
        raise UserError(f"no probe '{name}' in {FILE}; {suggest_name(name, raw['probes'])}")
    changes = raw["probes"][name]
    experiment = {**raw["base"], **{key: {**raw["base"][key], **value} for key, value in changes.items()}}
    if "size" in changes.get("model", {}):  # another family's size takes none of the base's numbers
        experiment["model"] = changes["model"]
    path = find_root() / "runs" / RESULTS.name / f"probe_{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(experiment, sort_keys=False))
    return path


def run_probe(name: str, path: Path) -> None:
    """Prepare, train and analyze a probe, whatever is missing, and write its numbers."""
    call = [sys.executable, "-m", "inheritune"]
    seed = ["--seed", str(SEED)]
    subprocess.run([*call, "prepare", str(path)], check=True)
    subprocess.run([*call, "train", str(path), "--run", "reference", *seed], check=True)
    experiment = load_experiment(str(path))
    steps = {step: f"reference@{step}" for step in experiment.run("reference").keep_at}
    steps[experiment.train.steps] = "reference"
    measured = {}
    for step, weights in steps.items():
        folder = get_results_dir(find_weights(experiment, weights, SEED))
        if not folder.read_attention():
            words = [] if weights == "reference" else ["--ranks-only"]
            subprocess.run([*call, "analyze", weights, str(path), *seed, *words], check=True)
        layers = [row for row in folder.read_attention() if row["kind"] == "layer"]
        measured[step] = {
            "max_rank": [layer["max_rank"][MAIN_THRESHOLD] for layer in layers],
            "avg_mass": [layer["avg_mass"][MAIN_THRESHOLD] for layer in layers],
            "uniform": sum(layer["uniform"] for layer in layers),
            "cost": [layer.get("cost", {}).get("block") for layer in layers],
            "little_use": len(folder.read_attention()[-1].get("little_use_layers", [])),
        }
    run = RunDir.of(experiment, "reference", SEED)
    provenance = read_json(run.provenance)["starts"][-1]
    facts = {
        "changes": yaml.safe_load(FILE.read_text())["probes"][name],
        "loss": run.read_results()["validation"]["mean"],
        "attention": measured,
        "made_by": {key: provenance[key] for key in ("git_commit", "python", "versions")},
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", facts)


def write_table(probes: dict[str, Any]) -> None:
    """Write the table of all probes: of each measured step, how far the attention has collapsed."""
    heads = ["probe", "step", "validation loss", f"layers with MaxRank < {NEAR_ONE}", "near uniform"]
    heads += ["lowest MaxRank", "highest AvgMass", "of little use"]
    rows = []
    for name in probes:
        file = RESULTS / f"{name}.json"
        facts = read_json(file) if file.is_file() else {"attention": {"not run": None}}
        for step, found in facts["attention"].items():
            rows.append([name, step, *(format_measured(facts, found) if found else [""] * 6)])
    table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    intro = f"# Probes\n\nMade by `python recipes/evidence/probe.py` from [{FILE.name}]({FILE.name}).\n\n"
    write_text(TABLE, f"{intro}{table}\n")


def format_measured(facts: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the cells of one measured step."""
    ranks = found["max_rank"]
    is_last = found["cost"][0] is not None  # costs are measured at the end
    return [
        f"{facts['loss']:.4f}" if is_last else "",
        f"{sum(rank < NEAR_ONE for rank in ranks)} of {len(ranks)}",
        f"{found['uniform']} of {len(ranks)}",
        f"{min(ranks):.2f}",
        f"{max(found['avg_mass']):.1f}",
        f"{found['little_use']} of {len(ranks)}" if is_last else "",
    ]


def main(*names: str) -> None:
    """Run the probes `names`, or all, and write the table."""
    raw = yaml.safe_load(FILE.read_text())
    for name in names or raw["probes"]:
        if not (RESULTS / f"{name}.json").is_file():
            log.info("probe %s", name)
            run_probe(name, write_probe(name, raw))
        write_table(raw["probes"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_script(main, *sys.argv[1:])
