"""Downstream tasks by lm-eval: their data, and the scores of a model that is in memory already.

What the paper's tasks are called stands in recipes/lm_eval/tasks.yaml, beside task files of our own. lm-eval
makes the requests, shares them out over the ranks and computes the metrics; it is imported where it is used
(it takes seconds).
"""

import contextlib
import io
import logging
import math
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from inheritune.config.experiment import Evaluate, Task, resolve_path
from inheritune.data.tokens import PROBE
from inheritune.errors import UserError, nearest
from inheritune.evaluation.taskcode import TASK_FILES, guard_templates, refuse_task_code
from inheritune.files.hub import hub_errors
from inheritune.runtime import dist
from inheritune.runtime.log import logger

FEWSHOT_SEED = 1234  # of the lm_eval command


def choose(evaluate: Evaluate, names: str | None) -> dict[str, Task]:
    """The experiment's tasks called `names` ('a,b'; 'none' for none of them), or all. Raises UserError for an
    unknown one."""
    chosen = list(evaluate.tasks) if names is None else [] if names == "none" else names.split(",")
    for name in chosen:
        if name not in evaluate.tasks:
            raise UserError(
                f"the experiment's 'evaluate' section has no task '{name}'; {nearest(name, evaluate.tasks)}"
            )
    return {name: evaluate.tasks[name] for name in chosen}


def load_tasks(chosen: dict[str, Task], task_files: str | None, allow_code: bool = False) -> dict:
    """{name: lm-eval's task, or group of tasks, ready to be scored, its data set read from the cache or the
    Hub}.

    Raises UserError for task files that name code, unless that is allowed, for a task or metric that lm-eval
    does not know, fixed few-shot examples, and data that cannot be had."""
    if not chosen:
        return {}
    refuse_task_code(task_files, allow_code)
    guard_templates(allow_code)
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [TASK_FILES] + ([resolve_path(task_files)] if task_files else [])
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not {task.task for task in chosen.values()} <= set(manager.all_subtasks):
        manager = TaskManager(
            include_path=folders
        )  # lm-eval's own 14,000 take half a minute to list from a slow disk
    loaded = {}
    for number, (name, task) in enumerate(chosen.items(), 1):
        known = manager.all_subtasks + manager.all_groups
        if task.task not in known:
            raise UserError(
                f"lm-eval {version('lm-eval')} has no task '{task.task}' ({name}); "
                f"{nearest(task.task, known)}"
            )
        logger.info("reading the data of task %s (%d of %d)", name, number, len(chosen))
        with (
            hub_errors(f"the data of task {name} ({task.task} of lm-eval)", "datasets"),
            quiet(),
            rendering(name),
        ):
            found = manager.load(task.task)
        for leaf in found["tasks"].values():
            unknown = [metric for metric in task.metrics if metric not in leaf.aggregation()]
            if unknown:
                raise UserError(
                    f"task {name} has no metric '{unknown[0]}'; {nearest(unknown[0], leaf.aggregation())}"
                )
            if task.shots and leaf.get_config("num_fewshot") == 0:
                raise UserError(
                    f"task {name} takes no few-shot examples ({leaf.task_name}); set its shots to 0"
                )
            if (
                task.shots and dist.world() > 1 and type(leaf.sampler).__name__ != "FirstNSampler"
            ):  # MMLU takes the first n
                raise UserError(
                    f"lm-eval draws the few-shot examples of {name} on each rank by itself, so "
                    f"{dist.world()} ranks would give "
                    f"another score than one; evaluate it on one rank, or give it 'fewshot_config: "
                    f"{{sampler: first_n}}'"
                )
            leaf.set_config("num_fewshot", task.shots)
            leaf.set_fewshot_seed(FEWSHOT_SEED)
        loaded[name] = found
    return loaded


def task_version(task: Task, found: dict) -> str:
    """The version that the file of lm-eval's task or group names."""
    return str(
        found["groups"][task.task].version
        if task.task in found["groups"]
        else found["tasks"][task.task].VERSION
    )


@contextlib.contextmanager
def rendering(name: str, kind: type[UserError] = UserError):
    """What jinja raises for a template of task `name`, of its sandbox (taskcode.guard_templates) too, as one
    sentence. `kind`: a NodeError where ranks render other documents, and one of them alone may meet it."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError as error:
        raise kind(
            f"a template of task {name} cannot be rendered ({error}); correct its file. Python's own "
            f"objects, by which a "
            f"template could run code, are out of its reach, unless you trust it and give --allow-task-code"
        ) from None


@contextlib.contextmanager
def quiet():
    """The libraries print for a person at a terminal; in a log their bars are noise."""
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(bars):
        yield


def open_tokenizer(folder: Path):
    """The Hugging Face tokenizer in a checkpoint's folder, or None if there is no file of one.

    Raises UserError if it gives other ids than the sentencepiece model beside it."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise UserError(
            f"the tokenizer in {folder} cannot be opened: {' '.join(str(error).split())[:200]}"
        ) from None
    if (folder / "tokenizer.model").is_file():
        import sentencepiece

        theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(
            PROBE
        )
        ours = tokenizer.encode(PROBE, add_special_tokens=False)
        if ours != theirs:
            raise UserError(
                f"the tokenizer in {folder} does not give the ids of its sentencepiece model "
                f"(tokenizer.model) for a probe: "
                f"its scores would mean nothing; evaluate a copy of the folder with a tokenizer.json that "
                f"does, such as "
                f"'prepare' leaves in data/<name>/tokenizer"
            )
    return tokenizer


