"""`table ITEM`: results as a table, from the JSON of finished runs only. ITEM is an experiment; its `paper` section names
the rows, the first of which is the reference; a grown run gives one row per stage.
"""

from dataclasses import dataclass

from tabulate import tabulate

from inheritune.config import Experiment, UserError, load_experiment
from inheritune.rundir import RunDir, read_json, read_jsonl, write_text

COLUMNS = (
    "model", "layers", "parameters", "steps", "validation loss (95% interval)", "difference to the reference (95% interval)",
    "steps to the reference's loss", "tokens/s", "training FLOPs",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One finished run, or one stage of a grown run."""

    label: str
    folder: RunDir
    results: dict
    flops: float
    """Training FLOPs, those of the stages before it counted (a person pays for them)."""


def entries(experiment: Experiment, seed: int = 0) -> list[Entry]:
    """The table's rows in order; runs that are not finished are left out.

    Raises UserError if the experiment defines no rows or its rows were measured on different data."""
    if not experiment.paper:
        raise UserError(f"experiment '{experiment.name}' has no 'paper' section that names table rows")
    found = []
    for row in experiment.paper:
        run, root = experiment.run(row.run), RunDir.of(experiment, row.run, seed)
        if not run.grow:
            if root.is_done():
                results = read_json(root.results)
                found.append(Entry(row.label, root, results, results.get("train_flops", 0.0)))
            continue
        number, flops = 1, 0.0
        while root.stage(number).is_done():
            results = read_json(root.stage(number).results)
            flops += results["train_flops"]
            found.append(Entry(f"{row.label}, stage {number}", root.stage(number), results, flops))
            number += 1
    data = {entry.results["data_fingerprint"]: entry.label for entry in found}
    if len(data) > 1:
        raise UserError(f"the runs were measured on different data and cannot share a table: {data}")
    return found


def steps_to(metrics: list[dict], target: float) -> int | None:
    """First evaluated step whose curve loss is at or below `target`, or None."""
    return next((row["step"] for row in metrics if row.get("val_loss", target + 1) <= target), None)


def validation_curve(folder: RunDir) -> list[dict]:
    """The evaluation rows of metrics.jsonl: step, tokens, val_loss."""
    return [row for row in read_jsonl(folder.metrics) if "val_loss" in row]


def speed(folder: RunDir) -> float | None:
    """Median tokens/s of the logged steps."""
    rates = sorted(row["tokens_per_s"] for row in read_jsonl(folder.metrics) if row.get("tokens_per_s"))
    return rates[len(rates) // 2] if rates else None


def make_table(experiment: Experiment, found: list[Entry]) -> list[list[str]]:
    """Cells of the table, COLUMNS wide."""
    curve = validation_curve(found[0].folder)
    target = curve[-1]["val_loss"] if curve else None
    cells = []
    for entry in found:
        results, loss = entry.results, entry.results["validation"]
        gap, reached = results.get("difference"), None
        if target is not None:
            reached = steps_to(validation_curve(entry.folder), target)
        rate = speed(entry.folder)
        cells.append(
            [
                entry.label,
                str(results["layers"]),
                f"{results['parameters'] / 1e6:.2f}M",
                str(results["steps"]),
                f"{loss['mean']:.4f} ({loss['low']:.4f} to {loss['high']:.4f})",
                f"{gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" if gap else "",
                "not reached" if reached is None else str(reached),
                f"{rate:,.0f}" if rate else "",
                f"{entry.flops:.2e}",
            ]
        )
    return cells


def verdict(experiment: Experiment, found: list[Entry]) -> str:
    """What was found, in words, whichever way it came out: the grown run's last stage against the reference, and against
    the random runs of its size."""
    grown = [entry for entry in found if entry.results.get("stage")]
    if not grown:
        return "No grown run is finished yet."
    reference, mark = found[0].results, "REHEARSAL, not a result. " if experiment.rehearsal else ""
    root = RunDir(grown[-1].folder.path.parent)
    decision = read_json(root.done) if root.is_done() else None
    chosen = next(e for e in grown if e.results["stage"] == decision["stage"]) if decision else grown[-1]
    gap = chosen.results["difference"]
    size = f"{chosen.results['layers']} of the reference's {reference['layers']} layers"
    margin = experiment.run(next(row.run for row in experiment.paper if experiment.run(row.run).grow)).grow.margin
    reached = "reaches" if gap["high"] <= margin else "does not reach"
    text = (
        f"{mark}With {size}, Inheritune {reached} the reference's validation loss: {gap['mean']:+.4f} nats "
        f"({gap['low']:+.4f} to {gap['high']:+.4f})"
    )
    for entry in found[1:]:
        if not entry.results.get("stage"):
            other = entry.results["validation"]["mean"] - chosen.results["validation"]["mean"]
            side = "above" if other > 0 else "below"
            shape = f"{entry.results['layers']} layers, {entry.results['steps']} steps"
            text += f"; the {entry.label} ({shape}) ends {abs(other):.4f} {side} it"
            if entry.results.get("difference", {"high": margin + 1})["high"] <= margin:
                text += " and reaches the reference's loss too"
    return text + "."


NOTE = (
    "One seed. Intervals are 95% over the {n} fixed validation windows, differences are paired by window; they do not cover "
    "the choice of seeds."
)


def table(item: str, seed: int = 0, rehearse=None) -> None:
    """Print the table of experiment `item`, and write it as table.md beside its runs."""
    experiment = load_experiment(item, rehearse)
    found = entries(experiment, seed)
    if not found or found[0].label != experiment.paper[0].label:
        raise UserError(
            f"no table yet: run '{experiment.paper[0].run}' of {experiment.name} (seed {seed}) is not finished; train it first"
        )
    title = f"{'REHEARSAL ' if experiment.rehearsal else ''}{experiment.name}, seed {seed}"
    text = tabulate(make_table(experiment, found), headers=COLUMNS, tablefmt="github", disable_numparse=True)
    n = found[0].results["validation"]["n"]
    page = f"{title}\n\n{text}\n\n{NOTE.format(n=n)}\n\n{verdict(experiment, found)}\n"
    print(page)
    write_text(RunDir.of(experiment, "table.md", seed).path, page)
