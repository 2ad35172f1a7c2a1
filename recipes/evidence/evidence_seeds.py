"""The numbers of one seed of the evidence: collected from its finished runs, kept in seeds/seedN.json."""

from pathlib import Path

from seed_files import read_seeds

from inheritune.analysis.thresholds import MAIN_THRESHOLD, has_papers_length
from inheritune.cluster.planner import read_stages
from inheritune.config.experiment import Experiment
from inheritune.config.layers import parse_layers
from inheritune.config.run import Run
from inheritune.config.sections import RESUMABLE_KEYS
from inheritune.errors import UserError
from inheritune.files.json_files import compute_seal, read_json
from inheritune.files.rundir import RunDir, find_weights, get_data_dir, get_results_dir
from inheritune.files.storage import find_root
from inheritune.paper.items import Row
from inheritune.paper.measured import find_folder
from inheritune.paper.training_costs import read_validation_curve, sum_flops
from inheritune.runs.job import Job

CORE = ("reference", "random", "random_longer", "inheritune", "last_half")
"""Runs that every reported seed has."""
WINDOWS = ("inheritune", "window_2", "window_4", "last_half")
"""Runs (of a grown run its first stage) that start from a window of the reference's layers, with the same
parts."""
CHOOSING = (0, 1)
"""These seeds, and those from 100 on, were used to choose the scale. They are not reported."""


def locate_results(experiment: Experiment, path: str) -> Path:
    """Return the folder for table and plots: next to the experiment's file, or next to the runs of a
    rehearsal."""
    if experiment.rehearsal:
        return find_root() / "runs/rehearsal" / experiment.name
    return Path(path).resolve().with_suffix("")


def read_fingerprint(experiment: Experiment) -> str:
    """Return what identifies the prepared text."""
    return read_json(get_data_dir(experiment) / "manifest.json")["fingerprint"]


def make_experiment_key(experiment: Experiment) -> str:
    """Return what identifies data, model and schedules, whose numbers must not be mixed in one table.

    Keys at their defaults do not count."""
    content = experiment.model_dump(
        mode="json", by_alias=True, exclude_defaults=True, include={"data", "model", "train"}
    )
    train = content["train"].items()
    content["train"] = {key: v for key, v in train if key == "eval_every" or key not in RESUMABLE_KEYS}
    return compute_seal(sorted((section, sorted(keys.items())) for section, keys in content.items()))


def make_run_key(run: Run) -> str:
    """Return what identifies a version of a run."""
    return compute_seal(sorted(run.model_dump(mode="json", by_alias=True, exclude_defaults=True).items()))


def check_seeds(experiment: Experiment, path: str, seeds: list[int]) -> None:
    """Raise UserError if the numbers of `seeds` cannot be reported, or not together with those of other
    seeds."""
    chose = [seed for seed in seeds if (seed in CHOOSING or seed >= 100) and not experiment.rehearsal]
    if chose:
        raise UserError(
            f"seeds {chose} chose the scale (recipes/evidence/README.md) and are not reported; take 2 to 99"
        )
    folder = locate_results(experiment, path)
    records = read_seeds(folder, experiment.rehearsal)
    if seeds or not records:
        text = read_fingerprint(experiment)
    else:  # the files of the seeds alone
        text = records[0]["text"]
    for record in records:
        alike = (record["key"], record["text"]) == (make_experiment_key(experiment), text)
        if record["seed"] not in seeds and not alike:
            raise UserError(
                f"seed {record['seed']} in {folder} is of another text or version of the experiment, and "
                f"can't be counted together with seeds {seeds}: move that folder away, or give all its seeds "
                f"in SEEDS"
            )


def list_measured(experiment: Experiment, run: str) -> list[str]:
    """Return the names of the weights of `run` whose attention is measured: at each kept step and at the end,
    of a grown run's first stage. Runs that keep no step are not measured."""
    spec = experiment.run(run)
    name = f"{run}/stage1" if spec.grow else run
    return [*(f"{name}@{step}" for step in spec.keep_at), name] if spec.keep_at else []


