"""The table, the plots and what is still missing of recipes/evidence.sh.

    python recipes/evidence/summary.py missing EXPERIMENT core|all SEED ...
    python recipes/evidence/summary.py summary EXPERIMENT SEED ...

Each seed's numbers are read from its finished runs into seeds/seedN.json; everything else is made from those files, so that
seeds of several sittings count together. Intervals are Student's t over seeds; differences are paired by seed, whose runs all
read the same batches."""

import math
import statistics
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from inheritune.config import RESUMABLE_KEYS, Experiment, UserError, load_experiment
from inheritune.figures import COLORS, MARKERS, REFERENCE_GREY, canvas
from inheritune.paper import Row, model_folder
from inheritune.rundir import RunDir, find_weights, read_json, root, seal_of, write_json
from inheritune.stages import read_stages, unfinished_source
from inheritune.tables import rounds, steps_to, training_cost, validation_curve, write_table

CORE = ("reference", "random", "random_longer", "inheritune", "last_half")
WINDOWS = {"inheritune": 1, "window_2": None, "window_4": None, "last_half": None}
"""Runs that start from a window of the reference's layers with the same parts, and their stage."""
MAIN = "0.9"
HEADS = (
    "model", "layers", "parameters", "steps", "seeds", "validation loss (95% interval)", "to the reference (95% interval)",
    "to the random start (95% interval)", "tokens to the random start's loss", "training FLOPs", "with those it starts from",
)  # fmt: skip


def measured(experiment: Experiment, run: str) -> list[str]:
    """Names of the weights of `run` whose attention is measured: at each kept step and at the end, of a grown run's first
    stage. Runs that keep no step are not measured."""
    spec = experiment.run(run)
    name = f"{run}/stage1" if spec.grow else run
    return [*(f"{name}@{step}" for step in spec.keep_at), name] if spec.keep_at else []


def attention_file(experiment: Experiment, name: str, seed: int) -> RunDir:
    weights = find_weights(experiment, name, seed)
    return RunDir(weights.parent if weights.name == "final" else weights)


def missing(experiment: Experiment, path: str, arms: str, seeds: list[int]) -> list[str]:
    """What can be done now, the longest first: `SEED VERB ...`, a line each."""
    found = []
    for seed in seeds:
        for name in CORE if arms == "core" else experiment.runs:
            spec = experiment.run(name)
            cost = experiment.layers_of(spec) * experiment.train_of(spec).steps
            if not RunDir.of(experiment, name, seed).is_done():
                if unfinished_source(experiment, spec, seed) is None:
                    found.append((cost, f"{seed} {'grow' if spec.grow else 'train'} {path} --run {name}"))
                continue
            for weights in measured(experiment, name):
                if not attention_file(experiment, weights, seed).attention.is_file():
                    found.append((0, f"{seed} analyze --model {weights} --data {path}"))
    return [line for _, line in sorted(found, key=lambda one: -one[0])]


# --- one seed -------------------------------------------------------------------------------------------------------------


def experiment_key(experiment: Experiment) -> str:
    """Tells experiments apart whose numbers must not meet in one table."""
    said = experiment.model_dump(mode="json", by_alias=True, exclude={"paper", "about", "name"})
    said["train"] = {key: value for key, value in said["train"].items() if key not in RESUMABLE_KEYS}
    return seal_of(said)


