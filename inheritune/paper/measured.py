"""Where the results of this repository's models are: the folders of a row, its scores, its attention."""

from inheritune.config.experiment import Experiment
from inheritune.config.rehearsal import shrink_layers
from inheritune.files.rundir import RunDir, find_weights, get_results_dir
from inheritune.paper.items import Row, fix_depth, split_run
from inheritune.runs.changes import check_own_run, find_job


def name_weights(experiment: Experiment, row: Row) -> str:
    """Return the name of the weights that a row shows: RUN, RUN/stage2, or RUN@10000 (weights kept at a
    step)."""
    run = split_run(row)[1]
    kept = f"@{experiment.runs[run].keep_at[row.kept - 1]}" if row.kept else ""
    return run + (f"/stage{row.stage}" if row.stage else "") + kept


def resolve_row(experiment: Experiment, row: Row, seed: int, started: bool = False) -> tuple[Row, str]:
    """Return (the row whose model stands for `row`, what to say about it).

    A row of a grown run shows its stage. If the growth ended before, it shows the run of that depth without
    growth (`fixed`), and where that is not finished the stage at which the growth ended. With `started`,
    runs in progress count too."""

    def is_there(folder: RunDir) -> bool:
        return folder.is_done() or (started and folder.metrics.is_file())

    if not row.stage:
        return row, ""
    root = RunDir.of(experiment, split_run(row)[1], seed)
    if is_there(root.stage(row.stage)):
        return row, ""
    if row.fixed and is_there(RunDir.of(experiment, row.fixed, seed)):
        return fix_depth(row), ""
    if not root.is_done():
        return row, ""
    ended = root.chosen()
    layers = ended.read_results()["layers"]
    found = row.model_copy(update={"stage": int(ended.path.name.removeprefix("stage"))})
    return found, f"growth ended at {layers} layers"


def find_folder(experiment: Experiment, row: Row, seed: int) -> RunDir | None:
    """Return the folder with the results of the row's run, stage, kept weights or third-party model; None if
    it is not finished.

    Raises UserError if the folder holds another run than the experiment describes."""
    run = split_run(row)[1]
    if experiment.run(run).init.external:
        return RunDir.of(experiment, run, seed)
    weights = find_weights(experiment, name_weights(experiment, row), seed)
    if weights is None:
        return None
    run_dir = RunDir(weights.parent)
    check_own_run(run_dir, find_job(experiment, run, seed, run_dir))
    return get_results_dir(weights)


def locate_attention(folder: RunDir, row: Row) -> RunDir:
    """Return the folder of a row's attention.jsonl: the model's, or a folder in it if `row.data` is set."""
    return RunDir(folder.path / f"on_{row.data}") if row.data else folder


def list_maps(experiment: Experiment, row: Row) -> list[tuple[int, int]]:
    """Return (layer, head), counted from 0, of the row's attention maps.

    In a rehearsal, they are those of the small model at the same relative depth."""
    pairs = [(layer - 1, head - 1) for layer, head in row.maps]
    if experiment.rehearsal:
        pairs = [(shrink_layers(layer + 1) - 1, head % experiment.model.heads) for layer, head in pairs]
    return list(dict.fromkeys(pairs))


def find_score(results: dict, metric: str) -> dict | None:
    """Return {score, stderr, n, task, version, shots} of metric tasks.NAME.METRIC in a results.json, or
    None."""
    _, task, name = metric.split(".")
    found = results.get("tasks", {}).get(task, {})
    if name not in found:
        return None
    return {**found[name], **{key: found.get(key) for key in ("n", "task", "version", "shots")}}
