"""The run folder: the name of every file in it, and the checks of a finished run.

    runs/<experiment>/seed<k>/<run>/     (a grown run holds stage1/, stage2/ ... with the same layout)
        experiment.yaml  provenance.json  metrics.jsonl  train.log  attention.jsonl  results.json  *.png
        validation/  init/  checkpoints/step_00001000/{..., COMPLETE}  at_00010000/  final/  DONE
        STOP             made by the user: the run saves and exits
        STOPPED          the last start saved and exited before the run was finished
        bad_batch.json   the last consecutive steps whose loss or gradient was not finite, for a replay

A folder without its marker (COMPLETE, DONE, manifest.json) does not exist for a reader. Markers are written
last and hold the size and xxh3-128 hash of every file that they cover (markers.py). JSON files of this
package hold a hash of themselves (json_files.py).
"""

import json
import platform
import re
from pathlib import Path
from typing import Any

import xxhash

from inheritune.config import names
from inheritune.config.experiment import Experiment
from inheritune.errors import UserError
from inheritune.files.advice import check_unchanged, describe_other_origin, format_seed_flag, name_experiment
from inheritune.files.json_files import compute_seal, read_json, read_jsonl
from inheritune.files.markers import COMPLETE, DONE, check_files, read_marked_files
from inheritune.files.result_values import check_results
from inheritune.files.storage import find_root, list_names

WINDOW_LOSSES = "window_losses"
"""Key of the results.json of a third-party model that holds its loss in each validation window. Those of a
run are in validation/."""


def get_data_dir(experiment: Experiment) -> Path:
    """Return the folder of the experiment's token shards.

    All experiments with the same data section share it."""
    key = json.dumps(experiment.data.preparation(), sort_keys=True)
    if experiment.data.takes_from("embedded"):
        key += f"python {platform.python_version()}"  # the corpus is this Python's standard library
    return find_root() / "data" / f"{experiment.data.name}-{xxhash.xxh3_128_hexdigest(key.encode())[:12]}"


def get_runs_dir(is_rehearsal: bool, root: Path | None = None) -> Path:
    """Return the folder of all runs, or of all rehearsals, under `root` (by default $INHERITUNE_ROOT)."""
    return (root or find_root()) / "runs" / (names.REHEARSAL if is_rehearsal else "")


def get_seed_dir(experiment: str, seed: int, is_rehearsal: bool, root: Path | None = None) -> Path:
    """Return the folder of the runs of the experiment of that name with that seed, as `get_runs_dir` does."""
    return get_runs_dir(is_rehearsal, root) / experiment / f"seed{seed}"


