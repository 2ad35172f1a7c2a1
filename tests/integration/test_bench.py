"""benchmarks: what its README and the documents say is what the stored results say, and a part runs and
judges itself."""

import json
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

BENCH = REPOSITORY / "benchmarks"
PAGE = REPOSITORY / "docs" / "benchmarks.md"
SAID = {  # row of that page: (part, words of the case, words of the goal) of each ratio in it, in order
    "training step, GPT-2 124M, one rank": [
        ("train_step", "124M, windows of 512, one rank", "time of the plain loop"),
        ("train_step", "124M, windows of 512, one rank", "time of HF Trainer"),
        ("train_step", "124M, windows of 512, one rank", "time of the matrix products alone"),
    ],
    "training step, GPT-2 124M, ZeRO 3": [
        ("train_step", "124M, windows of 512, two ranks", "time of the plain DDP"),
        ("train_step", "124M, windows of 512, two ranks", "time of HF Trainer with DeepSpeed"),
    ],
    "prepare, GPT-2's": [
        ("prepare", "GPT-2 BPE", "time of datasets.map, as nanoGPT"),
        ("prepare", "GPT-2 BPE", "time of the encoder alone on all cores"),
    ],
    "inherit, 13 of": [
        ("inherit", "13 of 26", "time of from_pretrained, save_pretrained"),
        ("inherit", "13 of 26", "time of mergekit passthrough"),
    ],
    "analyze": [
        ("analyze", "by SVD", "time of svd by head"),
        ("analyze", "N = T = 100", "time of the forward pass"),
    ],
    "a step's batch": [("batches", "60", "time of nanoGPT's loader")],
    "checkpoint": [
        ("checkpoint", "ZeRO 1", "time of DeepSpeed's save"),
        ("checkpoint", "ZeRO 3", "time of DeepSpeed's save"),
        ("checkpoint", "ZeRO 1", "time of DeepSpeed's save with a flush, as ours"),
        ("checkpoint", "ZeRO 3", "time of DeepSpeed's save with a flush, as ours"),
    ],
    "lm-eval scores": [("downstream", "400", "time of the lm_eval command with its defaults")],
}


def test_tables_are_what_the_report_makes_of_the_results():
    told = "import report; print(report.text())"
    made = subprocess.run(
        [sys.executable, "-c", told], cwd=BENCH, capture_output=True, text=True, check=True
    ).stdout
    assert made.strip() in (BENCH / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", SAID)
def test_the_documents_give_the_medians(row):
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row}"))
    expected = []
    for part, case, what in SAID[row]:
        results = json.loads((BENCH / "results" / f"{part}.json").read_text(encoding="utf-8"))
        goals = next(result["goals"] for result in results if case in result["case"])
        expected.append(
            next(
                goal["median"]
                for goal in goals
                if goal["what"] == what or goal["what"].startswith(f"{what} (")
            )
        )
    said = [float(number) for number in re.findall(r"\b\d\.\d\d\b", line.split("|")[2])]
    assert said == pytest.approx(expected, abs=0.0051)


@pytest.mark.slow
def test_a_part_in_small_takes_turns_and_judges_itself(tmp_path):
    command = [
        sys.executable,
        BENCH / "pieces.py",
        "--size",
        "small",
        "--turns",
        "2",
        "--case",
        "head and loss",
    ]
    command += ["--folder", tmp_path / "work", "--out", tmp_path / "out.json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (result,) = json.loads((tmp_path / "out.json").read_text())
    order = re.findall(r"turn (\d) ([^:]+(?:: their three products)?):", said)
    first, second = ([name for number, name in order if number == turn] for turn in "12")
    assert first == list(result["turns"]) and second == first[::-1]
    assert all(len(turns) == 2 and turns[0]["seconds"] > 0 for turns in result["turns"].values())
    same = next(goal for goal in result["goals"] if "difference of a loss" in goal["what"])
    assert same["met"] is True and len(same["values"]) == 2
    ratio = next(goal for goal in result["goals"] if goal["what"] == "time of torch's cross-entropy")
    ours, theirs = (result["turns"][name] for name in ("ours", "torch's cross-entropy"))
    assert ratio["values"] == pytest.approx(
        [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)], rel=0.01
    )