def harness(model: torch.nn.Module, tokenizer, batch: int, precision: str):
    """lm-eval's model around ours, its ranks being those of the launch (lm-eval alone would want its own
    accelerate launch, and to load the model again)."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        rank = property(lambda self: dist.rank())
        world_size = property(lambda self: dist.world())

        def all_gather(self, tensor):
            return torch.tensor(dist.gather(tensor.tolist())).flatten()

        def barrier(self):
            dist.barrier()

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            # the rolling windows come a batch at a time, and would draw a bar for each
            return super()._loglikelihood_tokens(
                requests, disable_tqdm or override_bs is not None, override_bs
            )

    model.config.use_cache = False  # a cache of keys and values is of no use to one forward
    mixed = None if precision == "fp32" else torch.bfloat16
    precisions = {
        "mixed_precision_dtype": mixed,
        "softmax_dtype": torch.float32,
    }  # a sum in bf16 would tie the choices
    return Harness(model, "causal", tokenizer=tokenizer, batch_size=batch, **precisions)


def unscored(chosen: dict[str, Task], loaded: dict, results: dict, checkpoint: str | None) -> list[str]:
    """Names of the tasks that results["tasks"] lacks for these weights, task and shots; rows of other weights
    are dropped.

    Raises UserError for a row of another version of its task."""
    rows = {name: row for name, row in results.get("tasks", {}).items() if row["checkpoint"] == checkpoint}
    missing = []
    for name, task in chosen.items():
        row, now = rows.get(name, {}), task_version(task, loaded[name])
        if (row.get("task"), row.get("shots")) != (task.task, task.shots) or not set(task.metrics) <= set(
            row
        ):
            missing.append(name)
        elif row["version"] != now:
            raise UserError(
                f"the score of {name} in results.json is of version {row['version']} of the task (lm-eval "
                f"{row['lm_eval']}), "
                f"lm-eval {version('lm-eval')} has {now}; delete that row, and 'seal', to score it anew, or "
                f"install the other "
                f"lm-eval"
            )
    if chosen:
        results["tasks"] = rows
    return missing


def score(lm, task: Task, found: dict) -> dict | None:
    """{task, metric: {score, stderr}, n, version, shots, lm_eval} of one task, on rank 0; None on the others.

    The standard error is lm-eval's: over the documents, not over seeds."""
    from lm_eval.evaluator import (
        evaluate,
    )  # what is behind the lm_eval command; the layer between loads model and tasks anew

    # the bootstrap of a perplexity's error would fork this process, whose threads may then hold locks for
    # ever; the same numbers come from one process, in a minute or two for LAMBADA
    os.environ["DISABLE_MULTIPROC"] = "1"
    with quiet(), rendering(task.task, dist.NodeError):
        answer = evaluate(lm, found, log_samples=False)
    if answer is None:
        return None
    values = answer.get("groups", {}).get(task.task) or answer["results"][task.task]
    row = {
        "task": task.task,
        "n": values["sample_len"],
        "version": task_version(task, found),
        "shots": task.shots,
    }
    row["lm_eval"] = version("lm-eval")
    for metric in task.metrics:
        key = next(key for key in values if key.partition(",")[0] == metric)
        stderr = values[key.replace(metric, f"{metric}_stderr", 1)]
        row[metric] = {"score": float(values[key]), "stderr": finite(stderr)}
    return row


def check_finite(name: str, row: dict, task: Task) -> None:
    """Raises UserError if a score of the row is nan or infinite, which no JSON can hold."""
    for metric in task.metrics:
        if not math.isfinite(row[metric]["score"]):
            raise UserError(
                f"{metric} of task {name} is {row[metric]['score']}: the model's weights or the task's data "
                f"are damaged; the "
                f"tasks before it are saved, --tasks scores others"
            )


def finite(stderr) -> float | None:
    """lm-eval's standard error; None where it has none (N/A; nan of a single document, inf of a perplexity's
    bootstrap)."""
    return float(stderr) if stderr != "N/A" and math.isfinite(float(stderr)) else None


def describe(name: str, row: dict, task: Task) -> str:
    """The scores of a task in one line."""
    parts = [
        f"{m} {row[m]['score']:.4f}" + (f" +- {row[m]['stderr']:.4f}" if row[m]["stderr"] else "")
        for m in task.metrics
    ]
    return f"{name}: {', '.join(parts)}, {row['n']} documents, {row['shots']} shots"