class RunDir:
    """The paths of one run's files. Creates no file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def of(cls, experiment: Experiment, run: str, seed: int = 0) -> "RunDir":
        """Return the folder of `run`; that of a rehearsal is under runs/rehearsal/."""
        return cls(get_seed_dir(experiment.name, seed, experiment.rehearsal) / run)

    def stage(self, number: int) -> "RunDir":
        """Return the folder of stage `number` (from 1) of a grown run."""
        return RunDir(self.path / f"stage{number}")

    def seed_checkpoint(self, layers: int) -> Path:
        """Return the random start of all runs of this experiment and seed with `layers` blocks."""
        return self.path.parent / names.RANDOM_INIT.format(layers)

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def discarded_metrics(self) -> Path:
        return self.path / "metrics.discarded.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def init(self) -> Path:
        return self.path / "init"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def validation(self) -> Path:
        return self.path / "validation"

    @property
    def attention(self) -> Path:
        return self.path / "attention.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def done(self) -> Path:
        return self.path / DONE

    @property
    def stop(self) -> Path:
        return self.path / "STOP"

    @property
    def stopped(self) -> Path:
        return self.path / "STOPPED"

    @property
    def bad_batch(self) -> Path:
        return self.path / "bad_batch.json"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.checkpoints / f"step_{step:08d}"

    def kept(self, step: int) -> Path:
        """Return the folder of the weights kept at `step` (`keep_at`)."""
        return self.path / f"at_{step:08d}"

    def kept_steps(self) -> list[int]:
        """Return the steps whose weights are kept here, in order."""
        found = (re.fullmatch("at_([0-9]{8,})", name) for name in list_names(self.path))
        return sorted(int(match[1]) for match in found if match and (self.path / match[0]).is_dir())

    def losses(self, step: int) -> Path:
        """Return the file of per-window validation losses (nats per token, float64) at `step`."""
        return self.validation / f"step_{step}.npy"

    def stages(self) -> list[int]:
        """Return the numbers of the stages that have a folder here, in order."""
        found = (re.fullmatch("stage([1-9][0-9]*)", name) for name in list_names(self.path))
        return sorted(int(match[1]) for match in found if match and (self.path / match[0]).is_dir())

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of the folders in checkpoints/ with a checkpoint's name, oldest first.

        The folders may be incomplete. Other names (step_00000004.bak, .DS_Store) are ignored."""
        found = {
            int(match[1])
            for name in list_names(self.checkpoints)
            if (match := re.fullmatch("step_([0-9]{8,})", name))
        }
        return sorted(step for step in found if self.checkpoint(step).is_dir())

    def marked_checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints that have a marker, oldest first."""
        return [step for step in self.checkpoint_steps() if (self.checkpoint(step) / COMPLETE).is_file()]

    def complete_checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints whose marker names the same step, oldest first."""
        return [step for step in self.marked_checkpoints() if self.named_step(step) == step]

    def named_step(self, step: int) -> int:
        """Return the step that the marker of checkpoint `step` names.

        It is another one if the folder is a copy under a wrong name. A marker that cannot be read gives
        `step`: the damage is found when the files are compared."""
        try:
            marker = read_json(self.checkpoint(step) / COMPLETE)
        except UserError:
            return step
        named = marker.get("step") if isinstance(marker, dict) else None
        return named if type(named) is int else step

    def check_checkpoint(self, step: int) -> None:
        """Raises UserError unless the files of checkpoint `step` match its marker and the marker names it."""
        folder = self.checkpoint(step)
        files = read_marked_files(folder / COMPLETE)
        if (named := self.named_step(step)) != step:
            raise UserError(
                f"{folder} is a copy of the checkpoint of step {named} under a wrong name; rename or "
                f"delete it"
            )
        check_files(folder, files)

    def is_done(self) -> bool:
        """Return whether the run is finished."""
        return self.done.is_file()

    def is_evaluated(self) -> bool:
        """Return whether the losses of a third-party model, which no run here trains, were measured."""
        found = read_json(self.results) if self.results.is_file() else None
        return isinstance(found, dict) and WINDOW_LOSSES in found

    def chosen(self) -> "RunDir":
        """Return this finished run; for a grown run, the stage that its DONE names.

        Raises UserError if that stage has other weights than DONE names."""
        done = read_json(self.done)
        if "stage" not in done:
            return self
        stage = self.stage(done["stage"])
        if done.get("weights") and done["weights"] != stage.weights_hash():
            raise UserError(
                f"{self.done} does not name the weights that {stage.done} does: one of the two was replaced"
            )
        return stage

    def weights(self) -> Path:
        """Return final/ of this finished run; for a grown run, that of the chosen stage."""
        return self.chosen().final

    def weights_hash(self) -> str:
        """Return a hash of the finished weights, as DONE records them."""
        return compute_seal(read_json(self.done).get("final"))

    def identify_weights(self) -> str | None:
        """Return what tells the weights of a finished run, or of an evaluated third-party model, from others;
        None if it is neither."""
        if self.is_done():
            return self.chosen().weights_hash()
        return read_json(self.results).get("weights") if self.is_evaluated() else None

    def _check_measured(self, facts: dict, file: Path) -> None:
        """Raises UserError if `facts`, from `file`, were measured on other weights than DONE names."""
        run = find_measured_run(self)
        if "weights" in facts and run and facts["weights"] != run.weights_hash():
            raise UserError(
                f"{file} was measured on other weights than those of {run.final}: they were replaced, or "
                f"the file is older"
            )

    def read_results(self, to_renew: bool = False) -> dict:
        """Return the content of results.json.

        Raises UserError if the file, or the record behind its numbers, is not as the finished run left it.
        Raises it too if the reference has been trained anew since the comparison, unless `to_renew`."""
        results = read_json(self.results)
        check_results(results, self.results, is_run=self.is_done() and not to_renew)
        self._check_measured(results, self.results)
        if not to_renew:
            self._check_compared(results)
            check_unchanged(results, self.results)
        check_files(self.path, results.get("record", {}) if self.is_done() else {})
        return results

    def _check_compared(self, results: dict) -> None:
        """Raises UserError if the run that `results` are compared with has been trained anew since."""
        name, stage = results.get("compared_with"), results.get("stage")
        seed_folder = self.path.parent.parent if stage else self.path.parent
        if not name or "compared_weights" not in results:
            return
        if RunDir(seed_folder / name).identify_weights() not in (None, results["compared_weights"]):
            run = f"{results['run']}/stage{stage}" if stage else results["run"]
            starts = self.read_starts() if self.provenance.is_file() else [{}]
            if name in (starts[0].get("start_weights") or {}):
                raise UserError(describe_other_origin(self.path.parent if stage else self.path, name))
            raise UserError(
                f"{self.results} compares with weights of run '{name}', which has been made anew since; "
                f"compare again: python -m inheritune evaluate {name_experiment(results)} "
                f"--run {run}{format_seed_flag(results['seed'])}"
            )

    def read_starts(self, *keys: str) -> list[dict]:
        """Return the starts in provenance.json, at least one, each with `keys`.

        Raises UserError if the file is missing or damaged."""
        found = read_json(self.provenance)
        starts = found.get("starts") if isinstance(found, dict) else None
        if isinstance(starts, list) and starts and all(_has_keys(start, keys) for start in starts):
            return starts
        raise UserError(
            f"{self.provenance} does not list the starts of its run: it is damaged; restore it, or delete it"
        )

    def read_attention(self, to_renew: bool = False) -> list[dict]:
        """Return the rows of attention.jsonl.

        Raises UserError if they are not as written, or were measured on other weights. Of weights that no
        run here trained, only unless `to_renew`."""
        rows = read_jsonl(self.attention)
        if not rows and self.attention.is_file():
            raise UserError(f"{self.attention} is empty; analyze the model again")
        self._check_measured(rows[0] if rows else {}, self.attention)
        if rows and not to_renew and "weights" not in rows[0]:
            check_unchanged(rows[0], self.attention)
        return rows


