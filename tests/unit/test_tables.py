"""Tables and figures of the paper: their data against the paper's numbers, cells and verdicts from run
folders in their real form, what is refused, what has to be run before."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import paper_index
import pytest
from conftest import experiment_dict, run_verb, write_experiment
from made_up_runs import write_settings
from markdown_rows import split_row
from matplotlib.figure import Figure

from inheritune.config.experiment import load_experiment
from inheritune.config.paths import RECIPES
from inheritune.errors import UserError
from inheritune.evaluation import card
from inheritune.files import escape
from inheritune.files.json_files import write_json
from inheritune.files.rundir import RunDir
from inheritune.files.writing import write_text
from inheritune.paper import (
    experiment_table,
    figures,
    prerequisites,
    published,
    table_cells,
    table_files,
    tables,
)
from inheritune.paper import items as paper
from inheritune.paper.items import list_items, load_experiments, load_item
from inheritune.paper.prerequisites import list_missing
from inheritune.paper.published import find_published, read_csv

TABLES = [name for name in list_items() if load_item(name).columns]
FIGURES = [name for name in list_items() if load_item(name).panels]
SCRIPTS = sorted(path for kind in ("table", "fig") for path in RECIPES.glob(f"{kind}*.sh"))


def finish(
    experiment: str, run: str, loss: float, stage=None, half=0.01, rehearse=False, seed=0, **more
) -> RunDir:
    """A finished run, or a stage of a grown one, as training and evaluate leave it; `more` replaces
    results."""
    loaded = load_experiment(experiment, rehearse=rehearse)
    folder = RunDir.of(loaded, run, seed)
    folder = folder.stage(stage) if stage else folder
    train = loaded.train_of(loaded.runs[run])
    results = {
        "experiment": loaded.name,
        "rehearsal": rehearse,
        "run": run,
        "stage": stage,
        "seed": seed,
        "layers": 4,
        "parameters": 1000,
        "steps": train.steps,
        "tokens": train.steps * train.batch_tokens,
        "train_flops": 1e20,
        "precision": "bf16_autocast",
        "data_fingerprint": "owt",
        "validation": {"mean": loss, "low": loss - half, "high": loss + half, "n": 4096},
    }
    write_json(folder.results, results | more)
    points = [(step, loss + 1 - step / train.steps) for step in (0, train.steps // 2, train.steps)]
    rows = [{"step": step, "tokens": step * train.batch_tokens, "val_loss": value} for step, value in points]
    write_text(folder.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    write_settings(loaded, run, folder, stage, seed)
    write_json(folder.done, {"final": {}})
    return folder


def score(value: float, stderr: float | None, metric="acc", **more) -> dict:
    return {
        "task": "t",
        metric: {"score": value, "stderr": stderr},
        "n": 100,
        "version": "1.0",
        "shots": 0,
    } | more


def rows_of(name: str) -> dict[tuple[str, str], dict]:
    """{(row, column): record} of the CSV file that `table` wrote."""
    with open(table_files.locate_results(False, 0) / f"{name}.csv", newline="") as file:
        return {(row["row"], row["column"]): row for row in csv.DictReader(file)}


# --- the data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_items())
def test_every_item_names_what_exists(name):
    item = load_item(name)
    load_experiments(item)  # each experiment and run
    assert bool(item.columns) != bool(item.panels) and (item.rows or item.panels)
    for row in item.rows:
        for column in item.columns.values():
            find_published(item, row, column)  # one row of the CSV file, or none asked for
    for row in item.models():
        spec = (
            load_experiment(row.run.rpartition("/")[0]).runs[row.run.rpartition("/")[2]] if row.run else None
        )
        assert not row.stage or row.stage <= len(spec.grow.depths(spec.init.inherit.layers, 99))
        assert not row.kept or row.kept <= len(spec.keep_at)
        if row.file and row in [r for panel in item.panels for r in panel.rows]:
            assert len(published.find_rows(row.file, row.match)) > 5 and row.value in read_csv(row.file)[0]


# columns with the paper's numbers, and how many of them the items must show
NUMBERS = {
    "table1": (
        "table_fineweb_downstream.csv",
        ["arc_easy_acc", "piqa_acc", "sciq_acc", "hellaswag_acc_norm", "lambada_acc", "average_paper"],
    ),
    "table2": ("table_gpt2_warm_start_val_loss.csv", ["val_loss_paper"]),
    "table3": ("table_submodule_ablation_val_loss.csv", ["val_loss_paper"]),
    "table4": ("table_gpt2_small_lazy_layers.csv", ["val_loss_paper"]),
    "table5": ("table_gpt2_owt_val_loss.csv", ["val_loss_paper"]),
    "table6": ("table_model_configs.csv", ["params_stated", "params_computed_tied_no_bias"]),
    "table7": ("table_gpt2_xlarge_owt_downstream.csv", ["full_48_layers", "inheritune_24_layers"]),
    "openllama_commonsense": (
        "table_openllama_commonsense.csv",
        ["winograd_wsc", "piqa", "boolq", "winogrande", "logiqa"],
    ),
    "openllama_understanding": (
        "table_openllama_nlu.csv",
        ["mmlu_5shot", "wnli", "qnli", "mnli", "truthfulqa"],
    ),
    "owt_perplexity": (
        "table_v1_gpt2_owt_downstream.csv",
        ["val_loss", "wikitext_perplexity", "lambada_acc"],
    ),
    "v1_average": ("fig_v1_avg9_and_mmlu.csv", ["mean_of_9_tasks_computed", "mmlu_5shot_table"]),
    "v1_compute": ("table_v1_pretraining_compute.csv", ["gpu_count", "days"]),
    "toy": ("toy_attention_demo.csv", ["value"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_of_the_csv_is_in_its_table(name):
    file, columns = NUMBERS[name]
    item = load_item(name)
    shown = Counter(
        f["value"] for r in item.rows for c in item.columns.values() if (f := find_published(item, r, c))
    )
    expected = Counter(row[column] for row in read_csv(file) for column in columns if row[column])
    assert expected and not expected - shown, expected - shown


def test_every_number_on_fresh_and_repeated_tokens_is_in_its_table():
    item = load_item("mmlu_tokens")
    shown = Counter(find_published(item, row, item.columns["mmlu"])["value"] for row in item.rows)
    files = (
        "fig_v1_mmlu_vs_fresh_tokens.csv",
        "table_v1_mmlu_repeat_vs_fresh.csv",
        "table_v2_mmlu_by_reference_model.csv",
    )
    assert (
        shown == Counter(row["mmlu_5shot"] for file in files for row in read_csv(file))
        and shown.total() == 25
    )


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table5"])
def test_logs_give_the_noise_that_the_csv_tells(name):
    """Last value, mean and deviation of each log's last ten evaluations; the paper cuts the last to two
    digits."""
    item, checked = load_item(name), 0
    for row in (row for row in item.rows if row.match):
        (told,) = published.find_rows(item.file, row.match)
        log = published.summarize_last_ten(published.load_curve(row))
        assert f"{log[0]:.4f}" == told["log_final_val_loss"]
        if "log_mean_last10" in told:
            assert (
                abs(log[1] - float(told["log_mean_last10"])) < 6e-5
                and abs(log[2] - float(told["log_sd_last10"])) < 6e-5
            )
            assert f"{log[0]:.6f}"[:4] == told["val_loss_paper"]
        checked += 1
    assert checked == len(read_csv(item.file))


def test_the_number_of_questions_gives_the_papers_standard_errors():
    item, checked = load_item("table7"), 0
    for row in item.rows:
        for column in (c for c in item.columns.values() if c.n and c.metric.endswith(("acc", "acc_norm"))):
            facts = find_published(item, row, column)
            if facts:
                share = float(facts["value"]) / 100
                assert 100 * np.sqrt(share * (1 - share) / column.n) == pytest.approx(
                    float(facts["stderr"]), abs=0.0151
                )
                checked += 1
    assert checked == 14


# --- cells --------------------------------------------------------------------------------------------------


def test_verdicts():
    assert table_cells.judge_difference(0.009, [0.0], 0.01, higher_is_better=False) == "matches"
    # 2 sqrt(2) 0.02 = 0.057
    assert table_cells.judge_difference(0.05, [0.02, 0.02], 0.01, higher_is_better=False) == "within noise"
    assert table_cells.judge_difference(0.06, [0.02, 0.02], 0.01, higher_is_better=False) == "worse"
    assert table_cells.judge_difference(-0.06, [0.02, 0.0], 0.01, higher_is_better=False) == "better"
    assert table_cells.judge_difference(-0.06, [0.02, None], 0.01, higher_is_better=False) == "noise unknown"
    for noises in ([None, None], [0.02, None]):  # equal digits may be chance
        assert table_cells.judge_difference(-0.006, noises, 0.01, False) == "noise unknown"
    assert table_cells.judge_difference(3.0, [1.0, 1.0], 0.01, higher_is_better=True) == "better"


def test_table_of_losses_with_a_part_of_the_runs(capsys):
    finish("gpt2_medium_owt", "reference", 2.8100)
    finish("gpt2_medium_owt", "random_16", 2.9300)
    finish("gpt2_medium_owt", "inheritune", 2.8760, stage=1)
    finish("gpt2_medium_owt", "inheritune", 2.8000, stage=2)
    tables.table("table5")
    page = capsys.readouterr().out
    cells = {
        re.sub(r" +", " ", line.split("|")[1].strip()): line
        for line in page.splitlines()
        if line.startswith("| ")
    }
    assert "| 2.81±0.0101 / 2.8100±0.0051: -0.0087 matches" in cells["Medium, 24 layers, random start"]
    assert "2.86±0.0097 / 2.9300±0.0051: +0.0607 worse" in cells["Medium, 16 layers, random start"]
    assert "2.87±0.0106 / 2.8760±0.0051: +0.0056 matches" in cells["Medium, 12 layers, Inheritune, round 1"]
    assert "2.84±0.0072 / 2.8000±0.0051: -0.0496 better" in cells["Medium, 14 layers, Inheritune, round 2"]
    assert "| 2.81±0.0105 / not run " in cells["Medium, 16 layers, Inheritune, round 3"]
    assert "2.8187; 2.8121±0.0101" in cells["Medium, 24 layers, random start"]
    # two rounds, then with the reference's steps; the first at or below its loss of 2.81: round 1 never,
    # round 2 at its end
    assert "| 2.00e+20 | 3.00e+20 |" in re.sub(r" +", " ", cells["Medium, 14 layers, Inheritune, round 2"])
    assert "not reached" in cells["Medium, 12 layers, Inheritune, round 1"]
    assert f"{2 * 100_000 * 393_216:.2e}" in cells["Medium, 14 layers, Inheritune, round 2"]
    assert "leads the full model (2.866) by 0.012 and not by 0.05" in page and "One seed" in page
    record = rows_of("table5")["Medium, 24 layers, random start", "validation loss"]
    assert (record["paper"], record["log_last"], record["ours"], record["ours_n"]) == (
        "2.81",
        "2.8187",
        "2.81",
        "4096",
    )
    assert record["state"] == "matches" and record["provenance"].startswith("read from")
    stem = table_files.locate_results(False, 0) / "table5"
    assert (
        stem.with_suffix(".md").read_text() in page
        and r"\begin{tabular}" in stem.with_suffix(".tex").read_text()
    )


def test_weights_kept_on_the_way_have_their_share_of_the_cost(capsys):
    run = finish("openllama_7b", "inheritune", 2.5)
    write_json(
        RunDir(run.kept(152_560)).results, {"rehearsal": False, "tasks": {"mmlu": score(0.2537, 0.0037)}}
    )
    tables.table("mmlu_tokens")
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| OpenLLaMA-7B, 20B")
    )
    assert "25.37±0.37 / 25.37±0.37: +0.00 matches" in line
    assert [cell.strip() for cell in line.strip("| ").split("|")][2:] == ["4.00e+19", "not known"]


def test_an_experiments_table_has_the_cuts_cost_and_the_controls(capsys):
    """The loss before the first step. The reference trained on is compared with Inheritune as the random
    starts are; the reference of a variant is not."""
    gap = {"mean": 0.005, "low": 0.002, "high": 0.008, "n": 400}
    for run, loss in (("reference", 2.65), ("random_18", 2.80), ("reference_longer", 2.55)):
        finish("gpt2_large_owt", run, loss)
    finish("gpt2_large_owt", "reference_clip", 2.60)
    finish("gpt2_large_owt", "inheritune", 2.66, stage=1, difference=gap)
    tables.table("gpt2_large_owt")
    lines = capsys.readouterr().out.splitlines()
    cells = [split_row(line) for line in lines if line.startswith("| ")]
    place = cells[0].index("loss before training")
    assert {row[0]: row[place] for row in cells[1:]} == {
        "full size, random start": "3.6500",
        "random start": "3.8000",
        "Inheritune, stage 1": "3.6600",
        "full size, trained on": "3.5500",
        "full size, the code's clip": "3.6000",
    }
    outcome = next(line for line in lines if line.startswith("With 4 of"))
    assert "the random start (4 layers, 100000 steps) ends 0.1400 above it" in outcome
    assert "the full size, trained on (4 layers, 100000 steps) ends 0.1100 below it" in outcome
    assert "clip" not in outcome


def test_what_is_missing_is_of_an_item_of_the_paper(capsys):
    finish("quickstart", "reference", 2.65)
    with pytest.raises(UserError, match="--missing is for an item .* python -m inheritune status quickstart"):
        tables.table("quickstart", missing=True)
    assert not capsys.readouterr().out


def test_an_end_at_the_same_printed_digits_is_level():
    said = [experiment_table.describe_gap(gap) for gap in (0.00004, -0.00004, 0.00006, -0.05)]
    assert said == ["level with", "level with", "0.0001 above", "0.0500 below"]


def test_within_noise_of_both(capsys):
    # 0.043 off; noise 2 sqrt(0.0233^2 + 0.01^2) = 0.051
    finish("gpt2_large_owt", "reference", 2.8100, half=0.0196)
    tables.table("table5")
    assert "2.8100±0.0100: -0.0431 within noise" in capsys.readouterr().out


def test_table_of_scores(capsys):
    tasks = {
        "arc_easy": score(0.5105, 0.0103),
        "piqa": score(0.70, 0.011),
        "sciq": score(0.60, 0.0155),
        "lambada_openai": score(0.2, 0.0056),
    }
    finish("gpt2_medium_fineweb", "reference", 3.2, tasks=tasks)
    tables.table("table1")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| Medium, 24"))
    assert (
        "51.05±1.03 / 51.05±1.03: +0.00 matches" in line and "61.81±1.13 / 70.00±1.10: +8.19 better" in line
    )
    assert (
        "74.8±1.4 / 60.0±1.6: -14.8 worse" in line
        and "30.79±0.46 / not run" in line
        and "47.74±0.44 / not run" in line
    )
    assert "20.28±0.56 / 20.00±0.56: -0.28 within noise" in line
    finish(
        "gpt2_medium_fineweb",
        "reference",
        3.2,
        tasks=tasks | {"hellaswag": score(0.31, 0.0046, metric="acc_norm")},
    )
    tables.table("table1")
    mean = (51.05 + 70 + 60 + 31 + 20) / 5
    # the paper's noise of a mean is that of its parts
    assert f"47.74±0.44 / {mean:.2f}±0.46: {mean - 47.74:+.2f} worse" in capsys.readouterr().out


def test_an_experiments_own_table_has_scores_and_baselines(capsys):
    scores = {"wikitext": score(25.46, None, "word_perplexity"), "lambada_openai": score(0.3, 0.01)}
    finish("gpt2_medium_owt", "reference", 2.8, tasks=scores)
    finish("gpt2_medium_owt", "stacking", 2.9, tasks={"wikitext": scores["wikitext"]})
    finish("gpt2_medium_owt", "random_16", 2.95)
    tables.table("gpt2_medium_owt")
    page = capsys.readouterr().out
    lines = {
        line.split("|")[1].strip(): line.rstrip(" |").split(" | ")
        for line in page.splitlines()
        if line.startswith("| ")
    }
    assert [cell.strip() for cell in lines["model"][-2:]] == [
        "wikitext, word_perplexity",
        "lambada_openai, acc",
    ]
    assert [cell.strip() for cell in lines["full size, random start"][-2:]] == ["25.46", "30.00±1.00"]
    assert [cell.strip() for cell in lines["stacking"][-2:]] == ["25.46", "not run"]
    assert "No grown run is finished yet." in page
    gap = {"mean": -0.2, "low": -0.21, "high": -0.19, "n": 4096}
    finish(
        "gpt2_medium_owt", "inheritune_everything", 2.6, stage=1, difference=gap, compared_with="reference"
    )
    tables.table("gpt2_medium_owt")
    assert "Inheritune (run 'inheritune_everything') reaches the reference's" in capsys.readouterr().out
    finish(
        "gpt2_medium_owt",
        "hybrid",
        2.9,
        tasks={"wikitext": score(25.0, None, "word_perplexity", version="9")},
    )
    with pytest.raises(
        UserError, match="wikitext.* of the table of gpt2_medium_owt mixes .* version 1.0 .* version 9"
    ):
        tables.table("gpt2_medium_owt")


def test_highlights_models_of_others_and_those_that_are_not_run(capsys):
    finish("openllama_3b_1b", "opt_1b", 2.0, tasks={"piqa": score(0.50, 0.01), "logiqa": score(0.2, 0.01)})
    finish("openllama_3b_1b", "pythia_1b", 2.0, tasks={"piqa": score(0.51, 0.01)})
    finish("openllama_3b_1b", "one_epoch", 2.0, tasks={"piqa": score(0.56, 0.01), "logiqa": score(0.3, 0.01)})
    tables.table("openllama_commonsense")
    said = capsys.readouterr().out
    cells = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ")}
    # above two baselines; above one
    assert "**56.00" in cells["ours, 1 epoch"] and "**30.00" not in cells["ours, 1 epoch"]
    # the paper's own bold: at least 90% of OpenLLaMA-3B (BoolQ) or above two baselines (WSC)
    eight = cells["ours, 8 epochs of 1B"]
    assert (
        "**61.68**" in eight
        and "**50.96**" in eight
        and "**56.47**" not in eight
        and "**25.19**" not in eight
    )
    assert "71.44±1.05 / as published" in cells["MPT-1.3B (200B)"] and "never run" in said
    assert "**" not in (table_files.locate_results(False, 0) / "openllama_commonsense.tex").read_text()


def test_model_sizes_are_computed_here(capsys):
    tables.table("table6")
    said = capsys.readouterr().out
    # of half width
    assert said.count(" matches") == 16 and "worse" not in said and said.count("as published") == 3


@pytest.mark.parametrize("name", TABLES)
def test_every_table_prints_without_any_run(name, capsys):
    tables.table(name)
    said = capsys.readouterr().out
    rows = load_item(name).rows
    claimed = [row for row in rows if row.claim]
    assert said.startswith(load_item(name).title) and said.count("\n|") == len(rows) + len(claimed) + 2
    assert all(note in said for note in load_item(name).notes)


# --- the user's words ---------------------------------------------------------------------------------------

WORDS = [
    "=cmd|' /C calc'!A0",
    "+1+cmd",
    "-x",
    "@x",
    "a | b",
    "<script>alert(1)</script>",
    "two\nlines\n\nthree",
    "tab\tbed",
    "\r=x",
    r"\input{/etc/passwd}",
    "100% of R&D #1",
    "$x_1^2$ and \\frac",
    "_hidden_",
    "**bold**",
    "[link](http://x)",
    "`code`",
    "&lt;b&gt;",
    "# heading",
    "~~struck~~",
    "\x1b[31mred",
    "random_16_200k",
]


def labelled(tmp_path, words: list[str], name: str = "nasty") -> str:
    """An experiment with one finished run for each of the words, which are the labels of its table."""
    raw = experiment_dict(paper=[{"run": f"run{n}", "label": label} for n, label in enumerate(words)])
    raw["runs"] = {f"run{n}": {"init": "random"} for n in range(len(words))}
    path = write_experiment(tmp_path, raw, name)
    for n in range(len(words)):
        experiment = load_experiment(path)
        folder = RunDir.of(experiment, f"run{n}")
        write_settings(experiment, f"run{n}", folder)
        values = {"mean": 2.0 + n, "low": 1.9 + n, "high": 2.1 + n, "n": 16}
        results = {
            "run": f"run{n}",
            "seed": 0,
            "layers": 4,
            "parameters": 1000,
            "steps": 6,
            "tokens": 3840,
            "train_flops": 1e9,
        }
        results |= {"data_fingerprint": "x", "validation": values}
        results["difference"] = {"mean": -n, "low": -n - 0.1, "high": 0.1 - n, "n": 16}
        write_json(folder.results, results | {"rehearsal": False})
        write_text(folder.metrics, json.dumps({"step": 6, "tokens": 3840, "val_loss": 2.0 + n}) + "\n")
        write_json(folder.done, {"final": {}})
    return path


@pytest.fixture
def nasty(tmp_path, capsys):
    """(what was printed, the stem of the files) of a table whose labels and title are WORDS."""
    path = labelled(tmp_path, WORDS, "1. it's <b> $x$ | *y*")
    tables.table(path)
    return capsys.readouterr().out, RunDir.of(load_experiment(path), "table").path


def test_words_are_shown_as_they_are_in_markdown(nasty):
    said, stem = nasty
    page = stem.with_suffix(".md").read_text()
    assert page in said and "\x1b" not in said
    assert page.startswith(r"1\. it's &lt;b&gt; \$x\$ \| \*y\*, seed 0")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(WORDS)
    # no new cell, no lost row
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(experiment_table.RESULT_COLUMNS) + 1}
    labels = [re.split(r"(?<!\\)\|", row)[1].strip() for row in rows[2:]]
    shown = {
        "a | b": r"a \| b",
        "<script>alert(1)</script>": "&lt;script&gt;alert(1)&lt;/script&gt;",
        "random_16_200k": "random_16_200k",
        "two\nlines\n\nthree": "two lines three",
        "_hidden_": r"\_hidden\_",
        "**bold**": r"\*\*bold\*\*",
        "# heading": r"\# heading",
        "[link](http://x)": r"\[link\](http://x)",
        "&lt;b&gt;": "&amp;lt;b&amp;gt;",
        "-x": r"\-x",
        "`code`": r"\`code\`",
        r"\input{/etc/passwd}": r"\\input{/etc/passwd}",
        "$x_1^2$ and \\frac": r"\$x_1^2\$ and \\frac",
    }
    for word, expected in shown.items():
        assert labels[WORDS.index(word)] == expected


def test_words_are_shown_as_they_are_in_latex(nasty, tmp_path):
    text = nasty[1].with_suffix(".tex").read_text()
    lines = text.splitlines()
    comments = [line for line in lines if line.startswith("%")]
    assert comments and lines[: len(comments)] == comments
    table = "\n".join(lines[len(comments) :])
    assert table.count(r"\\") == 1 + len(WORDS)
    assert (
        r"\textbackslash{}input\{/etc/passwd\}" in table
        and r"100\% of R\&D \#1" in table
        and r"\$x\_1" in table
    )
    assert not re.search(r"(?<!\\)[$#%]|\\input|\\frac", table)
    table_files.write_table(
        tmp_path / "x", "t\n\\input{x}", ["m"], [["a"]], ["note\n\\input{y}"], [{"m": "a"}]
    )
    lines = (tmp_path / "x.tex").read_text().splitlines()  # a comment ends with its line
    assert [line[0] for line in lines if "input" in line] == ["%", "%"]


def test_words_are_no_formula_in_csv_and_numbers_stay_numbers(nasty):
    with open(nasty[1].with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [row["model"] for row in rows]
    assert labels[:5] == ["'=cmd|' /C calc'!A0", "'+1+cmd", "'-x", "'@x", "a | b"]
    assert labels[6] == "two lines three" and labels[8] == "'=x" and len(rows) == len(WORDS)
    gap = [row["difference to the reference (95% interval)"] for row in rows]
    assert gap[1] == "-1.0000 (-1.1000 to -0.9000)" and gap[0] == "+0.0000 (-0.1000 to +0.1000)"
    assert [escape.escape_csv(number) for number in (-1.5, "-1.5", "+3e-4", "-1,234.5", "+12.5%", None)] == [
        -1.5,
        "-1.5",
        "+3e-4",
        "-1,234.5",
        "+12.5%",
        None,
    ]


def test_words_are_shown_as_they_are_in_plots(tmp_path):
    """matplotlib would read what is between two dollars, and hides a line whose name begins with an
    underscore."""
    words = ["$\\frac$", "_hidden", "$a$", "two\nlines"]
    drawn, usual = [], Figure.savefig
    path = labelled(tmp_path, words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), usual(self, *a, **k)))
        figures.figure(path)
    (axes,) = drawn[0].axes[:1]
    shown = [text.get_text().strip() for text in axes.get_legend().get_texts()]
    assert [text.partition(", 4 layers")[0] for text in shown[:4]] == [
        "$\\frac$",
        "_hidden",
        "$a$",
        "two lines",
    ]
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())


def test_words_are_shown_as_they_are_in_the_verdict_and_the_model_card(tmp_path):
    experiment = load_experiment(write_experiment(tmp_path, experiment_dict(), "a|b <i>"))
    described = {"experiment": experiment.name, "run_name": "x", "stage": None, "seed": 0}
    assert card.format_run_title(described) == r"run 'x' of experiment a\|b &lt;i&gt; (seed 0)"


# --- refusals -----------------------------------------------------------------------------------------------


def test_runs_of_different_data_in_one_column_are_refused():
    finish("gpt2_medium_owt", "reference", 2.8, data_fingerprint="one")
    finish("gpt2_large_owt", "random_18", 2.9, data_fingerprint="two")
    with pytest.raises(
        UserError,
        match="'Medium, 24 layers, random start' was measured with the data one, 'Large, 18.*' with the "
        "data two",
    ):
        tables.table("table5")


def test_scores_of_different_task_versions_are_refused():
    finish("openllama_3b_1b", "opt_1b", 2.0, tasks={"wsc": score(0.5, 0.01)})
    finish("openllama_3b_1b", "one_epoch", 2.0, tasks={"wsc": score(0.5, 0.01, version="2.0")})
    with pytest.raises(UserError, match="version 1.0 of task t .* version 2.0"):
        tables.table("openllama_commonsense")


def test_a_rehearsal_is_no_result(capsys):
    finish("gpt2_medium_owt", "reference", 5.0, rehearsal=True)
    with pytest.raises(UserError, match="gpt2_medium_owt/reference .* is a rehearsal, not a result"):
        tables.table("table5")
    finish("gpt2_medium_owt", "reference", 2.8)
    finish("gpt2_medium_owt", "reference", 6.0, rehearse=True)
    tables.table("table5", rehearse=True)
    said = capsys.readouterr().out
    assert (
        said.startswith("REHEARSAL, not a result.")
        and "REHEARSAL (worse)" in said
        and "6.0000" in said
        and "2.8000" not in said
    )
    assert (table_files.locate_results(True, 0) / "table5.md").is_file() and not table_files.locate_results(
        False, 0
    ).exists()


def test_unknown_items_and_the_wrong_verb():
    with pytest.raises(UserError, match="did you mean 'table5'"):
        load_item("table55")
    with pytest.raises(UserError, match="fig05 is a figure; use: python -m inheritune figure fig05"):
        tables.table("fig05")
    with pytest.raises(UserError, match="table5 is a table; use: python -m inheritune table table5"):
        figures.figure("table5")
    assert "did you mean" in run_verb("table", "table5", "--mising", check=False).stderr


# --- what has to be run -------------------------------------------------------------------------------------


def plan(name: str, *there: tuple, rehearse=False) -> list[str]:
    item = load_item(name)
    return [
        s.line()
        for s in list_missing(item, load_experiments(item, rehearse), lambda *what: what[:3] in there)
    ]


def test_what_is_missing_comes_in_order_and_once():
    assert plan("table3") == [
        "prepare gpt2_medium_owt - -",
        "train gpt2_medium_owt reference 1",
        "train gpt2_medium_owt submodules_attn 1,2",
        "train gpt2_medium_owt submodules_mlp 1,2",
        "train gpt2_medium_owt submodules_no_norms 1,2",
        "train gpt2_medium_owt inheritune_16 1,2",
    ]
    data = ("prepare", "gpt2_medium_owt", "-")
    trained = [("train", "gpt2_medium_owt", run) for run in ("reference", "submodules_attn", "inheritune_16")]
    assert plan("table3", data, *trained) == [
        "train gpt2_medium_owt submodules_mlp -",
        "train gpt2_medium_owt submodules_no_norms -",
    ]
    lines = plan("table2")
    assert "train gpt2_medium_owt stacking_half 1,2" in lines
    assert (
        lines[lines.index("train gpt2_medium_owt stacking_half 1,2") + 1]
        == "train gpt2_medium_owt stacking 1,2,4"
    )
    assert plan("table6") == []
    # a grown run's stage stands for the run of its depth, and growth comes first where other rows show it
    grown = [(verb, "gpt2_medium_owt", "inheritune") for verb in ("train", "stage")]
    there = [data, *trained[:2], *grown]
    assert not any("inheritune" in line for line in plan("table3", *there))
    lines = plan("table5")
    assert "grow gpt2_medium_owt inheritune 1,2" in lines and not any("inheritune_16" in x for x in lines)
    ended = [data, *trained[:1], ("train", "gpt2_medium_owt", "inheritune")]
    assert "train gpt2_medium_owt inheritune_16 -" in plan("table5", *ended)
    # one grown run for several rows, scores after training, models of others without training
    lines = plan("owt_perplexity")
    (grown,) = [
        number for number, line in enumerate(lines, 1) if line.startswith("grow gpt2_medium_owt inheritune ")
    ]
    assert lines[-3:] == [f"evaluate gpt2_medium_owt inheritune/stage{stage} {grown}" for stage in (1, 2, 3)]
    verbs = [line.split()[0] for line in lines]
    assert verbs == ["prepare", *["train"] * 6, "grow", "grow", *["evaluate"] * 10]
    assert plan("openllama_commonsense")[:5] == [
        "prepare openllama_3b_1b - -",
        *(f"train openllama_3b_1b {run} 1" for run in ("eight_epochs", "one_epoch", "released_391m")),
        "evaluate openllama_3b_1b reference 1",
    ]
    assert "evaluate openllama_7b inheritune@152560 2" in plan("mmlu_tokens")


def test_attention_is_measured_on_the_text_of_the_figure():
    assert plan("fig16")[-1] == "analyze gpt2_medium_fineweb gpt2_large_owt/reference 3,4"
    assert "analyze gpt2_medium_owt reference 1,2 --maps 4:2,7:3,20:2,22:4" in plan("fig09")
    assert "analyze gpt2_medium_owt reference 1,2 --maps 2:2,3:3,7:2,8:4" in plan("fig09", rehearse=True)
    assert plan("fig11") == ["prepare attention/llama3_8b - -", "analyze attention/llama3_8b reference 1"]


def test_missing_on_disk_and_by_the_command_line():
    finish("gpt2_small_owt", "reference", 3.0)
    finish("gpt2_small_owt", "random_4", 3.2)
    assert run_verb("table", "table4", "--missing").stdout.splitlines() == [
        "prepare gpt2_small_owt - -",
        "train gpt2_small_owt layers_5_to_8 1",
        "train gpt2_small_owt layers_9_to_12 1",
        "grow gpt2_small_owt inheritune 1",
    ]


def end_growth_early(layers: int = 14) -> None:
    """Medium's growth reached parity at its second round."""
    finish("gpt2_medium_owt", "reference", 2.65)
    for stage in (1, 2):
        finish("gpt2_medium_owt", "inheritune", 2.60, stage=stage, layers=10 + 2 * stage)
    root = RunDir.of(load_experiment("gpt2_medium_owt"), "inheritune")
    write_json(root.done, {"stage": 2, "layers": layers})


