"""Growth: the planner is a pure function; every branch of it in milliseconds."""

from pathlib import Path

import pytest
import yaml
from conftest import refused

from inheritune.cluster.grow import grow
from inheritune.cluster.planner import Action, StageResult, has_parity, plan_next_action, read_stages
from inheritune.cluster.status import status
from inheritune.config.experiment import load_experiment
from inheritune.config.run import Grow
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir
from inheritune.runs.changes import check_kind
from inheritune.runs.job import Job

GROW = Grow(by=2, max_layers=16, margin=0.01)


def stage(layers, mean, half=0.005):
    return StageResult(
        layers, {"mean": mean, "low": mean - half, "high": mean + half, "n": 400}, mean <= 0, 1.0e9
    )


def plan(stages, reference_done=True, data_ready=True, depths=(12, 14, 16)):
    return plan_next_action(list(depths), GROW, reference_done, data_ready, "reference", "grown", stages)


def test_depths_follow_the_paper():
    assert GROW.depths("0:12", 24) == [12, 14, 16]
    assert Grow(by=2, max_layers=18).depths(":18", 36) == [18]
    assert Grow(by=3, max_layers=8).depths("0:4", 8) == [4, 7, 8]
    with pytest.raises(UserError, match="between the first stage's 18 layers and the source's 36"):
        GROW.depths("0:18", 36)
    with pytest.raises(UserError, match="must inherit the first layers"):
        GROW.depths("12:24", 24)


def test_data_then_reference_then_stages():
    assert plan([], reference_done=False, data_ready=False) == Action("prepare")
    assert plan([], reference_done=False) == Action("train", run="reference")
    assert plan([]) == Action("train", run="grown", stage=1)
    assert plan([stage(12, 0.06)]) == Action("train", run="grown", stage=2)


def test_parity_stops_growth_by_the_upper_end_of_the_interval():
    assert has_parity(stage(12, 0.004).difference, 0.01)
    assert not has_parity(stage(12, 0.006).difference, 0.01)  # mean within the margin, interval not
    action = plan([stage(12, 0.06), stage(14, -0.02)])
    assert action.verb == "finish" and action.stage == 2
    assert action.verdict["parity"] and action.verdict["layers"] == 14


def test_last_stage_without_parity_chooses_the_best_and_says_so():
    action = plan([stage(12, 0.06), stage(14, 0.03), stage(16, 0.04)])
    assert action.verb == "finish" and action.stage == 2
    assert not action.verdict["parity"] and action.verdict["layers"] == 14


def test_both_rules_and_the_flops_of_all_stages_are_recorded():
    verdict = plan([stage(12, -0.001, half=0.02), stage(14, -0.02)]).verdict
    assert verdict["paper_rule_stage"] == 1 and verdict["stage"] == 2
    assert verdict["train_flops_of_all_stages"] == 2.0e9


# --- a run whose experiment has changed since ---------------------------------------------------------------


def write_run(folder: RunDir, job: Job, layers: int) -> None:
    """What a finished run, or stage, leaves for those that ask what it was."""
    folder.path.mkdir(parents=True)
    folder.experiment.write_text(yaml.safe_dump(job.resolved(job.settings), sort_keys=False))
    gap = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 16}
    results = {"run": job.name, "seed": job.seed, "stage": job.stage, "layers": layers, "parameters": 1000}
    results |= {"steps": 6, "tokens": 3840, "train_flops": 1.0, "difference": gap, "paper_rule": False}
    results["validation"] = {"mean": 5.0, "low": 4.9, "high": 5.1, "n": 16}
    write_json(folder.results, results)
    write_json(folder.done, {"final": {}})


@pytest.fixture
def grown(small) -> tuple[str, RunDir]:
    """(experiment, folder of its grown run, which is finished with stages of 2 and 3 layers)."""
    experiment = load_experiment(small)
    folder = RunDir.of(experiment, "grown")
    write_run(RunDir.of(experiment, "reference"), Job(experiment, "reference"), 4)
    for number, layers in ((1, 2), (2, 3)):
        write_run(folder.stage(number), Job(experiment, "grown", stage=number), layers)
    grow(small, "grown")
    assert read_json(folder.done)["layers"] in (2, 3)
    return small, folder