def is_finished(experiment: Experiment, name: str, seed: int) -> bool:
    """Return whether run `name` is trained to its end or, if it is a third-party model, evaluated."""
    folder = RunDir.of(experiment, name, seed)
    return folder.is_evaluated() if experiment.run(name).init.external else folder.is_done()


def find_measured_run(folder: RunDir) -> RunDir | None:
    """Return the finished run that measurements in `folder` are of: the folder itself, or the run that
    has it as on_<data>. None of other folders."""
    run = RunDir(folder.path.parent) if folder.path.name.startswith("on_") else folder
    return run if run.is_done() else None


def _has_keys(start: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(start, dict) and all(key in start for key in keys)


def parse_weights_name(name: str) -> tuple[str, str | None, str | None]:
    """Return (run, stage, step) of "RUN", "RUN/stage2", "RUN@10000" or "RUN/stage2@10000".

    A part that is not given is None."""
    match = re.fullmatch(r"(.*?)(?:/stage(\d+))?(?:@(\d+))?", name, re.DOTALL)
    assert match, "every text matches"
    return match[1], match[2], match[3]


def find_weights(experiment: Experiment, name: str, seed: int = 0) -> Path | None:
    """Return the weights called `name`, or None if the run or stage is not finished.

    A name is RUN, RUN/stage2, or RUN@10000 for weights kept at that step. RUN alone means, for a grown run,
    the stage that its DONE names. Raises UserError for an unknown run."""
    _, folder, step = _locate_weights(experiment, name, seed)
    if not folder.is_done():
        return None
    return folder.weights() if step is None else RunDir(folder.weights().parent).kept(step)


def _locate_weights(experiment: Experiment, name: str, seed: int) -> tuple[RunDir, RunDir, int | None]:
    """Return (folder of the run, that of the stage if `name` has one, the step or None)."""
    run, stage, step = parse_weights_name(name)
    experiment.run(run)
    root = RunDir.of(experiment, run, seed)
    return root, root.stage(int(stage)) if stage else root, int(step) if step else None


def check_has_parts(experiment: Experiment, name: str) -> None:
    """Raise UserError if `name` is a stage or step of a third-party model."""
    run, *parts = parse_weights_name(name)
    if any(parts) and experiment.run(run).init.external:
        raise UserError(
            f"'{name}': run '{run}' of {experiment.name} is a third-party model, which has no stages and no "
            f"kept steps; give '{run}'"
        )


def require_weights(experiment: Experiment, name: str, seed: int = 0) -> Path:
    """Return the weights called `name`, as `find_weights` does.

    Raises UserError, with the command to run first, if the run or stage is not finished, and for a stage or
    step that a finished run does not have."""
    root, folder, step = _locate_weights(experiment, name, seed)
    run, where = root.path.name, f"of {experiment.name} (seed {seed})"
    if (weights := find_weights(experiment, name, seed)) is None:
        if root.is_done():
            stages = ", ".join(map(str, root.stages())) or "none"
            part = folder.path.name.replace("stage", "stage ")
            raise UserError(f"run '{run}' {where} is finished and has no {part}; its stages are {stages}")
        command = f"{'grow' if experiment.run(run).grow else 'train'} {experiment.given} --run {run}"
        command += format_seed_flag(seed)
        raise UserError(f"run '{name}' {where} is not finished; first: python -m inheritune {command}")
    if step is not None and not weights.is_dir():
        kept = ", ".join(map(str, RunDir(weights.parent).kept_steps())) or "none"
        raise UserError(
            f"run '{run}' {where} has no weights of step {step}; the steps it kept, by keep_at while it "
            f"trained, are: {kept}"
        )
    return weights


def get_results_dir(weights: Path) -> RunDir:
    """Return the folder that holds the results of final/ or of kept weights."""
    return RunDir(weights.parent if weights.name == "final" else weights)


def get_analysis_dir(model: str, is_rehearsal: bool = False) -> RunDir:
    """Return the folder for the attention of a model that is not the result of a run: runs/analysis/<name>.

    A local folder is named by its last two parts, since at_00010000 alone would not say whose it is; a Hub id
    by both of its own."""
    path = Path(model).resolve() if Path(model).exists() else Path(model)
    name = "--".join(path.parts[-2:])
    return RunDir(get_runs_dir(is_rehearsal) / names.ANALYSIS / name)