def test_growth_that_ended_early_is_said_and_shown(capsys):
    end_growth_early()
    tables.table("table5")
    said = capsys.readouterr().out
    (row, claim) = (line for line in said.splitlines() if "Inheritune, round 3" in line)
    assert "2.81±0.0105 / 2.6000±0.0051: -0.2108 growth ended at 14 layers" in row
    assert "/ with 14 layers below the full model: -0.0500±0.0072, holds" in claim
    assert f"{2 * 100_000 * 393_216:.2e}" in row  # the tokens of the rounds that there were
    record = rows_of("table5")["Medium, 16 layers, Inheritune, round 3", "validation loss"]
    assert (record["run"], record["stage"]) == ("gpt2_medium_owt/inheritune", "2")
    assert figures.figure("fig05")
    said = capsys.readouterr().out
    assert "16 layers, Inheritune (growth ended at 14 layers): step 100,000: this repository 2.6000" in said
    # the paper's depth is trained beside it, and shown where it is finished
    assert "train gpt2_medium_owt inheritune_16 1" in list_on_disk("table5")
    finish("gpt2_medium_owt", "inheritune_16", 2.63, layers=16)
    assert not any("inheritune_16" in line for line in list_on_disk("table5"))
    tables.table("table5")
    said = capsys.readouterr().out
    assert "2.6300±0.0051: -0.1808 better" in said and "growth ended" not in said.partition("A cell is")[0]
    assert "with 16 layers within the noise of the full model: -0.0200" not in said  # 2.8 times its noise
    assert "with 16 layers below the full model: -0.0200±0.0072, holds" in said


