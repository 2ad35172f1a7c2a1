"""What a grown run needs next (paper, Algorithm 1): pure functions of what is finished on disk.

Nothing here starts a process or imports torch, so the growth logic is tested in milliseconds.
"""

from dataclasses import dataclass

from inheritune.config.experiment import Experiment
from inheritune.config.run import Grow, Run
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.rundir import RunDir


@dataclass(frozen=True)
class StageResult:
    """What a finished stage left: its depth and the paired difference to the reference, in nats."""

    layers: int
    difference: dict
    paper_rule: bool
    train_flops: float
    weights: str | None = None
    """Hash that identifies its weights."""


VERDICT_PARTS = ("layers", "parity", "margin", "difference")
"""What of a verdict is shown; see `_make_verdict` for all of it."""


@dataclass(frozen=True)
class Action:
    """What comes next: `prepare`, `evaluate` (a third-party reference), `train` (a run, or a stage of the
    grown run) or `finish`."""

    verb: str
    run: str = ""
    stage: int | None = None
    verdict: dict | None = None

    def title(self) -> str:
        return f"{self.verb} {self.run}".strip() + (f" stage {self.stage}" if self.stage else "")


def has_parity(difference: dict, margin: float) -> bool:
    """Return whether a stage meets the stop rule: the upper end of the 95% interval of (ours - reference) is
    at or below `margin` nats."""
    return difference["high"] <= margin


def plan_next_action(
    depths: list[int],
    grow: Grow,
    reference_done: bool,
    data_ready: bool,
    reference: str,
    run: str,
    stages: list[StageResult],
    is_external: bool = False,
) -> Action:
    """Return what to do next, given what is finished (pure). `is_external`: the reference is a third-party
    model, which is only evaluated.

    The stop rule is applied to each stage once, after its full schedule."""
    if not data_ready:
        return Action("prepare")
    if not reference_done:
        return Action("evaluate" if is_external else "train", run=reference)
    reached = bool(stages) and has_parity(stages[-1].difference, grow.margin)
    if reached:
        return Action("finish", run=run, stage=len(stages), verdict=_make_verdict(stages, len(stages), grow))
    if stages and len(stages) == len(depths):
        # without parity the chosen stage is the best one, which need not be the deepest
        best = min(range(len(stages)), key=lambda i: stages[i].difference["mean"]) + 1
        return Action("finish", run=run, stage=best, verdict=_make_verdict(stages, best, grow))
    return Action("train", run=run, stage=len(stages) + 1)


def _make_verdict(stages: list[StageResult], best: int, grow: Grow) -> dict:
    """Return the content of the grown run's DONE: stage number `best` was chosen."""
    by_paper = next((i + 1 for i, stage in enumerate(stages) if stage.paper_rule), None)
    return {
        "stage": best,
        "layers": stages[best - 1].layers,
        "weights": stages[best - 1].weights,
        "parity": has_parity(stages[-1].difference, grow.margin),
        "margin": grow.margin,
        "max_layers": grow.max_layers,
        "difference": stages[best - 1].difference,
        "paper_rule_stage": by_paper,
        "train_flops_of_all_stages": sum(stage.train_flops for stage in stages),
        "note": "the interval covers the choice of validation windows, not of seeds: one seed can stop by "
        "luck",
    }


def read_stages(folder: RunDir, depths: list[int]) -> list[StageResult]:
    """Return the results of the finished stages, in order, up to the first unfinished one. `depths` are the
    planned layers of each.

    Raises UserError for a stage of another depth, or without a comparison."""
    found = []
    for number, depth in enumerate(depths, start=1):
        stage = folder.stage(number)
        if not stage.is_done():
            break
        results = stage.read_results()
        if "difference" not in results:
            raise UserError(
                f"{stage.results} holds no difference to the reference; run evaluate, or train the stage "
                f"again"
            )
        if results["layers"] != depth:
            raise UserError(
                f"stage {number} of {folder.path} has {results['layers']} layers, the stages of the "
                f"experiment now have {depths} (run.grow.by, run.grow.max_layers); go back to the values "
                f"that it was grown with, or grow a run of another name"
            )
        found.append(
            StageResult(
                layers=results["layers"],
                difference=results["difference"],
                paper_rule=results["paper_rule"],
                train_flops=results["train_flops"],
                weights=results.get("weights"),
            )
        )
    return found


def read_verdict(folder: RunDir, n_stages: int) -> dict:
    """Return the content of the DONE of a grown run. Raises UserError if it names none of the stages or lacks
    a part of the verdict."""
    done = read_json(folder.done)
    stage = done.get("stage") if isinstance(done, dict) else None
    if type(stage) is not int or not 1 <= stage <= max([n_stages, *folder.stages()]):
        lack = "names no stage of the run"
    elif missing := [part for part in VERDICT_PARTS if part not in done] or _list_missing_numbers(done):
        lack = f"lacks '{missing[0]}'"
    else:
        return done
    raise UserError(f"{folder.done} {lack}: it is damaged; restore it, or delete it and grow again")


def _list_missing_numbers(done: dict) -> list[str]:
    """Return the parts of the difference to the reference that are no numbers."""
    gap = done["difference"] if isinstance(done["difference"], dict) else {}
    parts = ("mean", "low", "high", "n")
    return [f"difference.{part}" for part in parts if not isinstance(gap.get(part), int | float)]


def find_unfinished_source(experiment: Experiment, spec: Run, seed: int) -> str | None:
    """Return the name of an unfinished run of this experiment that `spec` starts from or learns from, or
    None."""
    needed = (source for source, _ in spec.sources() if source in experiment.runs)
    return next((source for source in needed if not RunDir.of(experiment, source, seed).is_done()), None)