def change(path: str, section: str, **values) -> None:
    """Change the grown run's section, or one of the experiment; None removes a key."""
    raw = yaml.safe_load(Path(path).read_text())
    found = raw["runs"]["grown"] if section == "grown" else raw[section]
    for key, value in values.items():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
        if value is None:
            del found[key]
    Path(path).write_text(yaml.safe_dump(raw, sort_keys=False))


def test_a_stage_of_another_depth_is_not_taken_for_a_planned_one(grown, capsys):
    """The verdict once said 'max_layers: 4, layers: 3', and status showed 4 layers."""
    path, folder = grown
    change(path, "grown", grow={"by": 2, "max_layers": 4})
    verdict = read_json(folder.done)
    folder.done.unlink()
    with pytest.raises(UserError, match="was trained with run.grow.by = 1, now it is 2; go back to it"):
        grow(path, "grown")
    with pytest.raises(UserError, match=r"stage 2 of .* has 3 layers, .* have \[2, 4\] \(run.grow.by, run"):
        read_stages(folder, [2, 4])
    assert not folder.is_done()
    write_json(folder.done, {**verdict, "stage": 2, "layers": 3})
    status(path)
    assert (
        "chose stage 2 of 3 layers, the stages of the experiment now have [2, 4]" in capsys.readouterr().out
    )


@pytest.mark.parametrize("part", ["layers", "parity", "margin", "difference", "difference.high"])
def test_a_verdict_without_a_part_of_it_is_damaged(grown, part):
    """It once ended in a KeyError."""
    path, folder = grown
    verdict = read_json(folder.done)
    outer, _, inner = part.partition(".")
    del (verdict[outer] if inner else verdict)[inner or outer]
    write_json(folder.done, verdict)
    with pytest.raises(UserError, match=rf"DONE lacks '{part}': it is damaged; restore it"):
        grow(path, "grown")


def test_a_finished_growth_names_each_changed_setting(grown, capsys):
    path, folder = grown
    change(path, "grown", grow={"margin": 0.5})
    capsys.readouterr()
    grow(path, "grown")
    said = capsys.readouterr().out
    assert "grown with margin" in said and f"to continue with that, delete {folder.done}" in said
    change(path, "train", lr=5e-4)
    change(path, "grown", init={"inherit": {"source": "reference", "layers": "0:1"}})
    grow(path, "grown")
    said = capsys.readouterr().out
    assert "note: this run was grown with train.lr = 0.001, the experiment now has 0.0005" in said
    assert "run.init.inherit.layers = 0:2, the experiment now has 0:1" in said and "delete" not in said


def test_training_does_not_take_a_grown_run_for_its_own(grown, capsys):
    """It once said that this run was finished, and named a final/ that did not exist."""
    path, folder = grown
    change(path, "grown", grow=None)
    with pytest.raises(UserError, match="grown holds a grown run, and the experiment has no 'grow' section"):
        check_kind(folder, is_grown=False)
    said = refused("train", path, "--run", "grown")
    assert "holds a grown run, and the experiment has no 'grow' section for it" in said
    status(path)
    assert "holds a grown run" in capsys.readouterr().out


def test_growth_does_not_take_a_run_without_stages_for_its_own(small, capsys):
    """It once ended with a KeyError, and status called the sound DONE damaged."""
    experiment = load_experiment(small)
    folder = RunDir.of(experiment, "grown")
    write_run(folder, Job(experiment, "grown"), 2)
    with pytest.raises(UserError, match="holds a run that was trained without a 'grow' section"):
        grow(small, "grown")
    status(small)
    said = capsys.readouterr().out
    assert "holds a run that was trained without a 'grow' section" in said and "damaged" not in said
