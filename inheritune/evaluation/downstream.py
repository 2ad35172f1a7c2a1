"""Downstream tasks by lm-eval: their data, and the scores of a model that is already in memory.

recipes/lm_eval/tasks.yaml lists the names of the paper's tasks; this repository's own task files are in the
same folder. lm-eval makes the requests, distributes them over the ranks and computes the metrics. It is
imported where it is used, because the import takes seconds.
"""

import contextlib
import inspect
import io
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from inheritune.config.paths import resolve_path
from inheritune.config.sections import Evaluate, Task
from inheritune.data.tokenizer import PROBE
from inheritune.errors import UserError, is_machine_limit, suggest_name, summarize_error
from inheritune.evaluation.even_forwards import EvenForwards
from inheritune.evaluation.task_metrics import explain_metric_errors, find_keys, read_score
from inheritune.evaluation.taskcode import TASK_FILES, guard_templates, refuse_task_code
from inheritune.files.hub import translate_hub_errors
from inheritune.runtime import dist
from inheritune.runtime.log import logger

FEWSHOT_SEED = 1234
"""The default of the lm_eval command."""


def choose_tasks(evaluate: Evaluate, names: str | None) -> dict[str, Task]:
    """Return the experiment's tasks called `names` ('a,b'; 'none' for no task), or all of them.

    Raises UserError for an unknown one."""
    if names is None:
        return dict(evaluate.tasks)
    chosen = [] if names == "none" else names.split(",")
    for name in chosen:
        if name not in evaluate.tasks:
            raise UserError(
                f"the experiment's 'evaluate' section has no task '{name}'; "
                f"{suggest_name(name, evaluate.tasks)}"
            )
    return {name: evaluate.tasks[name] for name in chosen}


def load_tasks(chosen: dict[str, Task], task_files: str | None, allow_code: bool = False) -> dict[str, dict]:
    """Return {name: lm-eval's task or group of tasks, ready to be scored}, with the data sets read from the
    cache or the Hub.

    Raises UserError for task files that name code, unless that is allowed, for a task or metric that lm-eval
    does not know, for fixed few-shot examples, and for data that is not available."""
    if not chosen:
        return {}
    refuse_task_code(task_files, allow_code)
    guard_templates(allow_code)
    manager = _make_manager(chosen, task_files)
    known = manager.all_subtasks + manager.all_groups
    loaded = {}
    for number, (name, task) in enumerate(chosen.items(), 1):
        if task.task not in known:
            raise UserError(
                f"lm-eval {version('lm-eval')} has no task '{task.task}' ({name}); "
                f"{suggest_name(task.task, known)}"
            )
        logger.info("reading the data of task %s (%d of %d)", name, number, len(chosen))
        with (
            translate_hub_errors(f"the data of task {name} ({task.task} of lm-eval)", "datasets"),
            silence_libraries(),
            explain_template_errors(name),
            explain_data_errors(name),
        ):
            found = manager.load(task.task)
        find_keys(name, task, found)
        for leaf in found["tasks"].values():
            _check_leaf(name, task, leaf)
            leaf.set_config("num_fewshot", task.shots)
            leaf.set_fewshot_seed(FEWSHOT_SEED)
        loaded[name] = found
    return loaded


def _make_manager(chosen: dict[str, Task], task_files: str | None) -> Any:
    """Return lm-eval's TaskManager, with lm-eval's own tasks only if one of them is chosen."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [TASK_FILES] + ([resolve_path(task_files)] if task_files else [])
    manager = TaskManager(include_path=folders, include_defaults=False)
    if {task.task for task in chosen.values()} <= set(manager.all_subtasks):
        return manager
    return TaskManager(include_path=folders)  # its 14,000 tasks take half a minute to list from a slow disk


def _check_leaf(name: str, task: Task, leaf: Any) -> None:
    """Raise UserError if one of lm-eval's tasks of `name` cannot have `task.shots`."""
    if not task.shots:
        return
    if leaf.get_config("num_fewshot") == 0:
        raise UserError(f"task {name} takes no few-shot examples ({leaf.task_name}); set its shots to 0")
    # the sampler takes one more where a document may be its own example
    spare = leaf.config.fewshot_split is not None and leaf.config.fewshot_split == leaf.config.test_split
    if task.shots + spare > (known := len(list(leaf.fewshot_docs()))):
        raise UserError(
            f"task {name} has {known} documents to take few-shot examples from ({leaf.task_name}), too few "
            f"for {task.shots} shots; set fewer"
        )
    if dist.get_world_size() > 1 and type(leaf.sampler).__name__ != "FirstNSampler":  # MMLU takes the first n
        raise UserError(
            f"lm-eval draws the few-shot examples of {name} on each rank by itself, so "
            f"{dist.get_world_size()} ranks "
            f"would give another score than one; evaluate it on one rank, or give it 'fewshot_config: "
            f"{{sampler: first_n}}'"
        )


