"""The verb `analyze`: which model and text it means, where its rows go, and what it must not overwrite.

python -m inheritune analyze --model runs/quickstart/seed0/reference/final --data quickstart
"""

from functools import partial
from pathlib import Path

from inheritune.analysis.attention import measure_model
from inheritune.analysis.report import describe_rows
from inheritune.analysis.thresholds import LENGTH, SEQUENCES
from inheritune.config import names
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.paths import RECIPES
from inheritune.config.reading import read_yaml
from inheritune.config.source_shape import find_commit
from inheritune.data.batches import Tokens
from inheritune.errors import UserError
from inheritune.files.json_files import is_sealed, read_json, write_jsonl
from inheritune.files.markers import is_prepared
from inheritune.files.outputs import check_writable, resolve_output
from inheritune.files.rundir import (
    RunDir,
    check_has_parts,
    find_measured_run,
    get_analysis_dir,
    get_results_dir,
    parse_weights_name,
    require_weights,
)
from inheritune.models.choice import is_same_model
from inheritune.models.networks import build_config
from inheritune.models.surgery import write_random
from inheritune.runs.pins import pin_revision


def find_run(model: str, experiment: Experiment, seed: int = 0) -> tuple[str, str | None, Path] | None:
    """Return (checkpoint, its revision, folder for the rows) of a run of `experiment`: RUN, RUN/stage2,
    RUN@10000; or of a run of another one, measured on the data of `experiment`: EXPERIMENT/RUN. Returns None
    if `model` is not such a name.

    In a rehearsal, a random model of the same size stands in for a third-party one. Raises UserError if the
    run is not finished."""
    name, *_ = parse_weights_name(model)
    owner, _, run = name.rpartition("/")
    if Path(model).exists() or (owner and not (RECIPES / f"{owner}.yaml").is_file()):
        return None
    owned = load_experiment(owner, experiment.rehearsal) if owner else experiment
    if run not in owned.runs:
        return None
    within = model.removeprefix(f"{owner}/")
    check_has_parts(owned, within)
    folder, external = RunDir.of(owned, run, seed), owned.runs[run].init.external
    weights: str | Path
    revision = None
    if external and owned.rehearsal:
        weights = folder.seed_checkpoint(owned.model.layers)
        write_random(build_config(owned.model, owned.model.layers), weights, seed)
    elif external:
        weights, revision = external.source, pin_revision(owned, external.source, external.revision)
    else:
        finished = require_weights(owned, within, seed)
        weights, folder = finished, get_results_dir(finished)
    return str(weights), revision, folder.path / f"on_{experiment.name}" if owner else folder.path


def check_replaced(folder: RunDir, model: str, revision: str | None) -> None:
    """Raise UserError if `folder` holds files that would be overwritten, unless they are those of an earlier
    analysis of the same model: an attention.jsonl as analyze left it, and its plots."""
    kept = "and is left as it is; give another --out"
    if not folder.attention.exists():
        for name in names.PLOTS:
            if (folder.path / name).exists():
                raise UserError(
                    f"{folder.path / name} lies without an attention.jsonl, so it was not drawn by analyze, "
                    f"{kept}"
                )
        return
    try:
        header, sealed = next(iter(folder.read_attention(to_renew=True)), {}), is_sealed(folder.attention)
    except UserError:  # damaged, or of another program
        header, sealed = {}, False
    if not sealed or header.get("kind") != "header" or not isinstance(header.get("model"), str):
        raise UserError(f"{folder.attention} is not as analyze leaves it, {kept}")
    commit = find_commit(model, revision)
    if not is_same_model(header["model"], model) or header.get("revision") != commit:
        both = ((header["model"], header.get("revision")), (model, commit))
        of, asked = (f"{name}@{at}" if at else name for name, at in both)
        raise UserError(f"{folder.attention} was measured on {of}, not on {asked}, {kept}")