def collect_seed(experiment: Experiment, seed: int) -> dict:
    """Return every finished model of `seed`: {seed, key, text, rehearsal, made_by, models, growth}."""
    models: list[dict] = []
    starts: list[dict] = []
    growth = {}
    for row in experiment.paper:
        spec, folder = experiment.run(row.run), RunDir.of(experiment, row.run, seed)
        if not folder.is_done():
            continue
        stages: list[int | None] = [None]
        if spec.grow:
            growth[row.run] = read_json(folder.done)
            depths = Job(experiment, row.run, seed, stage=1).depths()
            stages = [*range(1, len(read_stages(folder, depths)) + 1)]
        for stage in stages:
            label = f"{row.label}, stage {stage}" if stage else row.label
            where = Row(label=label, run=f"{experiment.name}/{row.run}", stage=stage)
            trained = find_folder(experiment, where, seed)
            models.append(_collect_model(experiment, row.run, where, trained, seed))
            starts += read_json(trained.provenance)["starts"]
        first = next(model for model in models if model["run"] == row.run)
        _add_attention(first, experiment, row.run, seed)
    return {
        "seed": seed,
        "key": make_experiment_key(experiment),
        "text": read_fingerprint(experiment),
        "rehearsal": experiment.rehearsal,
        "made_by": list_makers(starts),
        "models": models,
        "growth": growth,
    }


def list_makers(starts: list[dict]) -> list[dict]:
    """Return the different {git_commit, python, versions, machine} of the starts in provenance files."""
    keys = ("git_commit", "python", "versions", "machine")
    makers = [{key: start[key] for key in keys} for start in starts]
    return [one for index, one in enumerate(makers) if one not in makers[:index]]


def _collect_model(experiment: Experiment, run: str, where: Row, trained: RunDir, seed: int) -> dict:
    """Return the numbers of one finished run or stage."""
    spec, results = experiment.run(run), trained.read_results()
    flops, all_flops = sum_flops(experiment, run, where, seed)
    model = {key: results[key] for key in ("run", "stage", "layers", "parameters", "steps", "weights")}
    model |= {
        "label": where.label,
        "key": make_run_key(spec),
        "batch_tokens": experiment.train_of(spec).batch_tokens,
        "loss": results["validation"],
        "train_flops": flops,
        "flops_with_sources": all_flops,
        "curve": [[point["step"], point["val_loss"]] for point in read_validation_curve(trained)],
    }
    if run in WINDOWS and where.stage in (None, 1):
        model["window"] = parse_layers(spec.init.inherit.layers, experiment.model.layers)
    return model


def _add_attention(model: dict, experiment: Experiment, run: str, seed: int) -> None:
    """Add the attention measures of a run at each measured step to the numbers of its first model. Nothing is
    added until all of these steps are analyzed."""
    measured = {
        weights: get_results_dir(find_weights(experiment, weights, seed)).read_attention()
        for weights in list_measured(experiment, run)
    }
    if not all(map(has_papers_length, measured.values())):
        return
    for weights, rows in measured.items():
        step = int(weights.partition("@")[2] or experiment.train_of(experiment.run(run)).steps)
        layers = [one for one in rows if one["kind"] == "layer"]
        found = model.setdefault("attention", {}).setdefault(str(step), {})
        if all("cost" in layer for layer in layers):
            found["cost"] = [layer["cost"]["block"] for layer in layers]
        for row in (one for one in rows if one["kind"] == "without_lazy"):
            found["without_lazy"] = row["loss"] - rows[0]["loss"]
        found |= {
            "max_rank": [layer["max_rank"][MAIN_THRESHOLD] for layer in layers],
            "avg_mass": [layer["avg_mass"][MAIN_THRESHOLD] for layer in layers],
            "heads_near_1": sum(layer["heads_near_1"] for layer in layers),
            "suggested": rows[-1]["suggested_layers"],
            "reason": rows[-1]["reason"],
        }


def find_model(record: dict, run: str, stage: int | None = None) -> dict | None:
    """Return a model of a seed's record, or None."""
    return next((one for one in record["models"] if (one["run"], one["stage"]) == (run, stage)), None)


def merge_records(earlier: dict, now: dict) -> dict:
    """Return `now` with the runs of an earlier record of that seed that were not trained this time.

    They are added if text and experiment are the same and the reference came out with the same bits: each
    point of its curve and its interval over windows are equal in all digits. (`weights` also covers config
    and tokenizer, which another version may write otherwise.) This joins sittings on machines that share no
    disk."""
    ours, theirs = find_model(now, "reference"), find_model(earlier, "reference")
    alike = (earlier["key"], earlier["text"]) == (now["key"], now["text"])
    measured = ("loss", "curve", "parameters", "steps")
    if not (alike and ours and theirs and all(ours[key] == theirs.get(key) for key in measured)):
        return now
    trained = {model["run"] for model in now["models"]}
    kept = [model for model in earlier["models"] if model["run"] not in trained]
    made_by = list(now["made_by"])
    if kept:
        made_by += [one for one in earlier["made_by"] if one not in now["made_by"]]
    return now | {
        "models": now["models"] + kept,
        "growth": earlier["growth"] | now["growth"],
        "made_by": made_by,
    }