def list_on_disk(name: str) -> list[str]:
    """What `--missing` lists for a table or figure."""
    item, experiments = load_item(name), load_experiments(load_item(name))
    exists = prerequisites.make_disk_check(item, experiments, 0)
    return [step.line() for step in list_missing(item, experiments, exists)]


def test_growth_that_ended_early_leaves_the_paper_s_depth_to_run():
    end_growth_early()
    write_attention(RunDir.of(load_experiment("gpt2_medium_owt"), "reference"))
    assert list_on_disk("fig08") == [
        "prepare gpt2_medium_owt - -",
        "train gpt2_medium_owt inheritune_16 1",
        "analyze gpt2_medium_owt inheritune_16 1,2",
    ]
    write_attention(finish("gpt2_medium_owt", "inheritune_16", 2.7))
    assert list_on_disk("fig08") == ["prepare gpt2_medium_owt - -"]


def test_without_a_run_of_its_depth_the_last_stage_is_drawn(capsys):
    end_growth_early()
    root = RunDir.of(load_experiment("gpt2_medium_owt"), "inheritune")
    write_attention(root.stage(2))
    assert figures.figure("fig08")
    assert "16 layers, Inheritune: drawn, growth ended at 14 layers" in capsys.readouterr().out


# --- figures ------------------------------------------------------------------------------------------------


