"""The table, the plots and what is still missing of recipes/evidence.sh.

    python recipes/evidence/summary.py missing EXPERIMENT "core|all|RUN ..." SEED ...
    python recipes/evidence/summary.py summary EXPERIMENT SEED ...
    python recipes/evidence/summary.py summary EXPERIMENT           from seeds/ alone

Each seed's numbers are read from its finished runs into seeds/seedN.json. Everything else is made from those
files, so that seeds of several sittings count together.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import hypotheses
import reference_layers
from evidence_plots import plot_attention, plot_curves, plot_worth
from evidence_rows import (
    HEADERS,
    add_p_values,
    compare_starts,
    format_difference,
    list_depths,
    make_cells,
    make_rows,
)
from evidence_seeds import (
    CORE,
    check_seeds,
    collect_seed,
    find_model,
    list_measured,
    locate_results,
    make_run_key,
    merge_records,
)
from seed_files import read_seeds

from inheritune.analysis.thresholds import has_papers_length
from inheritune.cli.scripts import read_variable, run_script
from inheritune.cluster.planner import find_unfinished_source
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir, find_weights, get_results_dir
from inheritune.paper.table_files import write_table

LEVEL = 0.05
"""A p-value below this is counted."""


def select_runs(experiment: Experiment, arms: str) -> list[str]:
    """Return the runs meant by `arms`: core, all, or names, with the reference and the runs they start from.

    Raises UserError for an unknown run."""
    if arms == "all":
        return list(experiment.runs)
    wanted = ["reference", *(CORE if arms == "core" else arms.split())]
    for name in wanted:  # the list grows meanwhile
        wanted += [source for source, _ in experiment.run(name).sources() if source not in wanted]
    return [name for name in experiment.runs if name in wanted]


def list_missing(experiment: Experiment, path: str, arms: str, seeds: list[int]) -> list[str]:
    """Return what can be done now, the longest first: `SEED VERB ...`, a line each.

    Raises UserError, before anything is trained, as `check_seeds` does."""
    check_seeds(experiment, path, seeds)
    found: list[tuple[int, str]] = []
    for seed in seeds:
        for name in select_runs(experiment, arms):
            spec = experiment.run(name)
            cost = experiment.layers_of(spec) * experiment.train_of(spec).steps
            if not RunDir.of(experiment, name, seed).is_done():
                if find_unfinished_source(experiment, spec, seed) is None:
                    found.append((cost, f"{seed} {'grow' if spec.grow else 'train'} {path} --run {name}"))
                continue
            for weights in list_measured(experiment, name):
                rows = get_results_dir(find_weights(experiment, weights, seed)).read_attention()
                if not has_papers_length(rows):
                    # what layers cost is measured of the reference, at its end
                    only = "" if weights == "reference" else " --ranks-only"
                    found.append((0, f"{seed} analyze --model {weights} --data {path}{only}"))
    return [line for _, line in sorted(found, key=lambda one: -one[0])]


def is_complete(record: dict) -> bool:
    """Return whether a seed has the core models, with the attention of the two that are drawn."""
    models = {run: find_model(record, run) or find_model(record, run, 1) for run in CORE}
    return all(models.values()) and all(models[run].get("attention") for run in ("reference", "inheritune"))


def read_records(experiment: Experiment, folder: Path) -> tuple[list[dict], list[dict]]:
    """Return (the complete records in `folder`, the others), with models of the current experiment only."""
    keys = {name: make_run_key(run) for name, run in experiment.runs.items()}
    records = read_seeds(folder, experiment.rehearsal)
    for record in records:
        record["models"] = [model for model in record["models"] if model["key"] == keys.get(model["run"])]
    complete = [record for record in records if is_complete(record)]
    return complete, [record for record in records if not is_complete(record)]


def format_command(experiment: Experiment, path: str, records: list[dict], runs: set[str]) -> str:
    """Return the command that makes the reported numbers, those of `runs`."""
    shown = [run for run in experiment.runs if run in runs]
    arms = {CORE: "", tuple(experiment.runs): "ARMS=all "}.get(tuple(shown), f'ARMS="{" ".join(shown)}" ')
    seeds = " ".join(str(record["seed"]) for record in records)
    small = "REHEARSE=1 " if experiment.rehearsal else ""
    return f'{small}SCALE={Path(path).stem} {arms}SEEDS="{seeds}" bash recipes/evidence.sh'


def describe_machines(made_by: list[dict]) -> str:
    """Return the machines, versions and commits with which the seeds were made."""
    machines, pythons = ({one[key] for one in made_by} for key in ("machine", "python"))
    versions = {f"{name} {number}" for one in made_by for name, number in one["versions"].items()}
    commits = set()
    for commit in (str(one["git_commit"]) for one in made_by):
        commits.add(commit[:12] + (" with changes" if commit.endswith("+changes") else ""))
    return (
        f"{', '.join(sorted(machines))}; Python {', '.join(sorted(pythons))}, {', '.join(sorted(versions))}; "
        f"commit {', '.join(sorted(commits))}"
    )


def make_notes(
    experiment: Experiment, records: list[dict], rows: list[dict], gaps: dict, tested: list[dict], origin: str
) -> list[str]:
    """Return the notes below the table. `gaps` are those of `compare_starts`, `tested` what `add_p_values`
    returns, `origin` says how the numbers were made."""
    seeds = ", ".join(str(record["seed"]) for record in records)
    n_windows = records[0]["models"][0]["loss"]["n"]
    tokens = experiment.train.eval_every * experiment.train.batch_tokens / 1e6
    notes = [
        f"Seeds {seeds}. Intervals: 95%, Student's t over seeds; differences are paired by seed; "
        f"{n_windows} validation windows. Tokens are read off curves with a point every {tokens:.2f}M."
    ]
    if any(row["stage"] == "as grown" for row in rows):
        notes.append(
            "A stage after the first has only the seeds whose stage before did not reach parity; "
            "tokens and FLOPs count all stages, steps are those of one."
        )
    if tested:
        below, left = (sum(one[key] < LEVEL for one in tested) for key in ("p", "p_holm"))
        notes.append(
            f"p: paired t over seeds; corrected: by Holm, for the {len(tested)} comparisons here and in the "
            f"next note, each counted once. {below} are below {LEVEL}, {left} after the correction. Step 0 "
            f"is the loss of the start before its first step, less the reference's last: for a cut, what it "
            f"costs."
        )
    labels = {row["run"]: row["label"] for row in reversed(rows)}
    others = "; ".join(
        f"{labels[run]} {format_difference(gaps[run])}" for run in reversed(labels) if run in gaps
    )
    notes.append(f"Inheritune, stage 1, less others of its size and the reference trained on: {others}.")
    if lacking := [row.label for row in experiment.paper if row.run not in labels]:
        notes.append(f"Not run: {'; '.join(lacking)}.")
    return [*notes, origin]


def judge_layers(experiment: Experiment, path: str, folder: Path, records: list[dict]) -> list[str]:
    """Write what the reference's layers are like in the seeds that have it, and return the sentences on the
    hypotheses; nothing for an experiment without hypotheses."""
    measured = reference_layers.select_measured(records) if experiment.name == hypotheses.EXPERIMENT else []
    if not measured:
        return []
    measured.sort(key=lambda record: record["seed"])
    origin = describe_machines([one for record in measured for one in record["made_by"]])
    command = format_command(experiment, path, measured, {"reference"})
    return reference_layers.write_layers(folder, measured, f"{origin}; {command}")


def summarize(experiment: Experiment, path: str, seeds: list[int]) -> None:
    """Collect `seeds`, and write table and plots of all seeds in the folder of results.

    Where no seed is complete, only what their references say of the hypotheses. Raises UserError if there is
    none of that either."""
    folder = locate_results(experiment, path)
    check_seeds(experiment, path, seeds)
    now = {}
    for seed in seeds:
        file, record = folder / "seeds" / f"seed{seed}.json", collect_seed(experiment, seed)
        now[file] = merge_records(read_json(file), record) if file.is_file() else record
    read_seeds(folder, experiment.rehearsal, now)  # refused before they are written
    for file, record in now.items():
        write_json(file, record)
    records, partial = read_records(experiment, folder)
    judged = judge_layers(experiment, path, folder, [*records, *partial])
    if not records:
        lacking = (
            f"no seed has all of {', '.join(CORE)} and their attention, so there is no table of the runs"
        )
        if not judged:
            raise UserError(f"{lacking}: run recipes/evidence.sh")
        print(f"{lacking} yet; the reference's layers: {folder / 'layers.md'}")
        return
    rows = make_rows(records, experiment.runs)
    plot_curves(records, rows, folder / "curves.png")
    plot_attention(records, folder / "attention.png")
    worth = plot_worth(records, folder / "rank_worth.png")
    made_by = [one for record in records for one in record["made_by"]]
    command = format_command(experiment, path, records, {row["run"] for row in rows})
    gaps = compare_starts(records)
    origin = f"{describe_machines(made_by)}; {command}"
    notes = make_notes(experiment, records, rows, gaps, add_p_values(rows, gaps), origin)
    notes = [*judged, *notes]
    if partial:
        seeds_left = ", ".join(str(record["seed"]) for record in partial)
        notes.append(f"Not counted: seeds {seeds_left}, which lack a core run or its attention.")
    title = f"{'REHEARSAL, not a result. ' if experiment.rehearsal else ''}{experiment.about}"
    cells = [make_cells(row) for row in rows]
    flat = [dict(zip(HEADERS, row, strict=True)) for row in cells]
    write_table(folder / "table", title, list(HEADERS), cells, notes, flat)
    evidence = {
        "rehearsal": experiment.rehearsal,
        "seeds": [record["seed"] for record in records],
        "text": records[0]["text"],
        "command": command,
        "made_by": made_by,
        "rows": rows,
        "beside_inheritune": gaps,
        "depths": list_depths(records),
        "rank_worth": worth,
        "hypotheses": judged,
    }
    write_json(folder / "evidence.json", evidence)
    print(f"table and plots: {folder}")


def main(verb: str = "", path: str = "", *rest: str) -> None:
    """Run `missing` or `summary`. Raises UserError for another verb and for seeds that are no numbers.

    `check` raises what `missing` does for unknown arms, without prepared text."""
    arms, seeds = (rest[:1], rest[1:]) if verb in ("check", "missing") else ((), rest)
    if verb not in ("check", "missing", "summary") or not path or (verb != "summary" and not arms):
        raise UserError(
            "summary.py takes missing EXPERIMENT ARMS SEED ..., summary EXPERIMENT SEED ... or check "
            "EXPERIMENT ARMS"
        )
    experiment = load_experiment(path)
    if verb == "check":
        select_runs(experiment, arms[0])
        return
    numbers = [read_variable("SEED", seed) for seed in seeds]
    if verb == "missing":
        print("\n".join(list_missing(experiment, path, arms[0], numbers)))
    else:
        summarize(experiment, path, numbers)


if __name__ == "__main__":
    run_script(main, *sys.argv[1:])
