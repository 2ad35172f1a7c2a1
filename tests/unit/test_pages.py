"""The documents and scripts agree with the code and with the numbers that programs wrote."""

import ast
import json
import re
from pathlib import Path

import computed_mfu
import numpy as np
import pytest
from conftest import REPOSITORY
from markdown_rows import split_row
from scipy import stats

from inheritune.analysis.report import describe_rows
from inheritune.config.sections import Model
from inheritune.models.sizes import count_matrix_elements
from inheritune.runs.comparison import compare_windows

IMPORT = re.compile(r"\bfrom (inheritune[\w.]*) import ([\w, ]+)")
"""An import of this package in a shell script (`python -c`, a here-document) or in a block of a page."""
FOLDERS = ("recipes", "slurm", "tests", "benchmarks", "ds_configs", "docs", ".ci")


def find_texts() -> list[Path]:
    """Return the shell scripts and pages of the repository."""
    inside = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*")]
    return [
        path
        for path in [*REPOSITORY.iterdir(), *inside]
        if path.suffix in {".sh", ".md"} or path.name in {"Makefile", "run"}
    ]


def list_names(module: str) -> set[str]:
    """Return what `from module import` finds, read from the module's file without running it."""
    place = REPOSITORY / Path(*module.split("."))
    names = {path.stem for path in place.glob("*")} if place.is_dir() else set()
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        else:
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def test_imports_in_scripts_and_pages_exist():
    seen = set()
    for path in find_texts():
        for module, names in IMPORT.findall(path.read_text(encoding="utf-8")):
            for name in re.findall(r"\w+", names):
                assert name in list_names(module), f"{path}: {module} has no {name}"
                seen.add((path.name, name))
    assert {("setup.sh", "get_device"), ("evidence.sh", "get_device")} <= seen


def format_row(row: dict) -> list[str]:
    """Return the cells of a row of evidence.json, as docs/evidence.md has them."""
    difference = row["to_reference"]
    shown = (
        difference and f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
    )
    return [row["label"], " or ".join(map(str, row["layers"])), f"{row['loss']['mean']:.4f}", shown or ""]


def test_numbers_of_the_evidence_page_are_those_of_its_json():
    made = json.loads((REPOSITORY / "recipes/evidence/cpu/evidence.json").read_text(encoding="utf-8"))
    rows = {cells[0]: cells for row in made["rows"] if row["loss"]["n"] > 1 for cells in [format_row(row)]}
    page = (REPOSITORY / "docs" / "evidence.md").read_text(encoding="utf-8")
    _, _, *lines = re.findall(r"^\|.*\|$", page, re.MULTILINE)
    shown = [split_row(line) for line in lines]
    assert len(shown) == 8 and shown == [rows[cells[0]] for cells in shown]
    assert f"These are 8 of the {len(made['rows'])} rows" in page
    slope = made["rank_worth"]["slope"]
    assert f"{slope['mean']:.3f} nats" in page and f"({slope['low']:.3f} to {slope['high']:+.3f})" in page


def test_the_distance_to_the_reference_trained_on_is_that_of_the_seeds():
    gaps = []
    for file in sorted((REPOSITORY / "recipes/evidence/cpu/seeds").glob("seed*.json")):
        models = {(m["run"], m["stage"]): m["loss"]["mean"] for m in json.loads(file.read_text())["models"]}
        gaps.append(models["inheritune", 1] - models["reference_longer", None])
    mean, half = np.mean(gaps), stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps)
    page = " ".join((REPOSITORY / "docs" / "evidence.md").read_text(encoding="utf-8").split())
    made = json.loads((REPOSITORY / "recipes/evidence/cpu/evidence.json").read_text(encoding="utf-8"))
    gap = made["beside_inheritune"]["reference_longer"]
    assert (gap["mean"], gap["low"]) == pytest.approx((mean, mean - half))
    ends, p = (
        f"{mean - half:.3f} to {mean + half:.3f} below",
        f"p {gap['p']:.3f}, corrected {gap['p_holm']:.2f}",
    )
    assert f"{mean:.3f} below Inheritune ({ends}; {p})" in page
    flops = {(row["run"], row["stage"]): row["flops_with_sources"] for row in made["rows"]}
    spent = [
        f"{flops[key]:.1e}".replace("e+", "e") for key in (("reference_longer", None), ("inheritune", 1))
    ]
    assert f"{spent[0]} FLOPs with its source, Inheritune {spent[1]}" in page
    assert len(gaps) == 3 and min(gaps) >= 0.15 and "in each seed by 0.15 or more" in page


