"""The decision rule of recipes/claim.sh, fixed before any run: three comparisons, and what they mean.

Each comparison is the final validation loss of Inheritune less that of a control, paired by seed. Its 95%
interval is Student's t over seeds. They are asked in this order, and the next counts only if the one before
holds: so in at most 2.5% of all repetitions one of them is found to hold that does not.
"""

from dataclasses import dataclass

from evidence_rows import FAILS, HOLDS, UNDECIDED, judge_interval

MARGIN = 0.01
"""Nats within which Inheritune is level: the stop rule of growth (docs/paper.md)."""


@dataclass(frozen=True)
class Comparison:
    """Inheritune against the control `other`; it holds below `limit` nats."""

    name: str
    other: str
    limit: float
    asks: str

    def judge(self, low: float | None, high: float | None) -> str:
        """Return the verdict on a difference with the 95% interval from `low` to `high` (None: one seed)."""
        return judge_interval(low, high, self.limit)


COMPARISONS = (
    Comparison("parity", "reference", MARGIN, "Is the half as good as the whole?"),
    Comparison(
        "worth", "random_longer", 0.0, "Is it better than the same FLOPs spent on the half from random?"
    ),
    Comparison("cut", "reference_longer", MARGIN, "Is it as good as the whole after as many steps more?"),
)
"""In the order in which they are asked."""

LAZY_SHARE = 0.25
"""The outcome is about lazy layers if at least this share of the reference's layers is near rank 1."""

OUTCOMES = {
    (
        FAILS,
    ): "The claim fails at this size: half the layers, inherited and trained again, end above the whole.",
    (
        UNDECIDED,
    ): "Not decided: the spread over seeds is too wide to say whether the half is level with the whole.",
    (
        HOLDS,
        FAILS,
    ): "The half is level with the whole, but a random start with the same FLOPs ends lower. Who has no "
    "trained reference needs none.",
    (
        HOLDS,
        UNDECIDED,
    ): "The half is level with the whole. Whether that takes a trained reference is not decided.",
    (
        HOLDS,
        HOLDS,
        FAILS,
    ): "The claim holds against the reference as it was trained, and inheriting beats a random start. "
    "But the whole gains more from the same further steps: the layers that were cut were not redundant.",
    (
        HOLDS,
        HOLDS,
        UNDECIDED,
    ): "The claim holds, and inheriting beats a random start. Whether the cut costs anything is not decided.",
    (
        HOLDS,
        HOLDS,
        HOLDS,
    ): "The claim holds in full: the half is level with the whole also after as many steps, and "
    "better than a random start with the same FLOPs. The layers that were cut were redundant.",
}
"""{verdicts on the comparisons, as far as they are asked: what they mean}."""
FEW_LAZY = (
    "That is fewer than a quarter in some seed, too few for a test of lazy layers: whatever the losses show, "
    "they show nothing about these."
)


def conclude(verdicts: list[str]) -> tuple[tuple[str, ...], str]:
    """Return (the verdicts that count, what they mean), given those on COMPARISONS in order."""
    asked = []
    for verdict in verdicts:
        asked.append(verdict)
        if verdict != HOLDS:
            break
    return tuple(asked), OUTCOMES[tuple(asked)]
