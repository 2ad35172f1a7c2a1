"""What recipes/claim.sh has still to run, and its verdict.

python recipes/claim/claim.py missing SEED        one thing a line, as `inheritune table ITEM --missing`
python recipes/claim/claim.py submit SEED ...     Slurm jobs for it
python recipes/claim/claim.py judge SEED ...      the comparisons of rule.py over the finished seeds
"""

import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "evidence"))
from design import NAME, choose_seeds, count_seeds
from evidence_rows import average_seeds, format_interval
from rule import COMPARISONS, FEW_LAZY, LAZY_SHARE, UNDECIDED, conclude

from inheritune.analysis.thresholds import LENGTH, SEQUENCES, has_papers_length
from inheritune.cli.scripts import run_script
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.values import ARGUMENTS
from inheritune.errors import UserError
from inheritune.files.json_files import write_json
from inheritune.files.rundir import RunDir, is_finished
from inheritune.paper.items import Column, Item, Panel, Row
from inheritune.paper.measured import find_folder
from inheritune.paper.prerequisites import list_missing, make_disk_check
from inheritune.paper.table_cells import Cell, measure_cell, refuse_mixture
from inheritune.paper.table_files import write_table
from inheritune.submit.paper_jobs import submit_missing

HEADS = ["comparison", "what it asks", "difference (95% interval)", "limit", "verdict"]


def make_item(experiment: Experiment) -> Item:
    """Return the runs of the claim, and the reference's attention, as a table and figure of the paper."""
    rows = [Row(label=row.label, run=f"{NAME}/{row.run}") for row in experiment.paper]
    panel = Panel(kind="max_rank", title="the reference", rows=rows[:1])
    loss = Column(label="validation loss", metric="validation")
    return Item(title=experiment.about, columns={"loss": loss}, rows=rows, panels=[panel])


def print_missing(seed: int) -> None:
    """Print what is missing of a seed, one thing a line."""
    experiment = load_experiment(NAME)
    item, experiments = make_item(experiment), {NAME: experiment}
    for step in list_missing(item, experiments, make_disk_check(item, experiments, seed)):
        print(step.line())


def collect_seed(experiment: Experiment, seed: int) -> dict | None:
    """Return {seed, cells: {run: its loss}, near_lazy} of a seed; None if it lacks a run.

    near_lazy: how many layers of the reference are near rank 1, None if that was not measured, or not on as
    much text as the paper's. Raises UserError if a folder holds another run than the experiment describes."""
    cells: dict[str, Cell] = {}
    for row in experiment.paper:
        folder = find_folder(experiment, Row(label=row.label, run=f"{NAME}/{row.run}"), seed)
        if folder is None:
            return None
        cells[row.run] = measure_cell(folder.read_results(), "validation")
    rows = RunDir.of(experiment, "reference", seed).read_attention()
    is_measured = has_papers_length(rows)
    near_lazy = len(rows[-1]["near_lazy_layers"]) if is_measured else None
    return {"seed": seed, "cells": cells, "near_lazy": near_lazy}


def list_left_out(experiment: Experiment, numbers: list[int]) -> list[int]:
    """Return the seeds whose runs are all finished, and that are not among `numbers`. Their results are not
    read, so that no fault in them stops the verdict over others."""
    folders = RunDir.of(experiment, "inheritune", 0).path.parent.parent.glob("seed*")
    seeds = sorted(int(name) for folder in folders if (name := folder.name.removeprefix("seed")).isdecimal())
    runs = [row.run for row in experiment.paper]
    others = (seed for seed in seeds if seed not in numbers)
    return [seed for seed in others if all(is_finished(experiment, run, seed) for run in runs)]


def compare_seeds(seeds: list[dict]) -> list[dict]:
    """Return for each comparison {name, other, gaps, mean, low, high, n, limit, verdict} over seeds."""
    found = []
    for one in COMPARISONS:
        gaps = [seed["cells"]["inheritune"].ours - seed["cells"][one.other].ours for seed in seeds]
        gap = average_seeds(gaps)
        facts = {"name": one.name, "asks": one.asks, "other": one.other, "limit": one.limit, "gaps": gaps}
        found.append(facts | gap | {"verdict": one.judge(gap["low"], gap["high"])})
    return found


def describe_lazy(experiment: Experiment, seeds: list[dict]) -> str:
    """Return how many layers of the references are near rank 1, and what that means for the outcome."""
    counts = [seed["near_lazy"] for seed in seeds]
    if None in counts:
        return (
            f"Whether the references have lazy layers was not measured in every seed on {SEQUENCES} "
            f"sequences of {LENGTH} tokens."
        )
    layers = experiment.model.layers
    text = f"Layers of the references near rank 1: {', '.join(map(str, counts))} of {layers}."
    return text if min(counts) >= LAZY_SHARE * layers else f"{text} {FEW_LAZY}"


