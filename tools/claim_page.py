"""Writes the tables of docs/claim.md from recipes/claim: python tools/claim_page.py

A test fails when they are stale."""

import sys
from pathlib import Path

sys.path.extend(
    str(Path(__file__).resolve().parents[1] / place) for place in ("", "tests/support", "recipes/claim")
)
import design
import rule
from written import filled, markdown

from inheritune.config.experiment import load_experiment
from inheritune.config.paths import REPOSITORY
from inheritune.planning.plan import plan_experiment

FILE = REPOSITORY / "docs" / "claim.md"


def make_runs() -> str:
    """Return the table of the four runs of a seed."""
    experiment = load_experiment(design.NAME, rehearse=False)
    labels = {row.run: row.label for row in experiment.paper}
    rows = [
        [
            f"`{facts['run']}`",
            labels[facts["run"]],
            f"{facts['steps']:,}",
            f"{facts['tokens'] / 1e9:.1f}",
            f"{facts['gpu_hours']:.1f}",
        ]
        for facts in plan_experiment(experiment, gpus=1)
    ]
    return markdown(["run", "what", "steps", "B tokens", "H100-hours"], rows)


def make_outcomes() -> str:
    """Return the table of what each outcome means; "-" for a comparison that is not asked."""
    n = len(rule.COMPARISONS)
    rows = [[*verdicts, *["-"] * (n - len(verdicts)), meaning] for verdicts, meaning in rule.OUTCOMES.items()]
    return markdown([*(one.name for one in rule.COMPARISONS), "what it means"], rows)


def document() -> str:
    """Return docs/claim.md with current tables."""
    seeds, text = design.choose_seeds(), FILE.read_text(encoding="utf-8")
    asks = [[one.name, f"Inheritune - {one.other}", one.asks, f"{one.limit:g}"] for one in rule.COMPARISONS]
    made = {
        "runs": make_runs(),
        "rule": markdown(["comparison", "difference", "what it asks", "limit"], asks),
        "outcomes": make_outcomes(),
        "seeds": markdown(design.POWER_HEADS, design.make_power_rows(seeds)),
        "sizes": markdown(design.SIZE_HEADS, design.make_size_rows(seeds)),
        "hours": markdown(design.HOUR_HEADS, design.make_hour_rows(seeds, {})),
    }
    for part, table in made.items():
        text = filled(text, f"tools/claim_page.py, {part}", table)
    return text


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
