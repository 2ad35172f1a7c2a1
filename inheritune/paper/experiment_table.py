"""The table of an experiment: its `paper` section names the rows, the first of which is the reference.

A grown run gives one row per stage.
"""

from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from inheritune.config.experiment import Experiment
from inheritune.errors import UserError
from inheritune.files.escape import escape_markdown
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.rundir import RunDir
from inheritune.paper.table_cells import measure_cell, refuse_mixture
from inheritune.paper.training_costs import find_step_at_loss, read_validation_curve
from inheritune.runs.changes import check_own_run
from inheritune.runs.comparison import compare_with_reference
from inheritune.runs.job import Job

RESULT_COLUMNS = (
    "model",
    "layers",
    "parameters",
    "steps",
    "loss before training",
    "validation loss (95% interval)",
    "difference to the reference (95% interval)",
    "steps to the reference's loss",
    "tokens/s",
    "training FLOPs",
)


@dataclass(frozen=True)
class TableEntry:
    """One finished run, one stage of a grown run, or an evaluated third-party model."""

    label: str
    folder: RunDir
    results: dict
    flops: float
    """Training FLOPs, including those of the stages before it."""

    note: str = ""
    """What has changed in the experiment since this was trained."""


def list_entries(experiment: Experiment, seed: int = 0) -> list[TableEntry]:
    """Return the table's rows in order, without the runs that are not finished.

    Raises UserError if the experiment defines no rows, if its rows were measured on different data, or if a
    folder holds another run than the experiment describes."""
    if not experiment.paper:
        raise UserError(f"experiment '{experiment.name}' has no 'paper' section that names table rows")
    found = []
    for row in experiment.paper:
        folder = RunDir.of(experiment, row.run, seed)
        if experiment.run(row.run).grow:
            found += _list_stages(row.label, folder, Job(experiment, row.run, seed))
        elif experiment.run(row.run).init.external:
            if folder.is_evaluated():
                found.append(TableEntry(row.label, folder, folder.read_results(), 0.0))
        elif folder.is_done():
            job = Job(experiment, row.run, seed)
            note = check_own_run(folder, job)
            results = _pair_results(folder, job)
            found.append(TableEntry(row.label, folder, results, results.get("train_flops", 0.0), note))
    losses = [(entry.label, measure_cell(entry.results, "validation")) for entry in found]
    refuse_mixture("validation loss", f"the table of {experiment.name}", losses)
    return found


def list_notes(found: list[TableEntry]) -> list[str]:
    """Return a sentence for each row whose run was trained under other settings than the experiment has now,
    or whose loss was measured in another precision than that of the first row."""
    notes = [f"note: {entry.folder.path}: {entry.note}" for entry in found if entry.note]
    first, *others = [(entry.label, entry.results.get("precision")) for entry in found] or [("", None)]
    return notes + [
        f"note: the loss of '{label}' was measured in {precision}, that of '{first[0]}' in {first[1]}"
        for label, precision in others
        if precision and first[1] and precision != first[1]
    ]


def _list_stages(label: str, folder: RunDir, job: Job) -> list[TableEntry]:
    """Return an entry for each finished stage of a grown run."""
    found: list[TableEntry] = []
    number, flops = 1, 0.0
    while folder.stage(number).is_done():
        stage = replace(job, stage=number)
        note = check_own_run(folder.stage(number), stage)
        results = _pair_results(folder.stage(number), stage)
        flops += results["train_flops"]
        found.append(TableEntry(f"{label}, stage {number}", folder.stage(number), results, flops, note))
        number += 1
    return found


def _pair_results(folder: RunDir, job: Job) -> dict:
    """Return the results of a finished run with its difference to the reference, computed from the losses of
    both by window where the reference was finished after the run.

    Raises UserError if these two were measured on other data, windows or precision."""
    results = folder.read_results()
    file = folder.losses(results.get("steps") or 0)
    if results.get("difference") or not file.is_file():
        return results
    return results | compare_with_reference(job, np.load(file), results)


def make_rows(found: list[TableEntry]) -> list[list[str]]:
    """Return the cells of the table, RESULT_COLUMNS wide."""
    target = find_last_loss(found[0])
    return [make_row(entry, target, found[0].results["run"]) for entry in found]


def find_last_loss(entry: TableEntry) -> float | None:
    """Return the last loss on the windows of the curve; None if none was recorded. A third-party model has no
    curve, and its loss was measured once."""
    curve = read_validation_curve(entry.folder)
    return curve[-1]["val_loss"] if curve else entry.results.get("curve_loss")


