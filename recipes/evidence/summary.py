"""The table, the plots and what is still missing of recipes/evidence.sh.

    python recipes/evidence/summary.py missing EXPERIMENT "core|all|RUN ..." SEED ...
    python recipes/evidence/summary.py summary EXPERIMENT SEED ...

Each seed's numbers are read from its finished runs into seeds/seedN.json; everything else is made from those
files, so that seeds of several sittings count together. Intervals are Student's t over seeds; differences are
paired by seed, whose runs all read the same batches."""

import math
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from inheritune.cluster.grow import read_stages, unfinished_source
from inheritune.config.experiment import RESUMABLE_KEYS, Experiment, Run, load_experiment, parse_layers
from inheritune.errors import UserError
from inheritune.files.rundir import (
    RunDir,
    beside,
    data_dir,
    find_weights,
    read_json,
    root,
    seal_of,
    write_json,
)
from inheritune.paper.figures import COLORS, MAIN, MARKERS, REFERENCE_GREY, canvas
from inheritune.paper.items import Row, model_folder
from inheritune.paper.tables import steps_to, training_cost, validation_curve, write_table

CORE = ("reference", "random", "random_longer", "inheritune", "last_half")
WINDOWS = ("inheritune", "window_2", "window_4", "last_half")
"""Runs (of a grown one its first stage) that start from a window of the reference's layers, with the same
parts."""
CHOOSING = (0, 1)
"""These seeds and those from 100 on chose the scale: they are not reported."""
HEADS = (
    "model",
    "layers",
    "parameters",
    "steps",
    "seeds",
    "validation loss (95% interval)",
    "to the reference (95% interval)",
    "to the random start (95% interval)",
    "tokens to the random start's loss",
    "training FLOPs",
    "with those it starts from",
)


def measured(experiment: Experiment, run: str) -> list[str]:
    """Names of the weights of `run` whose attention is measured: at each kept step and at the end, of a grown
    run's first stage. Runs that keep no step are not measured."""
    spec = experiment.run(run)
    name = f"{run}/stage1" if spec.grow else run
    return [*(f"{name}@{step}" for step in spec.keep_at), name] if spec.keep_at else []


def runs_of(experiment: Experiment, arms: str) -> list[str]:
    """The runs meant by `arms`: core, all, or names, to which the reference and what else they start from is
    added.

    Raises UserError for an unknown run."""
    if arms == "all":
        return list(experiment.runs)
    wanted = ["reference", *(CORE if arms == "core" else arms.split())]
    for name in wanted:  # which grows meanwhile
        wanted += [source for source, _ in experiment.run(name).sources() if source not in wanted]
    return [name for name in experiment.runs if name in wanted]


def text_of(experiment: Experiment) -> str:
    """Tells the prepared text from others."""
    return read_json(data_dir(experiment) / "manifest.json")["fingerprint"]


def check_seeds(experiment: Experiment, path: str, seeds: list[int]) -> None:
    """Raises UserError if the numbers of `seeds` could not stand beside those that are there."""
    chose = [seed for seed in seeds if (seed in CHOOSING or seed >= 100) and not experiment.rehearsal]
    if chose:
        raise UserError(
            f"seeds {chose} chose the scale (recipes/evidence/README.md) and are not reported; take 2 to 99"
        )
    text, folder = text_of(experiment), results_folder(experiment, path)
    for record in (read_json(file) for file in seed_files(folder)):
        if record["seed"] not in seeds and (record["key"], record["text"]) != (
            experiment_key(experiment),
            text,
        ):
            raise UserError(
                f"seed {record['seed']} in {folder} is of another text or version of the experiment, and "
                f"can't be counted "
                f"together with seeds {seeds}: move that folder away, or give all its seeds in SEEDS"
            )