def collect(experiment: Experiment, seed: int) -> dict:
    """Every finished model of `seed`: {seed, key, data_fingerprint, rehearsal, starts, models, growth, suggested}."""
    models, growth, starts = [], {}, []
    for row in experiment.paper:
        spec, folder = experiment.run(row.run), RunDir.of(experiment, row.run, seed)
        if not folder.is_done():
            continue
        stages = [None]
        if spec.grow:
            growth[row.run] = read_json(folder.done)
            stages = range(1, len(read_stages(folder, experiment.layers_of(spec))) + 1)
        for stage in stages:
            label = f"{row.label}, stage {stage}" if stage else row.label
            where = Row(label=label, run=f"{experiment.name}/{row.run}", stage=stage)
            trained = model_folder(experiment, where, seed)
            results, (flops, all_flops) = trained.read_results(), training_cost(experiment, row.run, where, seed)
            models.append(
                {key: results[key] for key in ("run", "stage", "layers", "parameters", "steps", "data_fingerprint")}
                | {"label": label, "loss": results["validation"], "train_flops": flops, "flops_with_sources": all_flops}
                | {"tokens": sum(one.read_results()["tokens"] for one in rounds(trained, spec))}
                | {"curve": [[point["step"], point["val_loss"]] for point in validation_curve(trained)]}
            )
            starts += read_json(trained.provenance)["starts"]
        for weights in measured(experiment, row.run):
            rows = attention_file(experiment, weights, seed).read_attention()
            step = int(weights.partition("@")[2] or experiment.train_of(spec).steps)
            layers = [one for one in rows if one["kind"] == "layer"]
            of_run = next(one for one in models if one["run"] == row.run)
            of_run.setdefault("attention", {})[str(step)] = {
                field: [layer[field][MAIN] for layer in layers] for field in ("max_rank", "avg_mass")
            } | {"heads_near_1": sum(layer["heads_near_1"] for layer in layers), "suggested": rows[-1]["suggested_layers"]}
    keys = ("git_commit", "python", "versions", "machine")
    starts = [{key: start[key] for key in keys} for start in starts]
    made_by = [one for index, one in enumerate(starts) if one not in starts[:index]]
    return {
        "seed": seed,
        "key": experiment_key(experiment),
        "rehearsal": experiment.rehearsal,
        "made_by": made_by,
        "models": models,
        "growth": growth,
    }


# --- over seeds -----------------------------------------------------------------------------------------------------------


def over_seeds(values: list[float]) -> dict:
    """{mean, low, high, n}: the mean and its 95% interval, Student's t; no interval for a single seed."""
    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half, "n": n}


def find(record: dict, run: str, stage: int | None = None) -> dict | None:
    """A seed's model, or None."""
    return next((one for one in record["models"] if (one["run"], one["stage"]) == (run, stage)), None)


def tokens_to(model: dict, target: float) -> int | None:
    """Training tokens, earlier stages counted, until the curve is at or below `target`."""
    step = steps_to([{"step": step, "val_loss": loss} for step, loss in model["curve"]], target)
    last, per_step = model["curve"][-1][0], model["tokens"] / (model["steps"] * (model["stage"] or 1))
    return None if step is None else round(model["tokens"] - (last - step) * per_step)


def aggregate(records: list[dict]) -> list[dict]:
    """A row for each model that any seed has, in the order of the experiment's rows."""
    names = {(one["run"], one["stage"]): one["label"] for record in records for one in record["models"]}
    order = list(dict.fromkeys(run for run, _ in names))
    rows = []
    for run, stage in sorted(names, key=lambda name: (order.index(name[0]), name[1] or 0)):
        having = [(find(record, run, stage), record) for record in records if find(record, run, stage)]
        first = having[0][0]
        row = {key: first[key] for key in ("run", "stage", "label", "layers", "parameters", "steps", "tokens")}
        row |= {key: first[key] for key in ("train_flops", "flops_with_sources")}
        row |= {"seeds": [record["seed"] for _, record in having], "loss": over_seeds([m["loss"]["mean"] for m, _ in having])}
        for other in ("reference", "random"):
            gaps = [m["loss"]["mean"] - find(r, other)["loss"]["mean"] for m, r in having if find(r, other) and run != other]
            row[f"to_{other}"] = over_seeds(gaps) if gaps else None
        reached = [tokens_to(m, find(r, "random")["curve"][-1][1]) for m, r in having if find(r, "random")]
        row["tokens_to_random"] = reached
        rows.append(row)
    return rows


def depths(records: list[dict]) -> list[dict]:
    """Per seed: the n that `analyze` suggests for the reference, and the smallest n with which a grown run of the paper's
    parts reached parity (None: none did)."""
    found = []
    for record in records:
        grown = [record["growth"][run] for run in ("inheritune", "smallest") if run in record["growth"]]
        reached = [one["layers"] for one in grown if one["parity"]]
        attention = find(record, "reference")["attention"]
        last = attention[max(attention, key=int)]
        found.append({"seed": record["seed"], "suggested": last["suggested"], "smallest": min(reached, default=None)})
        found[-1] |= {"tried_from": min(m["layers"] for m in record["models"] if m["run"] in ("inheritune", "smallest"))}
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
    share = f" ({len(reached)} of {len(row['tokens_to_random'])} seeds)" if len(reached) < len(row["tokens_to_random"]) else ""
    sources = row["flops_with_sources"]
    return [
        row["label"], str(row["layers"]), f"{row['parameters'] / 1e6:.2f}M", str(row["steps"]), str(len(row["seeds"])),
        words(row["loss"]), words(row["to_reference"], "+"), words(row["to_random"], "+"),
        f"{statistics.fmean(reached) / 1e6:.2f}M{share}" if reached else "not reached",
        f"{row['train_flops']:.2e}", f"{sources:.2e}" if sources else "",
    ]  # fmt: skip


