"""Growth: the planner is a pure function; every branch of it in milliseconds."""

import pytest

from inheritune.cluster.planner import Action, StageResult, has_parity, plan_next_action
from inheritune.config.run import Grow
from inheritune.errors import UserError

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