def missing(experiment: Experiment, path: str, arms: str, seeds: list[int]) -> list[str]:
    """What can be done now, the longest first: `SEED VERB ...`, a line each. Raises UserError, before
    anything is trained, as `check_seeds` does."""
    check_seeds(experiment, path, seeds)
    found = []
    for seed in seeds:
        for name in runs_of(experiment, arms):
            spec = experiment.run(name)
            cost = experiment.layers_of(spec) * experiment.train_of(spec).steps
            if not RunDir.of(experiment, name, seed).is_done():
                if unfinished_source(experiment, spec, seed) is None:
                    found.append((cost, f"{seed} {'grow' if spec.grow else 'train'} {path} --run {name}"))
                continue
            for weights in measured(experiment, name):
                if not beside(find_weights(experiment, weights, seed)).attention.is_file():
                    found.append((0, f"{seed} analyze --model {weights} --data {path}"))
    return [line for _, line in sorted(found, key=lambda one: -one[0])]


def results_folder(experiment: Experiment, path: str) -> Path:
    """Where table and plots go: beside the experiment's file, those of a rehearsal beside its runs."""
    return (
        root() / "runs/rehearsal" / experiment.name
        if experiment.rehearsal
        else Path(path).resolve().with_suffix("")
    )


def seed_files(folder: Path) -> list[Path]:
    """The files of seeds, in the order of their numbers; what else lies there (seed1 (copy).json) is not
    ours."""
    found = {
        file: re.fullmatch(r"seed(0|[1-9][0-9]{0,9})\.json", file.name)
        for file in (folder / "seeds").glob("seed*.json")
    }
    return sorted((file for file, match in found.items() if match), key=lambda file: int(found[file][1]))


# --- one seed -----------------------------------------------------------------------------------------------


def experiment_key(experiment: Experiment) -> str:
    """Tells data, models and schedules apart whose numbers must not meet in one table; keys at their defaults
    don't count."""
    said = experiment.model_dump(
        mode="json", by_alias=True, exclude_defaults=True, include={"data", "model", "train"}
    )
    said["train"] = {k: v for k, v in said["train"].items() if k == "eval_every" or k not in RESUMABLE_KEYS}
    return seal_of(sorted((section, sorted(keys.items())) for section, keys in said.items()))


def run_key(run: Run) -> str:
    """Tells versions of a run apart."""
    return seal_of(sorted(run.model_dump(mode="json", by_alias=True, exclude_defaults=True).items()))


def collect(experiment: Experiment, seed: int) -> dict:
    """Every finished model of `seed`: {seed, key, text, rehearsal, made_by, models, growth}."""
    models, growth, starts = [], {}, []
    for row in experiment.paper:
        spec, folder = experiment.run(row.run), RunDir.of(experiment, row.run, seed)
        if not folder.is_done():
            continue
        stages, start = [None], spec.init.inherit
        if spec.grow:
            growth[row.run] = read_json(folder.done)
            stages = range(1, len(read_stages(folder, experiment.layers_of(spec))) + 1)
        for stage in stages:
            label = f"{row.label}, stage {stage}" if stage else row.label
            shows_window = row.run in WINDOWS and stage in (None, 1)
            where = Row(label=label, run=f"{experiment.name}/{row.run}", stage=stage)
            trained = model_folder(experiment, where, seed)
            results, (flops, all_flops) = (
                trained.read_results(),
                training_cost(experiment, row.run, where, seed),
            )
            models.append(
                {key: results[key] for key in ("run", "stage", "layers", "parameters", "steps", "weights")}
                | {
                    "label": label,
                    "key": run_key(spec),
                    "batch_tokens": experiment.train_of(spec).batch_tokens,
                }
                | {"loss": results["validation"], "train_flops": flops, "flops_with_sources": all_flops}
                | {"curve": [[point["step"], point["val_loss"]] for point in validation_curve(trained)]}
                | ({"window": parse_layers(start.layers, experiment.model.layers)} if shows_window else {})
            )
            starts += read_json(trained.provenance)["starts"]
        for weights in measured(experiment, row.run):
            rows = beside(find_weights(experiment, weights, seed)).read_attention()
            if not rows:
                continue
            step = int(weights.partition("@")[2] or experiment.train_of(spec).steps)
            layers = [one for one in rows if one["kind"] == "layer"]
            of_run = next(one for one in models if one["run"] == row.run)
            of_run.setdefault("attention", {})[str(step)] = {
                "max_rank": [layer["max_rank"][MAIN] for layer in layers],
                "avg_mass": [layer["avg_mass"][MAIN] for layer in layers],
                "heads_near_1": sum(layer["heads_near_1"] for layer in layers),
                "suggested": rows[-1]["suggested_layers"],
                "reason": rows[-1]["reason"],
            }
    keys = ("git_commit", "python", "versions", "machine")
    starts = [{key: start[key] for key in keys} for start in starts]
    return {
        "seed": seed,
        "key": experiment_key(experiment),
        "text": text_of(experiment),
        "rehearsal": experiment.rehearsal,
        "made_by": [one for index, one in enumerate(starts) if one not in starts[:index]],
        "models": models,
        "growth": growth,
    }


