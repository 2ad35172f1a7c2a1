"""The metrics of lm-eval's tasks: which of its scores an experiment means, and how they are read.

lm-eval computes a metric once for each filter of a task, which picks the answer out of the model's text:
gsm8k has a strict and a flexible one. `metrics` of an experiment names a metric, or "metric,filter".
"""

import contextlib
import math
import traceback
from collections.abc import Iterator
from typing import Any

from inheritune.config.sections import Task
from inheritune.errors import UserError, suggest_name, summarize_error
from inheritune.runtime import dist


def find_keys(name: str, task: Task, found: dict) -> dict[str, str]:
    """Return {metric of the experiment: its key in lm-eval's results} of a task or group that is loaded.

    Raises UserError for a metric or filter that lm-eval does not compute, for one that not all tasks of a
    group have, and for a metric of several filters of which none is named."""
    if task.task in found["groups"]:
        return {metric: _find_mean(name, task.task, metric, found) for metric in task.metrics}
    leaf = found["tasks"][task.task]
    return {metric: _find_key(name, metric, _list_filters(leaf, metric, name)) for metric in task.metrics}


def _list_filters(leaf: Any, metric: str, name: str) -> list[str]:
    """Return the filters of one of lm-eval's tasks of `name`. Raises UserError if it lacks the metric."""
    plain = metric.partition(",")[0]
    if plain not in leaf.aggregation():
        raise UserError(f"task {name} has no metric '{plain}'; {suggest_name(plain, leaf.aggregation())}")
    return [ensemble.name for ensemble in leaf._filters]


def _find_mean(name: str, group: str, metric: str, found: dict) -> str:
    """Return the key of a metric's mean over the tasks of a group. Raises UserError as `find_keys` does."""
    plain = metric.partition(",")[0]
    means = {mean.metric: mean.filter_list for mean in found["groups"][group].aggregate_metric_list or []}
    if plain not in means:
        raise UserError(
            f"task {name}: group '{group}' of lm-eval has no mean of '{plain}' over its tasks "
            f"(aggregate_metric_list); add it to the group's file, or name its tasks instead"
        )
    leaves = {leaf_name: _list_filters(leaf, metric, name) for leaf_name, leaf in found["tasks"].items()}
    all_filters = list(dict.fromkeys(one for filters in leaves.values() for one in filters))
    key = _find_key(name, metric, means[plain] or all_filters)
    chosen = key.partition(",")[2]
    if lacking := [leaf for leaf, filters in leaves.items() if chosen not in filters]:
        raise UserError(
            f"task {name}: the mean of '{plain}' over group '{group}' is by filter '{chosen}', which "
            f"'{lacking[0]}' lacks: it would leave that task out; correct the file of one of them"
        )
    return key


def _find_key(name: str, metric: str, filters: list[str]) -> str:
    """Return lm-eval's key "metric,filter". Raises UserError if no filter is named, or none of `filters`."""
    plain, _, chosen = metric.partition(",")
    chosen = chosen.strip()
    if chosen and chosen not in filters:
        raise UserError(f"task {name} has no filter '{chosen}' of {plain}; {suggest_name(chosen, filters)}")
    if not chosen and len(filters) > 1:
        names = ", ".join(f"'{plain},{one}'" for one in filters)
        raise UserError(
            f"task {name} has {plain} by {len(filters)} filters, each with a score of its own; name one in "
            f"metrics: {names}"
        )
    return f"{plain},{chosen or filters[0]}"


def read_score(values: dict, key: str) -> dict:
    """Return {score, stderr} of `key`, "metric,filter", in lm-eval's results of a task."""
    plain, _, chosen = key.partition(",")
    stderr = parse_stderr(values[f"{plain}_stderr,{chosen}"])
    return {"score": float(values[key]), "stderr": stderr}


def parse_stderr(stderr: float | str) -> float | None:
    """Return lm-eval's standard error, or None where it has none: N/A, nan of a single document, inf of a
    perplexity's bootstrap."""
    return float(stderr) if stderr != "N/A" and math.isfinite(float(stderr)) else None


def check_scores(name: str, row: dict, task: Task) -> None:
    """Raise UserError if a score of the row is nan or infinite, which JSON cannot hold."""
    for metric in task.metrics:
        if not math.isfinite(row[metric]["score"]):
            raise UserError(
                f"{metric} of task {name} is {row[metric]['score']}: the model's weights or the task's data "
                f"are damaged; the tasks before it are saved, --tasks scores others"
            )


def describe_scores(name: str, row: dict, task: Task) -> str:
    """Describe the scores of a task in one line."""
    parts = [
        f"{m} {row[m]['score']:.4f}" + (f" +- {row[m]['stderr']:.4f}" if row[m]["stderr"] else "")
        for m in task.metrics
    ]
    return f"{name}: {', '.join(parts)}, {row['n']} documents, {row['shots']} shots"


@contextlib.contextmanager
def explain_metric_errors(name: str) -> Iterator[None]:
    """Raise in one sentence what a metric of lm-eval raises for the documents of task `name`, such as the
    binary F1 for three choices."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(
            f.filename.endswith("lm_eval/api/metrics.py") or f.name == "process_results" for f in frames
        ):
            raise
        raise dist.NodeError(
            f"a metric of task {name} cannot be computed of its documents ({summarize_error(error)}); "
            f"correct metric_list in the task's file"
        ) from None