def write_attention(folder: RunDir, n_layers=24, maps=(), rehearsal=False) -> None:
    rows = [{"kind": "header", "model": "m", "rehearsal": rehearsal}]
    for layer in range(n_layers):
        rank = 1 + 20 / (layer + 1)
        rows.append(
            {
                "kind": "layer",
                "layer": layer,
                "rank": {"0.9": [rank] * 16},
                "max_rank": {"0.8": rank, "0.9": rank},
                "max_rank_std": {"0.8": 0.1, "0.9": 0.1},
                "avg_mass": {"0.9": rank},
                "avg_mass_std": {"0.9": 0.1},
            }
        )
    rows += [
        {"kind": "map", "layer": a, "head": b, "sequences": 3, "mean": [[1.0, 0.0], [0.5, 0.5]]}
        for a, b in maps
    ]
    write_text(folder.attention, "".join(json.dumps(row) + "\n" for row in rows))


DRAWN = {
    "fig01": 2,
    "fig03": 2,
    "fig05": 3,
    "fig06": 3,
    "fig07": 2,
    "fig08": 1,
    "fig14": 2,
    "fig17": 1,
    "fig18": 3,
    "fig19": 1,
    "fig20": 1,
}
"""Figures that show the paper's data without any run of ours: how many plots."""


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_without_any_run(name, capsys):
    paths = figures.figure(name)
    said = capsys.readouterr().out
    assert len(paths) == DRAWN.get(name, 0) and all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    assert said.count("not run") >= len(load_item(name).models())
    assert all(note in said for note in load_item(name).notes)