def get_task_version(task: Task, found: dict) -> str:
    """Return the version that the file of lm-eval's task or group names."""
    if task.task in found["groups"]:
        return str(found["groups"][task.task].version)
    return str(found["tasks"][task.task].VERSION)


def hash_content(found: dict) -> str:
    """Return a hash of what the scores of lm-eval's task or group depend on beside the weights: the settings
    and templates of its tasks, and the documents that they read."""
    digest = xxhash.xxh3_128()
    for name, group in sorted(found["groups"].items()):
        digest.update(f"{name} {group.aggregate_metric_list}".encode())
    for name, leaf in sorted(found["tasks"].items()):
        settings = leaf.dump_config()
        digest.update(f"{name} {json.dumps(settings, sort_keys=True, default=_describe_value)}".encode())
        splits = {settings.get("test_split") or settings.get("validation_split")}
        splits |= {settings.get("fewshot_split")} if settings.get("num_fewshot") else set()
        read = [leaf.dataset[split] for split in sorted(filter(None, splits))]
        if settings.get("num_fewshot") and not settings.get("fewshot_split"):
            read.append(leaf.fewshot_docs())  # of another split
        for document in itertools.chain.from_iterable(read):
            digest.update(repr(document).encode())
    return digest.hexdigest()


def _describe_value(value: Any) -> str:
    """Return the source of a function, or the kind of another object: no address, which each process has
    anew."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return type(value).__name__


@contextlib.contextmanager
def explain_template_errors(name: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Raise in one sentence what jinja, or its sandbox (taskcode.guard_templates), raises for a template of
    task `name`.

    `kind` is NodeError where ranks render different documents, because then one rank may fail alone."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError as error:
        raise kind(
            f"a template of task {name} cannot be rendered ({error}); correct its file. A template cannot "
            f"use Python's own objects, by which it could run code, unless you trust it and give "
            f"--allow-task-code"
        ) from None


@contextlib.contextmanager
def explain_data_errors(name: str) -> Iterator[None]:
    """Raise in one sentence what the datasets library raises for files on this machine that are missing,
    empty or damaged. `name` is the task's. What it raises for the Hub's is left to translate_hub_errors."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except StopIteration:
        raise UserError(f"the data of task {name} holds no documents: a file of it is empty") from None
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise cause from None
        raise UserError(
            f"the data of task {name} cannot be read ({summarize_error(cause)}): a file of it is damaged or "
            f"cut off; restore it"
        ) from None
    except FileNotFoundError as error:
        missing = error.filename or (re.findall("Unable to find '(/[^']*)'", str(error)) or [None])[0]
        if missing is None:
            raise
        raise UserError(
            f"the data of task {name} is missing: there is no {missing}; restore it, or correct the path in "
            f"the task's file"
        ) from None


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Drop what the libraries print, and their progress bars unless stderr is a terminal."""
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(bars):
        yield


def open_tokenizer(folder: Path) -> Any:
    """Return the Hugging Face tokenizer in a checkpoint's folder, or None if the folder has no file of one.

    A text that spells a special token, such as </s>, is encoded as characters, as `prepare` does. Raises
    UserError if its ids differ from those of the sentencepiece model in the same folder."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, split_special_tokens=True)
    except Exception as error:  # the tokenizers library raises nothing more precise
        if is_machine_limit(error):
            raise
        raise UserError(
            f"the tokenizer in {folder} cannot be opened: {' '.join(str(error).split())[:200]}"
        ) from None
    model_file = folder / "tokenizer.model"
    if model_file.is_file():
        import sentencepiece

        theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).encode(PROBE)
        ours = tokenizer.encode(PROBE, add_special_tokens=False)
        if ours != theirs:
            raise UserError(
                f"the tokenizer in {folder} does not give the ids of its sentencepiece model "
                f"(tokenizer.model) for a probe: its scores would mean nothing; evaluate a copy of the "
                f"folder with a tokenizer.json that does, such as the one that 'prepare' writes to "
                f"data/<name>/tokenizer, or the run itself (--run), whose ids are those of its training"
            )
    return tokenizer