def together(earlier: dict, now: dict) -> dict:
    """`now` with the runs of an earlier record of that seed that were not trained this time, if they are of
    the same text and experiment and their reference came out with the same bits: sittings on machines that
    share no disk."""
    ours, theirs = find(now, "reference"), find(earlier, "reference")
    alike = (earlier["key"], earlier["text"]) == (now["key"], now["text"])
    if not (alike and ours and theirs and ours["weights"] == theirs.get("weights")):
        return now
    trained = {model["run"] for model in now["models"]}
    kept = [model for model in earlier["models"] if model["run"] not in trained]
    made_by = now["made_by"] + [one for one in earlier["made_by"] if one not in now["made_by"]] * bool(kept)
    return now | {
        "models": now["models"] + kept,
        "growth": earlier["growth"] | now["growth"],
        "made_by": made_by,
    }


# --- over seeds ---------------------------------------------------------------------------------------------


def over_seeds(values: list[float]) -> dict:
    """{mean, low, high, n}: the mean and its 95% interval, Student's t; no interval for a single seed."""
    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "n": n,
    }


def find(record: dict, run: str, stage: int | None = None) -> dict | None:
    """A seed's model, or None."""
    return next((one for one in record["models"] if (one["run"], one["stage"]) == (run, stage)), None)


def reference_attention(record: dict) -> dict:
    """What was measured of the reference at its end."""
    of_steps = find(record, "reference")["attention"]
    return of_steps[max(of_steps, key=int)]


def tokens_to(stages: list[dict], target: float) -> int | None:
    """Training tokens of the stages, one after the other, until a curve is at or below `target`."""
    before = 0
    for model in stages:
        step = steps_to([{"step": step, "val_loss": loss} for step, loss in model["curve"]], target)
        if step is not None:
            return before + step * model["batch_tokens"]
        before += model["steps"] * model["batch_tokens"]
    return None


def chosen(record: dict, run: str) -> tuple[dict, list[dict]] | None:
    """(the stage that the grown run ended with, all that were trained for it), or None."""
    stages = [one for one in record["models"] if one["run"] == run]
    return (stages[record["growth"][run]["stage"] - 1], stages) if run in record["growth"] else None


def aggregate(records: list[dict], order: Iterable[str]) -> list[dict]:
    """A row for each model that any seed has, in the `order` of their runs; for a grown run that went beyond
    its first stage in some seed also one for what each seed ended with ("as grown")."""
    names = {(one["run"], one["stage"]): one["label"] for record in records for one in record["models"]}
    order, rows = list(order), []
    for run, stage in sorted(names, key=lambda name: (order.index(name[0]), name[1] or 0)):
        found = [(find(record, run, stage), record) for record in records if find(record, run, stage)]
        stages = [
            [one for one in r["models"] if one["run"] == run and (one["stage"] or 1) <= (stage or 1)]
            for _, r in found
        ]
        rows.append(row_of(names[run, stage], found, stages))
        if (stage or 1) > 1 and (run, stage + 1) not in names:
            ends = [(chosen(record, run), record) for record in records if chosen(record, run)]
            label = names[run, 1].removesuffix(", stage 1") + ", as grown"
            rows.append(
                row_of(label, [(end, r) for (end, _), r in ends], [trained for (_, trained), _ in ends])
            )
            rows[-1]["stage"] = "as grown"
    return rows