def test_curve_check_of_a_run_in_progress(capsys):
    """ "On the curve at 10K?" """
    folder = RunDir.of(load_experiment("gpt2_medium_owt"), "reference")
    for loss, where in ((3.2750, "on the curve"), (3.4000, "above the curve"), (3.1000, "below the curve")):
        write_text(
            folder.metrics, json.dumps({"step": 10_000, "tokens": 10_000 * 393_216, "val_loss": loss}) + "\n"
        )
        assert figures.figure("fig05")
        said = capsys.readouterr().out
        assert (
            f"step 10,000: this repository {loss:.4f}, the paper 3.2850, {loss - 3.285:+.4f} (±0.0202): "
            f"{where}" in said
        )


def test_attention_figures_draw_ours_beside_the_papers(capsys):
    folder = finish("gpt2_medium_owt", "reference", 2.8)
    alone = {name: [p.read_bytes() for p in figures.figure(name)] for name in ("fig01", "fig14")}
    write_attention(folder, maps=[(3, 1), (6, 2), (19, 1), (21, 3), (0, 0)])
    for name, before in alone.items():
        assert figures.figure(name)[0].read_bytes() != before[0]
    assert [p.name for p in figures.figure("fig09")] == ["fig09_a.png"] and len(figures.figure("fig10")) == 1
    assert "24 layers: drawn" in capsys.readouterr().out
    write_attention(folder, rehearsal=True)
    with pytest.raises(UserError, match="is a rehearsal's, not a result"):
        figures.figure("fig01")