def wrap_model(
    model: torch.nn.Module, tokenizer: Any, batch: int, precision: str, sharded: bool = False
) -> Any:
    """Return lm-eval's model around `model`, with the ranks of this launch.

    On its own lm-eval would need a launch by accelerate, and would load the model again. The ranks have
    different requests; of a `sharded` model they run as many forwards as the one that has most."""
    from lm_eval.models.huggingface import HFLM

    forwards = EvenForwards(model) if sharded else None

    class WrappedModel(HFLM):
        @property
        def rank(self) -> int:
            return dist.get_rank()

        @property
        def world_size(self) -> int:
            return dist.get_world_size()

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            if forwards:
                forwards.wait()
            return torch.tensor(dist.gather_objects(tensor.tolist())).flatten()

        def barrier(self) -> None:
            if forwards:
                forwards.wait()
            dist.barrier()

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            # The rolling windows come a batch at a time, and would draw a progress bar for each.
            return super()._loglikelihood_tokens(
                requests, disable_tqdm or override_bs is not None, override_bs
            )

    config: Any = model.config
    config.use_cache = False  # one forward pass does not reuse keys and values
    precisions = {
        "mixed_precision_dtype": None if precision == "fp32" else torch.bfloat16,
        "softmax_dtype": torch.float32,  # a sum in bf16 would tie the choices
    }
    return WrappedModel(model, "causal", tokenizer=tokenizer, batch_size=batch, **precisions)


def list_unscored(
    chosen: dict[str, Task], loaded: dict[str, dict], results: dict, checkpoint: str | None
) -> list[str]:
    """Return the names of the tasks that results["tasks"] lacks for these weights, task and shots.

    Rows of other weights are dropped from `results`. A row whose task has other templates or documents by now
    counts as missing; rows of older versions do not say which they had. Raises UserError for a row of another
    version of its task."""
    rows = {name: row for name, row in results.get("tasks", {}).items() if row["checkpoint"] == checkpoint}
    missing = []
    for name, task in chosen.items():
        row, now = rows.get(name, {}), get_task_version(task, loaded[name])
        is_same = (row.get("task"), row.get("shots")) == (task.task, task.shots)
        if not is_same or not set(task.metrics) <= set(row):
            missing.append(name)
        elif row["version"] != now:
            raise UserError(
                f"the score of {name} in results.json is of version {row['version']} of the task (lm-eval "
                f"{row['lm_eval']}), lm-eval {version('lm-eval')} has {now}; delete that row, and 'seal', to "
                f"score it anew, or install the other lm-eval"
            )
        elif "content" in row and row["content"] != hash_content(loaded[name]):
            logger.info("the documents or templates of task %s have changed: it is scored anew", name)
            missing.append(name)
    if chosen:
        results["tasks"] = rows
    return missing


def score_task(model: Any, task: Task, found: dict) -> dict | None:
    """Return {task, metric: {score, stderr}, n, version, shots, lm_eval} of one task on rank 0, None on the
    others.

    The standard error is lm-eval's: it is over the documents, not over seeds."""
    # This is the function behind the lm_eval command; the layer between loads the model and tasks anew.
    from lm_eval.evaluator import evaluate

    # The bootstrap of a perplexity's error would fork this process, whose threads may then hold locks for
    # ever. The same numbers come from one process, in a minute or two for LAMBADA.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with (
        silence_libraries(),
        explain_template_errors(task.task, dist.NodeError),
        explain_metric_errors(task.task),
    ):
        answer = evaluate(model, found, log_samples=False)
    if answer is None:
        return None
    values = answer.get("groups", {}).get(task.task) or answer["results"][task.task]
    row = {
        "task": task.task,
        "n": values["sample_len"],
        "version": get_task_version(task, found),
        "shots": task.shots,
        "lm_eval": version("lm-eval"),
        "content": hash_content(found),
    }
    keys = find_keys(task.task, task, found)
    return row | {metric: read_score(values, key) for metric, key in keys.items()}