def row_of(label: str, found: list[tuple[dict, dict]], stages: list[list[dict]]) -> dict:
    """The row of one model over seeds: `found` has it with the record of each seed, `stages` what was trained
    for it."""
    first = found[0][0]
    row = {
        "run": first["run"],
        "stage": first["stage"],
        "label": label,
        "seeds": [record["seed"] for _, record in found],
    }
    row |= {key: sorted({model[key] for model, _ in found}) for key in ("layers", "parameters")}
    row |= {"steps": first["steps"], "loss": over_seeds([model["loss"]["mean"] for model, _ in found])}
    for key in ("train_flops", "flops_with_sources"):
        row[key] = statistics.fmean(trained[-1][key] for trained in stages)
    for other in ("reference", "random"):
        gaps = [m["loss"]["mean"] - find(r, other)["loss"]["mean"] for m, r in found if first["run"] != other]
        row[f"to_{other}"] = over_seeds(gaps) if gaps else None
    targets = [find(record, "random")["curve"][-1][1] for _, record in found]
    row["tokens_to_random"] = [
        tokens_to(trained, target) for trained, target in zip(stages, targets, strict=True)
    ]
    return row


def beside_inheritune(records: list[dict]) -> dict:
    """{run: over seeds, the loss of Inheritune's first stage less that of the run}, of the other starts of
    its size (of a grown one its first stage); the random start with as many steps has a column in the
    table."""
    gaps = {}
    for record in records:
        ours = find(record, "inheritune", 1)
        for model in record["models"]:
            alike = model["layers"] == ours["layers"] and model["stage"] in (None, 1)
            if alike and model["run"] not in ("inheritune", "random"):
                gaps.setdefault(model["run"], []).append(ours["loss"]["mean"] - model["loss"]["mean"])
    return {run: over_seeds(values) for run, values in gaps.items()}


def depths(records: list[dict]) -> list[dict]:
    """Per seed: the n that `analyze` suggests for the reference and why, the smallest n with which a grown
    run of the paper's parts reached parity (None: none did), and the smallest that was tried."""
    found = []
    for record in records:
        grown = [record["growth"][run] for run in ("inheritune", "smallest") if run in record["growth"]]
        last = reference_attention(record)
        found.append({"seed": record["seed"], "suggested": last["suggested"], "reason": last["reason"]})
        found[-1]["smallest"] = min((one["layers"] for one in grown if one["parity"]), default=None)
        found[-1]["tried_from"] = min(
            m["layers"] for m in record["models"] if m["run"] in ("inheritune", "smallest")
        )
    return found


def words(value: dict | None, sign: str = "") -> str:
    """0.1234 (0.1200 to 0.1300)"""
    if value is None:
        return ""
    ends = "" if value["low"] is None else f" ({value['low']:{sign}.4f} to {value['high']:{sign}.4f})"
    return f"{value['mean']:{sign}.4f}{ends}"


def cells(row: dict) -> list[str]:
    """The row under HEADS."""
    reached = [tokens for tokens in row["tokens_to_random"] if tokens is not None]
    share = (
        f" ({len(reached)} of {len(row['tokens_to_random'])} seeds)"
        if len(reached) < len(row["tokens_to_random"])
        else ""
    )
    sizes = [f"{parameters / 1e6:.2f}" for parameters in row["parameters"]]
    return [
        row["label"],
        " or ".join(map(str, row["layers"])),
        f"{' or '.join(sizes)}M",
        str(row["steps"]),
        str(len(row["seeds"])),
        words(row["loss"]),
        words(row["to_reference"], "+"),
        words(row["to_random"], "+"),
        f"{statistics.fmean(reached) / 1e6:.2f}M{share}" if reached else "not reached",
        f"{row['train_flops']:.2e}",
        f"{row['flops_with_sources']:.2e}",
    ]