def make_row(entry: TableEntry, target: float | None, reference: str) -> list[str]:
    """Return the cells of one row; `target` is the last validation loss of the run `reference`."""
    results, loss = entry.results, entry.results["validation"]
    is_trained, curve = results.get("steps") is not None, read_validation_curve(entry.folder)
    reached = None if target is None else find_step_at_loss(curve, target)
    before = next((row["val_loss"] for row in curve if row["step"] == 0), None)
    rate = read_speed(entry.folder)
    return [
        entry.label,
        str(results["layers"]),
        f"{results['parameters'] / 1e6:.2f}M",
        str(results["steps"]) if is_trained else "",
        "" if before is None else f"{before:.4f}",
        f"{loss['mean']:.4f} ({loss['low']:.4f} to {loss['high']:.4f})",
        _format_difference(results, reference),
        ("not reached" if reached is None else str(reached)) if is_trained else "",
        f"{rate:,.0f}" if rate else "",
        f"{entry.flops:.2e}" if is_trained else "",
    ]


def _format_difference(results: dict, reference: str) -> str:
    """Return the difference that was measured, "" without one; if it is not to the table's reference, with
    the name of the run that it is to."""
    if not (gap := results.get("difference")):
        return ""
    name = results.get("compared_with", reference)
    to = "" if name == reference else f"to {escape_markdown(name)}: "
    return f"{to}{gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})"


def read_speed(folder: RunDir) -> float | None:
    """Return the median tokens/s of the logged steps, or None."""
    rates = [row["tokens_per_s"] for row in read_jsonl(folder.metrics) if row.get("tokens_per_s")]
    return median(rates) if rates else None


def describe_outcome(experiment: Experiment, found: list[TableEntry]) -> str:
    """Return the result in words: the chosen stage of the first grown run that has one against the reference,
    the random starts, and the reference trained on."""
    growths = {row.run: grow for row in experiment.paper if (grow := experiment.run(row.run).grow)}
    finished = {entry.results["run"] for entry in found}
    grower = next((run for run in growths if run in finished), None)
    if grower is None:
        return "No grown run is finished yet."
    grown = [entry for entry in found if entry.results["run"] == grower]
    folder = RunDir(grown[-1].folder.path.parent)
    decision = folder.chosen().path if folder.is_done() else grown[-1].folder.path
    chosen = next(entry for entry in grown if entry.folder.path == decision)
    gap, margin = chosen.results.get("difference"), growths[grower].margin
    ended_by = read_json(folder.done)["margin"] if folder.is_done() else margin
    mark = "REHEARSAL, not a result. " if experiment.rehearsal else ""
    size = f"{chosen.results['layers']} of the reference's {found[0].results['layers']} layers"
    if gap is None:
        return f"{mark}With {size}, Inheritune was not compared with the reference: its noise is unknown."
    reached = "reaches" if gap["high"] <= margin else "does not reach"
    method = "gradual stacking" if growths[grower].from_ == "middle" else "Inheritune"
    if grower != next(iter(growths)):
        method += f" (run '{grower}')"
    text = (
        f"{mark}With {size}, {method} {reached} the reference's validation loss within the margin of "
        f"{margin:g} nats: {gap['mean']:+.4f} nats ({gap['low']:+.4f} to {gap['high']:+.4f})"
    )
    if ended_by != margin:
        text += f", at the stage where growth ended with a margin of {ended_by:g}"
    for entry in found[1:]:
        if _is_control(experiment, entry.results["run"]):
            text += _compare_control(entry, chosen, margin)
    return text + "."


def _is_control(experiment: Experiment, name: str) -> bool:
    """Return whether a run of the table is a random start, or the table's reference trained on.

    The reference of a variant is neither."""
    run, full = experiment.run(name), experiment.paper[0].run
    if experiment.reference_of(run) != full or experiment.is_reference(name):
        return False
    start = run.init.inherit
    if start is None or start.depth or start.source != full:
        return run.init.random
    return experiment.layers_of(run) == experiment.layers_of(experiment.run(full)) and not run.grow


def describe_gap(gap: float) -> str:
    """Return a difference of two losses in words, before "it": level if the printed digits are zero."""
    if not round(gap, 4):
        return "level with"
    return f"{abs(gap):.4f} {'above' if gap > 0 else 'below'}"


def _compare_control(entry: TableEntry, chosen: TableEntry, margin: float) -> str:
    """Return a clause that compares a control with the chosen stage."""
    gap = entry.results["validation"]["mean"] - chosen.results["validation"]["mean"]
    shape = f"{entry.results['layers']} layers, {entry.results['steps']} steps"
    text = f"; the {escape_markdown(entry.label)} ({shape}) ends {describe_gap(gap)} it"
    if entry.results.get("difference", {"high": margin + 1})["high"] <= margin:
        text += " and reaches the reference's loss within the margin too"
    return text
