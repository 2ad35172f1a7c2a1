"""Claim rows: the difference of Inheritune's model to the full one, judged by one rule for the paper's
numbers and for this repository's, from made-up run folders in their real form."""

import pytest
from test_tables import finish, rows_of, score

from inheritune.errors import UserError
from inheritune.paper import tables
from inheritune.paper.claims import Gap
from inheritune.paper.items import load_item

MEDIUM = "claim: Medium, 16 layers, Inheritune, round 3"
SIX = ("reference", "random_16", "random_16_200k")
"""The runs of Table 5's Medium rows that do not grow."""


def show(name: str, capsys) -> dict[str, list[str]]:
    """Return {label: cells} of the printed table."""
    tables.table(name)
    lines = [line.strip("| \n") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def medium(reference: float, ours: float, **more) -> None:
    """Every Medium run of Table 5: the full model at `reference`, everything else at `ours`."""
    for run in SIX:
        finish("gpt2_medium_owt", run, reference if run == "reference" else ours)
    for stage in (1, 2, 3):
        finish("gpt2_medium_owt", "inheritune", ours, stage=stage, **more)


def grown(loss: float, rehearse=False) -> None:
    """The three stages of Medium's growth."""
    for stage in (1, 2, 3):
        finish("gpt2_medium_owt", "inheritune", loss, stage=stage, rehearse=rehearse)


def paired(mean: float, half: float, to: str = "reference") -> dict:
    """What `compare_with_reference` leaves in results.json."""
    return {
        "compared_with": to,
        "difference": {"mean": mean, "low": mean - half, "high": mean + half, "n": 400},
    }


def test_a_failed_claim_is_no_better_table(capsys):
    """Each of the six cells is better than the paper's, and the claim that they are there for fails."""
    medium(2.65, 2.70)
    shown = show("table5", capsys)
    assert all("better" in cells[0] for label, cells in shown.items() if label.startswith("Medium"))
    assert shown[MEDIUM][0].endswith("/ with 4 layers above the full model: +0.0500±0.0072, fails")
    record = rows_of("table5")[MEDIUM, "validation loss"]
    assert (record["state"], record["paper_state"]) == ("fails", "not decided")
    assert float(record["ours"]) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("ours", "more", "said"),
    [
        (2.60, {}, "below the full model: -0.0500±0.0072, holds"),
        (2.65, {}, "within the noise of the full model: +0.0000±0.0072, not decided"),
        (2.66, paired(0.002, 0.004), "within the margin of the full model: +0.0020±0.0020, holds"),
        (2.66, paired(0.012, 0.004), "above the full model: +0.0120±0.0020, not decided"),
        (2.66, paired(0.020, 0.004), "above the full model: +0.0200±0.0020, fails"),
        # compared with another run: not a difference to the full model
        (2.70, paired(-1.0, 0.004, "random_16"), "above the full model: +0.0500±0.0072, fails"),
    ],
)
def test_better_level_and_worse(ours, more, said, capsys):
    medium(2.65, ours, **more)
    assert show("table5", capsys)[MEDIUM][0].endswith(f"/ with 4 layers {said}")


def test_the_papers_own_difference_by_the_same_rule(capsys):
    """The last values of its logs, and the means of their last ten evaluations."""
    shown = show("table5", capsys)
    assert shown[MEDIUM][:2] == [
        "within the noise of the full model: -0.0079±0.0146, not decided / not run",
        "last ten: within the noise of the full model: +0.0032±0.0046, not decided",
    ]
    large, xlarge = (shown[f"claim: {label} layers, Inheritune"] for label in ("Large, 18", "XLarge, 24"))
    assert large[0].startswith("within the noise of the full model: -0.0441±0.0312, not decided")
    assert large[1] == "last ten: within the margin of the full model: -0.0123±0.0099, holds"
    assert xlarge[1] == "last ten: below the full model: -0.0279±0.0075, holds"
    fineweb = show("table1", capsys)["claim: Medium, 16 layers, Inheritune"]
    assert "last ten: above the full model: +0.0723±0.0219, fails" in fineweb
    assert fineweb[4] == "above the full model: +2.72±0.81, holds / not run"  # LAMBADA


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table5", "table7", "owt_perplexity"])
def test_each_table_of_the_claim_has_its_row(name, capsys):
    shown = show(name, capsys)
    claimed = [row.label for row in load_item(name).rows if row.claim]
    assert claimed and [label for label in shown if label.startswith("claim: ")] == [
        f"claim: {label}" for label in claimed
    ]


def test_a_table_without_the_full_model_compares_with_it_all_the_same(capsys):
    """Tables 2 and 3 have no row of the full model."""
    grown(2.70)
    row = "claim: Inheritune: all three"
    assert show("table3", capsys)[row][0].endswith("/ the full model is not run")
    finish("gpt2_medium_owt", "reference", 2.65)
    assert show("table3", capsys)[row][0].endswith("above the full model: +0.0500±0.0072, fails")


def test_scores_without_a_noise_have_no_verdict(capsys):
    for run, stage, wikitext, lambada in (("reference", None, 25.0, 0.40), ("inheritune", 1, 24.0, 0.30)):
        tasks = {
            "wikitext": score(wikitext, None, "word_perplexity"),
            "lambada_openai": score(lambada, 0.01),
        }
        finish("gpt2_xl_owt", run, 2.65, stage=stage, tasks=tasks)
    shown = show("table7", capsys)
    cells = shown["claim: 24 layers, Inheritune"]
    assert cells[8] == "+0.06, noise unknown / with 4 layers -1.00, noise unknown"
    assert cells[4].endswith("/ with 4 layers below the full model: -10.00±1.41, fails")
    assert cells[7].startswith("above the full model: +1.58±0.55, holds / not run")
    assert shown["48 layers, random start"][8] == "25.46 / 25.00: -0.46 noise unknown"


def test_models_of_different_data_are_not_compared(capsys):
    grown(2.70)
    finish("gpt2_medium_owt", "reference", 2.65, data_fingerprint="other")
    with pytest.raises(UserError, match="the claim 'Inheritune: all three' mixes what does not compare"):
        tables.table("table3")


def test_a_rehearsal_is_marked(capsys):
    finish("gpt2_medium_owt", "reference", 2.65, rehearse=True)
    grown(2.70, rehearse=True)
    tables.table("table5", rehearse=True)
    assert "REHEARSAL (with 4 layers above the full model: +0.0500" in capsys.readouterr().out


def test_the_rule():
    assert Gap(-3.0, 1.0).judge(0.0, higher_is_better=True) == "fails"
    assert Gap(3.0, 1.0).judge(0.0, higher_is_better=True) == "holds"
    assert Gap(0.0, 1.0).judge(0.0, higher_is_better=True) == "not decided"
    assert Gap(-3.0, None).judge(0.01, higher_is_better=False) == "noise unknown"
    assert Gap(0.01, 0.0).judge(0.01, higher_is_better=False) == "holds"  # the stop rule includes its margin