def run_analyze(
    model: str,
    data: str,
    out: str | None = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    maps: list[tuple[int, int]] | None = None,
    revision: str | None = None,
    costs: bool = True,
) -> Path:
    """Measure a model, write attention.jsonl and print the table. Returns the folder of attention.jsonl, for
    figures.plot_attention.

    `model` is an HF checkpoint, a Hub id, the folder of a finished run (of a grown one, its chosen stage), or
    the name of a run of that seed (`find_run`). `data` is an experiment or a folder of prepared data. `out`
    is by default the run folder that holds the weights, else runs/analysis/<model>. `costs`: measure
    what each layer is worth too. In a rehearsal, whose models have few positions, `length` is cut to its
    sequences.

    A run's own analysis is renewed; that of a run on other data than its own is in a folder on_<data> of the
    run. Raises UserError, before it measures, if another folder holds files that would be overwritten and are
    not an analysis of this model (`check_replaced`)."""
    given = Path(resolve_output(out)) if out else None
    if given:
        check_writable(given)
    experiment, tokens = _open_data(data)
    folder = given
    if experiment and (named := find_run(model, experiment, seed)):
        model, revision, folder = named[0], revision or named[1], folder or named[2]
    if RunDir(model).is_done():
        model = str(RunDir(model).weights())
    run = RunDir(Path(model).resolve().parent)
    is_final = Path(model).resolve() == run.final and run.final.is_dir()
    rehearsed_lengths = _find_rehearsed_lengths(experiment, run if is_final else None)
    length = min([length, *rehearsed_lengths])
    is_rehearsal = bool(rehearsed_lengths)
    if is_final and folder is None:
        folder = run.path if _has_data_of(run, tokens) else run.path / f"on_{_name_data(experiment, data)}"
    elif folder is None:
        folder = get_analysis_dir(model, is_rehearsal).path
    measured = find_measured_run(RunDir(folder))
    is_own = measured is not None and is_final and measured.path.resolve() == run.path
    if given or not is_own:  # a run's own analysis is renewed, where nothing else was asked for
        check_replaced(RunDir(folder), model, revision)
    if not costs:
        _check_no_costs(RunDir(folder), model)
    measure = partial(measure_model, model, tokens, sequences, length, seed, maps, revision=revision)
    rows = measure(progress=True, costs=costs, is_rehearsal=is_rehearsal)
    rows[0]["rehearsal"] = is_rehearsal
    if is_own:
        rows[0]["weights"] = run.weights_hash()
    if given or not is_own:  # another process may have written there meanwhile
        check_replaced(RunDir(folder), model, revision)
    write_jsonl(RunDir(folder).attention, rows)
    print(describe_rows(rows))
    return folder


def _check_no_costs(folder: RunDir, model: str) -> None:
    """Raise UserError if the analysis in `folder` has the costs of the layers, which take most of the time
    and would be lost."""
    try:
        rows = folder.read_attention()
    except UserError:  # damaged, or of other weights: it is to be renewed
        return
    if any("cost" in row for row in rows):
        raise UserError(
            f"{folder.attention} has the costs of the layers of {model}, which --ranks-only leaves out; "
            f"do without it, or give another --out"
        )


def _has_data_of(run: RunDir, tokens: Tokens) -> bool:
    """Return whether a run was trained on the data of `tokens`; true of a run that does not say so."""
    described = read_json(run.results) if run.results.is_file() else {}
    return described.get("data_fingerprint", tokens.fingerprint) == tokens.fingerprint


def _name_data(experiment: Experiment | None, data: str) -> str:
    return experiment.name if experiment else Path(data).resolve().name


def _open_data(data: str) -> tuple[Experiment | None, Tokens]:
    """Open the validation text of an experiment, or of a folder of prepared data, which has no experiment."""
    if is_prepared(Path(data)):
        return None, Tokens(data, "val")
    experiment = load_experiment(data)
    return experiment, Tokens.of(experiment, "val")


def _find_rehearsed_lengths(experiment: Experiment | None, run: RunDir | None) -> list[int]:
    """Return the sequence lengths of those, of the experiment and the run, that are rehearsals."""
    described = [experiment.model_dump(mode="json")] if experiment else []
    if run and run.experiment.is_file():
        described.append(read_yaml(run.experiment))
    return [one["data"]["sequence_length"] for one in described if one["rehearsal"]]