# --- plots ----------------------------------------------------------------------------------------------------------------


def plot_curves(records: list[dict], rows: list[dict], path: Path) -> None:
    """Mean curves of validation loss with the range over seeds, the core models left, the others right; of later stages none.

    The loss axis fits what comes after a tenth of the longest run, as in figures.plot_loss_curves."""
    curves = []  # (row, steps, losses of each seed)
    for row in (row for row in rows if row["stage"] in (None, 1)):
        of_seeds = np.array([m["curve"] for m in (find(r, row["run"], row["stage"]) for r in records) if m])  # seed, point, 2
        curves.append((row, of_seeds[0, 1:, 0], of_seeds[:, 1:, 1]))
    late = np.concatenate([losses[:, steps >= 0.1 * max(c[1][-1] for c in curves)].ravel() for _, steps, losses in curves])
    panels = [[one for one in curves if (one[0]["run"] in CORE) == core] for core in (True, False)]
    panels = [panel for panel in panels if panel]
    with canvas(path, 6.2 * len(panels), 5.2, records[0]["rehearsal"]) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
            for index, (row, steps, losses) in enumerate(panel):
                color, dashes = COLORS[index % len(COLORS)], "-" if index < len(COLORS) else "--"
                axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.15, linewidth=0)
                label = f"{row['label']} ({row['layers']} layers): {losses[:, -1].mean():.3f}"
                marker = MARKERS[index % len(MARKERS)]
                axes.plot(steps, losses.mean(axis=0), dashes, color=color, marker=marker, markersize=3, label=label)
            axes.axhline(curves[0][2][:, -1].mean(), color=REFERENCE_GREY, linewidth=1, linestyle=":")
            axes.set_yscale("log")
            axes.set_ylim(late.min() * 0.99, late.max() * 1.01)
            axes.yaxis.set_major_formatter("{x:.1f}")
            axes.yaxis.set_minor_formatter("{x:.1f}")
            axes.set_xlabel("step of its own training")
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, fontsize=8)
        figure.axes[0].set_ylabel("validation loss (nats per token)")
        figure.suptitle(f"Validation loss: mean and range of {len(records)} seed{'s' * (len(records) > 1)}")


def plot_attention(records: list[dict], path: Path) -> None:
    """MaxRank and AvgMass per layer, a line for each measured step, mean over seeds with the range at the end."""
    from matplotlib import colormaps

    models = [(find(records[0], run, stage), stage) for run, stage in (("reference", None), ("inheritune", 1))]
    fields = (("max_rank", "MaxRank (τ = 0.90)"), ("avg_mass", "AvgMass (η = 0.90)"))
    with canvas(path, 5 * len(models), 7, records[0]["rehearsal"]) as figure:
        grid = figure.subplots(2, len(models), squeeze=False, sharey="row")
        for column, (model, stage) in enumerate(models):
            steps = sorted(model["attention"], key=int)
            for line, (field, name) in enumerate(fields):
                axes = grid[line, column]
                for index, step in enumerate(steps):
                    of_seeds = np.array([find(r, model["run"], stage)["attention"][step][field] for r in records])
                    x, color = np.arange(1, of_seeds.shape[1] + 1), colormaps["viridis_r"]((index + 1) / len(steps))
                    axes.plot(x, of_seeds.mean(0), marker=MARKERS[index], markersize=4, color=color, label=f"step {step}")
                    if index == len(steps) - 1:
                        axes.fill_between(x, of_seeds.min(0), of_seeds.max(0), color=color, alpha=0.15, linewidth=0)
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
        figure.suptitle(f"Attention over training: mean of {len(records)} seeds, at the end with their range; dotted: rank 1")