def describe_more(compared: dict) -> str:
    """Return how many new seeds would decide a comparison if the difference and spread are as measured."""
    distance, spread = abs(compared["limit"] - compared["mean"]), statistics.stdev(compared["gaps"])
    needed = count_seeds(distance, spread) if distance and spread else None
    seeds = f"{needed} seeds" if needed else "more than a thousand seeds"
    return (
        f"To decide '{compared['name']}', if difference and spread are as measured here, takes {seeds}. Run "
        f"that many others: a rule that adds seeds until it is content is not this rule."
    )


def judge(numbers: list[int]) -> None:
    """Print the comparisons over the finished seeds and the outcome, and write them next to the runs.

    Raises UserError if no seed is finished, or if their losses were measured on different data."""
    experiment = load_experiment(NAME)
    found = {number: collect_seed(experiment, number) for number in numbers}
    seeds = [seed for seed in found.values() if seed]
    if not seeds:
        raise UserError("no seed has all four runs yet: bash recipes/claim.sh trains them (docs/claim.md)")
    cells = [(f"{run}, seed {seed['seed']}", cell) for seed in seeds for run, cell in seed["cells"].items()]
    refuse_mixture("validation loss", "the claim", cells)
    compared = compare_seeds(seeds)
    asked, meaning = conclude([one["verdict"] for one in compared])
    meaning = meaning if len(seeds) > 1 else "Not decided: an interval over seeds takes two seeds or more."
    wanted = len(numbers) if experiment.rehearsal else max(len(numbers), choose_seeds())
    if len(seeds) < wanted:
        meaning = f"So far, with {len(seeds)} of {wanted} seeds, which is no verdict: {meaning}"
    notes = [f"**{meaning}**", describe_lazy(experiment, seeds)]
    if len(seeds) > 1 and asked[-1] == UNDECIDED:
        notes.append(describe_more(compared[len(asked) - 1]))
    if lacking := [str(number) for number, seed in found.items() if not seed]:
        notes.append(
            f"Not finished, and not counted: seeds {', '.join(lacking)}. The rule is for all of them."
        )
    if left_out := list_left_out(experiment, numbers):
        notes.append(
            f"Finished, and left out of this table: seeds {', '.join(map(str, left_out))}. A verdict over "
            f"chosen seeds is not a verdict."
        )
    title = f"{'REHEARSAL, not a result. ' if experiment.rehearsal else ''}{experiment.about}"
    rows = [_make_row(one, place < len(asked)) for place, one in enumerate(compared)]
    stem = RunDir.of(experiment, "claim", numbers[0]).path.parent.parent / "claim"
    write_table(stem, title, HEADS, rows, notes, [dict(zip(HEADS, row, strict=True)) for row in rows])
    facts = {"rehearsal": experiment.rehearsal, "seeds": [seed["seed"] for seed in seeds], "meaning": meaning}
    lazy = [seed["near_lazy"] for seed in seeds]
    write_json(stem.with_suffix(".json"), facts | {"comparisons": compared, "near_lazy": lazy})
    print(f"written: {stem}.md")


def _make_row(compared: dict, is_asked: bool) -> list[str]:
    """Return the cells of a comparison under HEADS; one that is not asked has no verdict that counts."""
    verdict = compared["verdict"] if is_asked else f"not asked ({compared['verdict']})"
    interval = format_interval(compared, "+")
    return [
        f"Inheritune - {compared['other']}",
        compared["asks"],
        interval,
        f"{compared['limit']:g}",
        verdict,
    ]


def read_seeds(words: list[str]) -> list[int]:
    """Return the seeds that the words are. Raises UserError for a word that is none, or given twice."""
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise UserError(f"claim: seeds are whole numbers, as in 0 1 2 (got '{' '.join(words)}')")
    seeds = [int(word) for word in words]
    wrong = next((seed for seed in seeds if ARGUMENTS["seed"].problem(seed)), None)
    if wrong is not None or len(set(seeds)) < len(seeds):
        raise UserError(f"claim: each seed is given once, and is not too large (got '{' '.join(words)}')")
    return seeds


def main(verb: str = "", *words: str) -> None:
    """Run `missing`, `submit` or `judge`. Raises UserError for another verb."""
    if verb not in ("missing", "submit", "judge"):
        raise UserError(f"claim.py takes missing, submit or judge, and seeds (got '{verb}')")
    seeds = read_seeds(list(words))
    if verb == "judge":
        judge(seeds)
        return
    for seed in seeds:
        if verb == "missing":
            print_missing(seed)
        else:
            submit_missing(make_item(load_experiment(NAME)), seed, gpus=1)


if __name__ == "__main__":
    run_script(main, *sys.argv[1:])