# --- plots --------------------------------------------------------------------------------------------------


def plot_curves(records: list[dict], rows: list[dict], path: Path) -> None:
    """Above: mean curves of validation loss with the range over seeds; below: less the reference's at the
    same step, paired by seed. The core models left, the others right; of grown runs the first stage. The
    upper axis fits all after the first quarter of the reference's steps, the lower one all after half of
    them."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    curves = []  # (row, steps, losses of each seed, the reference's at the same steps)
    for row in (row for row in rows if row["stage"] in (None, 1)):
        having = [
            (find(r, row["run"], row["stage"]), find(r, "reference"))
            for r in records
            if find(r, row["run"], row["stage"])
        ]
        ours, theirs = (
            np.array([one[side]["curve"] for one in having])[:, 1:] for side in (0, 1)
        )  # seed, point, (step, loss)
        curves.append((row, ours[0, :, 0], ours[:, :, 1], theirs[:, :, 1]))
    panels = [[one for one in curves if (one[0]["run"] in CORE) == core] for core in (True, False)]
    panels = [panel for panel in panels if panel]
    begins = curves[0][1][-1] / 4, curves[0][1][-1] / 2
    with canvas(path, 6.2 * len(panels), 8, records[0]["rehearsal"]) as figure:
        grid = figure.subplots(
            2, len(panels), squeeze=False, sharey="row", sharex="col", height_ratios=(3, 2)
        )
        shown = ([], [])
        for column, panel in enumerate(panels):
            for index, (row, steps, losses, theirs) in enumerate(panel):
                color, dashes = COLORS[index % len(COLORS)], "-" if index < len(COLORS) else "--"
                shared = steps[: theirs.shape[1]]
                label = f"{row['label']} ({row['layers'][0]} layers, {len(row['seeds'])} seeds)"
                lines = ((steps, losses), (shared, losses[:, : len(shared)] - theirs[:, : len(shared)]))
                for axes, seen, begin, (x, of_seeds) in zip(
                    grid[:, column], shown, begins, lines, strict=True
                ):
                    axes.fill_between(
                        x, of_seeds.min(axis=0), of_seeds.max(axis=0), color=color, alpha=0.15, linewidth=0
                    )
                    marker = MARKERS[index % len(MARKERS)]
                    axes.plot(
                        x,
                        of_seeds.mean(axis=0),
                        dashes,
                        color=color,
                        marker=marker,
                        markersize=3,
                        label=label,
                    )
                    seen.append(of_seeds[:, x >= begin])
            grid[0, column].axhline(
                curves[0][2][:, -1].mean(), color=REFERENCE_GREY, lw=1, ls=":", label="end of the reference"
            )
            grid[1, column].set_xlabel("step of its own training")
            grid[1, column].legend(
                *grid[0, column].get_legend_handles_labels(),
                loc="upper center",
                frameon=False,
                bbox_to_anchor=(0.5, -0.18),
                fontsize=8,
            )
        grid[0, 0].set_yscale("log")
        for line, seen in zip(grid, shown, strict=True):
            low, high = min(one.min() for one in seen), max(one.max() for one in seen)
            line[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            line[0].yaxis.set_major_locator(MaxNLocator(8))
            line[0].yaxis.set_minor_locator(NullLocator())
            line[0].yaxis.set_major_formatter("{x:g}")
            for axes in line:
                axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        grid[0, 0].set_ylabel("validation loss (nats per token)")
        grid[1, 0].set_ylabel("less the reference's at that step")
        figure.suptitle("Validation loss: mean and range over seeds")


def plot_attention(records: list[dict], path: Path) -> None:
    """MaxRank and AvgMass per layer, a line for each measured step, mean over seeds with the range at the
    end."""
    from matplotlib import colormaps

    models = [
        (find(records[0], run, stage), stage) for run, stage in (("reference", None), ("inheritune", 1))
    ]
    fields = (("max_rank", "MaxRank (τ = 0.90)"), ("avg_mass", "AvgMass (η = 0.90)"))
    with canvas(path, 5 * len(models), 7, records[0]["rehearsal"]) as figure:
        grid = figure.subplots(2, len(models), squeeze=False, sharey="row")
        for column, (model, stage) in enumerate(models):
            steps = sorted(model["attention"], key=int)
            for line, (field, name) in enumerate(fields):
                axes = grid[line, column]
                for index, step in enumerate(steps):
                    of_seeds = np.array(
                        [find(r, model["run"], stage)["attention"][step][field] for r in records]
                    )
                    x, color = (
                        np.arange(1, of_seeds.shape[1] + 1),
                        colormaps["viridis_r"]((index + 1) / len(steps)),
                    )
                    axes.plot(
                        x,
                        of_seeds.mean(0),
                        marker=MARKERS[index],
                        markersize=4,
                        color=color,
                        label=f"step {step}",
                    )
                    if index == len(steps) - 1:
                        axes.fill_between(
                            x, of_seeds.min(0), of_seeds.max(0), color=color, alpha=0.15, linewidth=0
                        )
                axes.axhline(1, color=REFERENCE_GREY, linewidth=1, linestyle=":")
                axes.set_xticks(x)
                axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
                if column == 0:
                    axes.set_ylabel(name)
                if line == 0:
                    axes.set_title(f"{model['label']} ({model['layers']} layers)")
                else:
                    axes.set_xlabel("layer")
        for line in grid:
            line[0].set_ylim(0, 1.05 * max(axes.dataLim.y1 for axes in line))
        grid[0, 0].legend(frameon=False, fontsize=8)
        figure.suptitle(
            f"Attention over training: mean of {len(records)} seeds, at the end with their range; dotted: "
            f"rank 1"
        )


def plot_worth(records: list[dict], path: Path) -> dict:
    """What a start from a window of the reference's layers is worth, by the rank of these layers.  ->
    {points, slope: of the line through each seed's points, in nats per rank, over seeds}"""
    points = []
    for run in WINDOWS:
        for record in records:
            model = find(record, run, 1) or find(record, run)
            if model:
                ranks = reference_attention(record)["max_rank"]
                points.append({"run": run, "seed": record["seed"], "layers": model["window"]})
                points[-1]["avg_rank"] = statistics.fmean(ranks[layer] for layer in model["window"])
                points[-1]["to_random"] = model["loss"]["mean"] - find(record, "random")["loss"]["mean"]
    with canvas(path, 6, 4.4, records[0]["rehearsal"]) as figure:
        axes = figure.add_subplot()
        for index, run in enumerate(dict.fromkeys(point["run"] for point in points)):
            mine = [point for point in points if point["run"] == run]
            axes.scatter(
                [point["avg_rank"] for point in mine],
                [point["to_random"] for point in mine],
                color=COLORS[index],
                marker=MARKERS[index],
                label=f"layers {mine[0]['layers'][0] + 1} to {mine[0]['layers'][-1] + 1}",
            )
        axes.axhline(0, color=REFERENCE_GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("mean MaxRank of the copied layers in the reference")
        axes.set_ylabel("final loss, difference to the random start (nats)")
        axes.set_title("What a start from these layers is worth; a mark per seed")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)
    slopes = []
    for record in records:
        mine = [
            (point["avg_rank"], point["to_random"]) for point in points if point["seed"] == record["seed"]
        ]
        if len({rank for rank, _ in mine}) > 1:
            slopes.append(float(np.polyfit(*zip(*mine, strict=True), 1)[0]))
    return {"points": points, "slope": over_seeds(slopes) if slopes else None}


def is_complete(record: dict) -> bool:
    """Has the core models, with the attention of the two that are drawn."""
    models = [find(record, run) or find(record, run, 1) for run in CORE]
    return (
        all(models)
        and "attention" in models[CORE.index("reference")]
        and "attention" in models[CORE.index("inheritune")]
    )


def summarize(experiment: Experiment, path: str, seeds: list[int]) -> None:
    """Collect `seeds`, and write table and plots of all seeds that lie there. Raises UserError without a
    whole seed."""
    folder = results_folder(experiment, path)
    check_seeds(experiment, path, seeds)
    for seed in seeds:
        file, record = folder / "seeds" / f"seed{seed}.json", collect(experiment, seed)
        write_json(file, together(read_json(file), record) if file.is_file() else record)
    keys = {name: run_key(run) for name, run in experiment.runs.items()}
    records = [read_json(file) for file in seed_files(folder)]
    for record in records:
        record["models"] = [model for model in record["models"] if model["key"] == keys.get(model["run"])]
    partial = [str(record["seed"]) for record in records if not is_complete(record)]
    records = [record for record in records if is_complete(record)]
    if not records:
        raise UserError(f"no seed has all of {', '.join(CORE)} and their attention: run recipes/evidence.sh")
    rows = aggregate(records, experiment.runs)
    plot_curves(records, rows, folder / "curves.png")
    plot_attention(records, folder / "attention.png")
    worth = plot_worth(records, folder / "rank_worth.png")
    made_by = [one for record in records for one in record["made_by"]]
    machines, pythons = ({one[key] for one in made_by} for key in ("machine", "python"))
    commits = {
        f"{str(one['git_commit'])[:12]}{' with changes' * str(one['git_commit']).endswith('+changes')}"
        for one in made_by
    }
    versions = {f"{name} {number}" for one in made_by for name, number in one["versions"].items()}
    numbers, windows = (
        " ".join(str(record["seed"]) for record in records),
        records[0]["models"][0]["loss"]["n"],
    )
    shown = [run for run in experiment.runs if run in {row["run"] for row in rows}]
    arms = {CORE: "", tuple(experiment.runs): "ARMS=all "}.get(tuple(shown), f'ARMS="{" ".join(shown)}" ')
    command = f'SCALE={Path(path).stem} {arms}SEEDS="{numbers}" bash recipes/evidence.sh'
    notes = [
        f"Seeds {numbers.replace(' ', ', ')}. Intervals: 95%, Student's t over seeds; differences are paired "
        f"by seed; "
        f"{windows} validation windows. Tokens are read off curves with a point every "
        f"{experiment.train.eval_every * experiment.train.batch_tokens / 1e6:.2f}M.",
        f"{', '.join(sorted(machines))}; Python {', '.join(sorted(pythons))}, {', '.join(sorted(versions))}; "
        f"commit {', '.join(sorted(commits))}; {command}",
    ]
    labels, gaps = {row["run"]: row["label"] for row in reversed(rows)}, beside_inheritune(records)
    beside = "; ".join(f"{labels[run]} {words(gaps[run], '+')}" for run in reversed(labels) if run in gaps)
    notes.insert(1, f"Inheritune, stage 1, less others of its size: {beside}.")
    if any(row["stage"] == "as grown" for row in rows):
        notes.insert(
            1,
            "A stage after the first has only the seeds whose stage before did not reach parity; "
            "tokens and FLOPs "
            "count all stages, steps are those of one.",
        )
    if partial:
        notes.append(f"Not counted: seeds {', '.join(partial)}, which lack a core run.")
    title = f"{'REHEARSAL, not a result. ' if experiment.rehearsal else ''}{experiment.about}"
    flat = [dict(zip(HEADS, cells(row), strict=True)) for row in rows]
    write_table(folder / "table", title, list(HEADS), [cells(row) for row in rows], notes, flat)
    write_json(
        folder / "evidence.json",
        {
            "rehearsal": experiment.rehearsal,
            "seeds": [record["seed"] for record in records],
            "text": records[0]["text"],
        }
        | {"command": command, "made_by": made_by, "rows": rows, "beside_inheritune": gaps}
        | {"depths": depths(records), "rank_worth": worth},
    )
    print(f"table and plots: {folder}")


def main(verb: str, path: str, *rest: str) -> None:
    experiment = load_experiment(path)
    if verb == "missing":
        print("\n".join(missing(experiment, path, rest[0], [int(seed) for seed in rest[1:]])))
    else:
        summarize(experiment, path, [int(seed) for seed in rest])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