def plot_worth(records: list[dict], path: Path) -> list[dict]:
    """What a start from a window of the reference's layers is worth, by the rank of these layers.  -> the points"""
    points = []
    for run, stage in WINDOWS.items():
        for record in records:
            model, random, reference = find(record, run, stage), find(record, "random"), find(record, "reference")
            if not (model and random and reference):
                continue
            attention = reference["attention"]
            ranks = attention[max(attention, key=int)]["max_rank"]
            first = {"inheritune": 0, "last_half": len(ranks) - model["layers"]}.get(run)
            first = int(run.partition("_")[2]) if first is None else first
            points.append({"run": run, "seed": record["seed"], "first": first, "end": first + model["layers"]})
            points[-1] |= {"avg_rank": statistics.fmean(ranks[first : first + model["layers"]])}
            points[-1] |= {"to_random": model["loss"]["mean"] - random["loss"]["mean"]}
    with canvas(path, 6, 4.4, records[0]["rehearsal"]) as figure:
        axes = figure.add_subplot()
        for index, run in enumerate(dict.fromkeys(point["run"] for point in points)):
            mine = [point for point in points if point["run"] == run]
            axes.scatter(
                [point["avg_rank"] for point in mine], [point["to_random"] for point in mine], color=COLORS[index],
                marker=MARKERS[index], label=f"layers {mine[0]['first'] + 1} to {mine[0]['end']}",
            )  # fmt: skip
        axes.axhline(0, color=REFERENCE_GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("mean MaxRank of the copied layers in the reference")
        axes.set_ylabel("final loss, difference to the random start (nats)")
        axes.set_title("What a start from these layers is worth; a mark per seed")
        axes.legend(frameon=False)
    return points


def summarize(experiment: Experiment, scale: str, seeds: list[int]) -> None:
    """Collect `seeds`, and write table and plots of all seeds that lie there. Raises UserError without a finished seed."""
    folder = root() / "runs/rehearsal" / experiment.name if experiment.rehearsal else Path(__file__).parent / scale
    for seed in seeds:
        write_json(folder / "seeds" / f"seed{seed}.json", collect(experiment, seed))
    files = sorted((folder / "seeds").glob("seed*.json"), key=lambda file: int(file.stem.removeprefix("seed")))
    records = [read_json(file) for file in files]
    others = [r["seed"] for r in records if r["key"] != experiment_key(experiment)]
    records = [r for r in records if r["key"] == experiment_key(experiment) and all(find(r, run) for run in CORE[:3])]
    if not records:
        raise UserError(f"no seed has all of {', '.join(CORE)}: run recipes/evidence.sh")
    texts = {model["data_fingerprint"] for record in records for model in record["models"]}
    if len(texts) > 1:
        raise UserError(f"the seeds in {folder / 'seeds'} were trained on different texts; move those of one of them away")
    rows, n = aggregate(records), records[0]["models"][0]["loss"]["n"]
    plot_curves(records, rows, folder / "curves.png")
    plot_attention(records, folder / "attention.png")
    points = plot_worth(records, folder / "rank_worth.png")
    made_by = [one for record in records for one in record["made_by"]]
    machines, pythons = ({one[key] for one in made_by} for key in ("machine", "python"))
    commits = {
        f"{str(one['git_commit'])[:12]}{' with changes' * str(one['git_commit']).endswith('+changes')}" for one in made_by
    }
    numbers = ", ".join(str(record["seed"]) for record in records)
    versions = ", ".join(sorted({f"{name} {number}" for one in made_by for name, number in one["versions"].items()}))
    notes = [
        f"Seeds {numbers}; intervals are 95%, Student's t over seeds; differences are paired by seed; {n} validation windows.",
        f"{', '.join(sorted(machines))}; Python {', '.join(sorted(pythons))}, {versions}; "
        f'commit {", ".join(sorted(str(one)[:12] for one in commits))}; SCALE={scale} SEEDS="{numbers.replace(",", "")}" '
        f"bash recipes/evidence.sh",
    ]
    if others:
        notes.append(f"Not counted: seeds {', '.join(map(str, others))}, of another version of the experiment.")
    title = f"{'REHEARSAL, not a result. ' if experiment.rehearsal else ''}{experiment.about}"
    flat = [dict(zip(HEADS, cells(row), strict=True)) for row in rows]
    write_table(folder / "table", title, list(HEADS), [cells(row) for row in rows], notes, flat)
    write_json(
        folder / "evidence.json",
        {"rehearsal": experiment.rehearsal, "seeds": [r["seed"] for r in records], "data_fingerprint": texts.pop()}
        | {"made_by": made_by, "rows": rows, "depths": depths(records), "windows": points},
    )
    print(f"table and plots: {folder}")


def main(verb: str, path: str, *rest: str) -> None:
    experiment = load_experiment(path)
    if verb == "missing":
        print("\n".join(missing(experiment, path, rest[0], [int(seed) for seed in rest[1:]])))
    else:
        summarize(experiment, Path(path).stem, [int(seed) for seed in rest])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