def test_training_losses_are_means_between_evaluations():
    rows = [{"step": s, "loss": float(s)} for s in (1, 2)] + [
        {"step": 2, "val_loss": 9.0},
        {"step": 3, "loss": 5.0},
        {"step": 3, "val_loss": 9.0},
    ]
    assert [(row["step"], row["val_loss"]) for row in figures.select_evaluations(rows, "train_loss")] == [
        (2, 1.5),
        (3, 5.0),
    ]
    assert [row["val_loss"] for row in figures.select_evaluations(rows, "val_loss")] == [9.0, 9.0]


# --- scripts ------------------------------------------------------------------------------------------------


def test_scripts_are_sound_and_cover_every_item():
    named = []
    for script in SCRIPTS:
        text = script.read_text()
        last = text.splitlines()[-1]
        assert last.endswith(' "$@"'), script  # what is not understood is not ignored
        named += last.partition('paper_item.sh" ')[2].removesuffix(' "$@"').split()
        assert f"recipes/{script.name}" in text, script
    assert sorted(named) == sorted(list_items())
    done = subprocess.run(
        ["bash", RECIPES / "table6_model_configs.sh", "--seed", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "SEED=0 PROCS=2" in done.stderr and not done.stdout
    for word, suggestion in (("table5x", "did you mean 'table5'?"), ("qqq", "fig01, ")):
        done = subprocess.run(
            ["bash", RECIPES / "table6_model_configs.sh", word],
            env={**os.environ, "REHEARSE": "1", "DRAW": "1", "VIRTUAL_ENV": sys.prefix},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and "| " not in done.stdout, "nothing is drawn"
        assert f"no experiment '{word}'" in done.stderr and suggestion in done.stderr
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1091", *SCRIPTS, RECIPES / "paper_item.sh"], check=True)


def test_the_papers_numbers_are_listed_with_their_source():
    listed = re.findall(
        r"\]\((\w+\.(?:csv|yaml))\)", (paper.PAPER_FOLDER / "README.md").read_text(encoding="utf-8")
    )
    assert set(listed) == {
        path.name for path in paper.PAPER_FOLDER.iterdir() if path.suffix in (".csv", ".yaml")
    }


def test_the_index_names_every_script_and_is_current():
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(((?:table|fig)\w+\.sh)\)", text)) == {script.name for script in SCRIPTS}
    assert text == paper_index.document(), "recipes/README.md is stale: python tools/paper_index.py"
    assert all(load_item(name).reports for name in list_items())
