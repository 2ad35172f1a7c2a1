"""Downstream scores: `evaluate --model` beside the `lm_eval` command with its defaults, on the same tasks and
checkpoint.

The tasks are the rehearsal's (multiple choice, a last word, whole texts), their documents repeated; both
programs load the model once for all of them, and both must give the same scores. Times are those of whole
processes.
"""

import json
import os
import shutil
from pathlib import Path

from harness import Case, Goal, clock, main, over, run, verb, write_experiment, write_tokens
from lm_eval_command import lm_eval_command, lm_eval_results

TASKS = {
    "choice": {"task": "rehearsal_choice", "metrics": ["acc"]},
    "word": {"task": "rehearsal_word", "metrics": ["acc"]},
    "text": {"task": "rehearsal_text", "metrics": ["bits_per_byte"]},
}


def setup(work: dict, folder: Path) -> None:
    from inheritune.config.experiment import load_experiment
    from inheritune.config.paths import RECIPES
    from inheritune.data.bpe_training import train_bpe
    from inheritune.files.rundir import get_data_dir
    from inheritune.models.networks import build_config
    from inheritune.models.surgery import write_random

    place = folder / "downstream"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(RECIPES / "lm_eval" / "rehearsal", place / "tasks")
    documents = (place / "tasks" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(documents[number % len(documents)]) for number in range(work["documents"])]
    for number, row in enumerate(rows):  # equal requests would be answered once
        row["question"], row["text"] = f"{number}. {row['question']}", f"{number}. {row['text']}"
    (place / "tasks" / "test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    train = {
        "steps": 1,
        "batch_tokens": 64,
        "warmup_steps": 1,
        "lr": 3e-4,
        "precision": "fp32",
        "eval_windows": 2,
        "final_windows": 2,
    }
    path = write_experiment(
        place,
        {"sequence_length": 64, "name": "downstream"},
        model=work["model"],
        train=train,
        runs={"reference": {"init": "random"}},
        evaluate={"tasks": TASKS, "task_files": str(place / "tasks")},
    )
    experiment = load_experiment(str(path))
    write_tokens(get_data_dir(experiment), 1000, 1000, 300)
    write_random(build_config(experiment.model), place / "model", seed=0)
    train_bpe("bpe:300", [Path(os.__file__).read_text()] * 2, place / "model")
    shutil.copytree(place / "model", get_data_dir(experiment) / "tokenizer", dirs_exist_ok=True)


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def ours(work: dict, folder: Path) -> dict:
    place = folder / "downstream"
    (place / "ours.json").unlink(missing_ok=True)
    with clock() as measured:
        verb(
            "evaluate",
            place / "downstream.yaml",
            "--model",
            place / "model",
            "--out",
            place / "ours.json",
            **OFFLINE,
        )
    rows = json.loads((place / "ours.json").read_text())["tasks"]
    return measured | {
        f"score_{name}": rows[name][task["metrics"][0]]["score"] for name, task in TASKS.items()
    }


def lm_eval(work: dict, folder: Path, *more) -> dict:
    place, names = folder / "downstream", [task["task"] for task in TASKS.values()]
    shutil.rmtree(place / "theirs", ignore_errors=True)
    command = lm_eval_command(place / "model", names, place / "tasks", place / "theirs", *more)
    with clock() as measured:
        run(*command, **OFFLINE)
    rows = lm_eval_results(place / "theirs")["results"]
    return measured | {
        f"score_{name}": rows[its["task"]][f"{its['metrics'][0]},none"] for name, its in TASKS.items()
    }


def lm_eval_batched(work: dict, folder: Path) -> dict:
    return lm_eval(work, folder, "--batch_size", "16")


def scores_apart(turns: dict) -> list[float]:
    pairs = zip(turns["ours"], turns["lm_eval command"], strict=False)
    return [max(abs(a[f"score_{name}"] - b[f"score_{name}"]) for name in TASKS) for a, b in pairs]


def cases(size: str) -> list[Case]:
    model = {"size": "gpt2_tiny", "layers": 2, "width": 64, "heads": 4, "positions": 256, "vocab_size": 320}
    if size != "small":
        model = {
            "size": "gpt2_small",
            "layers": 6,
            "width": 384,
            "heads": 6,
            "positions": 256,
            "vocab_size": 320,
        }
    work = {"model": model, "documents": 16 if size == "small" else 400}
    goals = [
        Goal("time of the lm_eval command with its defaults", None, over("ours", "lm_eval command")),
        Goal(
            "time of the faster of the two",
            1.0,
            over("ours", "lm_eval command", "lm_eval command, --batch_size 16"),
        ),
        Goal("largest difference of a score", 1e-4, scores_apart),
    ]
    contestants = {
        "ours": ours,
        "lm_eval command": lm_eval,
        "lm_eval command, --batch_size 16": lm_eval_batched,
    }
    return [Case(f"three tasks of {work['documents']} documents", work, contestants, goals, setup)]


if __name__ == "__main__":
    main(__file__, cases)
