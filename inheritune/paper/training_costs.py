"""What a model cost to train: its curve, FLOPs and tokens, read from the folders of finished runs."""

from inheritune.config.experiment import Experiment
from inheritune.config.run import Run
from inheritune.files.json_files import read_jsonl
from inheritune.files.rundir import RunDir
from inheritune.paper.items import Row, split_run
from inheritune.paper.measured import find_folder, resolve_row

COSTS = ("training FLOPs (all rounds)", "with its sources", "tokens to the reference's loss (all rounds)")


def read_validation_curve(folder: RunDir) -> list[dict]:
    """Return the evaluation rows of metrics.jsonl: step, tokens, val_loss."""
    return [row for row in read_jsonl(folder.metrics) if "val_loss" in row]


def find_step_at_loss(metrics: list[dict], target: float) -> int | None:
    """Return the first evaluated step whose validation loss is at or below `target`, or None."""
    return next((row["step"] for row in metrics if row.get("val_loss", target + 1) <= target), None)


def list_rounds(folder: RunDir, spec: Run) -> list[RunDir]:
    """Return the folders of the rounds of growth up to the one in `folder`; only `folder` for a run that does
    not grow."""
    if not spec.grow:
        return [folder]
    last = int(folder.path.name.removeprefix("stage"))
    return [RunDir(folder.path.parent).stage(number) for number in range(1, last + 1)]


def sum_flops(experiment: Experiment, run: str, row: Row, seed: int) -> tuple[float, float | None] | None:
    """Return (training FLOPs of all rounds up to the row's stage or kept weights, the same with the FLOPs of
    the runs that it starts from or learns from).

    The result is None if the run is not finished. Its second number is None if one of the other runs is not
    in this experiment."""
    spec = experiment.run(run)
    folder = find_folder(experiment, row.model_copy(update={"kept": None}), seed)
    if spec.init.external or folder is None:
        return None
    own = sum(one.read_results()["train_flops"] for one in list_rounds(folder, spec))
    own *= spec.keep_at[row.kept - 1] / experiment.train_of(spec).steps if row.kept else 1
    others: list[float | None] = []
    for source in dict(spec.sources()):
        cost = None
        if source in experiment.runs:
            where = Row(label=source, run=f"{experiment.name}/{source}")
            cost = sum_flops(experiment, source, where, seed)
        others.append(cost[1] if cost else None)
    known = [flops for flops in others if flops is not None]
    return own, own + sum(known) if len(known) == len(others) else None


def count_tokens_to_reference(experiment: Experiment, run: str, row: Row, seed: int) -> str:
    """Return, as a cell, the training tokens until the curve is at or below the reference's last value.

    Earlier rounds of growth are included."""
    spec, folder = experiment.run(run), find_folder(experiment, row, seed)
    reference = experiment.reference_of(spec) or (run if spec.init.random else None)
    if not (reference and folder):
        return ""
    curve = read_validation_curve(RunDir.of(experiment, reference, seed))
    if not curve:
        return ""
    step = find_step_at_loss(read_validation_curve(folder), curve[-1]["val_loss"])
    if step is None:
        return "not reached"
    before = sum(one.read_results()["tokens"] for one in list_rounds(folder, spec)[:-1])
    return f"{step * experiment.train_of(spec).batch_tokens + before:.2e}"


def make_cost_cells(row: Row, experiments: dict[str, Experiment], seed: int) -> list[str]:
    """Return the cells of a row under the headers COSTS."""
    if not row.run:
        return ["", "", ""]
    row = resolve_row(experiments[split_run(row)[0]], row, seed)[0]
    name, run = split_run(row)
    cost = sum_flops(experiments[name], run, row, seed)
    if cost is None:
        return ["", "", ""]
    with_sources = "not known" if cost[1] is None else f"{cost[1]:.2e}"
    return [f"{cost[0]:.2e}", with_sources, count_tokens_to_reference(experiments[name], run, row, seed)]