def list_facts(made: dict) -> list[str]:
    """Return what docs/real_model.md says, from the numbers that its runs left."""
    models = {(model["run"], model["stage"]): model for model in made["models"]}
    losses = {name: model["loss"]["mean"] for name, model in models.items()}
    layers = [row for row in made["analysis"] if row["kind"] == "layer"]
    ranks = [row for row in made["ranks"] if row["kind"] == "layer"]
    costs = {kind: [row["cost"][kind] for row in layers] for kind in ("block", "attn")}
    max_ranks = [row["max_rank"]["0.9"] for row in layers]

    def pair(run: tuple, other: tuple, form: str = ".2f") -> tuple[str, str]:
        gap = compare_windows(np.array(models[run]["windows"]), np.array(models[other]["windows"]))
        ends = sorted(abs(gap[end]) for end in ("low", "high"))
        return f"{gap['mean']:{form}}", f"{ends[0]:.2f} to {ends[1]:.2f}"

    def at(run: tuple, step: int) -> float:
        return dict(models[run]["curve"])[step]

    first, cost, influence, window = ("first", 1), ("cost", None), ("influence", None), ("window", None)
    control = ("trained_on", None)
    nearest, interval = pair(influence, control)
    assert min(
        float(pair(run, control)[0]) for run in models if run != control and run[0] != "reference"
    ) == (float(nearest))
    early = at(("first", 2), 40) - at(("stacked", 2), 40)
    late, late_ends = pair(("stacked", 2), ("first", 2))
    rho = stats.spearmanr(max_ranks, costs["attn"])
    lowest = min(ranks, key=lambda row: row["max_rank"]["0.9"])
    cheapest = int(np.argmin(costs["block"]))
    cheaper = sum(row["cost"]["attn"] < row["cost"]["mlp"] for row in layers)
    summary = made["ranks"][-1]
    return [
        f"by influence, ends {nearest} nats above it ({interval}, paired by window)",
        "steps 15 of them are {} nats above those chosen by cost ({}, paired".format(*pair(first, cost)),
        "19 of them are still {} above ({})".format(*pair(("first", 2), cost)),
        f"the window was {at(window, 40) - at(cost, 40):.2f} above cost and "
        f"{at(window, 40) - at(influence, 40):.2f} above influence",
        f"After 40 steps gradual stacking (`from: middle`) is {early:.2f} nats below",
        f"After 200 steps it ends {late} above it ({late_ends})",
        f"four more of them by {losses[first] - losses['first', 2]:.2f} nats",
        f"the model's logits by {losses[first] - losses['distilled', None]:.2f}",
        f"still fell by {at(first, 160) - at(first, 200):.2f} nats in the last 40 steps, those by cost by "
        f"{at(cost, 160) - at(cost, 200):.2f}",
        f"Spearman {rho.statistic:+.2f}, p {rho.pvalue:.2f}",
        f"The lowest MaxRank is that of layer {lowest['layer'] + 1}: {lowest['max_rank']['0.9']:.2f} on 100",
        f"Of {summary['heads']} heads {summary['heads_rank_1']} have rank 1 and {summary['heads_near_1']}",
        f"The cheapest block ({cheapest + 1}) costs {costs['block'][cheapest]:.2f} nats",
        f"cheaper than the MLP** in {cheaper} of 30",
    ]


def test_numbers_of_the_real_model_are_those_that_its_runs_left():
    folder = REPOSITORY / "recipes/evidence/smollm2"
    made = json.loads((folder / "real_model.json").read_text(encoding="utf-8"))
    page = (REPOSITORY / "docs" / "real_model.md").read_text(encoding="utf-8")
    printed = describe_rows(made["analysis"]).splitlines()
    assert len(printed) > 40 and all(line.rstrip() in page for line in printed)
    table = [
        split_row(line)
        for line in (folder / "table.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ][1:]
    rows = {row[0]: [row[0], row[1], row[4], row[5], row[6]] for row in table}
    shown = [
        split_row(line)
        for line in page[page.index("## Heal") : page.index("## What it does not say")].splitlines()
        if line.startswith("| ")
    ][2:]
    assert len(shown) == len(rows) - 1 and all(row == rows[row[0]] for row in shown)
    for model in made["models"]:
        assert rows[model["label"]][3].startswith(f"{np.mean(model['windows']):.4f} (")
    text = " ".join(page.split())
    for fact in list_facts(made):
        assert fact in text, fact
    for row in made["analysis"]:
        if row["kind"] == "cut" and row["n"] == 15:
            assert f" | {row['loss']:.2f} |" in page


def test_computed_mfu_is_current_and_begins_at_what_was_measured():
    path, text = computed_mfu.document()
    assert path.read_text(encoding="utf-8") == text, f"{path} is stale: python tools/computed_mfu.py"
    result = json.loads((REPOSITORY / "benchmarks/results/h100/train_step.json").read_text(encoding="utf-8"))[
        0
    ]
    work, turns = result["work"], {name: its[0] for name, its in result["turns"].items()}
    tokens = work["sequences"] * work["length"]
    flops = 6 * count_matrix_elements(Model(**work["model"]), 24) * tokens
    rate = flops / turns["limit: matrix products"]["seconds"]
    assert abs(rate / computed_mfu.PRODUCTS - 1) < 0.02
    case = ("gpt2_medium", 24, work["micro"], work["sequences"] // work["micro"])
    assert case == computed_mfu.CASES[0]
    computed = [computed_mfu.compute_mfu(*case, way) for way in computed_mfu.WAYS]
    assert turns["ours"]["mfu"] < computed[0] and computed == sorted(computed)
